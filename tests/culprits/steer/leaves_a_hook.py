"""Wrong: a hook of its own stays on the model."""

from dataclasses import dataclass

from regard.contract.attach import intervention
from regard.contract.card import InterventionCard

CAUGHT_BY = "exit_restores"
CARD = InterventionCard(
    slug="leaves_a_hook",
    title="A culprit",
    exports=("Wrong",),
    baseline=True,
    sites=("z",),
)


@intervention(CARD)
@dataclass(frozen=True)
class Wrong:
    """Steer."""

    def start(self, session):
        session.model.lm_head.register_forward_hook(lambda module, args, output: output * 1.5)
        return self

    def on_z(self, call, z):
        return z * 0.5
