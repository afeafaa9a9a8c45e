"""Generalised neighbourhood attention: `stride` queries share the window of their leader, so that tiles become full.

    out_i = softmax over j in the neighbourhood of the leader of i's group of scale q_i.k_j, applied to v_j

A stride of 1 is neighbourhood attention, a stride of the kernel blocked (window) attention; outputs are not subsampled.
Departs from the paper: tiles are always a permutation of the tokens, never cut inside a kernel.
"""

from __future__ import annotations

from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.operator import operator
from regard.ops.neighborhood import Sizes, neighborhood_attention

CARD = OpCard(
    slug="gna",
    title="Generalized neighborhood attention",
    paper="Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light",
    builds_on=("neighborhood",),
    exports=("gna_attention",),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=20 m=20 d=8 e=6",
    options={"shape": (4, 5), "kernel": 4, "stride": (2, 3)},
    attends=("self", "causal_self"),
    accepts=("scale", "dropout"),
    time="n w",
    memory="n",
    engines=("block_sparse", "gather"),
)


@operator(CARD)
def gna_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    shape: tuple[int, ...],
    kernel: Sizes,
    stride: Sizes,
    dilation: Sizes = 1,
    is_causal: bool | tuple[bool, ...] = False,
    scale: float | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    dropout_p: float = 0.0,
    engine: str | None = None,
) -> Tensor:
    """Attend within strided neighbourhoods on a grid (section 3).

    stride: queries that share a window, at most the kernel, one value or one an axis; the leader is their centre (the
    right-hand one of an even number), on a causal axis the last of them. What a choice costs on which tiles says
    `regard.patterns.tile_cost.tile_cost`. The other options are those of `neighborhood_attention`.
    Raises OptionError, ShapeError.
    """
    return neighborhood_attention(
        q, k, v, shape=shape, kernel=kernel, dilation=dilation, stride=stride, is_causal=is_causal, scale=scale,
        extra_k=extra_k, extra_v=extra_v, dropout_p=dropout_p, engine=engine,
    )  # fmt: skip
