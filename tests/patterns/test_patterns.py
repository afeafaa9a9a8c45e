"""The atoms against their definition pair by pair, the algebra, the static properties, bound data."""

from __future__ import annotations

import math

import pytest
import torch

from regard import Causal, Documents, Explicit, Full, KeyValid, OptionError, Prefix, ShapeError, Sinks, SlidingWindow
from tests.oracles import coin

ATOMS = {
    "Full()": (Full(), lambda i, j: True),
    "Causal()": (Causal(), lambda i, j: j <= i),
    "Causal(strict=True)": (Causal(strict=True), lambda i, j: j < i),
    "SlidingWindow(1)": (SlidingWindow(1), lambda i, j: i == j),
    "SlidingWindow(3)": (SlidingWindow(3), lambda i, j: abs(i - j) < 3),
    "Sinks(2)": (Sinks(2), lambda i, j: j < 2 and j <= i),
    "Sinks(2, causal=False)": (Sinks(2, causal=False), lambda i, j: j < 2),
    "Prefix(3)": (Prefix(3), lambda i, j: j < 3),
    "Prefix(0)": (Prefix(0), lambda i, j: False),
    "and": (Causal() & SlidingWindow(3), lambda i, j: 0 <= i - j < 3),
    "or": (Causal() | Prefix(4), lambda i, j: j <= i or j < 4),
    "not": (~SlidingWindow(2), lambda i, j: abs(i - j) >= 2),
    "nested": (~(Causal() | Prefix(4)) | SlidingWindow(2), lambda i, j: not (j <= i or j < 4) or abs(i - j) < 2),
}
CAUSAL = [
    Causal(), Causal(strict=True), Sinks(2), Causal() & SlidingWindow(3), SlidingWindow(3) & Causal(),
    Causal() | Sinks(2), Causal() & SlidingWindow(2) | Sinks(2), Causal() & Prefix(3), Causal() & ~SlidingWindow(2),
]  # fmt: skip
NOT_CAUSAL = [
    Full(), SlidingWindow(3), Sinks(2, causal=False), Prefix(3), Causal() | Prefix(3), ~Causal(), ~~Causal(),
    SlidingWindow(2) | Causal(), Documents(), KeyValid(), Explicit(),
]  # fmt: skip


def pairs(rule, n, m, q_offset=0):
    return torch.tensor([[bool(rule(q_offset + r, j)) for j in range(m)] for r in range(n)]).view(1, 1, n, m)


@pytest.mark.parametrize("name", ATOMS)
@pytest.mark.parametrize("n, m, q_offset", [(6, 6, 0), (4, 9, 0), (9, 4, 0), (3, 9, 6), (1, 9, 8), (4, 5, 7)])
def test_the_dense_mask_is_the_rule_at_every_pair(name, n, m, q_offset):
    pattern, rule = ATOMS[name]
    mask = pattern.dense(n, m, q_offset=q_offset)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, pairs(rule, n, m, q_offset))


@pytest.mark.parametrize("name", ATOMS)
@pytest.mark.parametrize("n, m, q_offset", [(6, 6, 0), (9, 4, 0), (3, 9, 6)])
def test_row_counts_count_the_mask(name, n, m, q_offset):
    pattern, rule = ATOMS[name]
    counts = pattern.row_counts(n, m, q_offset=q_offset)
    assert counts.dtype == torch.int64
    assert torch.equal(counts, pairs(rule, n, m, q_offset).sum(-1))


def test_q_offset_gives_the_last_rows_of_the_whole_mask():
    pattern = Causal() & SlidingWindow(4) | Sinks(2)
    assert torch.equal(pattern.dense(3, 10, q_offset=7), pattern.dense(10, 10)[:, :, 7:])


def test_a_causal_window_holds_so_many_keys_with_the_own_one():
    counts = (Causal() & SlidingWindow(4)).row_counts(8, 8).flatten()
    assert counts.tolist() == [1, 2, 3, 4, 4, 4, 4, 4]


def test_sinks_may_be_spelled_without_brackets():
    bare, bracketed = Causal() & SlidingWindow(3) | Sinks(2), Causal() & (SlidingWindow(3) | Sinks(2))
    assert torch.equal(bare.dense(9, 9), bracketed.dense(9, 9))
    assert bare.causal
    assert bracketed.causal


def test_sinks_that_are_not_causal_show_the_future_in_that_spelling():
    leaky = Causal() & SlidingWindow(3) | Sinks(2, causal=False)
    assert leaky.dense(9, 9)[0, 0, 0, 1]
    assert not leaky.causal


@pytest.mark.parametrize("pattern", CAUSAL, ids=repr)
def test_a_pattern_called_causal_allows_no_later_key(pattern):
    assert pattern.causal is True
    assert not pattern.dense(9, 9).triu(1).any()
    assert "causal" in repr(pattern)


@pytest.mark.parametrize("pattern", NOT_CAUSAL, ids=repr)
def test_a_pattern_that_could_see_ahead_is_not_called_causal(pattern):
    assert pattern.causal is False
    assert "[causal]" not in repr(pattern)


@pytest.mark.parametrize(
    "pattern",
    [p for p, _ in ATOMS.values()]
    + [Causal() & SlidingWindow(3) | SlidingWindow(2), (Sinks(2) | SlidingWindow(3)) & Causal()],
    ids=repr,
)
def test_needed_after_is_an_upper_bound_on_who_still_sees_a_key(pattern):
    mask = pattern.dense(30, 10)[0, 0]
    for j in range(10):
        rows = mask[:, j].nonzero().flatten()
        assert len(rows) == 0 or rows.max() <= pattern.needed_after(0, j)


def test_needed_after_is_exact_where_a_cache_can_use_it():
    assert (Causal() & SlidingWindow(4)).needed_after(0, 5) == 8
    assert (SlidingWindow(4) | SlidingWindow(2)).needed_after(0, 5) == 8
    for endless in (Causal(), Sinks(1), Prefix(1), ~SlidingWindow(4), Causal() & SlidingWindow(4) | Sinks(1)):
        assert endless.needed_after(0, 5) == math.inf


def test_patterns_are_values():
    assert Causal() & SlidingWindow(3) == Causal() & SlidingWindow(3)
    assert hash(Causal() & SlidingWindow(3)) == hash(Causal() & SlidingWindow(3))
    assert Causal() & SlidingWindow(3) != Causal() & SlidingWindow(4)
    assert {Sinks(2): 1}[Sinks(2)] == 1
    with pytest.raises(AttributeError):
        SlidingWindow(3).window = 4


def test_a_repr_can_be_read_back():
    pattern = Causal(strict=True) & (SlidingWindow(3) | Sinks(2, causal=False)) & ~Prefix(1)
    assert eval(repr(pattern).removesuffix(" [causal]")) == pattern


def test_documents_see_their_own():
    doc = torch.tensor([[0, 0, 1, 1, 2], [5, 5, 5, 7, 5]])
    mask = Documents().bind(doc=doc).dense(5, 5)
    assert torch.equal(mask, (doc[:, None, :, None] == doc[:, None, None, :]))
    causal = (Causal() & Documents()).bind(doc=doc)
    assert torch.equal(causal.dense(2, 5, q_offset=3), mask[:, :, 3:] & Causal().dense(2, 5, q_offset=3))
    assert causal.causal


def test_padding_hides_keys_and_with_rows_also_queries():
    valid = coin(2, 6)
    keys = KeyValid().bind(key_valid=valid)
    assert torch.equal(keys.dense(4, 6), valid[:, None, None].expand(2, 1, 4, 6))
    both = KeyValid(rows=True).bind(key_valid=valid).dense(6, 6)
    assert torch.equal(both, valid[:, None, None] & valid[:, None, :, None])
    assert torch.equal(keys.row_counts(4, 6), valid.sum(-1)[:, None, None].expand(2, 1, 4))


@pytest.mark.parametrize("shape", [(1, 1, 5, 7), (2, 1, 5, 7), (1, 3, 5, 7), (2, 3, 5, 7)])
def test_an_explicit_mask_is_itself(shape):
    mask = coin(*shape)
    assert torch.equal(Explicit().bind(mask=mask).dense(5, 7), mask)
    assert torch.equal(Explicit().bind(mask=mask).dense(2, 6, q_offset=3), mask[:, :, 3:, :6])


def test_bound_patterns_combine_with_their_data():
    valid, doc = coin(2, 6), torch.tensor([[0, 0, 0, 1, 1, 1]])
    padded, packed = KeyValid().bind(key_valid=valid), Documents().bind(doc=doc)
    whole = Causal() & padded & packed
    want = Causal().dense(6, 6) & padded.dense(6, 6) & packed.dense(6, 6)
    assert torch.equal(whole.dense(6, 6), want)
    assert torch.equal((padded & Causal()).dense(6, 6), (Causal() & padded).dense(6, 6))
    assert torch.equal((~padded | packed).dense(6, 6), ~padded.dense(6, 6) | packed.dense(6, 6))
    assert torch.equal((SlidingWindow(2) | padded).dense(6, 6), SlidingWindow(2).dense(6, 6) | padded.dense(6, 6))
    assert torch.equal((Causal() & KeyValid()).bind(key_valid=valid).dense(6, 6), (Causal() & padded).dense(6, 6))


def test_two_tables_of_one_kind_need_two_labels():
    first, second = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 1, 0]])
    both = Documents("page").bind(page=first) & Documents("author").bind(author=second)
    assert torch.equal(both.dense(4, 4)[0, 0], (first == first.T) & (second == second.T))
    with pytest.raises(OptionError, match="label"):
        Documents().bind(doc=first) & Documents().bind(doc=second)


def test_bound_patterns_are_not_hashable():
    with pytest.raises(TypeError):
        hash(KeyValid().bind(key_valid=coin(1, 4)))


def test_missing_data_is_named():
    for pattern in (
        Documents(),
        Causal() & Documents(),
        ~Documents(),
        Causal() | Documents().bind(doc=torch.zeros(1, 4)) & KeyValid(),
    ):
        with pytest.raises(OptionError, match=r"\.bind\((doc|key_valid)="):
            pattern.dense(4, 4)


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: SlidingWindow(0), "at least 1 key, not 0"),
        (lambda: SlidingWindow(-3), "not -3"),
        (lambda: Sinks(0), "at least 1 key"),
        (lambda: Prefix(-1), "at least 0"),
        (lambda: Causal().bind(doc=torch.zeros(1, 4)), "takes no data 'doc'"),
        (lambda: Causal() & coin(4, 4), "combines with patterns only"),
        (lambda: KeyValid().bind(key_valid=torch.ones(1, 4)).dense(4, 4), "must be bool"),
    ],
)
def test_bad_settings_are_refused(make, text):
    with pytest.raises(OptionError, match=text):
        make()


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: KeyValid().bind(key_valid=coin(1, 5)).dense(4, 4), "5 positions, but there are 4 keys"),
        (lambda: Documents().bind(doc=torch.zeros(1, 4)).dense(6, 4), "query at 5"),
        (lambda: KeyValid(rows=True).bind(key_valid=coin(1, 4)).dense(2, 4, q_offset=3), "query at 4"),
        (lambda: Explicit().bind(mask=coin(1, 1, 4, 4)).dense(5, 4), "reach query position 4"),
        (lambda: Explicit().bind(mask=coin(1, 1, 4, 4)).dense(2, 4, q_offset=3), "reach query position 4"),
        (lambda: Explicit().bind(mask=torch.ones(1, 1, 4, 4)).dense(4, 4), "must be bool"),
        (lambda: Explicit().bind(mask=coin(4)).dense(4, 4), "must be"),
    ],
)
def test_data_of_the_wrong_size_or_kind_is_refused(make, text):
    with pytest.raises(ShapeError, match=text):
        make()


def test_padding_may_have_more_queries_than_positions():
    assert KeyValid().bind(key_valid=coin(1, 4)).dense(6, 4).shape == (1, 1, 6, 4)
