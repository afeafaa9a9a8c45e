"""A stranger's op, outside the library: half softmax attention, half the mean."""

from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.operator import operator
from regard.engines.dense import dense
from regard.patterns import Bound, Pattern

CARD = OpCard(
    slug="halfway",
    title="Softmax halfway to the mean",
    baseline=True,
    exports=("halfway_attention",),
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
def halfway_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Pattern | Bound | None = None,
    is_causal: bool = False,
    q_offset: int = 0,
    engine: str | None = None,
) -> Tensor:
    """Half softmax attention, half the mean of the visible values."""
    options = {"is_causal": is_causal, "q_offset": q_offset, "engine": engine}
    return (dense(q, k, v, pattern, **options).out + dense(q * 0, k, v, pattern, **options).out) / 2
