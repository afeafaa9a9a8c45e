"""Wrong: a convolution that is padded on both sides sees the next token."""

from torch import Tensor, nn

from regard.contract.card import MixerCard

CAUGHT_BY = "mixes_causal_self"
CARD = MixerCard(
    slug="centred_convolution",
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
        self.conv = nn.Conv1d(dim, dim, 3, padding=1, groups=dim)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, padding: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)
