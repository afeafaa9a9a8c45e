"""Wrong: a short sum is taken as the difference of two long ones, which cancel in half precision."""

import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract.card import MixerCard

CAUGHT_BY = "half_precision_layer"
CARD = MixerCard(
    slug="subtracts_long_sums",
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
        total = F.pad(self.project(x) + 64, (0, 0, 1, 0), value=64.0).cumsum(1)
        return total[:, 1:] - F.pad(total, (0, 0, 1, 0))[:, :-2] - 128
