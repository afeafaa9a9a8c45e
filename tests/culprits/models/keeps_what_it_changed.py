"""Wrong: the model it stands on stays without its causal mask."""

from typing import Any

from torch import Tensor, nn

from regard.contract.card import ModelCard

CAUGHT_BY = "foreign_model_is_left_alone"
CARD = ModelCard(
    slug="keeps_what_it_changed",
    title="A culprit",
    baseline=True,
    exports=("Model",),
    example="b=2 n=9 v=50",
    stands_on="llama",
    task="token ids to vectors",
)


class Model(nn.Module):
    """The mean of hidden states."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model.base_model
        self.model.config.is_causal = False

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).last_hidden_state.mean(1)
