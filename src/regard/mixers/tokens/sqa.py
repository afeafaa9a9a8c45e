"""Sparse query attention: fewer query heads than the model has room for.

    heads H of the reference layer, H_q < H query heads, H_kv <= H_q key heads, head width C / H

The cost of scores and values falls by H_q / H; keys and values are shared as in grouped-query attention.
Departs from the paper: none.
"""

from __future__ import annotations

from torch import Tensor

from regard.contract.card import MixerCard
from regard.contract.errors import OptionError
from regard.layers.attention import AnyPattern, Attention
from regard.ops.softmax import softmax_attention

CARD = MixerCard(
    slug="sqa",
    title="Sparse query attention",
    paper="Sparse Query Attention (SQA): A Computationally Efficient Attention Mechanism with Query Heads Reduction",
    builds_on=("softmax",),
    exports=("SparseQueryAttention", "sqa_heads"),
    example="b=2 n=10 c=32 h=8",
    attends=("self", "causal_self", "cross", "causal_cross"),
    padding=True,
    documents=True,
    decode=True,
    time="n m c",
    memory="n c",
)

# variant: (H / H_q, H / H_kv), table 1 of the paper; None: one key head
_VARIANTS: dict[str, tuple[int, int | None]] = {"sqa": (2, 4), "ssqa": (2, 2), "xsqa": (4, 4), "xsmqa": (4, None)}


def sqa_heads(heads: int, variant: str = "sqa") -> tuple[int, int]:
    """(query heads, key heads) of a variant for a reference of `heads` heads.

    variant: "sqa" (H/2, H/4), "ssqa" (H/2, H/2), "xsqa" (H/4, H/4), "xsmqa" (H/4, 1). Raises OptionError.
    """
    if variant not in _VARIANTS:
        raise OptionError(f"there is no variant {variant!r}; there are {', '.join(_VARIANTS)}")
    query, key = _VARIANTS[variant]
    if heads % query or (key is not None and heads % key):
        raise OptionError(f"{heads} heads do not divide into the variant {variant}: give query_heads= and kv_heads=")
    return heads // query, 1 if key is None else heads // key


class SparseQueryAttention(Attention):
    """Softmax attention with H_q <= heads query heads of width dim / heads (section 3).

    dim: model width. heads: H of the reference layer. query_heads, kv_heads: H_q and H_kv, H/2 and H/4 if None.
    The other options are those of the attention layer. Raises OptionError if H_q > H or H_kv does not divide H_q.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        query_heads: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        qk_norm: bool = False,
        rotary: bool = True,
        rotary_base: float = 1e4,
        context_dim: int | None = None,
    ):
        if query_heads is None or kv_heads is None:
            default = sqa_heads(heads)
            query_heads = default[0] if query_heads is None else query_heads
            kv_heads = default[1] if kv_heads is None else kv_heads
        if query_heads > heads:
            raise OptionError(f"sqa takes at most the {heads} query heads of its reference, not {query_heads}")
        if head_dim is None:
            if dim % heads:
                raise OptionError(f"a width of {dim} does not divide into {heads} heads: give head_dim=")
            head_dim = dim // heads
        super().__init__(
            dim, query_heads, kv_heads=kv_heads, head_dim=head_dim, bias=bias, qk_norm=qk_norm, rotary=rotary,
            rotary_base=rotary_base, context_dim=context_dim,
        )  # fmt: skip

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, pattern: AnyPattern, q_offset: int) -> Tensor:
        return softmax_attention(q, k, v, pattern=pattern, q_offset=q_offset)
