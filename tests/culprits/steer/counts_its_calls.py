"""Wrong: what it does hangs on how often it was called."""

from dataclasses import dataclass

from regard.contract.attach import intervention
from regard.contract.card import InterventionCard

CAUGHT_BY = "nests_with_a_recording"
CARD = InterventionCard(
    slug="counts_its_calls",
    title="A culprit",
    exports=("Wrong",),
    baseline=True,
    sites=("z",),
)


_calls = [0]


@intervention(CARD)
@dataclass(frozen=True)
class Wrong:
    """Steer."""

    def on_z(self, call, z):
        _calls[0] += 1
        return z * (0.5 + 0.01 * (_calls[0] % 7))
