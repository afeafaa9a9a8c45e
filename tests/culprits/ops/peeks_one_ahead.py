"""Wrong: the causal mask reaches one key too far."""

import torch
from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.operator import operator
from regard.engines.dense import dense

CAUGHT_BY = "attends_causal_self"
CARD = OpCard(
    slug="peeks_one_ahead",
    title="A culprit",
    baseline=True,
    exports=("attention",),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=10 m=12 d=8 e=6",
    attends=("self", "causal_self", "cross", "causal_cross"),
    engines=("dense",),
)


@operator(CARD)
def attention(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, engine: str | None = None) -> Tensor:
    """Attend."""
    n, m = q.shape[2], k.shape[2]
    mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(1) if is_causal else None
    return dense(q, k, v, mask=mask, engine=engine).out
