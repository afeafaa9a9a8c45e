"""Wrong: the first row of a batch counts more."""

import torch
import torch.nn.functional as F

from regard.contract.card import TrainingCard

CAUGHT_BY = "rows_come_in_any_order"
CARD = TrainingCard(
    slug="weighs_the_first_row",
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
    each = F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").mean(1)
    return {"ce": (each / torch.arange(1, len(each) + 1)).mean()}
