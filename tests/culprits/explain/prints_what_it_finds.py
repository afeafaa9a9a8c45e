"""Wrong: it prints."""

from __future__ import annotations

from torch import Tensor

from regard.contract.card import ExplanationCard

CAUGHT_BY = "reading_prints_nothing"
CARD = ExplanationCard(
    slug="prints_what_it_finds",
    title="A culprit",
    baseline=True,
    exports=("received",),
    takes={"weights": "weights"},
)


def received(weights: Tensor) -> Tensor:
    """What each token gets."""
    found = weights.sum(0)
    print(f"most is received by token {int(found.argmax())}")
    return found
