"""Wrong: the projection is cut off from the output's gradient."""

from torch import Tensor, nn

from regard.contract.card import PoolCard
from regard.layers.pooling import check_tokens, masked_mean

CAUGHT_BY = "gradient_reaches_the_pool"
CARD = PoolCard(
    slug="does_not_learn",
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
        check_tokens(x, padding, self.dim)
        return masked_mean(x @ self.proj.weight.detach().T + self.proj.bias, padding)
