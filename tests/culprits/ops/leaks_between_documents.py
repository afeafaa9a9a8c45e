"""Wrong: the state is not emptied where a document starts."""

from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.operator import operator
from regard.engines.scan import as_scan, linear_scan
from regard.patterns import Bound, Pattern

CAUGHT_BY = "documents"
CARD = OpCard(
    slug="leaks_between_documents",
    title="A culprit",
    baseline=True,
    exports=("attention",),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=11 m=11 d=8 e=6",
    attends=("causal_self",),
    accepts=("pattern",),
    padding=True,
    documents=True,
    engines=("scan",),
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
    is_causal, key_valid, _ = as_scan(pattern, is_causal, "leaks_between_documents")
    return linear_scan(q, k, v, is_causal=is_causal, key_valid=key_valid, engine=engine)[0]
