"""Sliding-window attention, the baseline with a fixed reach.

out_i = softmax over j in (i - window, i] of scale q_i.k_j, applied to v_j
"""

from __future__ import annotations

from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.errors import OptionError
from regard.contract.operator import operator
from regard.engines.automatic import attend
from regard.patterns import Bound, Causal, Pattern, SlidingWindow

CARD = OpCard(
    slug="sliding_window",
    title="Sliding-window attention",
    baseline=True,
    exports=("sliding_window_attention",),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=11 m=11 d=8 e=6",
    options={"window": 4},
    attends=("self", "causal_self"),
    accepts=("pattern", "mask", "bias", "scale", "dropout"),
    padding=True,
    documents=True,
    decode="kv",
    reach="window",
    time="n w",
    memory="n",
    engines=("dense", "block_sparse"),
)


@operator(CARD)
def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    pattern: Pattern | Bound | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    q_offset: int = 0,
    dropout_p: float = 0.0,
    engine: str | None = None,
) -> Tensor:
    """Softmax attention over the keys nearer than `window` positions.

    window: keys, at least 1; with is_causal the query's own position is one of them. pattern: a further limit.
    The other options are those of `softmax_attention`. Raises ShapeError, OptionError, Unsupported.
    """
    if is_causal and pattern is not None:
        raise OptionError("is_causal together with a pattern says it twice: write Causal() & pattern")
    near: Pattern | Bound = SlidingWindow(window)
    if is_causal:
        near = Causal() & near
    return attend(
        q, k, v, near if pattern is None else near & pattern, mask=mask, bias=bias, scale=scale, q_offset=q_offset,
        dropout_p=dropout_p, engine=engine,
    ).out  # fmt: skip
