"""Wrong: the diagonal of the weights that it was given is 0 afterwards."""

from __future__ import annotations

from torch import Tensor

from regard.contract.card import ExplanationCard

CAUGHT_BY = "reading_changes_nothing"
CARD = ExplanationCard(
    slug="masks_what_it_was_given",
    title="A culprit",
    baseline=True,
    exports=("others",),
    takes={"weights": "weights"},
)


def others(weights: Tensor) -> Tensor:
    """What each token gives to others."""
    return weights.fill_diagonal_(0).sum(-1)
