"""Wrong: it acts at the scores, and says so on the file's card alone."""

from dataclasses import dataclass, replace

from regard.contract.attach import intervention
from regard.contract.card import InterventionCard

CAUGHT_BY = "missing_sites_are_refused"
CARD = InterventionCard(
    slug="says_no_site",
    title="A culprit",
    exports=("Wrong",),
    baseline=True,
    sites=("scores",),
)


@intervention(CARD)
@dataclass(frozen=True)
class Wrong:
    """Steer."""

    def __post_init__(self):
        object.__setattr__(self, "card", replace(CARD, sites=()))

    def on_scores(self, call, scores):
        return scores * 0.5
