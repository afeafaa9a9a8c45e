"""Wrong: it takes a mean over the rows of the batch."""

from dataclasses import dataclass

from regard.contract.attach import intervention
from regard.contract.card import InterventionCard

CAUGHT_BY = "rows_do_not_meet"
CARD = InterventionCard(
    slug="looks_at_the_batch",
    title="A culprit",
    exports=("Wrong",),
    baseline=True,
    sites=("z",),
    padding=True,
)


@intervention(CARD)
@dataclass(frozen=True)
class Wrong:
    """Steer."""

    def on_z(self, call, z):
        return z - 0.5 * z.mean(0, keepdim=True)
