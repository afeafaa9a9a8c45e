"""Which pairs of positions may meet.

Belongs here: patterns as pure values, their algebra, their lowerings to masks and layouts, routers' selections.
Does not: soft masks, distances and tables (those are biases), anything with weights.
Look at: `atoms.py` and `grids.py` for the atoms, `algebra.py` for what is common to all, `layout.py` for the lowering.
"""

from regard.patterns.algebra import Bound, Pattern, PerHead, decode
from regard.patterns.atoms import (
    Band,
    BlockCausal,
    BlockLocal,
    Blocks,
    Causal,
    CoreContext,
    DilatedWindow,
    Documents,
    Empty,
    Explicit,
    Full,
    KeyValid,
    Prefix,
    SinkBand,
    Sinks,
    SlidingWindow,
    Strided,
    StridedBlocks,
)
from regard.patterns.grids import Axial, BlockGrid, Geometry, GridWindow, Halo, Neighborhood, Window
from regard.patterns.layout import BlockLayout
from regard.patterns.selection import BlockSelection, Permuted, Router, Selection, TokenSelection
from regard.patterns.tile_cost import TileCost, tile_cost
from regard.patterns.tiles import TilePermutation

__all__ = [
    "Axial",
    "Band",
    "BlockCausal",
    "BlockGrid",
    "BlockLayout",
    "BlockLocal",
    "BlockSelection",
    "Blocks",
    "Bound",
    "Causal",
    "CoreContext",
    "DilatedWindow",
    "Documents",
    "Empty",
    "Explicit",
    "Full",
    "Geometry",
    "GridWindow",
    "Halo",
    "KeyValid",
    "Neighborhood",
    "Pattern",
    "PerHead",
    "Permuted",
    "Prefix",
    "Router",
    "Selection",
    "SinkBand",
    "Sinks",
    "SlidingWindow",
    "Strided",
    "StridedBlocks",
    "TileCost",
    "TilePermutation",
    "TokenSelection",
    "Window",
    "decode",
    "tile_cost",
]
