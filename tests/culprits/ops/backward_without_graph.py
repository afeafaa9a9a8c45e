"""Wrong: the backward pass is cut from the graph, so that second derivatives are 0 without a word."""

from typing import Any

import torch
from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.operator import operator
from regard.engines.dense import dense

CAUGHT_BY = "second_derivatives"
CARD = OpCard(
    slug="backward_without_graph",
    title="A culprit",
    baseline=True,
    exports=("attention",),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=10 m=12 d=8 e=6",
    attends=("self", "causal_self", "cross", "causal_cross"),
    engines=("dense",),
)


class _Fast(torch.autograd.Function):
    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        return dense(q, k, v, is_causal=is_causal).out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.is_causal = inputs[3]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        tensors = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            out = dense(*tensors, is_causal=ctx.is_causal).out
        return *torch.autograd.grad(out, tensors, grad.detach()), None


@operator(CARD)
def attention(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, engine: str | None = None) -> Tensor:
    """Attend."""
    if engine == "reference":
        return dense(q, k, v, is_causal=is_causal, engine=engine).out
    return _Fast.apply(q, k, v, is_causal)
