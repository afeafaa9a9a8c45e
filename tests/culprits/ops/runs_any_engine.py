"""Wrong: an engine that does not exist is taken for the default one."""

from functools import wraps

from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.operator import operator
from regard.engines.dense import dense

CAUGHT_BY = "refuses_unknown_engine"
CARD = OpCard(
    slug="runs_any_engine",
    title="A culprit",
    baseline=True,
    exports=("attention",),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=10 m=12 d=8 e=6",
    attends=("self", "causal_self", "cross", "causal_cross"),
    engines=("dense",),
)


@operator(CARD)
def _body(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, engine: str | None = None) -> Tensor:
    """Attend."""
    return dense(q, k, v, is_causal=is_causal, engine=engine).out


@wraps(_body)
def attention(*args: Tensor, engine: str | None = None, **options: bool) -> Tensor:
    known = engine is None or engine.startswith("dense:") or engine in ("dense", "reference")
    return _body(*args, engine=engine if known else None, **options)
