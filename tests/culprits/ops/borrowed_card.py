"""Wrong: the function carries the card of another system."""

from dataclasses import replace

from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.operator import operator
from regard.engines.dense import dense

CAUGHT_BY = "card_is_attached"
CARD = OpCard(
    slug="borrowed_card",
    title="A culprit",
    baseline=True,
    exports=("attention",),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=10 m=12 d=8 e=6",
    attends=("self", "causal_self", "cross", "causal_cross"),
    engines=("dense",),
)


@operator(replace(CARD, slug="another"))
def attention(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, engine: str | None = None) -> Tensor:
    """Attend."""
    return dense(q, k, v, is_causal=is_causal, engine=engine).out
