"""A pattern on a grid as a pattern on rows in tile order, so that engines find few tiles, and full ones."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.contract.errors import OptionError, ShapeError
from regard.patterns.algebra import NO_DATA, Data, Pattern, decode
from regard.patterns.grids import GridPattern
from regard.patterns.layout import BlockLayout, lay_out_blocks, stack
from regard.patterns.rules import Boxes
from regard.patterns.tiles import TilePermutation, among_group

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, repr=False)
class Tiled(Pattern):
    """A pattern on a grid for queries and keys that `to_queries` and `to_keys` have put into tile order.

    pattern: on the grid, without data. q_tile, k_tile: queries and keys of a tile on each axis. dilation: cells that lie
    so far apart form a group; groups follow one another. stride: the queries are the cells at multiples of it, with
    dilation 1. The layout has one block per tile. Raises OptionError.
    """

    pattern: GridPattern
    q_tile: tuple[int, ...]
    k_tile: tuple[int, ...]
    dilation: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def best(
        cls,
        pattern: GridPattern,
        *,
        cells: int = 64,
        dilation: tuple[int, ...] | None = None,
        stride: tuple[int, ...] | None = None,
    ) -> Tiled:
        """The tiles of `cells` cells (a power of two) of which the fewest pairs are visited."""
        ones = (1,) * len(pattern.shape)
        dilation, stride = dilation or ones, stride or ones
        return cls(pattern, *_best_tiles(pattern.code(), cells, dilation, stride), dilation, stride)

    @property
    def q(self) -> TilePermutation:
        """The order of the queries."""
        cells = tuple(-(-length // s) for length, s in zip(self.pattern.shape, self.stride, strict=True))
        return TilePermutation(cells, self.q_tile, self.dilation)

    @property
    def k(self) -> TilePermutation:
        """The order of the keys."""
        return TilePermutation(self.pattern.shape, self.k_tile, self.dilation)

    def to_queries(self, x: Tensor, dim: int = 2) -> Tensor:
        """(…, N, …) in row-major order to (…, rows, …) in tile order, group after group; padding is 0."""
        return _in_line(self.q, x, dim)

    def to_keys(self, x: Tensor, dim: int = 2) -> Tensor:
        """As `to_queries`, for keys and values."""
        return _in_line(self.k, x, dim)

    def from_queries(self, x: Tensor, dim: int = 2) -> Tensor:
        """Back to row-major order, padding dropped."""
        order, dim = self.q, dim % x.dim()
        if order.groups > 1:
            x = x.unflatten(dim, (order.groups, -1)).movedim(dim, 1).flatten(0, 1)
        return order.inverse(x, dim)

    def places(self, *, of_queries: bool, device: torch.device | None = None) -> list[Tensor]:
        """The coordinate of every row on each axis, int64; in steps of the dilation, within its group."""
        order, step = (self.q, self.stride) if of_queries else (self.k, (1,) * len(self.k_tile))
        shape = tuple(length * d for length, d in zip(order.tiled_shape, order.steps, strict=True))
        whole = replace(order, shape=shape)
        found = []
        for axis, (length, s, d) in enumerate(zip(shape, step, order.steps, strict=True)):
            line = torch.arange(length, device=device) // d * s
            line = line.view(length, *(1,) * (len(shape) - axis - 1)).expand(shape).reshape(1, -1)
            found.append(_in_line(whole, line, 1)[0])
        return found

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor:
        (x, real_x), (y, real_y) = (
            _cells(self.q, i, self.pattern.shape, self.stride),
            _cells(self.k, j, self.pattern.shape),
        )
        return self.pattern.allowed(b, h, x, y, data) & real_x & real_y

    def check(self, n: int, m: int, q_offset: int, data: Data) -> None:
        rows, keys = (order.groups * order.length for order in (self.q, self.k))
        if (n, m, q_offset) != (rows, keys, 0):
            raise ShapeError(
                f"{self} is for {rows} queries and {keys} keys in tile order from position 0 on, not for {n} and {m} from "
                f"{q_offset} on: to_queries and to_keys put them into this order"
            )

    def layout(
        self,
        n: int,
        m: int,
        *,
        block: tuple[int, int] | None = None,
        q_offset: int = 0,
        device: torch.device | str | None = None,
        data: Data = NO_DATA,
    ) -> BlockLayout:
        """The tiles that may hold a pair; the block is the tile."""
        self.check(n, m, q_offset, data)
        tiles = (self.q.block, self.k.block)
        if block not in (None, tiles):
            raise OptionError(f"the blocks of {self} are its tiles of {tiles} cells, not {block}")
        return _layout(self).to(device)

    def flex(
        self,
        batch: int,
        heads: int,
        n: int,
        m: int,
        *,
        block: int = 128,
        q_offset: int = 0,
        device: torch.device | str | None = None,
        data: Data = NO_DATA,
    ) -> BlockMask:
        """The tiles as a BlockMask; the block must be the tile."""
        from regard.patterns.flex import layout_mask

        return layout_mask(
            self.layout(n, m, block=(block, block), q_offset=q_offset, device=device, data=data), batch, heads
        )


def block_cells(device: torch.device) -> int:
    """Cells of a tile that suit the engines of a device: the native kernels have blocks of 64, FlexAttention of 128."""
    return 128 if device.type == "cuda" else 64


def _in_line(order: TilePermutation, x: Tensor, dim: int) -> Tensor:
    dim = dim % x.dim()
    x = order.permute(x, dim)
    return x if order.groups == 1 else x.unflatten(0, (-1, order.groups)).movedim(1, dim).flatten(dim, dim + 1)


def _cells(
    order: TilePermutation, row: Tensor, shape: tuple[int, ...], stride: tuple[int, ...] | None = None
) -> tuple[Tensor, Tensor]:
    """(position on the grid, whether the row is a cell and not padding)."""
    group, row = row // order.length, row % order.length
    tile, inner = row // order.block, row % order.block
    place, real, inside = 0 * row, row >= 0, 1
    for axis in reversed(range(len(shape))):
        t, d = order.sizes[axis], order.steps[axis]
        count = order.tiled_shape[axis] // t
        x = (tile % count * t + inner % t) * d + group % d
        x = x if stride is None else x * stride[axis]
        tile, inner, group = tile // count, inner // t, group // d
        real = real & (x < shape[axis])
        place = place + x.clamp(max=shape[axis] - 1) * inside
        inside *= shape[axis]
    return place, real


@functools.lru_cache(maxsize=64)
def _layout(tiled: Tiled) -> BlockLayout:
    q, k = tiled.q, tiled.k
    kept: dict[Pattern, BlockLayout] = {}
    layouts = []
    for rest in q.rests():
        inner = among_group(tiled.pattern, q.steps, rest)
        if inner not in kept:
            boxes = q.boxes(rest) if max(tiled.stride) == 1 else _strided(tiled)
            kept[inner] = lay_out_blocks(inner, boxes, k.boxes(rest), n=q.length, m=k.length, block=(q.block, k.block))
        layouts.append(kept[inner])
    return layouts[0] if len(layouts) == 1 else _follow(stack(layouts))


def _strided(tiled: Tiled) -> Boxes:
    """The tiles of strided queries as blocks of positions on the whole grid."""
    order, shape = tiled.q, tiled.pattern.shape
    boxes, steps = order.boxes((0,) * len(shape)), torch.tensor(tiled.stride)
    place, positions = boxes.positions, torch.zeros_like(boxes.positions)
    for axis, length in enumerate(order.shape):
        x = place.clamp(min=0) // math.prod(order.shape[axis + 1 :]) % length
        positions += x * tiled.stride[axis] * math.prod(shape[axis + 1 :])
    return Boxes(shape, positions.masked_fill(place < 0, -1), boxes.first * steps, boxes.last * steps)


def _follow(groups: BlockLayout) -> BlockLayout:
    """Batch rows of a layout one after the other, as one sequence; none has a ragged end."""
    count = groups.batch

    def line(crow: Tensor, across: Tensor, tile: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        held = crow[:, 0, -1:]
        before = held.cumsum(0) - held
        starts = torch.cat(((crow[:, 0, :-1] + before).flatten(), held.sum()[None])).int()
        there = torch.arange(across.shape[2]) < held
        across = across[:, 0] + step * torch.arange(count)[:, None]
        return starts[None, None], across[there].int()[None, None], tile[:, 0][there][None, None]

    crow, col, tile = line(groups.crow, groups.col, groups.tile, groups.m // groups.block_k)
    crow_t, row_t, tile_t = line(groups.crow_t, groups.row_t, groups.tile_t, groups.n // groups.block_q)
    return replace(
        groups, n=groups.n * count, m=groups.m * count, crow=crow, col=col, tile=tile, crow_t=crow_t, row_t=row_t,
        tile_t=tile_t,
    )  # fmt: skip


def _best_tiles(
    code: tuple[int, ...], cells: int, dilation: tuple[int, ...], stride: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return _found_tiles(tuple(code), cells, tuple(dilation), tuple(stride))


# a search over shapes that is settled when a graph is made
torch.compiler.assume_constant_result(_best_tiles)


@functools.lru_cache(maxsize=256)
def _found_tiles(
    code: tuple[int, ...], cells: int, dilation: tuple[int, ...], stride: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    pattern = decode(code)
    assert isinstance(pattern, GridPattern)
    group = among_group(pattern, dilation, (0,) * len(dilation))
    assert isinstance(group, GridPattern)
    lines = [torch.arange(length) for length in group.shape]
    seen = [
        group._meets(a, x[::s, None], x).expand(-1, len(x)) for a, (x, s) in enumerate(zip(lines, stride, strict=True))
    ]
    splits = _splits(cells, len(seen))
    best, least = (splits[0], splits[0]), math.inf
    for q_tile in splits:
        for k_tile in splits if max(stride) > 1 else [q_tile]:
            # the pattern is a product over the axes, and so is the number of tiles
            visited = math.prod(_visited(m, t, s) for m, t, s in zip(seen, q_tile, k_tile, strict=True))
            # of equal numbers, the squarer tile
            cost = visited * (1 + 1e-6 * (max(q_tile) + max(k_tile)))
            if cost < least:
                best, least = (q_tile, k_tile), cost
    return best


def _splits(cells: int, axes: int) -> list[tuple[int, ...]]:
    """Powers of two, one per axis, whose product is `cells`."""
    if axes == 1:
        return [(cells,)]
    powers = [2**e for e in range(cells.bit_length())]
    return [(p, *rest) for p in powers for rest in _splits(cells // p, axes - 1)]


def _visited(seen: Tensor, q_tile: int, k_tile: int) -> int:
    rows, keys = (-(-length // t) for length, t in zip(seen.shape, (q_tile, k_tile), strict=True))
    whole = seen.new_zeros(rows * q_tile, keys * k_tile)
    whole[: seen.shape[0], : seen.shape[1]] = seen
    return int(whole.view(rows, q_tile, keys, k_tile).any(3).any(1).sum())
