"""Wrong: of two softmaxes one behind the other, the scale reaches the first alone."""

from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.operator import operator
from regard.engines.dense import dense

CAUGHT_BY = "scale_matters"
CARD = OpCard(
    slug="scales_one_of_two",
    title="A culprit",
    baseline=True,
    exports=("attention",),
    spec="q: b h n d, k: b g m d, v: b g m e, agents: b h l d -> b h n e",
    example="b=2 h=4 g=2 n=10 m=12 d=8 e=6 l=3",
    attends=("self", "cross"),
    accepts=("scale",),
    engines=("dense",),
)


@operator(CARD)
def attention(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, *, scale: float | None = None, engine: str | None = None
) -> Tensor:
    """Attend."""
    gathered = dense(agents, k, v, scale=scale, engine=engine).out
    return dense(q, agents, gathered, engine=engine).out
