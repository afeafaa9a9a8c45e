"""Wrong: it says that it changes queries, and writes into the keys too."""

from dataclasses import dataclass

from regard.contract.attach import intervention
from regard.contract.card import InterventionCard

CAUGHT_BY = "changes_its_sites_alone"
CARD = InterventionCard(
    slug="scales_keys_in_place",
    title="A culprit",
    exports=("Wrong",),
    baseline=True,
    sites=("q",),
)


@intervention(CARD)
@dataclass(frozen=True)
class Wrong:
    """Steer."""

    def on_attention(self, call, follow):
        call.k.mul_(0.9)
        return follow(call.replace(q=call.q * 0.5))
