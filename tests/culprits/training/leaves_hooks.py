"""Wrong: hooks of its own stay on the model."""

import torch

from regard.contract.card import TrainingCard

CAUGHT_BY = "training_changes_nothing_else"
CARD = TrainingCard(
    slug="leaves_hooks",
    title="A culprit",
    baseline=True,
    exports=("loss",),
    student="sequence",
    batch="ids",
    losses=("size",),
    trains=("*",),
)


def loss(model, batch):
    """How large what each part gives out is."""
    sizes = []
    for module in model.modules():
        module.register_forward_hook(lambda m, given, out: sizes.append(out) if isinstance(out, torch.Tensor) else None)
    model(batch)
    return {"size": torch.stack([out.square().mean() for out in sizes]).mean()}
