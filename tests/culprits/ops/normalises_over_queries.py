"""Wrong: weights are normalised over the queries, so that all of them take part."""

from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.operator import operator

CAUGHT_BY = "attends_causal_cross"
CARD = OpCard(
    slug="normalises_over_queries",
    title="A culprit",
    baseline=True,
    exports=("attention",),
    spec="q: b h n d, k: b h m d, v: b h m e -> b h n e",
    example="b=2 h=4 n=10 m=12 d=8 e=6",
    attends=("cross", "causal_cross"),
)


@operator(CARD)
def attention(q: Tensor, k: Tensor, v: Tensor, *, engine: str | None = None) -> Tensor:
    """Attend."""
    weights = (q @ k.transpose(-1, -2)).softmax(2)
    return weights @ v
