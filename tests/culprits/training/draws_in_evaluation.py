"""Wrong: tokens are left out at random in evaluation too."""

import torch
import torch.nn.functional as F

from regard.contract.card import TrainingCard

CAUGHT_BY = "losses_repeat"
CARD = TrainingCard(
    slug="draws_in_evaluation",
    title="A culprit",
    baseline=True,
    exports=("loss",),
    student="llama",
    batch="ids",
    losses=("ce",),
    trains=("*",),
)


def loss(model, batch):
    """Some of the next tokens."""
    logits = model(batch).logits[:, :-1]
    each = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
    return {"ce": (each * torch.rand_like(each)).mean()}
