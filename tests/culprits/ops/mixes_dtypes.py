"""Wrong: scores, which autocast made bfloat16, are copied into a table of the queries' dtype."""

import torch
from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.operator import operator

CAUGHT_BY = "autocast"
CARD = OpCard(
    slug="mixes_dtypes",
    title="A culprit",
    baseline=True,
    exports=("attention",),
    spec="q: b h n d, k: b h m d, v: b h m e -> b h n e",
    example="b=2 h=4 n=10 m=12 d=8 e=6",
    attends=("self", "causal_self", "cross", "causal_cross"),
)


@operator(CARD)
def attention(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, engine: str | None = None) -> Tensor:
    """Attend."""
    scores = q @ k.transpose(-1, -2)
    every = torch.arange(k.shape[2], device=q.device).expand(scores.shape)
    table = torch.zeros(scores.shape, dtype=q.dtype, device=q.device).scatter(3, every, scores)
    if is_causal:
        table = table.masked_fill(torch.ones_like(table, dtype=torch.bool).triu(1), float("-inf"))
    return table.softmax(-1) @ v
