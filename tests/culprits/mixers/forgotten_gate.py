"""Wrong: a gate is made and never used."""

from torch import Tensor, nn

from regard.contract.card import MixerCard
from regard.engines.dense import dense
from regard.layers.attention import AnyPattern, Attention

CAUGHT_BY = "gradient_reaches_every_parameter"
CARD = MixerCard(
    slug="forgotten_gate",
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

    def __init__(self, dim: int, heads: int):
        super().__init__(dim, heads)
        self.gate = nn.Linear(dim, dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, pattern: AnyPattern, q_offset: int) -> Tensor:
        return dense(q, k, v, pattern, q_offset=q_offset).out
