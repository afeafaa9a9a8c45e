"""Wrong: one key is left out, as by a slice that is one too short."""

from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.operator import operator
from regard.engines.dense import dense

CAUGHT_BY = "attends_cross"
CARD = OpCard(
    slug="drops_the_last_key",
    title="A culprit",
    baseline=True,
    exports=("attention",),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=10 m=12 d=8 e=6",
    attends=("self", "cross"),
    engines=("dense",),
)


@operator(CARD)
def attention(q: Tensor, k: Tensor, v: Tensor, *, engine: str | None = None) -> Tensor:
    """Attend."""
    kept = slice(max(k.shape[2] - 1, 1))
    return dense(q, k[:, :, kept], v[:, :, kept], engine=engine).out
