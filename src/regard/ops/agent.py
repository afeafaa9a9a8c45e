"""Agent attention: a few agents gather the values, then every query reads the agents.

out = softmax(scale q a' + B2) softmax(scale a k' + B1) v,      a: (B, H, L, D), L much smaller than N
"""

from __future__ import annotations

from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.errors import Unsupported
from regard.contract.operator import operator
from regard.engines.dense import dense
from regard.patterns import Bound, Pattern

CARD = OpCard(
    slug="agent",
    title="Agent attention",
    paper="Agent Attention: On the Integration of Softmax and Linear Attention",
    exports=("agent_attention",),
    spec="q: b h n d, k: b g m d, v: b g m e, a: b h l d -> b h n e",
    example="b=2 h=4 g=2 n=10 m=12 d=8 e=6 l=3",
    attends=("self", "cross"),
    accepts=("pattern", "scale"),
    padding=True,
    time="(n + m) l d",
    memory="(n + m) l",
    engines=("dense",),
)


@operator(CARD)
def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    *,
    pattern: Pattern | Bound | None = None,
    is_causal: bool = False,
    bias_ak: Tensor | None = None,
    bias_qa: Tensor | None = None,
    scale: float | None = None,
    engine: str | None = None,
) -> Tensor:
    """Agent attention (equation 5). The implied weights of a row sum to 1 and their table has rank L at most.

    a: the agents, usually pooled queries. pattern: KeyValid(), which hides keys from the agents. bias_ak: B1, added to
    the agents' scores, broadcastable to (B, H, L, M). bias_qa: B2, to (B, H, N, L). scale: D^-1/2 if None.
    Not causal: agents gather all values. Raises ShapeError, Unsupported.
    """
    if is_causal or (pattern is not None and pattern.causal):
        raise Unsupported("agents pool over all queries and gather all values: agent is not causal; softmax is")
    gathered = dense(a, k, v, pattern, bias=bias_ak, scale=scale, engine=engine).out
    return dense(q, a, gathered, bias=bias_qa, scale=scale, engine=engine).out
