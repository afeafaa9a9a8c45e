"""Wrong: gradients reach the teacher too."""

from regard.contract.card import TrainingCard

CAUGHT_BY = "gradients_reach_what_it_trains"
CARD = TrainingCard(
    slug="trains_its_teacher",
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
        return {"mse": (model(batch) - self.teacher(batch)).square().mean()}
