"""Gated short convolution, the local layer that recall benchmarks set before a mixer (BaseConv of Zoology).

y = (x W + b) * conv(x),      a depthwise causal convolution of a few tokens

BASED's released models have silu(conv(x)) without a bias in the convolution.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract.card import MixerCard
from regard.contract.errors import OptionError, Unsupported
from regard.layers.attention import check_tokens
from regard.layers.caches import ConvState
from regard.layers.causal_conv import CausalConv1d

CARD = MixerCard(
    slug="short_conv",
    title="Gated short convolution",
    baseline=True,
    exports=("GatedShortConv",),
    example="b=2 n=10 c=16 h=4",
    attends=("causal_self",),
    padding=True,
    documents=True,
    decode=True,
    constant_state=True,
    time="n c",
    memory="n c",
)


class GatedShortConv(nn.Module):
    """A linear gate times a short causal convolution (Zoology, section 4; BASED, appendix).

    dim: model width. heads: taken for the frame's sake and not used: convolutions have none. kernel: tokens, at
    least 1. expand: inner width over dim. form: "zoology", or "based" with a silu behind a convolution without bias.
    Raises OptionError; Unsupported for a context or is_causal=False.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        kernel: int = 3,
        expand: int = 1,
        form: Literal["zoology", "based"] = "zoology",
    ):
        super().__init__()
        if form not in ("zoology", "based"):
            raise OptionError(f"form is {form!r}; it is 'zoology' or 'based'")
        self.form = form
        inner = expand * dim
        self.dim = dim
        self.up = nn.Linear(dim, inner) if expand != 1 else nn.Identity()
        self.gate = nn.Linear(dim, inner)
        self.conv = CausalConv1d(inner, kernel, bias=form == "zoology")
        self.down = nn.Linear(inner, dim) if expand != 1 else nn.Identity()

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        padding: Tensor | None = None,
        reset: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Mix tokens (B, N, C) causally. padding: bool (B, N), True = takes part. reset: bool (B, N)."""
        if context is not None or not is_causal:
            raise Unsupported("a short convolution is causal and reads no context; softmax does both")
        check_tokens("GatedShortConv", self.dim, x, None, padding, reset, is_causal)
        return self._gated(x, self.conv(self._inner(x, padding), reset=reset))

    def init_state(
        self, batch: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> ConvState:
        """The state before the first token: zeros."""
        return self.conv.init_state(batch, dtype=dtype, device=device)

    def prefill(self, x: Tensor, state: ConvState, *, padding: Tensor | None = None) -> tuple[Tensor, ConvState]:
        """N >= 1 tokens after the state. padding: bool (B, N)."""
        check_tokens("GatedShortConv", self.dim, x, None, padding, None, True)
        mixed, state = self.conv.prefill(self._inner(x, padding), state)
        return self._gated(x, mixed), state

    def step(self, x: Tensor, state: ConvState) -> tuple[Tensor, ConvState]:
        """One token (B, 1, C)."""
        return self.prefill(x, state)

    def state_bytes(self, batch: int, length: int) -> int:
        """Bytes of the state: the same for every length."""
        weight = self.conv.conv.weight
        return batch * (self.conv.kernel - 1) * weight.shape[0] * weight.element_size()

    def _gated(self, x: Tensor, mixed: Tensor) -> Tensor:
        return self.down(self.gate(x) * (F.silu(mixed) if self.form == "based" else mixed))

    def _inner(self, x: Tensor, padding: Tensor | None) -> Tensor:
        inner = self.up(x)
        return inner if padding is None else inner * padding[..., None]
