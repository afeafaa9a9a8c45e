"""Wrong: hidden keys give nothing, but are counted in the denominator."""

from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.operator import operator
from regard.patterns import Bound, Full, Pattern

CAUGHT_BY = "padding"
CARD = OpCard(
    slug="counts_hidden_keys",
    title="A culprit",
    baseline=True,
    exports=("attention",),
    spec="q: b h n d, k: b h m d, v: b h m e -> b h n e",
    example="b=2 h=4 n=10 m=12 d=8 e=6",
    attends=("self", "causal_self", "cross", "causal_cross"),
    accepts=("pattern",),
    padding=True,
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
    allowed = (Full() if pattern is None else pattern).dense(q.shape[2], k.shape[2])
    if is_causal:
        allowed = allowed.tril()
    return ((q @ k.transpose(-1, -2)).softmax(-1) * allowed) @ v
