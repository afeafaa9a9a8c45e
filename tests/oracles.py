"""Attention written as loops over rows, in float64: what the library is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from regard.patterns.layout import BlockLayout


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


def block_layout(mask: Tensor, q_offset: int = 0, block: int = 64) -> BlockLayout:
    """The layout of a bool mask (B', H', N, M), tile by tile and bit by bit; no tile is shared."""
    batch, heads, n, m = mask.shape
    rows, columns = -(-n // block), -(-m // block)
    words = -(-block // 64)
    padded = torch.zeros(batch, heads, rows * block, columns * block, dtype=torch.bool)
    padded[:, :, :n, :m] = mask
    bits: list[Tensor] = []
    lists: dict[str, list[list[int]]] = {"crow": [], "col": [], "tile": [], "crow_t": [], "row_t": [], "tile_t": []}
    for b in range(batch):
        for h in range(heads):
            marks = torch.full((rows, columns), -1, dtype=torch.int64)
            for r in range(rows):
                for c in range(columns):
                    valid = mask[b, h, r * block : (r + 1) * block, c * block : (c + 1) * block]
                    if valid.all():
                        marks[r, c] = 0
                    elif valid.any():
                        bits.append(padded[b, h, r * block : (r + 1) * block, c * block : (c + 1) * block])
                        marks[r, c] = len(bits)
            for table, suffix in ((marks, ""), (marks.T, "_t")):
                seen = table >= 0
                lists["crow" + suffix].append([0, *seen.sum(1).cumsum(0).tolist()])
                lists[("col" if not suffix else "row") + suffix].append(seen.nonzero()[:, 1].tolist())
                lists["tile" + suffix].append(table[seen].tolist())
    longest = max([len(x) for x in lists["col"]], default=0)
    tensors = {
        name: torch.tensor(
            [x if name.startswith("crow") else x + [-1] * (longest - len(x)) for x in many], dtype=torch.int32
        ).view(batch, heads, -1 if many and (longest or name.startswith("crow")) else 0)
        for name, many in lists.items()
    }
    tiles = torch.stack(bits) if bits else torch.zeros(0, block, block, dtype=torch.bool)
    return BlockLayout(
        block, block, n, m, q_offset, bits=_words(tiles, words), bits_t=_words(tiles.transpose(1, 2), words), **tensors
    )


def _words(tiles: Tensor, words: int) -> Tensor:
    """Bool (T, rows, columns) as int64 (T, rows, words), bit j of word w = column 64 w + j."""
    padded = torch.zeros(*tiles.shape[:2], words * 64, dtype=torch.int64)
    padded[..., : tiles.shape[2]] = tiles
    # the sum wraps at bit 63, which is what a sign bit is
    return (padded.view(*tiles.shape[:2], words, 64) << torch.arange(64)).sum(-1)
