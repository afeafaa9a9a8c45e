"""Wrong: the state is said to be constant, but keeps every key."""

from torch import Tensor

from regard.contract.card import MixerCard
from regard.engines.dense import dense
from regard.layers.attention import AnyPattern, Attention

CAUGHT_BY = "state_grows_as_claimed"
CARD = MixerCard(
    slug="claims_a_constant_state",
    title="A culprit",
    baseline=True,
    exports=("Mixer",),
    example="b=2 n=10 c=16 h=4",
    attends=("self", "causal_self", "cross", "causal_cross"),
    padding=True,
    documents=True,
    decode=True,
    constant_state=True,
)


class Mixer(Attention):
    """Mix tokens."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, pattern: AnyPattern, q_offset: int) -> Tensor:
        return dense(q, k, v, pattern, q_offset=q_offset).out
