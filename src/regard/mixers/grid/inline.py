"""InLine attention on a grid, with a local convolution whose kernels are read from the mean of the input.

out = W_o(inline(q, k, v) + conv(v; r)),      r = W_2 gelu(W_1 mean(x)), 3 x 3 weights a channel, W_1, W_2 by head
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract.card import MixerCard
from regard.layers.grids import check_grid, head_width
from regard.ops.inline import inline_attention

CARD = MixerCard(
    slug="inline",
    part_of="inline",
    title="InLine attention with a local residual",
    builds_on=("inline",),
    exports=("InLineAttention2d",),
    example="b=2 y=4 x=5 c=16 h=4",
    attends=("self",),
    time="n c d",
    memory="n c",
)


class InLineAttention2d(nn.Module):
    """InLine attention of all places, and a 3 x 3 depthwise convolution made by the image: (B, H, W, C) -> the same.

    dim: width C. heads: H, dividing dim. qkv_bias: of the projections. Section 4.2; a class token, which the released
    networks leave out of the convolution, is not part of a grid. Raises OptionError, ShapeError, Unsupported.
    """

    def __init__(self, dim: int, heads: int = 8, *, qkv_bias: bool = True):
        super().__init__()
        self.dim, self.heads, self.head_dim = dim, heads, head_width(dim, heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.residual = nn.Sequential(
            nn.Conv1d(dim, dim, 1, groups=heads), nn.GELU(), nn.Conv1d(dim, 9 * dim, 1, groups=heads)
        )

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, padding: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Mix the places of a grid. Raises ShapeError; Unsupported for a context, padding or a causal call."""
        check_grid("InLineAttention2d", self.dim, x, context, padding, is_causal=is_causal)
        batch, height, width, _ = x.shape
        q, k, v = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        out = inline_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        kernels = self.residual(x.mean((1, 2))[..., None]).view(batch * self.dim, 1, 3, 3)
        image = v.transpose(-1, -2).reshape(1, batch * self.dim, height, width)
        local = F.conv2d(image, kernels, padding=1, groups=batch * self.dim).view(batch, self.dim, height, width)
        return self.proj(out + local.permute(0, 2, 3, 1))
