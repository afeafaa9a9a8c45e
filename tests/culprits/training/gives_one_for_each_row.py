"""Wrong: a loss for each row."""

import torch.nn.functional as F

from regard.contract.card import TrainingCard

CAUGHT_BY = "losses_are_named_scalars"
CARD = TrainingCard(
    slug="gives_one_for_each_row",
    title="A culprit",
    baseline=True,
    exports=("loss",),
    student="llama",
    batch="ids",
    losses=("ce",),
    trains=("*",),
)


def loss(model, batch):
    """Next tokens."""
    logits = model(batch).logits[:, :-1]
    return {"ce": F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").mean(1)}
