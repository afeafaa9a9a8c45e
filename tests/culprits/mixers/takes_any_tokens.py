"""Wrong: tokens that do not fit are left to torch, which names neither system nor width."""

from torch import Tensor, nn

from regard.contract.card import MixerCard

CAUGHT_BY = "names_wrong_tokens"
CARD = MixerCard(
    slug="takes_any_tokens",
    title="A culprit",
    baseline=True,
    exports=("Mixer",),
    example="b=2 n=10 c=16 h=4",
    attends=("causal_self",),
)


class Mixer(nn.Module):
    """Mix tokens."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.project = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, padding: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return self.project(x).cumsum(1)
