"""Wrong: it computes attention and does not go on, so that nobody else sees the call."""

from dataclasses import dataclass

from regard.contract.attach import intervention
from regard.contract.card import InterventionCard

CAUGHT_BY = "nests_with_a_recording"
CARD = InterventionCard(
    slug="goes_its_own_way",
    title="A culprit",
    exports=("Wrong",),
    baseline=True,
    sites=("scores",),
)


@intervention(CARD)
@dataclass(frozen=True)
class Wrong:
    """Steer."""

    def on_attention(self, call, follow):
        return call.heads(call.weights(call.scores() * 0.5))
