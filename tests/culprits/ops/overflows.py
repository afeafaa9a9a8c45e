"""Wrong: exp without a maximum leaves the range of float16."""

from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.operator import operator

CAUGHT_BY = "half_precision"
CARD = OpCard(
    slug="overflows",
    title="A culprit",
    baseline=True,
    exports=("attention",),
    spec="q: b h n d, k: b h m d, v: b h m e -> b h n e",
    example="b=2 h=4 n=10 m=12 d=8 e=6",
    attends=("self", "causal_self", "cross", "causal_cross"),
)


@operator(CARD)
def attention(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, engine: str | None = None) -> Tensor:
    """Attend."""
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    weights = scores.exp().tril() if is_causal else scores.exp()
    return (weights / weights.sum(-1, keepdim=True)) @ v
