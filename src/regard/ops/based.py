"""Taylor linear attention (of BASED): the second-order expansion of exp in a state of fixed size.

    out_i = sum_j (1 + a_ij + a_ij^2 / 2) v_j / sum_j (1 + a_ij + a_ij^2 / 2),      a_ij = q_i . k_j / sqrt d

Departs from the paper: features are packed (each product once), which has the same kernel at half the size.
"""

from __future__ import annotations

from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.operator import operator
from regard.engines.scan import ScanState, as_scan, linear_scan
from regard.patterns import Bound, Pattern
from regard.primitives.feature_maps import taylor2

CARD = OpCard(
    slug="based",
    title="BASED: Taylor linear attention",
    paper="Simple linear attention language models balance the recall-throughput tradeoff",
    exports=("taylor_linear_attention", "taylor_linear_attention_step"),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=10 m=12 d=4 e=6",
    attends=("self", "causal_self", "cross", "causal_cross"),
    accepts=("pattern",),
    padding=True,
    documents=True,
    decode="state",
    time="n d^2 e",
    memory="n d^2",
    engines=("scan",),
)


@operator(CARD)
def taylor_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Pattern | Bound | None = None,
    is_causal: bool = False,
    eps: float = 1e-12,
    engine: str | None = None,
) -> Tensor:
    """Taylor linear attention (section 4.1). Weights are positive: 1 + a + a^2/2 is at least 1/2.

    pattern: an intersection of Causal(), KeyValid() and, where causal, Documents(). eps: added to the denominator.
    d should be small: the state has (1 + d + d(d+1)/2) e numbers a head. Raises Unsupported, ShapeError.
    """
    is_causal, key_valid, reset = as_scan(pattern, is_causal, "based")
    return linear_scan(
        taylor2(q), taylor2(k), v, divide_by="sum", eps=eps, is_causal=is_causal, key_valid=key_valid, reset=reset,
        engine=engine,
    )[0]  # fmt: skip


def taylor_linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    state: ScanState | None = None,
    key_valid: Tensor | None = None,
    reset: Tensor | None = None,
    eps: float = 1e-12,
    engine: str | None = None,
) -> tuple[Tensor, ScanState]:
    """Continue causal `taylor_linear_attention` by any N >= 1 steps from a state (None: from the start): (out, state)."""
    return linear_scan(
        taylor2(q), taylor2(k), v, divide_by="sum", eps=eps, key_valid=key_valid, reset=reset, initial_state=state,
        engine=engine,
    )  # fmt: skip
