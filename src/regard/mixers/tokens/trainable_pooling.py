"""Multi-layer trainable pooling: learned queries read one vector of every layer.

    m_l = mean over tokens of layer l, + w_l (a learned vector of each layer),   l = 1 … L
    x = Z + W_o MHA(LN(Z) W_q, LN(m) W_k, LN(m) W_v),   Z: r learned latents,   out = mean over latents of x + FF(x)

Embeddings before the first layer are no layer. Departs from the released code: any number of layers (32 are written into
it); the output is not normalised (the embedder does that); padding says which tokens count, not the id of a pad.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard.contract.card import PoolCard
from regard.contract.errors import OptionError
from regard.layers.pooling import blank_rows, check_tokens, last_token, masked_mean
from regard.mixers.tokens.nv_embed import cross_attend_blocks

CARD = PoolCard(
    slug="trainable_pooling",
    title="Multi-layer trainable pooling",
    paper="Pooling And Attention: What Are Effective Designs For LLm-Based Embedding Models?",
    builds_on=("nv_embed",),
    exports=("MultiLayerPool", "LastLayerPool"),
    example="b=2 l=3 n=9 c=12",
    options={"num_layers": 3, "num_latents": 5, "heads": 2},
    time="l n c + r l c",
    memory="l c + r c",
)


class MultiLayerPool(nn.Module):
    """The tokens of all layers (B, L, N, C) as one vector (B, C) (section 3.2).

    dim: C. num_layers: L. num_latents: r. head_dim: dim / heads if None; the released models have 2048. ff_mult: inner
    width of the feed-forward over dim. of: what stands for a layer, the "mean" of its tokens or, for causal models, the
    "last" one. Its state dict has the names of the released `attn_pool`. Raises OptionError, ShapeError.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_layers: int,
        num_latents: int = 768,
        heads: int = 32,
        head_dim: int | None = None,
        ff_mult: int = 4,
        of: Literal["mean", "last"] = "mean",
    ):
        super().__init__()
        if of not in ("mean", "last"):
            raise OptionError(f'of a layer the "mean" or the "last" token is taken, not {of!r}')
        self.dim, self.num_layers, self.of = dim, num_layers, of
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.pos_emb = nn.Embedding(num_layers, dim)
        self.cross_attend_blocks = cross_attend_blocks(dim, heads, head_dim, ff_mult)

    def forward(self, x: Tensor, *, padding: Tensor | None = None) -> Tensor:
        """x (B, L, N, C), the first layer's output first; padding: bool (B, N), True for tokens that take part."""
        check_tokens(x, padding, self.dim, self.num_layers)
        taken = None if padding is None else padding.unsqueeze(1)
        layers = (masked_mean if self.of == "mean" else last_token)(x, taken) + self.pos_emb.weight.to(x.dtype)
        return blank_rows(_ask(self, layers), padding)


class LastLayerPool(nn.Module):
    """The tokens of the last layer (B, N, C) as one vector (B, C): learned queries read the tokens themselves (section 3.2).

    The one-layer pool that the paper compares with. Options and names as in MultiLayerPool. Departs from the released
    code: pads are not read.
    """

    def __init__(
        self, dim: int, *, num_latents: int = 768, heads: int = 32, head_dim: int | None = None, ff_mult: int = 4
    ):
        super().__init__()
        self.dim = dim
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.cross_attend_blocks = cross_attend_blocks(dim, heads, head_dim, ff_mult)

    def forward(self, x: Tensor, *, padding: Tensor | None = None) -> Tensor:
        """x (B, N, C); padding: bool (B, N), True for tokens that take part."""
        check_tokens(x, padding, self.dim)
        if padding is not None:
            # a pad may hold anything, and a weight of 0 times NaN is NaN
            x = x.masked_fill(~padding.unsqueeze(-1), 0.0)
        return blank_rows(_ask(self, x, padding), padding)


def _ask(pool: MultiLayerPool | LastLayerPool, source: Tensor, taken: Tensor | None = None) -> Tensor:
    """What the latents find in a source (B, M, C), averaged: (B, C)."""
    blocks: Any = pool.cross_attend_blocks
    attend, feed = blocks
    u = pool.latents + attend.fn(attend.norm_context(pool.latents)[None], attend.norm(source), taken)
    return (u + feed.fn(feed.norm(u))).mean(1)
