"""Wrong: what it finds hangs on how often it was asked."""

from __future__ import annotations

from torch import Tensor

from regard.contract.card import ExplanationCard

CAUGHT_BY = "reading_repeats"
CARD = ExplanationCard(
    slug="counts_its_readings",
    title="A culprit",
    baseline=True,
    exports=("received",),
    takes={"weights": "weights"},
)

_readings = [0]


def received(weights: Tensor) -> Tensor:
    """What each token gets, a little more every time."""
    _readings[0] += 1
    return weights.sum(0) * _readings[0]
