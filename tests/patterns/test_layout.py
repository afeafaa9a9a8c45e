"""Layouts against the dense mask: tile by tile, bit by bit, by rows and by columns."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.contract.errors import OptionError, ShapeError
from regard.patterns import (
    Causal,
    Documents,
    Explicit,
    Full,
    KeyValid,
    Neighborhood,
    Prefix,
    SlidingWindow,
    Strided,
    layout,
)
from tests.oracles import coin
from tests.patterns.atoms import ATOMS, sizes


def unpack(words, keys):
    out = torch.zeros(*words.shape[:2], keys, dtype=torch.bool)
    for j in range(keys):
        out[:, :, j] = (words[:, :, j // 64] >> (j % 64)) & 1 == 1
    return out


def check(found, mask):
    """Every field of a layout against the mask (B', H', n, m), by loops over tiles."""
    n, m, bq, bk = found.n, found.m, found.block_q, found.block_k
    rows, columns = -(-n // bq), -(-m // bk)
    batch, heads = found.crow.shape[:2]
    mask = mask.expand(batch, heads, n, m)
    bits, bits_t = unpack(found.bits, bk), unpack(found.bits_t, bq)
    assert torch.equal(bits.transpose(1, 2), bits_t)
    assert len(torch.unique(bits.flatten(1), dim=0)) == len(bits)
    for x in (found.crow, found.col, found.tile, found.crow_t, found.row_t, found.tile_t):
        assert x.dtype == torch.int32 and x.is_contiguous()
    assert found.bits.dtype == found.bits_t.dtype == torch.int64
    assert found.bits.is_contiguous() and found.bits_t.is_contiguous()
    for b in range(batch):
        for h in range(heads):
            seen, seen_t = {}, {}
            for lines, starts, index, tiles, into, turned in (
                (rows, found.crow, found.col, found.tile, seen, False),
                (columns, found.crow_t, found.row_t, found.tile_t, seen_t, True),
            ):
                start = starts[b, h].tolist()
                assert start[0] == 0 and len(start) == lines + 1
                for line in range(lines):
                    places = index[b, h, start[line] : start[line + 1]].tolist()
                    assert places == sorted(set(places))
                    for place, t in zip(places, tiles[b, h, start[line] : start[line + 1]].tolist(), strict=True):
                        into[(place, line) if turned else (line, place)] = t
                assert (index[b, h, start[-1] :] == -1).all()
            assert seen == seen_t
            for r in range(rows):
                for c in range(columns):
                    part = mask[b, h, r * bq : (r + 1) * bq, c * bk : (c + 1) * bk]
                    if not part.any():
                        assert (r, c) not in seen
                    elif part.all():
                        assert seen[r, c] == 0
                    else:
                        held = bits[seen[r, c] - 1]
                        assert torch.equal(held[: part.shape[0], : part.shape[1]], part)
                        assert int(held.sum()) == int(part.sum())
    assert torch.equal(found.dense(), mask)
    assert torch.equal(found.empty_rows(), ~mask.any(-1))
    assert found.pairs() == int(mask.sum())


@pytest.mark.parametrize("name", ATOMS)
@pytest.mark.parametrize("block", [(8, 8), (5, 11), (16, 4), (64, 64), (1, 7)])
def test_the_layout_holds_the_dense_mask(name, block):
    pattern = ATOMS[name][0]
    for n, m, q_offset in sizes(pattern):
        check(pattern.layout(n, m, block=block, q_offset=q_offset), pattern.dense(n, m, q_offset=q_offset))


@pytest.mark.parametrize("name", ATOMS)
@pytest.mark.parametrize("factor", [2, 3])
def test_coarse_tiles_first_find_the_same(name, factor, monkeypatch):
    monkeypatch.setattr(layout, "COARSE", factor)
    pattern = ATOMS[name][0]
    layout._kept.cache_clear()
    for n, m, q_offset in sizes(pattern, [(42, 42, 0), (41, 30, 1)]):
        check(pattern.layout(n, m, block=(4, 3), q_offset=q_offset), pattern.dense(n, m, q_offset=q_offset))
    layout._kept.cache_clear()


LINES = [ATOMS[name][0] for name in ATOMS if ATOMS[name][0].tokens is None and ATOMS[name][0].heads is None]
LINES = [p for p in LINES if type(p).__name__ != "CoreContext"]
GRIDS = [ATOMS[name][0] for name in ATOMS if ATOMS[name][0].tokens == 42 and ATOMS[name][0].heads is None]
TREES = st.recursive(
    st.sampled_from(LINES + GRIDS),
    lambda inner: st.one_of(
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a, b: a - b, inner, inner),
        st.builds(lambda a: ~a, inner),
    ),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(TREES, st.integers(1, 42), st.integers(1, 42), st.integers(0, 20), st.integers(1, 17), st.integers(1, 17))
def test_random_compositions(pattern, n, m, q_offset, block_q, block_k):
    q_offset = min(q_offset, 42 - n)
    found = pattern.layout(n, m, block=(block_q, block_k), q_offset=q_offset)
    mask = pattern.dense(n, m, q_offset=q_offset)
    assert torch.equal(found.dense(), mask)
    assert found.partial == sum(
        bool(part.any() and not part.all()) for rows in mask[0, 0].split(block_q) for part in rows.split(block_k, 1)
    )
    assert found.visited == sum(
        bool(part.any()) for rows in mask[0, 0].split(block_q) for part in rows.split(block_k, 1)
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(TREES, st.integers(0, 2**32 - 1), st.integers(1, 17), st.integers(1, 17))
def test_the_verdict_on_tiles_is_never_wrong(pattern, seed, block_q, block_k):
    """some may be too often True and all too seldom, never the other way round."""
    q, k = layout.Runs(0, 42, block_q), layout.Runs(0, 42, block_k)
    some, every = layout._verdict(pattern.rule({}), layout._grid(q, k, 1, 1))
    some, every = (x.expand(1, 1, q.count, k.count)[0, 0] for x in (some, every))
    mask = pattern.dense(42, 42)[0, 0]
    for r, rows in enumerate(mask.split(block_q)):
        for c, part in enumerate(rows.split(block_k, 1)):
            assert some[r, c] or not part.any()
            assert part.all() or not every[r, c]


@pytest.mark.parametrize("block", [(8, 8), (5, 11), (64, 64)])
@pytest.mark.parametrize("batch", [1, 3])
def test_bound_data_is_laid_out(block, batch):
    doc = torch.randint(0, 3, (batch, 40)).sort(1)[0]
    mixed = torch.randint(0, 4, (batch, 40))
    valid = torch.arange(40) < torch.tensor([33, 40, 8])[:batch, None]
    for bound in (
        Documents().bind(doc=doc),
        Documents().bind(doc=mixed),
        Causal() & Documents().bind(doc=doc),
        KeyValid().bind(key_valid=valid),
        KeyValid(rows=True).bind(key_valid=valid),
        KeyValid().bind(key_valid=coin(batch, 40)) & Causal(),
        Causal() & KeyValid().bind(key_valid=valid) & Documents().bind(doc=doc[:1]),
        ~Documents().bind(doc=doc) | SlidingWindow(3),
        Explicit().bind(mask=coin(batch, 1, 40, 40)),
        Explicit().bind(mask=coin(1, 2, 40, 40, p=0.05)),
        Causal() & Explicit().bind(mask=coin(batch, 2, 40, 40, p=0.95)),
        ATOMS["per head"][0] & Documents().bind(doc=doc),
        ATOMS["per head"][0] & Explicit().bind(mask=coin(batch, 3, 40, 40)),
        Neighborhood((5, 8), 3) & KeyValid().bind(key_valid=valid),
    ):
        for n, q_offset in ((40, 0), (17, 23), (1, 39)):
            found = bound.layout(n, 40, block=block, q_offset=q_offset)
            check(found, bound.dense(n, 40, q_offset=q_offset))


def test_several_batch_rows_stay_apart():
    valid = torch.arange(40) < torch.tensor([33, 0, 8])[:, None]
    found = KeyValid().bind(key_valid=valid).layout(20, 40, block=(8, 8))
    assert found.batch == 3 and found.heads == 1
    assert found.crow[:, 0, -1].tolist() == [15, 0, 3]
    assert found.empty_rows()[:, 0].all(-1).tolist() == [False, True, False]


def test_layouts_of_pure_patterns_are_kept():
    pattern = Causal() & SlidingWindow(9)
    assert pattern.layout(40, 40) is (Causal() & SlidingWindow(9)).layout(40, 40)
    assert pattern.layout(40, 40) is not pattern.layout(40, 40, q_offset=1)
    assert pattern.layout(40, 40) is not pattern.layout(40, 40, block=(32, 64))
    assert pattern.layout(40, 40) is pattern.layout(40, 40, device="cpu")


def test_no_queries_or_no_keys():
    for n, m in ((0, 8), (8, 0), (0, 0)):
        found = Causal().layout(n, m, block=(4, 4))
        assert found.crow.shape == (1, 1, -(-n // 4) + 1) and found.crow_t.shape == (1, 1, -(-m // 4) + 1)
        assert found.visited == 0
        assert found.empty_rows().shape == (1, 1, n) and found.empty_rows().all()


def test_rows_without_keys_are_listed():
    found = (Causal(strict=True) & SlidingWindow(3)).layout(20, 20, block=(4, 4))
    assert found.empty_rows().flatten().nonzero().flatten().tolist() == [0]
    assert Prefix(0).layout(9, 9).empty_rows().all()
    assert not Full().layout(9, 9).empty_rows().any()


def test_a_ragged_last_block_may_be_full():
    found = Causal().layout(70, 70, block=(64, 64))
    assert (found.tile > 0).flatten().tolist() == [True, False, True]


def test_translation_invariant_patterns_need_few_bits():
    assert len((Causal() & SlidingWindow(256)).layout(8192, 8192).bits) == 2
    assert len(Strided(7).layout(2048, 2048).bits) == 7


@pytest.mark.parametrize("union", [True, False])
def test_layouts_combine(union):
    doc = torch.randint(0, 3, (2, 40)).sort(1)[0]
    kinds = [p for p in (Causal(), SlidingWindow(4), ATOMS["per head"][0], Full(), ~Causal(), Prefix(0))]
    kinds.append(Documents().bind(doc=doc))
    for a in kinds:
        for b in kinds:
            whole = a | b if union else a & b
            left, right = a.layout(30, 40, block=(8, 16)), b.layout(30, 40, block=(8, 16))
            check(left | right if union else left & right, whole.dense(30, 40))


def test_a_layout_can_be_repeated_and_moved():
    bound = Documents().bind(doc=torch.randint(0, 3, (2, 40)))
    found = bound.layout(40, 40, block=(8, 8))
    assert torch.equal(found.repeat(3).dense(), found.dense().repeat(3, 1, 1, 1))
    assert found.to("meta").col.is_meta


def test_bad_sizes_are_refused():
    with pytest.raises(OptionError, match="at least 1 row"):
        Causal().layout(8, 8, block=(0, 4))
    with pytest.raises(OptionError, match="needs data"):
        Documents().layout(8, 8)
    with pytest.raises(ShapeError, match="5 positions, but there are 4 keys"):
        KeyValid().bind(key_valid=coin(1, 5)).layout(4, 4)
    with pytest.raises(ShapeError, match="42 positions"):
        ATOMS["near"][0].layout(43, 42)
    with pytest.raises(ShapeError, match="different sizes"):
        Causal().layout(8, 8) & Causal().layout(9, 8)


def test_a_long_sequence_is_laid_out_at_once():
    """The figures are in test_layout_speed; this bound is loose, since other work may run on the machine."""
    start = time.process_time()
    found = (Causal() & SlidingWindow(256)).layout(65536, 65536)
    assert time.process_time() - start < 0.5
    assert found.visited == 1024 + 1023 + 1022 + 1021 + 1020
