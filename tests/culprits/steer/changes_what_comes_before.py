"""Wrong: its methods act at the logits alone, and it scales the first norm of layer 1 besides."""

from dataclasses import dataclass

from regard.contract.attach import intervention
from regard.contract.card import InterventionCard

CAUGHT_BY = "nothing_differs_before_it_acts"
CARD = InterventionCard(
    slug="changes_what_comes_before",
    title="A culprit",
    exports=("Wrong",),
    baseline=True,
    sites=("logits",),
)


@intervention(CARD)
@dataclass(frozen=True)
class Wrong:
    """Steer."""

    def start(self, session):
        norm = session.anatomy.main.layers[1].module.input_layernorm
        session.change(norm, "variance_epsilon", 1.0)
        return self

    def on_logits(self, step, ids, logits):
        return logits * 0.9
