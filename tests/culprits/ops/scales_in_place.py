"""Wrong: the caller's queries are scaled in place."""

from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.operator import operator
from regard.engines.dense import dense

CAUGHT_BY = "inputs_unwritten"
CARD = OpCard(
    slug="scales_in_place",
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
    q *= q.shape[-1] ** -0.5
    return dense(q, k, v, is_causal=is_causal, scale=1.0, engine=engine).out
