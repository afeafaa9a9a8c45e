"""Softmax attention, the baseline that everything is compared with.

out = softmax(scale q k' + bias) v
"""

from __future__ import annotations

from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.operator import operator
from regard.engines.automatic import attend
from regard.patterns import Bound, Pattern

CARD = OpCard(
    slug="softmax",
    title="Softmax attention",
    baseline=True,
    exports=("softmax_attention",),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=10 m=12 d=8 e=6",
    attends=("self", "causal_self", "cross", "causal_cross"),
    accepts=("pattern", "mask", "bias", "scale", "dropout"),
    padding=True,
    documents=True,
    decode="kv",
    time="n m",
    memory="n",
    engines=("dense", "block_sparse"),
)


@operator(CARD)
def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Pattern | Bound | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    q_offset: int = 0,
    dropout_p: float = 0.0,
    engine: str | None = None,
) -> Tensor:
    """Softmax attention (Vaswani et al., 2017, equation 1).

    pattern, mask, bias: who may meet whom, and what is added to the scores. scale: D^-1/2 if None.
    q_offset: position of the first query, for caches. dropout_p: share of the weights that is dropped.
    Raises ShapeError, OptionError, Unsupported.
    """
    return attend(
        q, k, v, pattern, mask=mask, bias=bias, is_causal=is_causal, scale=scale, q_offset=q_offset,
        dropout_p=dropout_p, engine=engine,
    ).out  # fmt: skip
