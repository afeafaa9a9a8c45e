"""Wrong: the card says that it owns the cache, and what stands before the session does not."""

from dataclasses import dataclass, replace

from regard.contract.attach import intervention
from regard.contract.card import InterventionCard

CAUGHT_BY = "owners_refuse_each_other"
CARD = InterventionCard(
    slug="shares_what_it_owns",
    title="A culprit",
    exports=("Wrong",),
    baseline=True,
    sites=("scores",),
    owns=("scores",),
)


@intervention(CARD)
@dataclass(frozen=True)
class Wrong:
    """Steer."""

    def __post_init__(self):
        object.__setattr__(self, "card", replace(CARD, owns=()))

    def on_scores(self, call, scores):
        return scores * 0.5
