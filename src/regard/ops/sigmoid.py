"""Sigmoid attention: every key is weighed on its own, no row normalisation.

    out = sigmoid(scale q k' + bias + b) v,      b = -ln n,  n the training length

Departs from the paper: none; the query-key norm, the rotary positions and the norm after the layer that its language
models use are options of the attention layer.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.errors import OptionError
from regard.contract.operator import operator
from regard.engines.automatic import attend
from regard.patterns import Bound, Pattern
from regard.primitives.normalisers import Sigmoid

CARD = OpCard(
    slug="sigmoid",
    title="Sigmoid self-attention",
    paper="Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
    exports=("sigmoid_attention",),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=10 m=12 d=8 e=6",
    options={"length": 12},
    attends=("self", "causal_self", "cross", "causal_cross"),
    accepts=("pattern", "mask", "bias", "scale", "dropout"),
    padding=True,
    documents=True,
    decode="kv",
    time="n m",
    memory="n m",
    engines=("dense", "block_sparse"),
    mixer={"qk_norm": True},
)


@operator(CARD)
def sigmoid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sigmoid_bias: float | Literal["-log_n"] = "-log_n",
    length: int | None = None,
    pattern: Pattern | Bound | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    q_offset: int = 0,
    dropout_p: float = 0.0,
    engine: str | None = None,
) -> Tensor:
    """Sigmoid attention (section 3; the bias: section 4).

    sigmoid_bias: the constant b, "-log_n" for -ln(length). length: the training length in tokens, at least 1; it stays
    what it was in training, whatever the number of keys. A causal row with few keys has small weights: that is the
    method. The other options are those of `softmax_attention`. Raises OptionError without a length; ShapeError.
    """
    if sigmoid_bias == "-log_n":
        if length is None:
            raise OptionError(
                "sigmoid attention needs the training length: pass length=, in tokens; a bias taken from the current "
                "key count would make decoding differ from training"
            )
        if length < 1:
            raise OptionError(f"sigmoid attention needs a length of at least 1 token, not {length}")
        sigmoid_bias = -math.log(length)
    return attend(
        q, k, v, pattern, mask=mask, bias=bias, is_causal=is_causal, scale=scale, q_offset=q_offset,
        normaliser=Sigmoid(float(sigmoid_bias)), dropout_p=dropout_p, engine=engine,
    ).out  # fmt: skip
