"""Wrong: it changes nothing."""

from dataclasses import dataclass

from regard.contract.attach import intervention
from regard.contract.card import InterventionCard

CAUGHT_BY = "changes_something"
CARD = InterventionCard(
    slug="does_nothing",
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
        return z
