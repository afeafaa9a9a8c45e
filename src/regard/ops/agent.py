"""Agent attention: a few agents gather the values, then every query reads the agents.

out = softmax(scale q a' + B2) softmax(scale a k' + B1) v,      agents a (B, H, L, D), L much smaller than N
"""

from __future__ import annotations

from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.operator import operator
from regard.engines.dense import dense
from regard.engines.scan import as_scan
from regard.patterns import Bound, KeyValid, Pattern

CARD = OpCard(
    slug="agent",
    title="Agent attention",
    paper="Agent Attention: On the Integration of Softmax and Linear Attention",
    exports=("agent_attention",),
    spec="q: b h n d, k: b g m d, v: b g m e, agents: b h l d -> b h n e",
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
    agents: Tensor,
    *,
    pattern: Pattern | Bound | None = None,
    is_causal: bool = False,
    bias_ak: Tensor | None = None,
    bias_qa: Tensor | None = None,
    scale: float | None = None,
    engine: str | None = None,
) -> Tensor:
    """Agent attention (section 4.1). The implied weights of a row sum to 1; their table has rank L at most.

    agents: usually pooled queries; then they depend on all of them, and no causal form exists. pattern: KeyValid(),
    which hides keys from the agents. bias_ak: B1, broadcastable to (B, H, L, M); bias_qa: B2, to (B, H, N, L); -inf in
    B2 hides an agent. scale: of both products, D^-1/2 if None. Raises ShapeError, OptionError, Unsupported.
    """
    _, key_valid, _ = as_scan(pattern, is_causal, "agent")
    valid = None if key_valid is None else KeyValid().bind(key_valid=key_valid)
    gathered = dense(agents, k, v, valid, bias=bias_ak, scale=scale, engine=engine).out
    return dense(q, agents, gathered, bias=bias_qa, scale=scale, engine=engine).out
