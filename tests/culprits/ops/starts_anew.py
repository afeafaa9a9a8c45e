"""Wrong: every piece begins with an empty state."""

from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.operator import operator
from regard.engines.scan import ScanState, linear_scan

CAUGHT_BY = "continues_from_a_state"
CARD = OpCard(
    slug="starts_anew",
    title="A culprit",
    baseline=True,
    exports=("attention", "attention_step"),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=11 m=11 d=8 e=6",
    attends=("causal_self",),
    decode="state",
    engines=("scan",),
)


@operator(CARD)
def attention(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, engine: str | None = None) -> Tensor:
    """Attend."""
    return linear_scan(q, k, v, engine=engine)[0]


def attention_step(
    q: Tensor, k: Tensor, v: Tensor, *, state: ScanState | None = None, engine: str | None = None
) -> tuple[Tensor, ScanState]:
    """Continue."""
    return linear_scan(q, k, v, engine=engine)
