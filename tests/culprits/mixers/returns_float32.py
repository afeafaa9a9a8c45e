"""Wrong: half-precision tokens come back in float32."""

from torch import Tensor

from regard.contract.card import MixerCard
from regard.engines.dense import dense
from regard.layers.attention import AnyPattern, Attention

CAUGHT_BY = "tokens_to_tokens"
CARD = MixerCard(
    slug="returns_float32",
    title="A culprit",
    baseline=True,
    exports=("Mixer",),
    example="b=2 n=10 c=16 h=4",
    attends=("self", "causal_self", "cross", "causal_cross"),
    padding=True,
    documents=True,
    decode=True,
)


class Mixer(Attention):
    """Mix tokens."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, pattern: AnyPattern, q_offset: int) -> Tensor:
        return dense(q, k, v, pattern, q_offset=q_offset).out

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        padding: Tensor | None = None,
        reset: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        out = super().forward(x, context, padding=padding, reset=reset, is_causal=is_causal)
        return out.float() if out.dtype.itemsize < 4 else out
