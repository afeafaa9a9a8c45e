"""Wrong: two of them are never equal."""

from dataclasses import dataclass

from regard.contract.attach import intervention
from regard.contract.card import InterventionCard

CAUGHT_BY = "is_a_frozen_value"
CARD = InterventionCard(
    slug="settings_change",
    title="A culprit",
    exports=("Wrong",),
    baseline=True,
    sites=("z",),
)


@intervention(CARD)
@dataclass(frozen=True, eq=False)
class Wrong:
    """Steer."""

    def on_z(self, call, z):
        return z * 0.5
