"""Wrong: after the figure was drawn, the largest value found is 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from regard.contract.card import ExplanationCard
from regard.contract.optional import need

CAUGHT_BY = "figure_draws_what_was_found"
CARD = ExplanationCard(
    slug="scales_what_it_draws",
    title="A culprit",
    baseline=True,
    exports=("received", "Received"),
    takes={"weights": "weights"},
    figure=True,
)


@dataclass(frozen=True)
class Received:
    """What each token gets."""

    values: Tensor

    def figure(self) -> Any:
        """A bar for each token."""
        graphs = need("plotly.graph_objects", "explain")
        return graphs.Figure(graphs.Bar(y=self.values.div_(self.values.max()).tolist()))


def received(weights: Tensor) -> Received:
    """What each token gets."""
    return Received(weights.sum(0))
