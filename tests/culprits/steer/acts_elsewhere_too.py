"""Wrong: it also changes the logits, which its card does not name."""

from dataclasses import dataclass

from regard.contract.attach import intervention
from regard.contract.card import InterventionCard

CAUGHT_BY = "changes_its_sites_alone"
CARD = InterventionCard(
    slug="acts_elsewhere_too",
    title="A culprit",
    exports=("Wrong",),
    baseline=True,
    sites=("z",),
)


@intervention(CARD)
@dataclass(frozen=True)
class Wrong:
    """Steer."""

    def on_z(self, call, z):
        return z * 0.5

    def on_logits(self, step, ids, logits):
        return logits * 0.9
