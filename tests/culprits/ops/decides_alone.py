"""Wrong: torch's attention is called behind the back of the engines that are claimed."""

import torch.nn.functional as F
from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.operator import operator

CAUGHT_BY = "explains_its_engine"
CARD = OpCard(
    slug="decides_alone",
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
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
