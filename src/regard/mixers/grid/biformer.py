"""Bi-level routing attention: regions choose regions by their means, places attend inside the chosen ones.

    A = C^-1/2 mean(q over region) mean(k over region)' ;  I = top-k of each row of A, without gradient
    out = W_o(softmax over the places of regions I of C^-1/2 q k', applied to v  +  LCE(v)),   LCE a 5 x 5 depthwise conv

Departs from the paper: none in the default. A grid that does not divide into regions is refused, or padded (`pad`).
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract.card import MixerCard
from regard.contract.errors import OptionError, ShapeError
from regard.engines.block_sparse import block_sparse
from regard.engines.dense import dense
from regard.engines.precision import accumulator, without_autocast
from regard.layers.conv_blocks import on_channels_first
from regard.layers.grids import check_grid, from_regions, head_width, to_regions
from regard.patterns.selection import BlockSelection

CARD = MixerCard(
    slug="biformer",
    part_of="biformer",
    title="Bi-level routing attention",
    exports=("BiLevelRoutingAttention", "bilevel_routing"),
    example="b=2 y=4 x=6 c=16 h=4",
    options={"regions": 2, "topk": 2, "lce": 3},
    attends=("self",),
    time="n w c",
    memory="n c",
)

PADS = (None, "mask", "legacy")


class BiLevelRoutingAttention(nn.Module):
    """Attention of every place to the places of the `topk` regions that its region chooses: (B, H, W, C) -> the same.

    regions: on each side. topk: regions chosen, at most regions^2; None for all places at once as the last stage of the
    released networks has it (projections without bias, scale D^-1/2, the convolution on the layer's input). lce: kernel
    of the depthwise convolution beside the attention, 0 for none. kv_pool: side of the places whose keys and values
    are averaged, None for none. soft: keys and values are multiplied by the softmax of the chosen scores, which then
    have a gradient. pad: a grid that regions do not divide is refused (None); padded at the end, without the padding
    taking part in attention or means ("mask"); or padded with zeros that take part, as the released segmentation
    networks do ("legacy"). Raises OptionError, ShapeError.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        regions: int = 7,
        topk: int | None = 4,
        lce: int = 5,
        kv_pool: int | None = None,
        soft: bool = False,
        pad: Literal["mask", "legacy"] | None = "mask",
    ):
        super().__init__()
        if regions < 1 or (topk is not None and not 1 <= topk <= regions**2):
            raise OptionError(f"topk is {topk}: of {regions} x {regions} regions, 1 to {regions**2} can be chosen")
        if lce < 0 or (lce and lce % 2 == 0):
            raise OptionError(f"lce is {lce}; it is an odd kernel, or 0 for no convolution")
        if pad not in PADS:
            raise OptionError(f"pad is {pad!r}; it is one of {', '.join(map(repr, PADS))}")
        if kv_pool is not None and kv_pool < 1:
            raise OptionError(f"kv_pool is {kv_pool}; it is a side of at least 1 place")
        if topk is None and (soft or kv_pool is not None):
            raise OptionError("soft and kv_pool are about chosen regions: give topk")
        if soft and topk is not None and topk < 2:
            warnings.warn(
                "the softmax over one chosen region is 1: soft routing needs topk of at least 2", stacklevel=2
            )
        self.dim, self.heads, self.head_dim = dim, heads, head_width(dim, heads)
        self.regions, self.topk, self.kv_pool, self.soft, self.pad = regions, topk, kv_pool, soft, pad
        self.scale = (dim if topk is not None else self.head_dim) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=topk is not None)
        self.lce = nn.Conv2d(dim, dim, lce, padding=lce // 2, groups=dim) if lce else None
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, padding: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Mix the places of a grid. Raises ShapeError; Unsupported for a context, padding or a causal call."""
        check_grid("BiLevelRoutingAttention", self.dim, x, context, padding, is_causal=is_causal)
        if self.topk is None:
            return self._attend_all(x)
        height, width = x.shape[1:3]
        down, right = -height % self.regions, -width % self.regions
        if (down or right) and self.pad is None:
            raise ShapeError(
                f"a grid of {height}x{width} does not divide into {self.regions}x{self.regions} regions: resize it, "
                'choose regions=, or pad="mask"'
            )
        if self.pad == "legacy":
            x = F.pad(x, (0, 0, 0, right, 0, down))
        qkv = self.qkv(x)
        beside = self._beside(qkv[..., 2 * self.dim :])
        valid = None
        if self.pad == "mask" and (down or right):
            qkv = F.pad(qkv, (0, 0, 0, right, 0, down))
            valid = F.pad(x.new_ones(height, width), (0, right, 0, down)).bool()
        out = self._attend_chosen(qkv, valid)
        out = out[:, : beside.shape[1], : beside.shape[2]]
        return self.proj(out + beside)[:, :height, :width]

    def _attend_all(self, x: Tensor) -> Tensor:
        q, k, v = self._split(self.qkv(x).flatten(1, 2))
        out = dense(q, k, v, scale=self.scale).out.transpose(1, 2).flatten(2).view_as(x)
        return self.proj(out + self._beside(x))

    def _attend_chosen(self, qkv: Tensor, valid: Tensor | None) -> Tensor:
        assert self.topk is not None
        s, (height, width) = self.regions, qkv.shape[1:3]
        side = (height // s, width // s)
        q, k, v = self._split(to_regions(qkv, s).flatten(1, 2))
        real = None if valid is None else to_regions(valid[None, ..., None], s)[0, ..., 0]
        scores = region_scores(q, k, s**2, valid=real)
        if self.kv_pool is not None:
            k, v, real = self._pool(k, v, real, side)
        hidden = None
        if real is not None:
            hidden = torch.zeros_like(real, dtype=q.dtype).masked_fill(~real, float("-inf"))
        if self.soft:
            out = _attend_soft(q, k, v, scores, hidden, topk=self.topk, scale=self.scale)
        else:
            block = (q.shape[2] // s**2, k.shape[2] // s**2)
            selection = BlockSelection(*block, choose_regions(scores, self.topk))
            bias = None if hidden is None else hidden.view(1, 1, 1, -1)
            out = block_sparse(q, k, v, selection, bias=bias, scale=self.scale).out
        return from_regions(out.transpose(1, 2).flatten(2).unflatten(1, (s * s, -1)), s, side)

    def _pool(
        self, k: Tensor, v: Tensor, valid: Tensor | None, side: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values averaged over kv_pool x kv_pool places, real ones only; and which averages have any."""
        p = self.kv_pool
        assert p is not None
        if side[0] % p or side[1] % p:
            raise ShapeError(f"regions of {side[0]}x{side[1]} places do not divide into squares of kv_pool = {p}")
        shape = (self.regions**2, side[0] // p, p, side[1] // p, p)
        if valid is None:
            k, v = (t.unflatten(2, shape).mean((4, 6)).flatten(2, 4) for t in (k, v))
            return k, v, None
        real = valid.view(shape)
        share = real / real.sum((2, 4), keepdim=True).clamp(min=1)
        k, v = ((t.unflatten(2, shape) * share[..., None].to(t.dtype)).sum((4, 6)).flatten(2, 4) for t in (k, v))
        return k, v, real.any(4).any(2).flatten(1)

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.unflatten(-1, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def _beside(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x) if self.lce is None else on_channels_first(self.lce, x)


def bilevel_routing(q: Tensor, k: Tensor, topk: int, regions: int, *, valid: Tensor | None = None) -> BlockSelection:
    """Which regions each region attends to, the same for all heads (section 3.2); the choice carries no gradient.

    q, k (B, H, N, D), the N tokens in `regions` equal runs. topk: regions chosen, at most `regions`. valid: bool
    (regions, N / regions), tokens that count in the means; a region without any is not chosen, its slot is -1.
    Raises OptionError, ShapeError.
    """
    if not 1 <= topk <= regions:
        raise OptionError(f"topk is {topk}: of {regions} regions, 1 to {regions} can be chosen")
    if q.shape[2] % regions or k.shape != q.shape:
        raise ShapeError(
            f"q is {tuple(q.shape)} and k {tuple(k.shape)}; both must be (B, H, N, D) with N a multiple of {regions}"
        )
    side = q.shape[2] // regions
    return BlockSelection(side, side, choose_regions(region_scores(q, k, regions, valid=valid), topk))


def region_scores(q: Tensor, k: Tensor, regions: int, *, valid: Tensor | None = None) -> Tensor:
    """Products of the means of queries and keys over regions, all heads together: (B, regions, regions), float32.

    A region without valid tokens gets -inf as a key.
    """
    kind = accumulator(q.dtype)
    q, k = (t.to(kind).unflatten(2, (regions, -1)) for t in (q, k))
    if valid is None:
        q, k = q.mean(3), k.mean(3)
    else:
        share = (valid / valid.sum(1, keepdim=True).clamp(min=1)).to(kind)[..., None]
        q, k = (q * share).sum(3), (k * share).sum(3)
    q, k = (t.transpose(1, 2).flatten(2) for t in (q, k))
    # in half precision a small difference of scores would choose another region
    with without_autocast(q.device):
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(1, 2)
    return scores if valid is None else scores.masked_fill(~valid.any(1), float("-inf"))


def choose_regions(scores: Tensor, topk: int) -> Tensor:
    """The regions of the largest scores, int32 (B, 1, regions, topk); -1 for a score of -inf."""
    values, indices = scores.detach().topk(topk, -1)
    return indices.masked_fill(torch.isneginf(values), -1).int()[:, None]


def _attend_soft(
    q: Tensor, k: Tensor, v: Tensor, scores: Tensor, hidden: Tensor | None, *, topk: int, scale: float
) -> Tensor:
    """Keys and values times the softmax of the chosen scores: each region has its own, so that they are gathered."""
    batch, heads, _, d = q.shape
    regions = scores.shape[1]
    values, index = scores.topk(topk, -1)
    weights = values.softmax(-1).to(k.dtype)[..., None, None, None]
    row = torch.arange(batch, device=q.device).view(-1, 1, 1)

    def gathered(t: Tensor) -> Tensor:
        picked = t.unflatten(2, (regions, -1)).transpose(1, 2)[row, index] * weights
        return picked.transpose(2, 3).flatten(3, 4).flatten(0, 1)

    bias = None if hidden is None else hidden[index].flatten(2).flatten(0, 1)[:, None, None]
    q = q.unflatten(2, (regions, -1)).transpose(1, 2).flatten(0, 1)
    out = dense(q, gathered(k), gathered(v), bias=bias, scale=scale).out
    return out.view(batch, regions, heads, -1, d).transpose(1, 2).flatten(2, 3)
