from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from regard import Halo, Neighborhood, OptionError, ShapeError
from regard.patterns.algebra import decode
from regard.patterns.tiled import Tiled
from regard.patterns.tiles import TilePermutation

# pattern, dilation of the groups, stride of the queries
CASES = [
    (Neighborhood((20,), 5, 3, 1, True), (3,), (1,)),
    (Neighborhood((7, 9), 3, (2, 3)), (2, 3), (1, 1)),
    (Neighborhood((9, 8), (3, 4), 1, (1, 2)), (1, 1), (1, 1)),
    (Neighborhood((8, 8), 4, 2, 3), (2, 2), (1, 1)),
    (Neighborhood((5, 6, 9), (2, 3, 4), (2, 1, 2), 1, (True, False, False)), (2, 1, 2), (1, 1, 1)),
    (Halo((8, 12), 4, 2), (1, 1), (1, 1)),
    (Halo((8, 12), 4, 1), (1, 1), (2, 2)),
    (Halo((6, 9), 3, 2), (1, 1), (1, 1)),
]


def sizes(tiled):
    return tiled.q.groups * tiled.q.length, tiled.k.groups * tiled.k.length


def positions(tiled):
    """The position of every row of queries and keys, -1 for padding."""
    shape = tiled.pattern.shape
    count = torch.arange(math.prod(shape)).view(shape) + 1
    strided = count[tuple(slice(None, None, s) for s in tiled.stride)]
    rows = tiled.to_queries(strided.reshape(1, -1), 1)[0] - 1
    return rows, tiled.to_keys(count.view(1, -1), 1)[0] - 1


@pytest.mark.parametrize("cells", [4, 16, 64])
@pytest.mark.parametrize("pattern, dilation, stride", CASES, ids=str)
def test_layout_mask_and_coordinates_are_those_of_the_grid(pattern, dilation, stride, cells):
    tiled = Tiled.best(pattern, cells=cells, dilation=dilation, stride=stride)
    n, m = sizes(tiled)
    rows, keys = positions(tiled)
    whole = F.pad(pattern.dense(pattern.tokens, pattern.tokens)[0, 0], (0, 1, 0, 1))
    expected = whole[rows][:, keys]
    layout = tiled.layout(n, m)
    assert (layout.block_q, layout.block_k) == (cells, cells)
    assert torch.equal(layout.dense()[0, 0], expected)
    assert torch.equal(tiled.dense(n, m)[0, 0], expected)
    for of_queries, place in ((True, rows), (False, keys)):
        for axis, found in enumerate(tiled.places(of_queries=of_queries)):
            inner = math.prod(pattern.shape[axis + 1 :])
            wanted = place // inner % pattern.shape[axis] // dilation[axis]
            assert torch.equal(found[place >= 0], wanted[place >= 0])


@pytest.mark.parametrize("pattern, dilation, stride", CASES, ids=str)
def test_there_and_back(pattern, dilation, stride):
    tiled = Tiled.best(pattern, cells=16, dilation=dilation, stride=stride)
    x = torch.randn(2, 3, math.prod(tiled.q.shape), 5)
    there = tiled.to_queries(x)
    assert torch.equal(tiled.from_queries(there), x)
    rows, _ = positions(tiled)
    assert (there[:, :, rows < 0] == 0).all()


@pytest.mark.parametrize(
    "shape, tile, dilation", [((7, 9), (2, 4), (2, 3)), ((5, 6, 7), (2, 2, 4), (1, 1, 2)), ((16,), 4, 3)]
)
def test_reordering_by_views_is_reordering_by_the_index(shape, tile, dilation):
    order = TilePermutation(shape, tile, dilation)
    x = torch.randn(2, 3, math.prod(shape), 5)
    index = order.index()
    wanted = torch.where((index < 0)[None, :, None, :, None], 0.0, x[:, :, index.clamp(min=0)].movedim(2, 1)).flatten(
        0, 1
    )
    assert torch.equal(order.permute(x), wanted)
    assert torch.equal(order.inverse(wanted), x)


def test_the_best_tiles_visit_least():
    # windows of 3 rows and 33 columns: wide tiles
    tiled = Tiled.best(Neighborhood((32, 128), (3, 33)))
    assert tiled.q_tile[1] > tiled.q_tile[0]


def test_it_travels_as_integers():
    tiled = Tiled.best(Neighborhood((7, 9), 3, (2, 3)), dilation=(2, 3))
    assert decode(tiled.code()) == tiled


def test_rows_in_another_order_are_refused():
    tiled = Tiled.best(Neighborhood((7, 9), 3))
    with pytest.raises(ShapeError, match="for 128 queries and 128 keys in tile order"):
        tiled.layout(63, 63)
    with pytest.raises(OptionError, match="its tiles"):
        tiled.layout(*sizes(tiled), block=(32, 32))


def test_flex_attention_takes_its_tiles():
    from torch.nn.attention.flex_attention import flex_attention

    pattern = Neighborhood((14, 20), 5, (2, 1))
    tiled = Tiled.best(pattern, cells=128, dilation=(2, 1))
    q, k, v = torch.randn(3, 1, 2, 280, 16).unbind(0)
    mask = tiled.flex(1, 2, *sizes(tiled))
    out = tiled.from_queries(flex_attention(tiled.to_queries(q), tiled.to_keys(k), tiled.to_keys(v), block_mask=mask))
    wanted = F.scaled_dot_product_attention(q, k, v, pattern.dense(280, 280))
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
