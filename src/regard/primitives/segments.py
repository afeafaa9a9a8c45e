"""Sums and softmax over groups of rows that lie anywhere: nodes of graphs, instances of bags."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.contract.errors import ShapeError


def segment_sum(x: Tensor, index: Tensor, count: int) -> Tensor:
    """Sum rows by segment: x (N, …), index int64 (N,) in 0 … count - 1, in any order -> (count, …), in x's dtype.

    A segment without rows gives 0. Summed in float32 (float64 stays). Raises ShapeError.
    """
    _check(x, index, count)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.new_zeros(count, *x.shape[1:]).index_add(0, index, wide).to(x.dtype)


def segment_softmax(scores: Tensor, index: Tensor, count: int) -> Tensor:
    """Softmax over the rows of each segment, entry by entry: scores (N, …) -> (N, …), in its dtype.

    index, count: as for `segment_sum`. A score of -inf has no part; a segment of nothing else gives 0 and gradient 0.
    Raises ShapeError.
    """
    _check(scores, index, count)
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    hidden = torch.isneginf(wide)
    # -inf enters as 0 and is cut afterwards: exp(-inf - -inf) is no number
    wide = wide.masked_fill(hidden, 0.0)
    place = index.view(-1, *(1,) * (scores.dim() - 1)).expand_as(wide)
    lowest = torch.full((count, *scores.shape[1:]), torch.finfo(wide.dtype).min, dtype=wide.dtype, device=wide.device)
    shown = wide.detach().masked_fill(hidden, torch.finfo(wide.dtype).min)
    top = lowest.scatter_reduce(0, place, shown, "amax").gather(0, place)
    parts = torch.exp((wide - top).masked_fill(hidden, 0.0)).masked_fill(hidden, 0.0)
    total = segment_sum(parts, index, count).gather(0, place)
    return (parts / total.masked_fill(total == 0, 1.0)).to(scores.dtype)


def _check(x: Tensor, index: Tensor, count: int) -> None:
    if x.dim() < 1 or index.dtype != torch.int64 or tuple(index.shape) != tuple(x.shape[:1]) or count < 0:
        raise ShapeError(
            f"index is {index.dtype} {tuple(index.shape)} for rows {tuple(x.shape)} and {count} segments; it must be "
            "int64, one number a row"
        )
    if index.numel() and not torch.compiler.is_compiling() and not index.is_meta:
        least, most = (int(edge) for edge in torch.aminmax(index))
        if least < 0 or most >= count:
            raise ShapeError(f"index runs from {least} to {most}; with {count} segments it must be in 0 … {count - 1}")
