"""Wrong: its card names the logits, and no method of it gets them."""

from dataclasses import dataclass

from regard.contract.attach import intervention
from regard.contract.card import InterventionCard

CAUGHT_BY = "reaches_its_sites"
CARD = InterventionCard(
    slug="names_a_site_in_vain",
    title="A culprit",
    exports=("Wrong",),
    baseline=True,
    sites=("z", "logits"),
)


@intervention(CARD)
@dataclass(frozen=True)
class Wrong:
    """Steer."""

    def on_z(self, call, z):
        return z * 0.5
