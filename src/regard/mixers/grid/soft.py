"""Softmax-free attention on a grid: landmarks by a strided convolution, values also through a convolution.

out = W_o(soft(q, v, gelu(norm(conv_rxr(q)))) + conv_kxk(v)),      q = W_q x / D^(1/4)

Departs from the released code: ratio 1 has landmarks of its own as every other ratio has them (there it cannot run).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract.card import MixerCard
from regard.contract.errors import OptionError, ShapeError
from regard.layers.grids import check_grid, head_width
from regard.ops.soft import soft_attention

CARD = MixerCard(
    slug="soft",
    part_of="soft",
    title="Softmax-free attention with convolved landmarks",
    builds_on=("soft",),
    exports=("SOFTAttention2d",),
    example="b=2 y=4 x=6 c=16 h=4",
    options={"ratio": 2},
    attends=("self",),
    time="n l c",
    memory="n l",
)


class SOFTAttention2d(nn.Module):
    """Softmax-free attention of all places and a convolution of the values: (B, H, W, C) -> the same (section 3.2).

    dim: width C. heads: H, dividing dim. ratio: the landmarks stand on a grid so many times coarser on each side, which
    must divide; their convolution is shared by the heads. conv: odd side of the convolution of the values, one kernel a
    head. symmetric_norm, newton_iters: see `soft_attention`. bias: in the projections. Raises OptionError.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        ratio: int = 2,
        conv: int = 3,
        symmetric_norm: bool = False,
        newton_iters: int = 20,
        bias: bool = True,
    ):
        super().__init__()
        if ratio < 1 or conv < 1 or conv % 2 == 0:
            raise OptionError(f"the ratio is at least 1 and the side of the convolution odd, not {ratio} and {conv}")
        self.dim, self.heads, self.head_dim = dim, heads, head_width(dim, heads)
        self.ratio, self.symmetric_norm, self.newton_iters = ratio, symmetric_norm, newton_iters
        self.to_q, self.to_v = nn.Linear(dim, dim, bias=bias), nn.Linear(dim, dim, bias=bias)
        self.to_out = nn.Linear(dim, dim, bias=bias)
        self.landmarks = nn.Conv2d(self.head_dim, self.head_dim, ratio, ratio, bias=False)
        self.norm = nn.LayerNorm(self.head_dim)
        self.local = nn.Conv2d(heads, heads, conv, padding=conv // 2, groups=heads, bias=False)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, padding: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Mix the places of a grid. Raises ShapeError; Unsupported for a context, padding or a causal call."""
        check_grid("SOFTAttention2d", self.dim, x, context, padding, is_causal=is_causal)
        batch, height, width, _ = x.shape
        if height % self.ratio or width % self.ratio:
            raise ShapeError(
                f"a grid of {height}x{width} does not divide by the ratio {self.ratio} of the landmarks: resize or crop "
                "the grid, or take another ratio"
            )
        q = self._heads(self.to_q(x) * self.head_dim**-0.25)
        v = self._heads(self.to_v(x))
        image = q.flatten(0, 1).transpose(1, 2).unflatten(2, (height, width))
        landmarks = F.gelu(self.norm(self.landmarks(image).flatten(2).transpose(1, 2)))
        landmarks = landmarks.unflatten(0, (batch, self.heads)).to(q.dtype)
        out = soft_attention(q, v, landmarks, symmetric_norm=self.symmetric_norm, newton_iters=self.newton_iters)
        # the channels of a head go through its kernel one by one
        channels = v.permute(0, 3, 1, 2).unflatten(3, (height, width)).flatten(0, 1)
        local = self.local(channels).unflatten(0, (batch, self.head_dim)).flatten(3).permute(0, 2, 3, 1)
        return self.to_out((out + local).transpose(1, 2).reshape(x.shape))

    def _heads(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
