"""Wrong: its card says that all is trained, and the embeddings are not."""

import torch.nn.functional as F

from regard.contract.card import TrainingCard

CAUGHT_BY = "gradients_reach_what_it_trains"
CARD = TrainingCard(
    slug="forgets_a_part",
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
    embeds = model.get_input_embeddings()(batch).detach()
    logits = model(inputs_embeds=embeds).logits[:, :-1]
    return {"ce": F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())}
