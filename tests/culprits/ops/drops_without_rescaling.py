"""Wrong: dropped weights are not made up for, so that the mean shrinks."""

from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.operator import operator
from regard.engines.dense import dense

CAUGHT_BY = "dropout_matters"
CARD = OpCard(
    slug="drops_without_rescaling",
    title="A culprit",
    baseline=True,
    exports=("attention",),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=10 m=12 d=8 e=6",
    attends=("self", "causal_self", "cross", "causal_cross"),
    accepts=("dropout",),
    engines=("dense",),
)


@operator(CARD)
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float = 0.0, is_causal: bool = False, engine: str | None = None
) -> Tensor:
    """Attend."""
    out = dense(q, k, v, is_causal=is_causal, dropout_p=dropout_p, engine=engine).out
    return out * (1 - dropout_p)
