"""Wrong: it sums over the processes even where there is one alone."""

import torch.distributed as dist
from torch import Tensor

from regard.contract.card import ParallelCard
from regard.engines.dense import dense

CAUGHT_BY = "alone_sends_nothing"
CARD = ParallelCard(
    slug="talks_to_itself",
    title="A culprit",
    baseline=True,
    exports=("talkative_attention",),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=8 m=8 d=4 e=3",
    attends=("self", "causal_self"),
    whole="softmax",
)


def talkative_attention(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, group: object = None) -> Tensor:
    """Softmax attention."""
    out = dense(q, k, v, is_causal=is_causal).out
    if dist.is_initialized():
        dist.all_reduce(out.detach().clone(), group=group)
    return out
