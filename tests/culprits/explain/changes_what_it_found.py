"""A reading whose result can be written to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regard.contract.card import ExplanationCard

CAUGHT_BY = "explanation_is_described"

CARD = ExplanationCard(
    slug="changes_what_it_found",
    title="A result that can be changed",
    paper="None, it is wrong on purpose",
    exports=("largest_weight", "Found"),
)


@dataclass
class Found:
    """Where the largest weight of each row is."""

    place: Tensor


def largest_weight(weights: Tensor) -> Found:
    """The key that each query attends to most."""
    return Found(weights.argmax(-1))
