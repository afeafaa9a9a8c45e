"""Wrong: the layers that it is told to keep to are not looked at."""

from dataclasses import dataclass

from regard.contract.attach import intervention
from regard.contract.card import InterventionCard

CAUGHT_BY = "spares_the_first_layer"
CARD = InterventionCard(
    slug="acts_in_every_layer",
    title="A culprit",
    exports=("Wrong",),
    baseline=True,
    sites=("z",),
    spares={"layers": (1,)},
)


@intervention(CARD)
@dataclass(frozen=True)
class Wrong:
    """Steer."""

    layers: tuple[int, ...] | None = None

    def on_z(self, call, z):
        return z * 0.5
