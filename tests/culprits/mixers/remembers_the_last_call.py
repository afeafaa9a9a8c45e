"""Wrong: a running mean in a buffer makes each call differ from the one before."""

import torch
from torch import Tensor

from regard.contract.card import MixerCard
from regard.engines.dense import dense
from regard.layers.attention import AnyPattern, Attention

CAUGHT_BY = "same_bits_twice"
CARD = MixerCard(
    slug="remembers_the_last_call",
    title="A culprit",
    baseline=True,
    exports=("Mixer",),
    example="b=2 n=10 c=16 h=4",
    attends=("self", "causal_self", "cross", "causal_cross"),
    padding=True,
    documents=True,
    decode=True,
)


class Mixer(Attention):
    """Mix tokens."""

    def __init__(self, dim: int, heads: int):
        super().__init__(dim, heads)
        self.register_buffer("mean", torch.zeros(dim))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, pattern: AnyPattern, q_offset: int) -> Tensor:
        return dense(q, k, v, pattern, q_offset=q_offset).out

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        padding: Tensor | None = None,
        reset: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        with torch.no_grad():
            self.mean = 0.9 * self.mean + 0.1 * x.mean((0, 1))
        return super().forward(x - self.mean, context, padding=padding, reset=reset, is_causal=is_causal)
