"""Wrong: tokens are added one by one in their own dtype."""

import torch
from torch import Tensor, nn

from regard.contract.card import PoolCard
from regard.layers.pooling import check_tokens

CAUGHT_BY = "pool_in_half_precision"
CARD = PoolCard(
    slug="sums_in_half_precision",
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
        taken = torch.ones(x.shape[:2], dtype=torch.bool) if padding is None else padding
        total = torch.zeros_like(x[:, 0])
        for token in self.proj(x).masked_fill(~taken[..., None], 0.0).unbind(1):
            total = total + token
        return total / taken.sum(1, keepdim=True).clamp(min=1)
