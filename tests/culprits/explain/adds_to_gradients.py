"""Wrong: the gradients of the weights grow by those of the score that is explained."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from regard.contract.card import ExplanationCard

CAUGHT_BY = "reading_changes_nothing"
CARD = ExplanationCard(
    slug="adds_to_gradients",
    title="A culprit",
    baseline=True,
    exports=("slopes",),
    reads="cnn",
    takes={"model": "model", "images": "images"},
)


def slopes(model: Any, images: Tensor) -> Tensor:
    """The gradient of the likeliest class at the pixels."""
    images = images.clone().requires_grad_()
    model(images).amax(-1).sum().backward()
    return images.grad
