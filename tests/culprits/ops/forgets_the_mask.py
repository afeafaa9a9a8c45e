"""Wrong: a mask is taken and ignored."""

from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.operator import operator
from regard.engines.dense import dense

CAUGHT_BY = "mask_matters"
CARD = OpCard(
    slug="forgets_the_mask",
    title="A culprit",
    baseline=True,
    exports=("attention",),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=10 m=12 d=8 e=6",
    attends=("self", "causal_self", "cross", "causal_cross"),
    accepts=("mask",),
    engines=("dense",),
)


@operator(CARD)
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, is_causal: bool = False, engine: str | None = None
) -> Tensor:
    """Attend."""
    return dense(q, k, v, is_causal=is_causal, engine=engine).out
