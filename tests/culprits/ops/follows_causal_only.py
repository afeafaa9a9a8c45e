"""Wrong: of a pattern only its causality is followed, and the rest dropped without a word."""

from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.operator import operator
from regard.engines.dense import dense
from regard.patterns import Bound, Pattern

CAUGHT_BY = "refuses_other_patterns"
CARD = OpCard(
    slug="follows_causal_only",
    title="A culprit",
    baseline=True,
    exports=("attention",),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=10 m=12 d=8 e=6",
    attends=("self", "causal_self", "cross", "causal_cross"),
    accepts=("pattern",),
    engines=("dense",),
)


@operator(CARD)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Pattern | Bound | None = None,
    is_causal: bool = False,
    engine: str | None = None,
) -> Tensor:
    """Attend."""
    is_causal = is_causal or (pattern is not None and pattern.causal)
    return dense(q, k, v, is_causal=is_causal, engine=engine).out
