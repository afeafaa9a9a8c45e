"""Figures of attention weights: how much keys get, which of them are sinks, how alike layers are."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.contract.errors import OptionError


def column_means(weights: Tensor, visible: Tensor | None = None) -> Tensor:
    """How much each key gets on average from the rows that may see it: (…, N, M) -> (…, M), float32 at least.

    visible: bool (…, N, M), True = may attend; None for causal rows, the last of which sees all keys. A key that no row
    sees gets 0.
    """
    n, m = weights.shape[-2:]
    if visible is None:
        visible = torch.ones(n, m, dtype=torch.bool, device=weights.device).tril(m - n)
    high = weights.to(torch.promote_types(weights.dtype, torch.float32))
    return high.masked_fill(~visible, 0.0).sum(-2) / visible.sum(-2).clamp(min=1)


def column_sinks(means: Tensor, bar: float | Tensor) -> Tensor:
    """The keys that get more than `bar` on average, but for the first of them in each row: bool (…, M) of means (…, M).

    bar: broadcastable to (…, M). The first one is the sink of the initial token, which stays (ACT, section 4).
    """
    above = means > bar
    return above & (above.long().cumsum(-1) > 1)


def sink_bar(tokens: Tensor, alpha: float | None, threshold: float | None) -> Tensor:
    """What a sink gets more than: alpha / tokens, or the threshold itself with alpha=None. Raises OptionError."""
    if (alpha is None) == (threshold is None):
        raise OptionError("give alpha=, a multiple of 1 / N, or threshold=, a mean weight, with alpha=None")
    return torch.tensor(threshold, dtype=torch.float64) if alpha is None else alpha / tokens


def layer_similarity(weights: Tensor, valid: Tensor | None = None) -> Tensor:
    """The cosine of the attention matrices of every two layers, the mean over texts and heads: (L, L).

    weights (L, B, H, N, N). valid: bool (B, N), False for pads, which count as 0. A head that attends to nothing is like
    nothing (0).
    """
    flat = weights.to(torch.promote_types(weights.dtype, torch.float32))
    if valid is not None:
        flat = flat * (valid[:, None, :, None] & valid[:, None, None, :])
    flat = flat.flatten(3)
    norm = flat.norm(dim=-1, keepdim=True)
    flat = flat / torch.where(norm == 0, torch.ones_like(norm), norm)
    return torch.einsum("lbhx,mbhx->lm", flat, flat) / (flat.shape[1] * flat.shape[2])


def entropy(weights: Tensor) -> Tensor:
    """The entropy of each row in nats: (…, N, M) -> (…, N), float32 at least; 0 for a row that attends nothing."""
    return torch.special.entr(weights.to(torch.promote_types(weights.dtype, torch.float32))).sum(-1)


def hops(grid: tuple[int, int]) -> Tensor:
    """How many rings lie between patches of a grid (h, w), row after row: int64 (h w, h w), 0 for a patch and itself."""
    y, x = (axis.flatten() for axis in torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij"))
    return torch.maximum((y[:, None] - y).abs(), (x[:, None] - x).abs())


def hop_profile(weights: Tensor, grid: tuple[int, int]) -> Tensor:
    """What patches give to the ring of patches k hops away, the mean over patches: (…, P, P) -> (…, max(h, w)).

    weights: of patch queries on patch keys, P = h w, row after row; float32 at least comes back. What a patch gives to
    other tokens is not in it, so that the profile sums to the rest.
    """
    apart = hops(grid).to(weights.device).flatten()
    high = weights.to(torch.promote_types(weights.dtype, torch.float32)).flatten(-2)
    rings = high.new_zeros(*high.shape[:-1], max(grid)).index_add(-1, apart, high)
    return rings / weights.shape[-2]


def attention_distance(weights: Tensor, grid: tuple[int, int]) -> Tensor:
    """How far patches look, in patches (Euclidean), the mean over patches that look at any: (…, P, P) -> (…).

    Weights are those of patch queries on patch keys, made to sum to 1 over patches.
    """
    h, w = grid
    place = torch.cartesian_prod(torch.arange(h), torch.arange(w)).to(weights.device, torch.float32)
    high = weights.to(torch.promote_types(weights.dtype, torch.float32))
    mass = high.sum(-1)
    # not cdist, which goes by products and is off by rounding
    far = (high * (place[:, None] - place).norm(dim=-1)).sum(-1) / mass.masked_fill(mass == 0, 1.0)
    return far.sum(-1) / (mass > 0).sum(-1).clamp(min=1)
