"""Wrong: every piece is rotated as if it were the first."""

from dataclasses import replace

from torch import Tensor

from regard.contract.card import MixerCard
from regard.engines.dense import dense
from regard.layers.attention import AnyPattern, Attention
from regard.layers.caches import KVState

CAUGHT_BY = "prefill_and_step"
CARD = MixerCard(
    slug="positions_from_zero",
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

    def prefill(self, x: Tensor, state: KVState, *, padding: Tensor | None = None) -> tuple[Tensor, KVState]:
        out, left = super().prefill(x, replace(state, seen=0), padding=padding)
        return out, replace(left, seen=state.seen + x.shape[1])
