"""Latent attention pooling: every token asks a learned dictionary, and the answers are averaged.

    u = h + W_o MHA(LN(h) W_q, LN(C) W_k, LN(C) W_v),   C: r learned latents,   out = mean of u + FF(LN(u)) over tokens

The tokens are the queries and the latents are keys and values, the reverse of a Perceiver. FF is GEGLU. Departs from the
released model: the output is not normalised (the embedder does that), and a row without tokens gives 0 instead of NaN.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract.card import PoolCard
from regard.contract.errors import OptionError
from regard.layers.pooling import check_tokens, masked_mean
from regard.ops.softmax import softmax_attention

CARD = PoolCard(
    slug="nv_embed",
    title="NV-Embed: latent attention pooling",
    paper="NV-Embed: Improved Techniques for Training LLMs as Generalist Embedding Models",
    builds_on=("softmax",),
    exports=("LatentAttentionPool",),
    example="b=2 n=9 c=12",
    options={"num_latents": 5, "heads": 2},
    time="n r c",
    memory="n c",
)


class LatentAttentionPool(nn.Module):
    """Tokens (B, N, C) as one vector (B, C) through attention of each token to learned latents (section 3.1).

    dim: C. num_latents: r. head_dim: dim / heads if None; the released model has head_dim = dim. ff_mult: inner width of
    the feed-forward over dim. Its state dict has the names of the released `latent_attention_model`. Raises OptionError,
    ShapeError.
    """

    def __init__(
        self, dim: int, *, num_latents: int = 512, heads: int = 8, head_dim: int | None = None, ff_mult: int = 4
    ):
        super().__init__()
        self.dim = dim
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.cross_attend_blocks = cross_attend_blocks(dim, heads, head_dim, ff_mult)

    def forward(self, x: Tensor, *, padding: Tensor | None = None) -> Tensor:
        """x (B, N, C); padding: bool (B, N), True for tokens that the mean is taken over."""
        check_tokens(x, padding, self.dim)
        blocks: Any = self.cross_attend_blocks
        attend, feed = blocks
        u = x + attend.fn(attend.norm(x), attend.norm_context(self.latents)[None])
        return masked_mean(u + feed.fn(feed.norm(u)), padding)


def cross_attend_blocks(dim: int, heads: int, head_dim: int | None, ff_mult: int) -> nn.ModuleList:
    """Attention between tokens and latents, then GEGLU, each behind its norms. Raises OptionError."""
    if head_dim is None:
        if dim % heads:
            raise OptionError(f"a width of {dim} does not divide into {heads} heads: give head_dim=")
        head_dim = dim // heads
    attention = _CrossAttention(dim, heads, head_dim)
    return nn.ModuleList([_Normed(dim, attention, context=True), _Normed(dim, _GeGLU(dim, dim * ff_mult))])


class _Normed(nn.Module):
    """A function with the norms of what it is given: `norm` of tokens or layers, `norm_context` of latents."""

    def __init__(self, dim: int, fn: nn.Module, *, context: bool = False):
        super().__init__()
        self.fn = fn
        self.norm = nn.LayerNorm(dim)
        if context:
            self.norm_context = nn.LayerNorm(dim)


class _CrossAttention(nn.Module):
    """Queries (B|1, N, C) attend to a source (B|1, M, C), of which `taken` bool (B, M) takes part; no biases."""

    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, x: Tensor, source: Tensor, taken: Tensor | None = None) -> Tensor:
        batch = max(x.shape[0], source.shape[0])
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2).expand(batch, -1, -1, -1)
            for t in (self.to_q(x), *self.to_kv(source).chunk(2, dim=-1))
        )
        mask = None if taken is None else taken[:, None, None]
        return self.to_out(softmax_attention(q, k, v, mask=mask).transpose(1, 2).flatten(2))


class _GeGLU(nn.Module):
    """(value * gelu(gate)) W2 + b2, value and gate from one projection: (…, C) -> (…, C)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        # the released names count an activation without weights between the two
        self.net = nn.ModuleDict({"0": nn.Linear(dim, 2 * hidden), "2": nn.Linear(hidden, dim)})

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.net["0"](x).chunk(2, dim=-1)
        return self.net["2"](value * F.gelu(gate))
