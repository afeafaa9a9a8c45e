"""Wrong: the mean of no token is 0 / 0."""

from torch import Tensor, nn

from regard.contract.card import PoolCard
from regard.layers.pooling import check_tokens, masked_mean

CAUGHT_BY = "a_row_without_tokens_is_0"
CARD = PoolCard(
    slug="averages_nothing",
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
        out = masked_mean(self.proj(x), padding)
        return out if padding is None else out / padding.any(1, keepdim=True)
