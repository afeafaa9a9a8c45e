"""Selections against loops over slots: masks, layouts, what is forced and what is forbidden."""

from __future__ import annotations

import pytest
import torch

from regard.contract.errors import OptionError, ShapeError
from regard.patterns import (
    BlockSelection,
    Causal,
    Documents,
    Full,
    PerHead,
    Permuted,
    Prefix,
    SlidingWindow,
    TokenSelection,
)
from tests.patterns.test_layout import check


def slots(batch, heads, rows, places, k, seed=0, p=0.7):
    """Distinct indices in random order, some slots empty."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(batch, heads, rows, places, generator=generator).argsort(-1)[..., :k]
    empty = torch.rand(order.shape, generator=generator) > p
    return order.masked_fill(empty, -1).int()


def by_hand(indices, n, m, block_q, block_k):
    batch, heads = indices.shape[:2]
    out = torch.zeros(batch, heads, n, m, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for i in range(n):
                for index in indices[b, h, i // block_q].tolist():
                    if index >= 0:
                        out[b, h, i, index * block_k : (index + 1) * block_k] = True
    return out


LIMITS = [
    (None, None), (None, Causal()), (SlidingWindow(3), Causal()), (Prefix(2), None),
    (PerHead([SlidingWindow(2), Causal()]), Causal() | Prefix(5)),
]  # fmt: skip


def limited(mask, force, within, q_offset):
    n, m = mask.shape[2:]
    if force is not None:
        mask = mask | force.dense(n, m, q_offset=q_offset)
    return mask if within is None else mask & within.dense(n, m, q_offset=q_offset)


@pytest.mark.parametrize("force, within", LIMITS)
@pytest.mark.parametrize("block_q, block_k", [(8, 8), (4, 2), (1, 8), (7, 5), (16, 16), (40, 3)])
@pytest.mark.parametrize("block", [(8, 8), (16, 4), (64, 64), (5, 70)])
def test_selected_blocks(force, within, block_q, block_k, block):
    n, m, q_offset = 37, 45, 8
    indices = slots(2, 2, -(-n // block_q), -(-m // block_k), 3)
    chosen = BlockSelection(block_q, block_k, indices, force=force, within=within)
    want = limited(by_hand(indices, n, m, block_q, block_k), force, within, q_offset)
    assert torch.equal(chosen.dense(n, m, q_offset=q_offset), want)
    check(chosen.to_layout(n, m, block=block, q_offset=q_offset), want)


@pytest.mark.parametrize("force, within", LIMITS)
@pytest.mark.parametrize("block", [(8, 8), (16, 4), (64, 64), (5, 70)])
def test_selected_tokens(force, within, block):
    n, m, q_offset = 37, 45, 8
    indices = slots(2, 2, n, m, 9)
    chosen = TokenSelection(indices, force=force, within=within)
    want = limited(by_hand(indices, n, m, 1, 1), force, within, q_offset)
    assert torch.equal(chosen.dense(n, m, q_offset=q_offset), want)
    check(chosen.to_layout(n, m, block=block, q_offset=q_offset), want)


def test_whole_blocks_need_no_bits():
    found = BlockSelection(16, 32, slots(1, 1, 4, 2, 1, p=1.0)).to_layout(64, 64, block=(8, 16))
    assert found.partial == 0 and found.visited == 4 * 2 * 2


def test_a_ragged_block_may_be_full():
    found = BlockSelection(7, 7, torch.tensor([[[[0, 1, 2], [2, 1, 0], [2, 0, 1]]]])).to_layout(20, 19, block=(8, 8))
    assert found.partial == 0 and found.visited == 9


def test_documents_limit_a_selection():
    doc = torch.tensor([[0] * 20 + [1] * 25, [0] * 45])
    indices = slots(2, 1, 45, 45, 20)
    chosen = TokenSelection(indices, within=(Causal() & Documents()).bind(doc=doc))
    want = by_hand(indices, 45, 45, 1, 1) & (Causal() & Documents()).bind(doc=doc).dense(45, 45)
    assert torch.equal(chosen.dense(45, 45), want)
    check(chosen.to_layout(45, 45, block=(8, 8)), want)


def test_a_selection_of_key_heads_serves_their_query_heads():
    indices = slots(2, 2, 5, 5, 2)
    chosen = BlockSelection(4, 4, indices, within=PerHead([Causal(), Full(), Causal(), Full()]))
    want = by_hand(indices, 20, 20, 4, 4).repeat_interleave(2, 1) & chosen.within.dense(20, 20)
    assert torch.equal(chosen.dense(20, 20, heads=4), want)
    check(chosen.to_layout(20, 20, block=(8, 8), heads=4), want)
    shared = BlockSelection(4, 4, indices[:, :1])
    assert shared.dense(20, 20, heads=4).shape == (2, 1, 20, 20)
    with pytest.raises(ShapeError, match="2 heads does not fit 5"):
        chosen.dense(20, 20, heads=5)


def test_tokens_and_blocks_of_one_are_the_same():
    indices = slots(1, 2, 30, 30, 7)
    a, b = TokenSelection(indices, within=Causal()), BlockSelection(1, 1, indices, within=Causal())
    assert torch.equal(a.dense(30, 30), b.dense(30, 30))
    assert torch.equal(a.to_layout(30, 30).dense(), b.to_layout(30, 30).dense())


def test_rows_that_nothing_selects_are_empty():
    indices = torch.full((1, 1, 6, 3), -1)
    indices[0, 0, 2, 1] = 4
    for chosen in (TokenSelection(indices), BlockSelection(1, 1, indices)):
        found = chosen.to_layout(6, 6, block=(4, 4))
        assert found.empty_rows()[0, 0].tolist() == [True, True, False, True, True, True]
    assert TokenSelection(torch.full((1, 1, 6, 3), -1)).to_layout(6, 6).visited == 0
    assert TokenSelection(torch.zeros(1, 1, 6, 0, dtype=torch.int32)).to_layout(6, 6).visited == 0


def test_a_router_may_select_too_much_but_nothing_leaks():
    everything = torch.arange(5).expand(1, 1, 5, 5)
    chosen = BlockSelection(8, 8, everything, within=Causal())
    assert torch.equal(chosen.to_layout(40, 40, block=(16, 16)).dense(), Causal().dense(40, 40))


def permuted_by_hand(chosen, n, m, rule):
    batch, heads, groups, _ = chosen.q_index.shape
    out = torch.zeros(batch, heads, n, m, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for g in range(groups):
                for i in chosen.q_index[b, h, g].tolist():
                    for j in chosen.k_index[b, h, g].tolist():
                        if i >= 0 and j >= 0 and rule(i, j):
                            out[b, h, i, j] = True
    return out


@pytest.mark.parametrize("block", [(8, 8), (16, 4), (64, 64)])
def test_groups(block):
    n, m = 20, 26
    chosen = Permuted(slots(2, 2, 4, n, 6), slots(2, 2, 4, m, 5, seed=1), Causal())
    want = permuted_by_hand(chosen, n, m, lambda i, j: j <= i)
    assert torch.equal(chosen.dense(n, m), want)
    check(chosen.to_layout(n, m, block=block), want)
    grouped = chosen.grouped()
    for b, h, g, x, y in grouped.nonzero().tolist():
        assert 0 <= chosen.k_index[b, h, g, y] <= chosen.q_index[b, h, g, x]
    pairs = (chosen.q_index >= 0)[..., None] & (chosen.k_index >= 0)[..., None, :]
    ordered = chosen.k_index[..., None, :] <= chosen.q_index[..., None]
    assert torch.equal(grouped, pairs & ordered)
    want = permuted_by_hand(chosen, n, m, lambda i, j: j <= i + 3)
    assert torch.equal(chosen.dense(n, m, q_offset=3), want)
    many = Permuted(chosen.q_index, chosen.k_index, Causal()).dense(n, m, heads=4)
    assert torch.equal(many, chosen.dense(n, m).repeat_interleave(2, 1))
    check(chosen.to_layout(n, m, block=block, heads=4), many)


def test_membership_counts_groups():
    chosen = Permuted(torch.tensor([[[[0, 1, 2], [2, 3, -1]]]]), torch.tensor([[[[0, 1], [2, 3]]]]), Full())
    assert chosen.memberships(5)[0, 0].tolist() == [1, 1, 2, 1, 0]
    chosen.check(5, 4)
    with pytest.raises(OptionError, match="one group at most"):
        Permuted(chosen.q_index, chosen.k_index, Full(), "disjoint").check(5, 4)
    apart = Permuted(torch.tensor([[[[0, 1], [2, 3]]]]), torch.tensor([[[[0, 1], [2, 3]]]]), Full(), "disjoint")
    assert apart.to_layout(4, 4, block=(2, 2)).visited == 2


@pytest.mark.parametrize("make", [
    lambda i: BlockSelection(4, 4, i).dense(12, 12), lambda i: BlockSelection(4, 4, i).to_layout(12, 12, block=(4, 4)),
    lambda i: BlockSelection(4, 4, i).to_layout(12, 12, block=(8, 64)), lambda i: BlockSelection(4, 4, i).check(12, 12),
    lambda i: TokenSelection(i).dense(3, 12), lambda i: TokenSelection(i).to_layout(3, 12, block=(2, 2)),
    lambda i: Permuted(i, i.new_zeros(1, 1, 3, 1), Full()).dense(12, 12),
])  # fmt: skip
def test_what_is_named_twice_is_refused(make):
    with pytest.raises(OptionError, match="twice"):
        make(torch.tensor([[[[0, 1, 2], [1, -1, -1], [2, 0, 2]]]]))


def test_nothing_carries_from_key_to_key():
    """Adding words would turn keys 0 and 0 into key 1, and hide that a key is named twice."""
    with pytest.raises(OptionError, match="twice"):
        TokenSelection(torch.tensor([[[[0, 0]]]])).to_layout(1, 8, block=(4, 4))
    with pytest.raises(OptionError, match="twice"):
        TokenSelection(torch.tensor([[[[63, 63]]]])).to_layout(1, 64)


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: TokenSelection(torch.zeros(1, 1, 3)), "4 axes"),
        (lambda: TokenSelection(torch.zeros(1, 1, 3, 2)), "must be integer"),
        (lambda: TokenSelection(torch.zeros(1, 1, 3, 2).int(), torch.zeros(1, 1, 3, 3)), "shape of indices"),
        (lambda: BlockSelection(4, 4, torch.zeros(1, 1, 3, 2).int(), torch.zeros(1, 1, 3)), "weights is"),
        (lambda: BlockSelection(4, 4, slots(1, 1, 3, 3, 1)).dense(13, 12), "3 rows of slots; 13 rows in blocks of 4"),
        (lambda: BlockSelection(4, 4, slots(1, 1, 3, 3, 1)).to_layout(13, 12), "3 rows of slots"),
        (lambda: TokenSelection(slots(1, 1, 3, 9, 9, p=1.0)).dense(3, 8), "-1 to 7"),
        (lambda: TokenSelection(slots(1, 1, 3, 9, 9, p=1.0)).to_layout(3, 8), "names 0 to 8"),
        (lambda: TokenSelection(slots(1, 1, 3, 3, 1) - 2).to_layout(3, 8), "names -"),
        (lambda: Permuted(slots(1, 1, 3, 3, 1), slots(1, 1, 2, 3, 1), Full()), "must agree"),
        (lambda: Permuted(slots(1, 1, 3, 9, 9, p=1.0), slots(1, 1, 3, 3, 1), Full()).dense(8, 8), "8 rows"),
    ],
)
def test_selections_of_the_wrong_shape_are_refused(make, text):
    with pytest.raises(ShapeError, match=text):
        make()


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: BlockSelection(0, 4, slots(1, 1, 3, 3, 1)), "at least 1 row"),
        (lambda: Permuted(slots(1, 1, 3, 3, 1), slots(1, 1, 3, 3, 1), Full(), "sum"), "not 'sum'"),
    ],
)
def test_bad_options_are_refused(make, text):
    with pytest.raises(OptionError, match=text):
        make()
