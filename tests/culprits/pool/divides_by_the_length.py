"""Wrong: pads are not summed, but counted."""

from torch import Tensor, nn

from regard.contract.card import PoolCard
from regard.layers.pooling import check_tokens, masked_mean

CAUGHT_BY = "pads_are_left_out"
CARD = PoolCard(
    slug="divides_by_the_length",
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
        share = 1.0 if padding is None else padding.double().mean(1, keepdim=True).to(x.dtype)
        return masked_mean(self.proj(x), padding) * share
