"""Wrong: every row of the grid is a sequence of its own."""

import torch
from torch import Tensor, nn

from regard.contract.card import MixerCard
from regard.contract.errors import OptionError
from regard.layers.grids import check_grid

CAUGHT_BY = "mixes_self"
CARD = MixerCard(
    slug="never_leaves_its_row",
    title="A culprit",
    baseline=True,
    exports=("Mixer",),
    example="b=2 y=3 x=4 c=16 h=4",
    attends=("self",),
)


class Mixer(nn.Module):
    """Mix the places of a grid."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise OptionError(f"a width of {dim} does not divide into {heads} heads")
        self.dim = dim
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, padding: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        check_grid("Mixer", self.dim, x, context, padding, is_causal=is_causal)
        q, k, v = self.qkv(x).chunk(3, -1)
        return torch.softmax(q @ k.transpose(-1, -2) * self.dim**-0.5, -1) @ v
