"""Wrong: the settings called off still change the last bits."""

from dataclasses import dataclass

from regard.contract.attach import intervention
from regard.contract.card import InterventionCard

CAUGHT_BY = "off_is_the_plain_model"
CARD = InterventionCard(
    slug="never_quite_off",
    title="A culprit",
    exports=("Wrong",),
    baseline=True,
    sites=("z",),
    off={"scale": 1.0},
)


@intervention(CARD)
@dataclass(frozen=True)
class Wrong:
    """Steer."""

    scale: float = 0.5

    def on_z(self, call, z):
        return z * (self.scale + 1e-6)
