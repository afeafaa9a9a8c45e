"""Wrong: gradients of the keys are divided by the number of processes plus one, as for a mean that nobody took."""

import torch
from torch import Tensor

from regard.contract.card import ParallelCard
from regard.engines.dense import dense

CAUGHT_BY = "alone_equals_one_process"
CARD = ParallelCard(
    slug="averages_gradients",
    title="A culprit",
    baseline=True,
    exports=("averaged_attention",),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=8 m=8 d=4 e=3",
    attends=("self", "causal_self"),
    whole="softmax",
)


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return dx / 2


def averaged_attention(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, group: object = None) -> Tensor:
    """Softmax attention."""
    return dense(q, Halved.apply(k), v, is_causal=is_causal).out
