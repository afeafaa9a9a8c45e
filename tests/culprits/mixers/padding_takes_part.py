"""Wrong: padded tokens become 0, but stay keys that take weight."""

from torch import Tensor

from regard.contract.card import MixerCard
from regard.engines.dense import dense
from regard.layers.attention import AnyPattern, Attention

CAUGHT_BY = "padded_tokens"
CARD = MixerCard(
    slug="padding_takes_part",
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
        if padding is not None and context is None:
            x = x * padding[..., None]
        elif padding is not None:
            context = context * padding[..., None]
        return super().forward(x, context, reset=reset, is_causal=is_causal)
