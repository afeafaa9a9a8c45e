"""Wrong: a context is taken and ignored."""

from torch import Tensor

from regard.contract.card import MixerCard
from regard.engines.dense import dense
from regard.layers.attention import AnyPattern, Attention

CAUGHT_BY = "refuses_other_ways"
CARD = MixerCard(
    slug="ignores_the_context",
    title="A culprit",
    baseline=True,
    exports=("Mixer",),
    example="b=2 n=10 c=16 h=4",
    attends=("self", "causal_self"),
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
        return super().forward(x, padding=padding, reset=reset, is_causal=is_causal)
