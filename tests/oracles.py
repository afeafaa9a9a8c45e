"""Attention written as loops over rows, in float64: what the library is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def normal(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def coin(*shape: int, p: float = 0.6, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < p


def softmax_row(scores: Tensor) -> Tensor:
    weights = (scores - scores.max()).exp()
    return weights / weights.sum()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    weigh: Callable[[Tensor], Tensor] = softmax_row,
) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp) row by row; `weigh` sees the scores of the visible keys of one row only."""
    batch, heads, n, d = q.shape
    groups, m = k.shape[1], k.shape[2]
    q, k, v = q.double(), k.double(), v.double()
    scale = d**-0.5 if scale is None else scale
    seen = torch.ones(batch, heads, n, m, dtype=torch.bool) if allowed is None else allowed.expand(batch, heads, n, m)
    added = torch.zeros(batch, heads, n, m, dtype=torch.float64) if bias is None else bias.expand(batch, heads, n, m)
    out = torch.zeros(batch, heads, n, v.shape[-1], dtype=torch.float64)
    lse = torch.full((batch, heads, n), float("-inf"), dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            g = h * groups // heads
            for i in range(n):
                keys = [j for j in range(m) if seen[b, h, i, j]]
                if keys:
                    scores = torch.stack([scale * (q[b, h, i] * k[b, g, j]).sum() + added[b, h, i, j] for j in keys])
                    out[b, h, i] = (weigh(scores)[:, None] * v[b, g, keys]).sum(0)
                    lse[b, h, i] = scores.exp().sum().log()
    return out, lse


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float = 1.0,
    divide_by: str = "none",
    eps: float = 1e-6,
    key_valid: Tensor | None = None,
    reset: Tensor | None = None,
    s0: Tensor | None = None,
    z0: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, state, sum of keys) of linear attention, one step after the other, one head after the other."""
    batch, heads, n, d = q.shape
    share = heads // k.shape[1]
    outs, states, sums = [], [], []
    for b in range(batch):
        for h in range(heads):
            s = torch.zeros(d, v.shape[-1], dtype=q.dtype) if s0 is None else s0[b, h * s0.shape[1] // heads]
            z = torch.zeros(d, dtype=q.dtype) if z0 is None else z0[b, h * z0.shape[1] // heads]
            for t in range(n):
                if reset is not None and reset[b, t]:
                    s, z = torch.zeros_like(s), torch.zeros_like(z)
                if key_valid is None or key_valid[b, t]:
                    forget = 1.0 if g is None else (g[h] if g.dim() == 1 else g[b, h, t]).exp()
                    s = forget * s + k[b, h // share, t][:, None] * v[b, h // share, t]
                    z = forget * z + k[b, h // share, t]
                row, total = scale * q[b, h, t] @ s, scale * q[b, h, t] @ z
                if divide_by == "sum":
                    row = row / (total + eps)
                elif divide_by == "abs1":
                    row = row / max(total.abs(), torch.ones_like(total))
                outs.append(row)
            states.append(s)
            sums.append(z)
    return (
        torch.stack(outs).view(batch, heads, n, -1),
        torch.stack(states).view(batch, heads, d, -1),
        torch.stack(sums).view(batch, heads, d),
    )
