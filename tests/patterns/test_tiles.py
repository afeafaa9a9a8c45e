"""Grids in tile order: the permutation and back, layouts in that order, the cost of tiles."""

from __future__ import annotations

import math

import pytest
import torch

from regard.contract.errors import OptionError, ShapeError
from regard.patterns import (
    Axial,
    BlockGrid,
    Causal,
    Documents,
    Full,
    GridWindow,
    Halo,
    Neighborhood,
    PerHead,
    SlidingWindow,
    TilePermutation,
    Window,
    tile_cost,
)
from regard.patterns.tiles import grid_layout
from tests.patterns.test_layout import check


def in_tile_order(pattern, q, k):
    """The dense mask moved into the orders of two permutations, cell by cell: (groups, H, rows, keys)."""
    cells = math.prod(q.shape)
    mask = pattern.dense(cells, cells)[0]
    out = torch.zeros(q.groups, len(mask), q.length, k.length, dtype=torch.bool)
    for g, (rows, keys) in enumerate(zip(q.index(), k.index(), strict=True)):
        for r, i in enumerate(rows.tolist()):
            for c, j in enumerate(keys.tolist()):
                if i >= 0 and j >= 0:
                    out[g, :, r, c] = mask[:, i, j]
    return out


@pytest.mark.parametrize("shape, tile, dilation", [
    ((6, 8), (2, 4), 1), ((7, 9), (3, 4), 1), ((7, 9), (2, 2), (2, 3)), ((12,), 5, 2), ((3, 4, 5), (2, 2, 3), (1, 2, 2)),
    ((4, 4), 1, 1), ((5, 5), 8, 1),
])  # fmt: skip
def test_there_and_back(shape, tile, dilation):
    order = TilePermutation(shape, tile, dilation)
    cells = math.prod(shape)
    x = torch.randn(3, 2, cells, 4)
    tiled = order.permute(x)
    assert tiled.shape == (3 * order.groups, 2, order.length, 4)
    assert order.length % order.block == 0
    assert torch.equal(order.inverse(tiled), x)
    index = order.index()
    assert sorted(index[index >= 0].tolist()) == list(range(cells))
    for g, rows in enumerate(index):
        for r, i in enumerate(rows.tolist()):
            want = x[:, :, i] if i >= 0 else torch.zeros(3, 2, 4)
            assert torch.equal(tiled[g :: order.groups, :, r], want)
    assert torch.equal(order.inverse(order.permute(x[..., 0])), x[..., 0])
    assert torch.equal(order.inverse(order.permute(x[:, 0], dim=1), dim=1), x[:, 0])


def test_a_tile_is_a_box_of_cells():
    order = TilePermutation((6, 8), (2, 4))
    for tile in order.index().view(-1, 2, 4):
        assert torch.equal(tile - tile[0, 0], torch.tensor([[0, 1, 2, 3], [8, 9, 10, 11]]))


def test_groups_hold_one_rest_each():
    order = TilePermutation((7, 9), 2, (2, 3))
    for g, rows in enumerate(order.index()):
        cells = rows[rows >= 0]
        assert (cells // 9 % 2 == g // 3).all() and (cells % 9 % 3 == g % 3).all()


SHAPE = (7, 9)
PATTERNS = [
    Neighborhood(SHAPE, 3), Neighborhood(SHAPE, (4, 5), 1, (2, 3)), Neighborhood(SHAPE, 3, (2, 3)),
    Neighborhood(SHAPE, 3, 1, 2, (True, False)), Window(SHAPE, 3, 1), Window(SHAPE, (2, 4)), Halo(SHAPE, 2, 1),
    GridWindow((8, 9), (4, 3)), Axial(SHAPE, 0), Axial(SHAPE, 1), BlockGrid((8, 8), 2, 4, 2), Causal(), SlidingWindow(5),
    Full(), Neighborhood(SHAPE, 3) & Causal(), ~Window(SHAPE, 3) | Axial(SHAPE, 1), Window(SHAPE, 2) - SlidingWindow(3),
    PerHead([Window(SHAPE, 3), Causal()]), Causal().on(prefix=3), Window((9, 7), 3),
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("q_tile, k_tile", [((2, 3), (2, 3)), ((4, 4), (2, 5)), ((1, 1), (8, 3)), ((7, 9), (7, 9))])
def test_a_layout_in_tile_order_is_the_mask_in_tile_order(pattern, q_tile, k_tile):
    inner = pattern.tokens or 63
    shape = SHAPE if inner == 63 else (8, inner // 8)
    q, k = TilePermutation(shape, q_tile), TilePermutation(shape, k_tile)
    check(grid_layout(pattern, q, k), in_tile_order(pattern, q, k))


@pytest.mark.parametrize("pattern, dilation", [
    (Neighborhood((9, 10), 3, (3, 2)), (3, 2)), (Neighborhood((9, 11), (2, 3), (3, 2), (2, 1)), (3, 2)),
    (Neighborhood((9, 11), 2, (2, 3), 1, True), (2, 3)), (Neighborhood((9, 10), 2, (4, 2)), (2, 1)),
    (Neighborhood((17,), 3, 4), 4), (Neighborhood((9,), 4, 2) | Neighborhood((9,), 2, 4), 2),
    (PerHead([Neighborhood((9,), 3, 2), Neighborhood((9,), 2, 2)]), 2),
])  # fmt: skip
@pytest.mark.parametrize("tile", [2, 3, 4])
def test_dilated_neighbourhoods_fall_into_groups(pattern, dilation, tile):
    shape = (pattern.patterns[0] if isinstance(pattern, PerHead) else getattr(pattern, "left", pattern)).shape
    order = TilePermutation(shape, tile, dilation)
    want = in_tile_order(pattern, order, order)
    found = order.layout(pattern)
    assert found.batch in (1, order.groups)
    # groups of one shape have one layout
    assert torch.equal(found.dense().expand_as(want), want)
    check(found, want[: found.batch])
    assert int(pattern.dense(math.prod(shape), math.prod(shape)).sum()) == int(want.sum())
    twice = order.layout(pattern, batch=2)
    assert torch.equal(twice.dense(), found.dense() if found.batch == 1 else found.dense().repeat(2, 1, 1, 1))


def test_attention_in_tile_order_is_attention():
    order, pattern = TilePermutation((7, 9), (2, 4), (2, 3)), Neighborhood((7, 9), 3, (2, 3))
    q, k, v = torch.randn(3, 2, 2, 63, 8, dtype=torch.float64)
    mask = order.layout(pattern, batch=2).dense()
    tiled = torch.nn.functional.scaled_dot_product_attention(*map(order.permute, (q, k, v)), mask)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, pattern.dense(63, 63))
    torch.testing.assert_close(order.inverse(tiled), want)


def test_tile_order_makes_tiles_full():
    pattern = Neighborhood((64, 64), 15)
    tiled = TilePermutation((64, 64), 8).layout(pattern)
    assert tiled.visited - tiled.partial > 0
    rows = pattern.layout(4096, 4096)
    assert rows.partial == rows.visited > tiled.visited


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: TilePermutation((4, 4), (2, 2, 2)), "tile of a grid"),
        (lambda: TilePermutation((4, 4), 0), "from 1 on"),
        (lambda: TilePermutation((4, 4), 2, 5), "groups without cells"),
        (lambda: TilePermutation((), 2), "at least one cell"),
        (lambda: TilePermutation((4, 6), 4, pad=False), "do not divide"),
        (lambda: TilePermutation((9, 8), 4, 2, pad=False), "do not divide"),
        (lambda: TilePermutation((4, 4), 2).layout(Window((4, 5), 2)), "20 positions.*has 16"),
        (lambda: TilePermutation((4, 4), 2).layout(Window((4, 4), 2).on(prefix=1)), "beside it as extra keys"),
        (lambda: TilePermutation((4, 4), 2).layout(Documents()), "without data"),
        (lambda: TilePermutation((4, 4), 2, 2).layout(Neighborhood((4, 4), 2)), "does not fall into groups"),
        (lambda: TilePermutation((4, 4), 2, 2).layout(Window((4, 4), 2)), "only Neighborhood does"),
        (lambda: grid_layout(Full(), TilePermutation((4, 4), 2), TilePermutation((4, 4), 2, 2)), "one grid"),
        (lambda: tile_cost(Full(), (4, 6), (4, 4), (4, 4), pad=False), "do not divide"),
        (lambda: tile_cost(Full(), (4, 6), 5, 4, pad=False), "do not divide"),
        (lambda: tile_cost(Full(), (4, 6), 5, (4, 4)), "both"),
    ],
)
def test_bad_tiles_are_refused(make, text):
    with pytest.raises(OptionError, match=text):
        make()


def test_tensors_of_another_size_are_refused():
    order = TilePermutation((4, 6), 4)
    with pytest.raises(ShapeError, match="24 cells"):
        order.permute(torch.zeros(1, 1, 25, 2))
    with pytest.raises(ShapeError, match="axis 2 must hold 32 rows"):
        order.inverse(torch.zeros(1, 1, 24, 2))


VIDEO = (30, 48, 80), (18, 24, 24), (16, 8, 8)
IMAGE = (256, 256), (80, 80), (16, 16)
WORLD = (16, 44, 80), (16, 32, 48), (1, 16, 16)


@pytest.mark.parametrize("setting, q_tile, kv_tile", [
    (VIDEO, (2, 8, 8), (2, 8, 8)), (VIDEO, (2, 8, 8), (6, 8, 8)), (IMAGE, (16, 16), (16, 16)),
    (WORLD, (1, 4, 16), (1, 4, 16)), (WORLD, (16, 1, 16), (4, 2, 8)), (WORLD, (2, 2, 4), (8, 4, 16)),
])  # fmt: skip
def test_published_settings_are_perfectly_block_sparse(setting, q_tile, kv_tile):
    shape, kernel, stride = setting
    cost = tile_cost(Neighborhood(shape, kernel, 1, stride), shape, q_tile, kv_tile)
    assert cost.partial == 0
    want = math.prod(shape) / math.prod(kernel)
    assert cost.flop_speedup == pytest.approx(want, rel=1e-12)
    assert cost.bound_speedup == pytest.approx(want, rel=1e-12)


def test_other_tiles_are_not_perfect():
    shape, kernel, stride = VIDEO
    assert tile_cost(Neighborhood(shape, kernel, 1, stride), shape, (4, 8, 8), (4, 8, 8)).partial > 0
    shape, kernel, stride = WORLD
    assert tile_cost(Neighborhood(shape, kernel, 1, stride), shape, (1, 8, 16), (1, 8, 16)).partial > 0
    for tile in (2, 3, 4):
        assert tile_cost(Neighborhood((12, 12), 3), (12, 12), (tile, tile), (tile, tile)).partial > 0


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("q_tile, kv_tile", [((2, 2), (2, 2)), ((4, 2), (2, 4)), (8, 16), (12, 12)])
def test_the_cost_counts_tiles_of_the_mask(stride, q_tile, kv_tile):
    shape, pattern = (12, 8), Neighborhood((12, 8), (4, 5), 1, stride)
    cost = tile_cost(pattern, shape, q_tile, kv_tile)
    if isinstance(q_tile, tuple):
        q, k = TilePermutation(shape, q_tile), TilePermutation(shape, kv_tile)
        mask, found = in_tile_order(pattern, q, k)[0, 0], grid_layout(pattern, q, k)
        sizes = (q.block, k.block)
    else:
        mask, found, sizes = (
            pattern.dense(96, 96)[0, 0],
            pattern.layout(96, 96, block=(q_tile, kv_tile)),
            (q_tile, kv_tile),
        )
    parts = [part for rows in mask.split(sizes[0]) for part in rows.split(sizes[1], 1)]
    assert cost.visited == sum(bool(p.any()) for p in parts) == int((found.col >= 0).sum())
    assert cost.partial == sum(bool(p.any() and not p.all()) for p in parts)
    assert cost.total == len(parts)
    assert cost.bound_speedup == cost.total / cost.visited
    assert cost.flop_speedup == pytest.approx(96 * 96 / int(mask.sum()))
    assert cost.bound_speedup <= cost.flop_speedup + 1e-12


def test_the_cost_of_nothing_is_nothing():
    cost = tile_cost(~Full(), (4, 4), (2, 2), (2, 2))
    assert cost.visited == 0 and cost.bound_speedup == cost.flop_speedup == math.inf
