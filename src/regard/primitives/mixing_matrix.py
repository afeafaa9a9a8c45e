"""The matrix by which an op mixes values, read from the op itself: column j is its output for values 1 at key j alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regard.contract.errors import OptionError, ShapeError, Unsupported


def mixing_matrix(op: Callable[..., Tensor], q: Tensor, k: Tensor, v_width: int, **options: Any) -> Tensor:
    """The matrix P of out = P v: q (B, H, N, D), k (B, G, M, D) -> (B, H, N, M), differentiable in q and k.

    op: called as op(q, k, v, **options), ceil(M / v_width) times and once more on random values, which must come out
    as P v: within sqrt(eps) of the dtype. v_width: width of the values that it is called with, at least 1. options: the
    op's own. Raises Unsupported for an op that is not linear in v, or mixes the channels of v or heads; ShapeError,
    OptionError.
    """
    if q.dim() != 4 or k.dim() != 4:
        raise ShapeError(f"q is {tuple(q.shape)}, k {tuple(k.shape)}; they must be (B, H, N, D) and (B, G, M, D)")
    if v_width < 1:
        raise OptionError(f"v_width is the width of the values, at least 1, not {v_width}")
    batch, groups, m, _ = k.shape
    columns = []
    for first in range(0, m, v_width):
        one_hot = torch.zeros(m, v_width, dtype=k.dtype, device=k.device)
        count = min(v_width, m - first)
        one_hot[first : first + count, :count] = torch.eye(count, dtype=k.dtype, device=k.device)
        out = op(q, k, one_hot.expand(batch, groups, m, v_width), **options)
        wanted = (*q.shape[:3], v_width)
        if tuple(out.shape) != wanted:
            raise ShapeError(f"{_name(op)} gave {tuple(out.shape)}; an output of values of width {v_width} is {wanted}")
        columns.append(out[..., :count])
    matrix = torch.cat(columns, -1) if columns else q.new_zeros(*q.shape[:3], 0)
    _check_linear(op, q, k, matrix, v_width, options)
    return matrix


@torch.no_grad()
def _check_linear(
    op: Callable[..., Tensor], q: Tensor, k: Tensor, matrix: Tensor, v_width: int, options: dict[str, Any]
) -> None:
    # a generator of its own: the caller's random numbers stay as they are
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(*k.shape[:3], v_width, dtype=torch.float64, generator=generator).to(k)
    expected = matrix.to(torch.float64) @ v.to(torch.float64).repeat_interleave(q.shape[1] // k.shape[1], 1)
    found = op(q, k, v, **options).to(torch.float64)
    allowed = torch.finfo(q.dtype).eps ** 0.5 * expected.abs().amax().clamp(min=1e-30) if expected.numel() else 0.0
    if expected.numel() and not bool((found - expected).abs().amax() <= allowed):
        raise Unsupported(
            f"{_name(op)} has no mixing matrix: it is not linear in v, key by key and channel by channel "
            "(softmax, linear and lightning are)"
        )


def _name(op: Callable[..., Tensor]) -> str:
    card = getattr(op, "card", None)
    return str(card.slug if card is not None else getattr(op, "__name__", type(op).__name__))
