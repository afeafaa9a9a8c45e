"""Combiner attention as a layer.

Decoding keeps one key and value for each segment that is complete, and the open one: n / s + s numbers in place of n.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from regard.contract.card import MixerCard
from regard.contract.errors import OptionError, Unsupported
from regard.layers.attention import AnyPattern, Attention, check_tokens
from regard.layers.caches import CoreState
from regard.ops.combiner import VARIANTS, causal_segments, combiner_attention

CARD = MixerCard(
    slug="combiner",
    title="Combiner attention layer",
    part_of="combiner",
    builds_on=("combiner",),
    exports=("CombinerAttention",),
    example="b=2 n=10 c=16 h=4",
    options={"segment": 3},
    attends=("self", "causal_self"),
    decode=True,
    time="n n^1/2 c",
    memory="n c",
)


class CombinerAttention(Attention):
    """Attention to all tokens through spans (sections 4 and 5).

    segment: tokens of the variant "fixed"; about the root of the usual length is cheapest. variant, shape, pool: as of
    `combiner_attention`; only "fixed" works both ways and decodes. The other options are those of the attention layer;
    positions come with the tokens, as in the paper, unless rotary is set. Raises OptionError, Unsupported.
    """

    crosses = False

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        segment: int = 64,
        variant: Literal["fixed", "log", "axial_vertical", "axial_horizontal", "axial_mixture"] = "fixed",
        shape: tuple[int, int] | None = None,
        pool: Literal["max", "mean"] = "max",
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        qk_norm: bool = False,
        rotary: bool = False,
        rotary_base: float = 1e4,
    ):
        super().__init__(
            dim, heads, kv_heads=kv_heads, head_dim=head_dim, bias=bias, qk_norm=qk_norm, rotary=rotary,
            rotary_base=rotary_base,
        )  # fmt: skip
        if segment < 1:
            raise OptionError(f"combiner needs segments of at least 1 token, not {segment}")
        if variant not in VARIANTS:
            raise OptionError(f"the variant is {variant!r}; it is one of {', '.join(VARIANTS)}")
        self.segment, self.variant, self.shape = segment, variant, shape
        self.pool: Literal["max", "mean"] = pool

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        padding: Tensor | None = None,
        reset: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Mix tokens (B, N, C). Raises ShapeError; Unsupported for a context, padding and reset."""
        _refuse(padding, reset)
        return super().forward(x, context, is_causal=is_causal)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, pattern: AnyPattern, q_offset: int) -> Tensor:
        # one short segment is all there is
        segment = min(self.segment, q.shape[2]) if self.variant == "fixed" else None
        return combiner_attention(
            q, k, v, variant=self.variant, segment=segment, shape=self.shape, pool=self.pool, is_causal=pattern.causal
        )

    def init_state(  # type: ignore[override]
        self, batch: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> CoreState:
        """The state before the first token. Raises Unsupported for another variant than "fixed"."""
        if self.variant != "fixed":
            raise Unsupported(f"the variant {self.variant!r} of combiner does not decode; 'fixed' does")
        open_ = super().init_state(batch, dtype=dtype, device=device)
        none = open_.k.new_empty(batch, self.heads, 0, self.head_dim)
        return CoreState(none, none, open_.k, open_.v, none)

    def prefill(  # type: ignore[override]
        self, x: Tensor, state: CoreState, *, padding: Tensor | None = None
    ) -> tuple[Tensor, CoreState]:
        """N >= 1 tokens after the state. Raises Unsupported for padding: segments are counted from the first token."""
        _refuse(padding, None)
        check_tokens(type(self).__name__, self.dim, x, None, None, None, True)
        q, k, v = self._project(x, x)
        q, k = self._rotate(q, k, state.seen)
        assert state.q is not None
        q, k, v = torch.cat((state.q, q), 2), torch.cat((state.k, k), 2), torch.cat((state.v, v), 2)
        out, (core_k, core_v) = causal_segments(
            q, k, v, (state.core_k, state.core_v), segment=self.segment, pool=self.pool, rows=x.shape[1]
        )
        # a copy: a view would hold on to the segments that are closed
        q, k, v = (t[:, :, t.shape[2] // self.segment * self.segment :].clone() for t in (q, k, v))
        return self._merge_heads(out), CoreState(core_k, core_v, k, v, q, state.seen + x.shape[1])

    def state_bytes(self, batch: int, length: int) -> int:
        """Bytes of the state after `length` tokens, in the dtype of the weights."""
        spans, rest = divmod(length, self.segment)
        vectors = 2 * self.heads * spans + (self.heads + 2 * self.kv_heads) * rest
        return batch * vectors * self.head_dim * self.to_k.weight.element_size()


def _refuse(padding: Tensor | None, reset: Tensor | None) -> None:
    if padding is not None:
        raise Unsupported("combiner takes no padding: segments are counted from the first token; softmax does")
    if reset is not None:
        raise Unsupported("combiner takes no document starts; softmax does")
