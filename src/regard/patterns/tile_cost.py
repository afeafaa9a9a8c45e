"""What a block engine does for a pattern on a grid: how many tiles it visits, and how many of them it must mask.

    bound on the speed-up = tiles / visited tiles,      by arithmetic alone = pairs / pairs that may meet

A pattern is perfectly block-sparse if no tile is partial; then both are equal, up to ragged edges. Generalized
Neighborhood Attention, section 3. Departs from the paper: the tiles come from the layout that the engine itself uses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from regard.contract.errors import OptionError
from regard.patterns.algebra import Pattern
from regard.patterns.tiles import TilePermutation, grid_layout

Tile = int | tuple[int, ...]


@dataclass(frozen=True)
class TileCost:
    """visited: tiles with any pair; partial: those of them that need a mask; total: all tiles; heads are added up.

    bound_speedup: total / visited. flop_speedup: all pairs / pairs that may meet. Both are infinite for no pair.
    """

    visited: int
    partial: int
    total: int
    bound_speedup: float
    flop_speedup: float


def tile_cost(pattern: Pattern, shape: tuple[int, ...], q_tile: Tile, kv_tile: Tile, *, pad: bool = True) -> TileCost:
    """The cost of a pattern on a grid.

    q_tile, kv_tile: cells per axis of a tile in tile order, or a number: consecutive cells in row-major order. pad:
    False refuses tiles that do not divide the grid. Raises OptionError.
    """
    cells = math.prod(shape)
    if isinstance(q_tile, int) and isinstance(kv_tile, int):
        if not pad and (cells % q_tile or cells % kv_tile):
            raise OptionError(f"tiles of {q_tile} and {kv_tile} cells do not divide the {cells} of {tuple(shape)}")
        found = pattern.layout(cells, cells, block=(q_tile, kv_tile))
    elif isinstance(q_tile, tuple) and isinstance(kv_tile, tuple):
        q, k = TilePermutation(shape, q_tile, pad=pad), TilePermutation(shape, kv_tile, pad=pad)
        found = grid_layout(pattern, q, k)
    else:
        raise OptionError("q_tile and kv_tile are both tiles of the grid or both numbers of consecutive cells")
    total = -(-found.n // found.block_q) * -(-found.m // found.block_k) * found.heads
    pairs = found.pairs()
    return TileCost(
        found.visited,
        found.partial,
        total,
        total / found.visited if found.visited else math.inf,
        cells * cells * found.heads / pairs if pairs else math.inf,
    )
