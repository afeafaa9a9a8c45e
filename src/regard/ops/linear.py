"""Linear attention with the feature map elu + 1, the baseline with a state of fixed size.

out_i = phi(q_i) sum_j phi(k_j) v_j' / (phi(q_i) . sum_j phi(k_j)),      phi(x) = elu(x) + 1
"""

from __future__ import annotations

from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.operator import operator
from regard.engines.scan import ScanState, as_scan, linear_scan
from regard.patterns import Bound, Pattern
from regard.primitives.feature_maps import elu1

CARD = OpCard(
    slug="linear",
    title="Linear attention (elu + 1)",
    baseline=True,
    exports=("linear_attention", "linear_attention_step"),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=10 m=12 d=8 e=6",
    attends=("self", "causal_self", "cross", "causal_cross"),
    accepts=("pattern",),
    padding=True,
    documents=True,
    decode="state",
    time="n d e",
    memory="n d",
    engines=("scan",),
)


@operator(CARD)
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Pattern | Bound | None = None,
    is_causal: bool = False,
    eps: float = 1e-6,
    engine: str | None = None,
) -> Tensor:
    """Linear attention (Katharopoulos et al., 2020, equations 5 and 9).

    pattern: an intersection of Causal(), KeyValid() and, where causal, Documents(). eps: added to the denominator.
    Raises Unsupported for other patterns and for a causal call with n != m; ShapeError.
    """
    is_causal, key_valid, reset = as_scan(pattern, is_causal, "linear")
    return linear_scan(
        elu1(q),
        elu1(k),
        v,
        divide_by="sum",
        eps=eps,
        is_causal=is_causal,
        key_valid=key_valid,
        reset=reset,
        engine=engine,
    )[0]


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    state: ScanState | None = None,
    key_valid: Tensor | None = None,
    reset: Tensor | None = None,
    eps: float = 1e-6,
    engine: str | None = None,
) -> tuple[Tensor, ScanState]:
    """Continue causal `linear_attention` by any N >= 1 steps from a state (None: from the start): (out, new state)."""
    return linear_scan(
        elu1(q),
        elu1(k),
        v,
        divide_by="sum",
        eps=eps,
        key_valid=key_valid,
        reset=reset,
        initial_state=state,
        engine=engine,
    )
