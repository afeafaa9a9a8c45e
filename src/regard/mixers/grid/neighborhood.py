"""The neighbourhood attention layer on grids of one, two or three axes.

    out = W_o concat_heads(neighborhood_attention(q, k, v)),      [q k v] = W_qkv x + b

Departs from the released layer: it does not turn off the relative bias and the dropout of the weights, which NATTEN
dropped in version 0.20.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract.card import MixerCard
from regard.contract.errors import OptionError
from regard.layers.grids import check_grid, head_width
from regard.ops.neighborhood import neighborhood_attention, per_axis

CARD = MixerCard(
    slug="neighborhood",
    part_of="neighborhood",
    title="Neighborhood attention layer",
    builds_on=("neighborhood",),
    exports=("NeighborhoodAttention",),
    example="b=2 y=5 x=7 c=16 h=4",
    options={"kernel": 3, "rpb": True},
    attends=("self", "causal_self"),
    time="n w c",
    memory="n c",
)

SMALL = ("error", "pad_legacy", "shrink")


class NeighborhoodAttention(nn.Module):
    """Attention of every place to the `kernel` places nearest to it on each axis: (B, *grid, C) -> (B, *grid, C).

    kernel, dilation, stride, causal: one value, or one an axis; see `neighborhood_attention`. axes: how many the grid
    has, 1 to 3. rpb: a learned bias for every offset, per head. dropout, out_dropout: shares of the weights and of the
    output that are dropped in training. small_input: what happens where kernel * dilation exceeds a side: "error";
    "pad_legacy", the input is padded with zeros at the end of each axis and the padding takes part, as DiNAT's weights
    expect; "shrink", the dilation becomes max(1, side // kernel) and the kernel min(kernel, side).
    Raises OptionError, ShapeError.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kernel: int | tuple[int, ...] = 7,
        dilation: int | tuple[int, ...] = 1,
        stride: int | tuple[int, ...] = 1,
        causal: bool | tuple[bool, ...] = False,
        axes: int = 2,
        rpb: bool = False,
        bias: bool = True,
        head_dim: int | None = None,
        dropout: float = 0.0,
        out_dropout: float = 0.0,
        small_input: Literal["error", "pad_legacy", "shrink"] = "error",
    ):
        super().__init__()
        if axes not in (1, 2, 3):
            raise OptionError(f"a grid has 1, 2 or 3 axes, not {axes}")
        if small_input not in SMALL:
            raise OptionError(f"small_input is {small_input!r}; it is one of {', '.join(SMALL)}")
        self.dim, self.heads, self.head_dim = dim, heads, head_width(dim, heads, head_dim)
        self.axes, self.small_input = axes, small_input
        self.kernel: tuple[int, ...] = per_axis("kernel", kernel, axes)
        self.dilation = per_axis("dilation", dilation, axes)
        self.stride = per_axis("stride", stride, axes)
        self.causal = per_axis("causal", causal, axes)
        self.dropout = dropout
        inner = heads * self.head_dim
        self.qkv = nn.Linear(dim, 3 * inner, bias=bias)
        self.rpb = nn.Parameter(torch.empty(heads, *(2 * k - 1 for k in self.kernel))) if rpb else None
        self.proj = nn.Linear(inner, dim)
        self.out_dropout = nn.Dropout(out_dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The relative bias starts with deviation 0.02; the projections are left to the frame."""
        if self.rpb is not None:
            nn.init.trunc_normal_(self.rpb, std=0.02)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, padding: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Mix the places of a grid. is_causal: no place after the query on any axis is seen.

        Raises ShapeError, OptionError; Unsupported for a context or padding.
        """
        check_grid("NeighborhoodAttention", self.dim, x, context, padding, axes=self.axes)
        shape, kernel, dilation = tuple(x.shape[1:-1]), self.kernel, self.dilation
        rpb: Tensor | None = self.rpb
        if any(k * d > side for k, d, side in zip(kernel, dilation, shape, strict=True)):
            x, kernel, dilation, rpb = self._fit(x)
        grid = tuple(x.shape[1:-1])
        q, k, v = self.qkv(x.flatten(1, -2)).unflatten(-1, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        out = neighborhood_attention(
            q, k, v, shape=grid, kernel=kernel, dilation=dilation, stride=self.stride,
            is_causal=True if is_causal else self.causal, rpb=rpb, dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip
        out = self.out_dropout(self.proj(out.transpose(1, 2).flatten(2))).unflatten(1, grid)
        return out if grid == shape else out[(slice(None), *(slice(side) for side in shape))]

    def _fit(self, x: Tensor) -> tuple[Tensor, tuple[int, ...], tuple[int, ...], Tensor | None]:
        """Grid, kernel, dilation and relative bias for a grid that is smaller than kernel * dilation."""
        shape = tuple(x.shape[1:-1])
        if self.small_input == "error":
            raise OptionError(
                f"the grid is {shape}, but the neighbourhood spans kernel {self.kernel} times dilation {self.dilation}: "
                'take a larger grid, or small_input="pad_legacy" or "shrink"'
            )
        if self.small_input == "pad_legacy":
            more = [max(0, k * d - side) for k, d, side in zip(self.kernel, self.dilation, shape, strict=True)]
            return F.pad(x, (0, 0, *(p for m in reversed(more) for p in (0, m)))), self.kernel, self.dilation, self.rpb
        kernel = tuple(min(k, side) for k, side in zip(self.kernel, shape, strict=True))
        wide = zip(self.kernel, self.dilation, shape, strict=True)
        dilation = tuple(d if k * d <= side else max(1, side // k) for k, d, side in wide)
        rpb: Tensor | None = self.rpb
        if rpb is not None:
            # the middle of the table: an offset keeps its bias
            cut = [slice(k - s, k + s - 1) for k, s in zip(self.kernel, kernel, strict=True)]
            rpb = rpb[(slice(None), *cut)]
        return x, kernel, dilation, rpb
