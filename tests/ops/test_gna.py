from __future__ import annotations

from itertools import product
from math import prod

import pytest
import torch
import torch.nn.functional as F

from regard import Neighborhood, OptionError, Window, gna_attention, neighborhood_attention
from regard.patterns.tile_cost import tile_cost
from regard.patterns.tiled import Tiled
from regard.patterns.tiles import TilePermutation
from tests.neighbours import attend_by_mask, neighbourhood_mask
from tests.oracles import normal

# name -> (grid, kernel, stride, tiles of queries and keys without partial tiles)
PAPER = {
    "hunyuan_video": ((30, 48, 80), (18, 24, 24), (16, 8, 8), [((2, 8, 8), (2, 8, 8)), ((2, 8, 8), (6, 8, 8))]),
    "flux_4k": ((256, 256), (80, 80), (16, 16), [((16, 16), (16, 16))]),
    "cosmos": ((16, 44, 80), (16, 32, 48), (1, 16, 16), [((16, 4, 16), (16, 4, 16)), ((8, 2, 8), (4, 1, 16))]),
}


def dense(shape, **options):
    return Neighborhood(shape, **options).dense(prod(shape), prod(shape))


def test_a_stride_of_the_kernel_is_window_attention_where_it_divides_the_grid():
    for shape, kernel in (((12,), (4,)), ((6, 8), (3, 4)), ((4, 6, 4), (2, 3, 4))):
        window = Window(shape, kernel).dense(prod(shape), prod(shape))
        assert torch.equal(dense(shape, kernel=kernel, stride=kernel), window)
        causal = dense(shape, kernel=kernel, stride=kernel, is_causal=True)
        axes = torch.stack(torch.meshgrid(*map(torch.arange, shape), indexing="ij")).flatten(1)
        later = (axes[:, None, :] > axes[:, :, None]).any(0)
        assert torch.equal(causal, window & ~later)


def test_a_short_last_group_looks_back_into_its_neighbour():
    found = dense((10,), kernel=4, stride=4)[0, 0]
    assert not torch.equal(found, Window((10,), 4).dense(10, 10)[0, 0])
    assert found[9].nonzero().flatten().tolist() == [6, 7, 8, 9]
    assert Window((10,), 4).dense(10, 10)[0, 0, 9].nonzero().flatten().tolist() == [8, 9]


def test_queries_of_a_group_share_the_window_of_their_leader():
    found = dense((16,), kernel=6, stride=4)[0, 0]
    for first in range(0, 16, 4):
        assert all(torch.equal(found[first], found[first + i]) for i in range(4))
    # the centre of four is the third, and an even kernel reaches one further to the left
    assert found[4].nonzero().flatten().tolist() == [3, 4, 5, 6, 7, 8]


def test_strides_between_one_and_the_kernel_equal_the_whole_table():
    for shape, kernel, stride, causal in (
        ((13,), 5, 3, False), ((7, 9), (4, 5), (2, 5), (True, False)), ((4, 5, 6), 3, (1, 2, 3), False),
    ):  # fmt: skip
        q, k, v = normal((2, 2, prod(shape), 4), (2, 1, prod(shape), 4), (2, 1, prod(shape), 3))
        wanted = attend_by_mask(q, k, v, neighbourhood_mask(shape, kernel, 1, stride, causal))
        for engine in (None, "gather", "reference"):
            out = gna_attention(q, k, v, shape=shape, kernel=kernel, stride=stride, is_causal=causal, engine=engine)
            torch.testing.assert_close(out, wanted)


def test_outputs_are_not_subsampled():
    q, k, v = normal((1, 1, 64, 4), (1, 1, 64, 4), (1, 1, 64, 4))
    out = gna_attention(q, k, v, shape=(8, 8), kernel=4, stride=4)
    assert out.shape == q.shape
    windows = [t.view(1, 1, 2, 4, 2, 4, 4).transpose(3, 4).reshape(4, 1, 16, 4) for t in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*windows).view(1, 1, 2, 2, 4, 4, 4).transpose(3, 4).reshape(1, 1, 64, 4)
    torch.testing.assert_close(out, wanted)


def test_a_stride_of_one_is_neighbourhood_attention():
    q, k, v = normal((1, 2, 42, 4), (1, 2, 42, 4), (1, 2, 42, 4))
    out = gna_attention(q, k, v, shape=(6, 7), kernel=3, stride=1)
    assert torch.equal(out, neighborhood_attention(q, k, v, shape=(6, 7), kernel=3))


@pytest.mark.parametrize("name", PAPER)
def test_the_configurations_of_the_paper_have_no_partial_tile(name):
    shape, kernel, stride, tiles = PAPER[name]
    pattern = Neighborhood(shape, kernel, 1, stride)
    for q_tile, kv_tile in tiles:
        cost = tile_cost(pattern, shape, q_tile, kv_tile)
        assert cost.partial == 0
        assert cost.flop_speedup == pytest.approx(prod(shape) / prod(kernel))
        # exact where tiles divide the grid
        if all(length % t == 0 for t_ in (q_tile, kv_tile) for length, t in zip(shape, t_, strict=True)):
            assert cost.bound_speedup == pytest.approx(cost.flop_speedup)


def test_four_frames_a_tile_do_not_divide_thirty():
    shape, kernel, stride, _ = PAPER["hunyuan_video"]
    assert tile_cost(Neighborhood(shape, kernel, 1, stride), shape, (4, 8, 8), (4, 8, 8)).partial > 0


def test_visited_tiles_are_the_entries_of_the_layout():
    shape, pattern = (12, 16), Neighborhood((12, 16), (5, 6), 1, (2, 3))
    cost = tile_cost(pattern, shape, (4, 4), (4, 4))
    layout = TilePermutation(shape, (4, 4)).layout(pattern)
    assert cost.visited == int((layout.col >= 0).sum())
    assert cost.partial == int((layout.tile > 0).sum())
    mask = pattern.dense(192, 192)[0, 0].view(3, 4, 4, 4, 3, 4, 4, 4)
    assert cost.visited == int(mask.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).any(-1).sum())


def test_no_bound_beats_the_arithmetic():
    for kernel, stride in ((3, 1), (5, 2), (8, 4), (8, 8), (7, 7)):
        for tile in ((2, 2), (4, 4), (8, 4)):
            cost = tile_cost(Neighborhood((16, 16), kernel, 1, stride), (16, 16), tile, tile)
            assert cost.bound_speedup <= cost.flop_speedup * (1 + 1e-12)
            if cost.partial == 0:
                assert cost.bound_speedup == pytest.approx(cost.flop_speedup)


def test_sliding_windows_always_have_partial_tiles():
    for tile in ((2, 1), (1, 2), (2, 2), (4, 8)):
        assert tile_cost(Neighborhood((16, 16), 5), (16, 16), tile, tile).partial > 0


def test_the_op_chooses_tiles_that_visit_least():
    for shape, kernel, stride in (((6, 16, 24), (4, 8, 8), (2, 4, 4)), ((64, 64), 7, 1), ((16, 128), (3, 9), 1)):
        pattern = Neighborhood(shape, kernel, 1, stride)
        tiled = Tiled.best(pattern)
        visited = tile_cost(pattern, shape, tiled.q_tile, tiled.k_tile).visited
        others = [t for t in product((1, 2, 4, 8, 16, 32, 64), repeat=len(shape)) if prod(t) == 64][
            :: 3 if len(shape) == 3 else 1
        ]
        assert visited == min([visited, *(tile_cost(pattern, shape, t, t).visited for t in others)])


def test_tiles_that_do_not_divide_are_refused_without_padding():
    with pytest.raises(OptionError, match="pad=True"):
        tile_cost(Neighborhood((10, 8), 3), (10, 8), (4, 4), (4, 4), pad=False)


def test_a_stride_beyond_the_kernel_is_refused():
    q = torch.zeros(1, 1, 64, 4)
    with pytest.raises(OptionError, match="stride of 5"):
        gna_attention(q, q, q, shape=(8, 8), kernel=4, stride=5)
