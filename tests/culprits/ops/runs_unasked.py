"""Wrong: a call with all keys runs, though only the causal one is claimed."""

from dataclasses import replace

from torch import Tensor

from regard.contract.card import ATTENDS, OpCard
from regard.contract.operator import operator
from regard.engines.dense import dense

CAUGHT_BY = "refuses_other_attends"
CARD = OpCard(
    slug="runs_unasked",
    title="A culprit",
    baseline=True,
    exports=("attention",),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=11 m=11 d=8 e=6",
    attends=("causal_self",),
    engines=("dense",),
)


@operator(replace(CARD, attends=ATTENDS))
def attention(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, engine: str | None = None) -> Tensor:
    """Attend."""
    return dense(q, k, v, is_causal=is_causal, engine=engine).out


attention.card = CARD
