"""Wrong: the generator that it was built with is in training mode once images were drawn with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regard.contract.card import ExplanationCard

CAUGHT_BY = "reading_changes_nothing"
CARD = ExplanationCard(
    slug="leaves_a_generator_in_training",
    title="A culprit",
    baseline=True,
    exports=("Walks",),
    takes={"generator": "generator"},
    calls="Walks.draw",
    options={"count": 2},
)


@dataclass(frozen=True)
class Walks:
    """Images of codes."""

    generator: nn.Module

    def draw(self, count: int) -> Tensor:
        """So many images, (count, C, h, w)."""
        with torch.no_grad():
            return self.generator.train()(torch.ones(count, 8, 8, 8))
