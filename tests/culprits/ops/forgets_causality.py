"""Wrong: of a pattern only the padding is followed, and Causal() dropped."""

from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.operator import operator
from regard.engines.dense import dense
from regard.patterns import Bound, KeyValid, Pattern

CAUGHT_BY = "pattern_matters"
CARD = OpCard(
    slug="forgets_causality",
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
    allowed = None
    if pattern is not None:
        parts = (
            [part for part in pattern.conjuncts() if isinstance(part, KeyValid)] if isinstance(pattern, Pattern) else []
        )
        allowed = parts[0] if parts else None
    return dense(q, k, v, allowed, is_causal=is_causal, engine=engine).out
