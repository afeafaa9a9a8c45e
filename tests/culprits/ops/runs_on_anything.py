"""Wrong: what does not fit is left to torch, which names no axis."""

import torch.nn.functional as F
from torch import Tensor

from regard.contract.card import OpCard

CAUGHT_BY = "names_wrong_shapes"
CARD = OpCard(
    slug="runs_on_anything",
    title="A culprit",
    baseline=True,
    exports=("attention",),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=10 m=12 d=8 e=6",
    attends=("self", "causal_self", "cross", "causal_cross"),
)


def attention(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, engine: str | None = None) -> Tensor:
    """Attend."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)


attention.card = CARD
attention.reference = attention
