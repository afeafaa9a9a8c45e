"""Agent attention on a grid: the agents are the means of the queries over the fields of a coarse grid.

out = W_o(softmax(s q a' + B2) softmax(s a k' + B1) v + conv3x3(v)),      a = pool(q), s = D^-1/2

B1, B2: a coarse image an agent, stretched to the grid, plus a number a row and a number a column of the grid.
Departs from the released networks: the tables are stretched too where the grid is another one; padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract.card import MixerCard
from regard.contract.errors import OptionError, ShapeError, Unsupported
from regard.layers.conv_blocks import on_channels_first
from regard.layers.grids import check_grid, head_width
from regard.ops.agent import agent_attention
from regard.patterns import KeyValid

CARD = MixerCard(
    slug="agent",
    part_of="agent",
    title="Agent attention with pooled agents",
    builds_on=("agent",),
    exports=("AgentAttention2d",),
    example="b=2 y=4 x=5 c=16 h=4",
    options={"agents": 4, "grid": (4, 5)},
    attends=("self",),
    padding=True,
    time="n l c",
    memory="n l",
)

# places on a side of the coarse images
_COARSE = 7


class AgentAttention2d(nn.Module):
    """Agent attention of all places and a 3 x 3 depthwise convolution of the values: (B, H, W, C) -> the same.

    dim: width C. heads: H, dividing dim. agents: a square number. grid: places (H, W) that the biases are made for;
    those of another grid are interpolated. prefix: class tokens in front of the places; they attend and are read, but
    stay out of the agents and the convolution. bias: in the projections of q, k, v. Section 4.2. Raises OptionError.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        agents: int = 49,
        grid: tuple[int, int] = (14, 14),
        prefix: int = 0,
        bias: bool = True,
    ):
        super().__init__()
        self.side = round(max(agents, 0) ** 0.5)
        if agents < 1 or self.side**2 != agents:
            raise OptionError(
                f"agents are means over the fields of a square grid: {agents} is not a square, such as 49"
            )
        if prefix < 0:
            raise OptionError(f"prefix is a number of tokens, at least 0, not {prefix}")
        self.dim, self.heads, self.head_dim, self.prefix = dim, heads, head_width(dim, heads), prefix
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)
        self.local = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.bias_ak = AgentBias(heads, agents, grid, prefix)
        self.bias_qa = AgentBias(heads, agents, grid, prefix)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        padding: Tensor | None = None,
        is_causal: bool = False,
        shape: tuple[int, int] | None = None,
    ) -> Tensor:
        """Mix the places of a grid, or with shape=(H, W) tokens (B, prefix + H W, C).

        padding: bool, as x without its channels, True = takes part; other places are neither pooled nor read, and their
        rows give exactly 0. Raises ShapeError; Unsupported for a context or a causal call.
        """
        if is_causal:
            raise Unsupported("agents pool over all queries: agent is not causal; neighborhood is, along every axis")
        height, width = self._check(x, context, padding, shape)
        tokens = x.flatten(1, -2)
        valid = None if padding is None else padding.flatten(1)
        q, k, v = self.qkv(tokens).chunk(3, -1)
        bias_qa = self.bias_qa((height, width)).transpose(-1, -2)
        pattern = None
        if valid is None:
            agents = self._pool(q, height, width)
        else:
            v, pattern = v.masked_fill(~valid[..., None], 0.0), KeyValid().bind(key_valid=valid)
            share = self._pool(valid[..., None].to(q.dtype), height, width)
            agents = self._pool(q.masked_fill(~valid[..., None], 0.0), height, width) / torch.where(share > 0, share, 1)
            # a field without places has no agent
            bias_qa = bias_qa.masked_fill((share == 0).transpose(1, 2)[:, None], float("-inf"))
        q, k, heads_of_v, agents = (self._heads(t) for t in (q, k, v, agents))
        bias_ak, bias_qa = self.bias_ak((height, width)).to(q.dtype), bias_qa.to(q.dtype)
        out = agent_attention(q, k, heads_of_v, agents, pattern=pattern, bias_ak=bias_ak, bias_qa=bias_qa)
        image = v[:, self.prefix :].unflatten(1, (height, width))
        local = on_channels_first(self.local, image).flatten(1, 2)
        out = self.proj(out.transpose(1, 2).flatten(2) + F.pad(local, (0, 0, self.prefix, 0)))
        if valid is not None:
            out = out.masked_fill(~valid[..., None], 0.0)
        return out.reshape(x.shape)

    def _check(
        self, x: Tensor, context: Tensor | None, padding: Tensor | None, shape: tuple[int, int] | None
    ) -> tuple[int, int]:
        if shape is None:
            check_grid("AgentAttention2d", self.dim, x, context)
            if self.prefix:
                raise ShapeError(f"a grid has no place for {self.prefix} class tokens: pass tokens and shape=(H, W)")
            shape = (x.shape[1], x.shape[2])
        else:
            if context is not None:
                raise Unsupported("agent reads no context: its agents are pooled from the tokens; softmax reads one")
            count = self.prefix + shape[0] * shape[1]
            if x.dim() != 3 or x.shape[1:] != (count, self.dim):
                raise ShapeError(
                    f"tokens are {tuple(x.shape)}; {self.prefix} class tokens and {shape[0]}x{shape[1]} places must be "
                    f"(B, {count}, {self.dim})"
                )
        if padding is not None and (padding.dtype != torch.bool or padding.shape != x.shape[:-1]):
            raise ShapeError(
                f"padding is {padding.dtype} {tuple(padding.shape)}; it must be bool {tuple(x.shape[:-1])}"
            )
        return shape

    def _pool(self, x: Tensor, height: int, width: int) -> Tensor:
        image = x[:, self.prefix :].transpose(1, 2).unflatten(2, (height, width))
        return F.adaptive_avg_pool2d(image, self.side).flatten(2).transpose(1, 2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)


class AgentBias(nn.Module):
    """A number for every head, agent and token: (heads, agents, prefix + H W) for a grid of H x W places.

    The number of a place is that of a coarse 7 x 7 image, bilinear, plus one of its row and one of its column.
    """

    def __init__(self, heads: int, agents: int, grid: tuple[int, int], prefix: int):
        super().__init__()

        def table(*axes: int) -> nn.Parameter:
            return nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, agents, *axes), std=0.02))

        self.coarse = table(_COARSE, _COARSE)
        self.rows, self.columns = table(grid[0], 1), table(1, grid[1])
        self.front = table(prefix) if prefix else None

    def forward(self, shape: tuple[int, int]) -> Tensor:
        places = (
            _stretch(self.coarse, shape) + _stretch(self.rows, (shape[0], 1)) + _stretch(self.columns, (1, shape[1]))
        )
        return places.flatten(2) if self.front is None else torch.cat((self.front, places.flatten(2)), -1)


def _stretch(table: Tensor, shape: tuple[int, int]) -> Tensor:
    if tuple(table.shape[2:]) == tuple(shape):
        return table
    return F.interpolate(table, size=shape, mode="bilinear", align_corners=False)
