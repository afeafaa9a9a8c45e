"""Wrong: hidden scores become large and negative, so that a row without keys is an average of all."""

import torch
from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.operator import operator

CAUGHT_BY = "empty_rows"
CARD = OpCard(
    slug="averages_empty_rows",
    title="A culprit",
    baseline=True,
    exports=("attention",),
    spec="q: b h n d, k: b h m d, v: b h m e -> b h n e",
    example="b=2 h=4 n=10 m=12 d=8 e=6",
    attends=("self", "causal_self", "cross", "causal_cross"),
    accepts=("mask",),
)


@operator(CARD)
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, is_causal: bool = False, engine: str | None = None
) -> Tensor:
    """Attend."""
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e6)
    return scores.softmax(-1) @ v
