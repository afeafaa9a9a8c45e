"""Wrong: settings that it does not know are taken without a word."""

import torch.nn.functional as F

from regard.contract.card import TrainingCard

CAUGHT_BY = "training_is_described"
CARD = TrainingCard(
    slug="takes_any_setting",
    title="A culprit",
    baseline=True,
    exports=("loss",),
    student="llama",
    batch="ids",
    losses=("ce",),
    trains=("*",),
)


def loss(model, batch, **settings):
    """Next tokens."""
    logits = model(batch).logits[:, :-1]
    return {"ce": F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())}
