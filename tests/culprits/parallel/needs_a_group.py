"""Wrong: without a group of processes it cannot be called."""

from torch import Tensor

from regard.contract.card import ParallelCard
from regard.engines.dense import dense

CAUGHT_BY = "splits_by_group"
CARD = ParallelCard(
    slug="needs_a_group",
    title="A culprit",
    baseline=True,
    exports=("attend_in_group",),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=8 m=8 d=4 e=3",
    attends=("self", "causal_self"),
    whole="softmax",
)


def attend_in_group(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, group: object) -> Tensor:
    """Softmax attention."""
    return dense(q, k, v, is_causal=is_causal).out
