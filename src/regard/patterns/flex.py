"""Patterns for torch's flex_attention: block lists from the layout, so that the table of pairs is never built."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from regard.contract.errors import OptionError, ShapeError
from regard.patterns.layout import BlockLayout, lay_out
from regard.patterns.rules import Data, HasRule

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def block_mask(
    pattern: HasRule,
    batch: int,
    heads: int,
    n: int,
    m: int,
    block: int,
    q_offset: int,
    device: torch.device | str | None,
    data: Data,
) -> BlockMask:
    """The BlockMask of a pattern for `heads` query heads (with grouped heads: enable_gqa=True).

    block: rows and keys of a block, a multiple of the kernel's tile on a GPU. Raises OptionError, ShapeError.
    """
    if block < 1:
        raise OptionError(f"the blocks of a BlockMask need at least 1 row, not {block}")
    layout = lay_out(pattern, n, m, (block, block), q_offset, device, data)

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return pattern.allowed(b, h, i + q_offset, j, data)

    return _from_layout(layout, batch, heads, mask_mod)


def layout_mask(layout: BlockLayout, batch: int, heads: int) -> BlockMask:
    """The BlockMask of any layout with square blocks, such as that of a selection: pairs are read from its bits."""
    if layout.block_q != layout.block_k:
        raise OptionError(f"a BlockMask has square blocks, not {layout.block_q} by {layout.block_k}")
    block = layout.block_q
    rows, columns = -(-layout.n // block), -(-layout.m // block)
    row = _rows_of_entries(layout, rows)
    table = torch.full((layout.batch, layout.heads, rows, columns), -1, dtype=torch.int32, device=layout.col.device)
    b, h, place = (layout.col >= 0).nonzero(as_tuple=True)
    table[b, h, row[b, h, place], layout.col[b, h, place].long()] = layout.tile[b, h, place]
    # tile 0, all pairs, gets bits too
    bits = torch.cat((torch.full_like(layout.bits[:1], -1), layout.bits)) if len(layout.bits) else layout.bits
    one_batch, one_head = layout.batch == 1, layout.heads == 1

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        tile = table[b * 0 if one_batch else b, h * 0 if one_head else h, i // block, j // block]
        if not len(bits):
            return tile >= 0
        word = bits[tile.clamp(min=0), i % block, j % block // 64]
        return (tile >= 0) & ((word >> (j % block % 64)) & 1 == 1)

    return _from_layout(layout, batch, heads, mask_mod)


def _from_layout(layout: BlockLayout, batch: int, heads: int, mask_mod: MaskMod) -> BlockMask:
    if layout.batch not in (1, batch) or layout.heads not in (1, heads):
        raise ShapeError(f"the layout is for batch {layout.batch} and {layout.heads} heads, not {batch} and {heads}")
    block, n, m = layout.block_q, layout.n, layout.m
    rows, columns = -(-n // block), -(-m // block)
    row, full = _rows_of_entries(layout, rows), layout.tile == 0
    # torch does not look at the bounds inside full blocks, so ragged ones go with those that need the mask
    if n % block:
        full = full & (row < rows - 1)
    if m % block:
        full = full & (layout.col < columns - 1)
    there = layout.col >= 0
    partial, whole = (_compact(layout.col, row, chosen & there, rows, columns) for chosen in (~full, full))
    return BlockMask.from_kv_blocks(*partial, *whole, BLOCK_SIZE=block, mask_mod=mask_mod, seq_lengths=(n, m))


def _rows_of_entries(layout: BlockLayout, rows: int) -> Tensor:
    """int64 (B', H', nnz): the query block of each tile."""
    place = torch.arange(layout.col.shape[-1], device=layout.col.device)
    ends = layout.crow[..., 1:].contiguous()
    found = torch.searchsorted(ends, place.to(torch.int32).expand(*ends.shape[:2], -1).contiguous(), right=True)
    return found.clamp(max=max(rows - 1, 0))


def _compact(col: Tensor, row: Tensor, chosen: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """(how many blocks each row has, int32 (B', H', nQ); their columns in front, int32 (B', H', nQ, nK))."""
    batch, heads = col.shape[:2]
    counts = torch.zeros(batch, heads, rows, dtype=torch.int64, device=col.device)
    counts.scatter_add_(2, row, chosen.long())
    b, h, place = chosen.nonzero(as_tuple=True)
    line = row[b, h, place]
    # the index of a chosen block among those of its row
    starts = counts.cumsum(2) - counts
    rank = (chosen.long().cumsum(2) - 1)[b, h, place] - starts[b, h, line]
    indices = torch.zeros(batch, heads, rows, columns, dtype=torch.int32, device=col.device)
    indices[b, h, line, rank] = col[b, h, place]
    return counts.int(), indices
