"""Wrong: q_offset is taken and ignored."""

from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.operator import operator
from regard.engines.dense import dense
from regard.patterns import Bound, Pattern

CAUGHT_BY = "decodes_from_a_cache"
CARD = OpCard(
    slug="forgets_the_offset",
    title="A culprit",
    baseline=True,
    exports=("attention",),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=10 m=12 d=8 e=6",
    attends=("self", "causal_self", "cross", "causal_cross"),
    accepts=("pattern",),
    padding=True,
    documents=True,
    decode="kv",
    engines=("dense",),
)


@operator(CARD)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Pattern | Bound | None = None,
    q_offset: int = 0,
    is_causal: bool = False,
    engine: str | None = None,
) -> Tensor:
    """Attend."""
    return dense(q, k, v, pattern, is_causal=is_causal, engine=engine).out
