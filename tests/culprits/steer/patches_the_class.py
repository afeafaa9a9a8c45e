"""Wrong: it changes the class, and so every model of it."""

from dataclasses import dataclass

from regard.contract.attach import intervention
from regard.contract.card import InterventionCard

CAUGHT_BY = "a_second_model_is_untouched"
CARD = InterventionCard(
    slug="patches_the_class",
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
        norm = type(session.anatomy.main.final)
        forward = norm.forward
        session.change(norm, "forward", lambda module, x: forward(module, x) * 0.9)
        return self

    def on_z(self, call, z):
        return z
