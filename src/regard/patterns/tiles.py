"""Grids in tile order: each tile of cells is one block of consecutive rows, so that patterns on grids have few, full tiles.

The cells that lie `dilation` apart form a group; groups become batch rows, each tiled on its own.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract.errors import OptionError, ShapeError
from regard.patterns.algebra import And, Or, Pattern, PerHead
from regard.patterns.grids import Neighborhood
from regard.patterns.layout import BlockLayout, lay_out_blocks, stack
from regard.patterns.rules import Boxes


@dataclass(frozen=True)
class TilePermutation:
    """Reorders the cells of a grid so that each n-D tile is one block.

    shape: cells on each axis. tile, dilation: cells, at least 1, a number or one per axis. pad: fill axes up to whole
    tiles; without it a tile that does not divide its axis (of a group) raises OptionError. Padding is never attended and
    attends nothing.
    """

    shape: tuple[int, ...]
    tile: int | tuple[int, ...]
    dilation: int | tuple[int, ...] = 1
    pad: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if not self.shape or min(self.shape) < 1:
            raise OptionError(f"a grid needs axes of at least one cell, not {self.shape}")
        for name in ("tile", "dilation"):
            value = getattr(self, name)
            sizes = (value,) * len(self.shape) if isinstance(value, int) else tuple(value)
            if len(sizes) != len(self.shape) or min(sizes) < 1:
                raise OptionError(f"the {name} of a grid {self.shape} is one number from 1 on per axis, not {value}")
            object.__setattr__(self, name, sizes)
        if any(d > length for d, length in zip(self.steps, self.shape, strict=True)):
            raise OptionError(f"a dilation of {self.steps} leaves groups without cells on a grid of {self.shape}")
        if not self.pad and any(
            self.group_shape(rest)[axis] % t for rest in self.rests() for axis, t in enumerate(self.sizes)
        ):
            raise OptionError(f"tiles of {self.sizes} do not divide the grid {self.shape}; use pad=True or other tiles")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The tile, one number per axis."""
        return self.tile  # type: ignore[return-value]

    @property
    def steps(self) -> tuple[int, ...]:
        """The dilation, one number per axis."""
        return self.dilation  # type: ignore[return-value]

    @property
    def block(self) -> int:
        """Cells of a tile."""
        return math.prod(self.sizes)

    @property
    def groups(self) -> int:
        """Batch rows that one becomes."""
        return math.prod(self.steps)

    @property
    def tiled_shape(self) -> tuple[int, ...]:
        """Cells on each axis of a group, with padding."""
        longest = (-(-length // d) for length, d in zip(self.shape, self.steps, strict=True))
        return tuple(-(-length // t) * t for length, t in zip(longest, self.sizes, strict=True))

    @property
    def length(self) -> int:
        """Rows of a group, with padding."""
        return math.prod(self.tiled_shape)

    def group_shape(self, rest: tuple[int, ...]) -> tuple[int, ...]:
        """Cells on each axis of the group of one rest modulo the dilation."""
        return tuple(-(-(length - r) // d) for length, d, r in zip(self.shape, self.steps, rest, strict=True))

    def index(self, device: torch.device | str | None = None) -> Tensor:
        """int64 (groups, length): the position of each row in tile order, -1 for padding."""
        return _index(self).to(device)

    def permute(self, x: Tensor, dim: int = 2) -> Tensor:
        """(B, …, N, …) in row-major order to (B * groups, …, length, …) in tile order; padding is zero."""
        if x.shape[dim] != math.prod(self.shape):
            raise ShapeError(
                f"axis {dim} of {tuple(x.shape)} must hold the {math.prod(self.shape)} cells of {self.shape}"
            )
        dim, axes = dim % x.dim(), len(self.shape)
        whole = [length * d for length, d in zip(self.tiled_shape, self.steps, strict=True)]
        x = x.unflatten(dim, self.shape)
        more = [side - length for side, length in zip(whole, self.shape, strict=True)]
        if any(more):
            x = F.pad(x, (*(0,) * (2 * (x.dim() - dim - axes)), *(p for m in reversed(more) for p in (0, m))))
        for axis, (side, t, d) in enumerate(zip(whole, self.sizes, self.steps, strict=True)):
            x = x.unflatten(dim + 3 * axis, (side // (t * d), t, d))
        before, after = range(1, dim), range(dim + 3 * axes, x.dim())
        tiles, cells, rests = ([dim + 3 * axis + part for axis in range(axes)] for part in range(3))
        out = x.permute(0, *rests, *before, *tiles, *cells, *after)
        sizes = (*x.shape[1:dim], self.length, *x.shape[dim + 3 * axes :])
        return out.reshape(x.shape[0] * self.groups, *sizes)

    def inverse(self, x: Tensor, dim: int = 2) -> Tensor:
        """Back from tile order to row-major order, padding dropped."""
        dim = dim % x.dim()
        if x.shape[dim] != self.length or x.shape[0] % self.groups:
            raise ShapeError(
                f"{tuple(x.shape)} is not in the order of these tiles: axis {dim} must hold {self.length} rows and "
                f"axis 0 a multiple of {self.groups} groups"
            )
        axes, batch = len(self.shape), x.shape[0] // self.groups
        counts = [length // t for length, t in zip(self.tiled_shape, self.sizes, strict=True)]
        whole = [length * d for length, d in zip(self.tiled_shape, self.steps, strict=True)]
        middle, after = x.shape[1:dim], x.shape[dim + 1 :]
        out = x.reshape(batch, *self.steps, *middle, *counts, *self.sizes, *after)
        first = 1 + axes + len(middle)
        parts = [p for axis in range(axes) for p in (first + axis, first + axes + axis, 1 + axis)]
        kept = range(1 + axes, first)
        out = out.permute(0, *kept, *parts, *range(first + 2 * axes, out.dim())).reshape(batch, *middle, *whole, *after)
        for axis, length in enumerate(self.shape):
            out = out.narrow(dim + axis, 0, length)
        return out.flatten(dim, dim + axes - 1)

    def layout(self, pattern: Pattern, *, batch: int = 1, device: torch.device | str | None = None) -> BlockLayout:
        """The tiles of a pattern in tile order, block = one tile; kept.

        B' is 1, or batch * groups if the groups differ in shape. Raises OptionError for a pattern of another grid, one
        with data, or one that joins cells of different groups.
        """
        found = grid_layout(pattern, self, self)
        return (found if found.batch == 1 else found.repeat(batch)).to(device)

    def boxes(self, rest: tuple[int, ...]) -> Boxes:
        """The tiles of one group as blocks of its own positions."""
        shape, sizes = self.group_shape(rest), self.sizes
        counts = [length // t for length, t in zip(self.tiled_shape, sizes, strict=True)]
        corner = torch.cartesian_prod(*(torch.arange(c) * t for c, t in zip(counts, sizes, strict=True)))
        within = torch.cartesian_prod(*(torch.arange(t) for t in sizes))
        first, within = corner.view(-1, len(shape)), within.view(-1, len(shape))
        cells = first[:, None] + within
        limit = torch.tensor(shape)
        strides = torch.tensor([math.prod(shape[axis + 1 :]) for axis in range(len(shape))])
        positions = (cells * strides).sum(2).masked_fill((cells >= limit).any(2), -1)
        return Boxes(shape, positions, first, torch.minimum(first + torch.tensor(sizes), limit) - 1)

    def rests(self) -> list[tuple[int, ...]]:
        """The group of each batch row, as its rests modulo the dilation."""
        return [
            tuple(rest) for rest in torch.cartesian_prod(*map(torch.arange, self.steps)).view(self.groups, -1).tolist()
        ]


@functools.lru_cache(maxsize=64)
def grid_layout(pattern: Pattern, q: TilePermutation, k: TilePermutation) -> BlockLayout:
    """The layout of a pattern with queries in the tiles of one permutation and keys in those of another of one grid."""
    if (q.shape, q.dilation) != (k.shape, k.dilation):
        raise OptionError("queries and keys are tiles of one grid with one dilation")
    if pattern.needs:
        raise OptionError(f"{pattern} has data bound by position; only patterns without data are laid out in tiles")
    if pattern.tokens not in (None, math.prod(q.shape)):
        raise OptionError(
            f"{pattern} has {pattern.tokens} positions, the grid {q.shape} has {math.prod(q.shape)}; tokens outside the "
            "grid go beside it as extra keys"
        )
    kept: dict[Pattern, BlockLayout] = {}
    layouts = []
    for rest in q.rests():
        inner = among_group(pattern, q.steps, rest)
        if inner not in kept:
            kept[inner] = lay_out_blocks(
                inner, q.boxes(rest), k.boxes(rest), n=q.length, m=k.length, block=(q.block, k.block)
            )  # fmt: skip
        layouts.append(kept[inner])
    return layouts[0] if len(kept) == 1 else stack(layouts)


def among_group(pattern: Pattern, dilation: tuple[int, ...], rest: tuple[int, ...]) -> Pattern:
    """The pattern among the cells of one group."""
    if all(d == 1 for d in dilation):
        return pattern
    if isinstance(pattern, Neighborhood):
        return pattern.subgrid(dilation, rest)
    if isinstance(pattern, And | Or):
        return type(pattern)(among_group(pattern.left, dilation, rest), among_group(pattern.right, dilation, rest))
    if isinstance(pattern, PerHead):
        return PerHead(tuple(among_group(p, dilation, rest) for p in pattern.patterns), pattern.kv_heads)
    raise OptionError(f"{pattern} does not fall into groups of cells {dilation} apart; only Neighborhood does")


@functools.lru_cache(maxsize=32)
def _index(permutation: TilePermutation) -> Tensor:
    rows = []
    steps = torch.tensor(permutation.steps)
    strides = torch.tensor([math.prod(permutation.shape[a + 1 :]) for a in range(len(permutation.shape))])
    for rest in permutation.rests():
        shape = permutation.group_shape(rest)
        place = permutation.boxes(rest).positions.flatten()
        cells = torch.stack(
            [place.clamp(min=0) // math.prod(shape[a + 1 :]) % length for a, length in enumerate(shape)], 1
        )
        rows.append(((cells * steps + torch.tensor(rest)) * strides).sum(1).masked_fill(place < 0, -1))
    return torch.stack(rows)
