"""Wrong: afterwards all of the model is in evaluation mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.contract.card import ExplanationCard

CAUGHT_BY = "reading_changes_nothing"
CARD = ExplanationCard(
    slug="leaves_it_in_evaluation",
    title="A culprit",
    baseline=True,
    exports=("likeliest",),
    reads="llama",
    takes={"model": "model", "ids": "ids"},
)


@torch.no_grad()
def likeliest(model: Any, ids: Tensor) -> Tensor:
    """The next tokens."""
    return model.eval()(ids).logits[:, -1].argmax(-1)
