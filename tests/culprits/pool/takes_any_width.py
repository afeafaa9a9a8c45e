"""Wrong: tokens that are too wide are cut to the width."""

from torch import Tensor, nn

from regard.contract.card import PoolCard
from regard.layers.pooling import masked_mean

CAUGHT_BY = "pool_names_wrong_tokens"
CARD = PoolCard(
    slug="takes_any_width",
    title="A culprit",
    baseline=True,
    exports=("Culprit",),
    example="b=2 n=9 c=12",
)


class Culprit(nn.Module):
    """The mean of projected tokens."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, *, padding: Tensor | None = None) -> Tensor:
        return masked_mean(self.proj(x[..., : self.dim]), padding)
