"""Wrong: afterwards all of the teacher has the mode that the whole of it had."""

import torch

from regard.contract.card import TrainingCard

CAUGHT_BY = "training_changes_nothing_else"
CARD = TrainingCard(
    slug="sets_one_mode_for_all",
    title="A culprit",
    baseline=True,
    exports=("Loss",),
    teacher="sequence",
    student="sequence",
    batch="ids",
    losses=("mse",),
    trains=("*",),
)


class Loss:
    """The difference of logits."""

    def __init__(self, teacher):
        self.teacher = teacher

    def __call__(self, model, batch):
        before = self.teacher.training
        with torch.no_grad():
            target = self.teacher.eval()(batch)
        self.teacher.train(before)
        return {"mse": (model(batch) - target).square().mean()}
