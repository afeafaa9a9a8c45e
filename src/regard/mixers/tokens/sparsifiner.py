"""Sparsifiner: a low-rank estimate of the attention of this very image says which keys each query reads.

    coef = softmax(scale (q Wq) ((k Wk)' P)),   A~ = coef P_back',   out = softmax attention to the largest keep N of A~

P, P_back (N x N/reduce_n) are bound to positions; Wq, Wk narrow each head and are shared by all heads. The choice has no
gradient: the four are taught by the layer's own attention before the choice, sum (A~ - A)^2, which goes to
`collect_losses`, or by a teacher's (`train.distillation.sparsifiner`). Rows of the class token read every key.
Departs from the released code: equal estimates choose the earlier key; q, k and A are not moved by that loss (there an
optimiser that holds Wq, Wk, P, P_back only has the same effect); the count of keys is not kept from call to call.
"""

from __future__ import annotations

from torch import Tensor, nn

from regard.contract.card import MixerCard
from regard.contract.errors import OptionError, ShapeError, Unsupported
from regard.engines.gather import gather
from regard.layers.attention import check_tokens
from regard.layers.sparsifiner import Connectivity, connectivity_topk
from regard.ops.softmax import softmax_attention
from regard.patterns import KeyValid

__all__ = ["Connectivity", "SparsifinerAttention", "connectivity_topk"]

CARD = MixerCard(
    slug="sparsifiner",
    title="Sparsifiner, keys by a low-rank estimate",
    paper="Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers",
    builds_on=("softmax",),
    exports=("SparsifinerAttention", "Connectivity", "connectivity_topk"),
    example="b=2 n=16 c=16 h=4",
    options={"num_tokens": 16, "keep": 0.5, "reduce_n": 4},
    attends=("self",),
    padding=True,
    time="n m c",
    memory="n m",
)


class SparsifinerAttention(nn.Module):
    """Attention of `num_tokens` tokens, each to `keep` of the keys, chosen by a `Connectivity` (section 3).

    bias: biases in the four projections. head_dim: dim / heads if None. The other options are those of `Connectivity`.
    Raises OptionError.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        num_tokens: int,
        keep: float | None = 0.25,
        threshold: float | None = None,
        prefix: int = 1,
        reduce_n: int = 8,
        reduce_c: int = 2,
        coef_topk: int | None = 8,
        coef_threshold: float = 0.0,
        basis_threshold: float = 0.02,
        shared: bool = False,
        scale: float | None = None,
        head_dim: int | None = None,
        bias: bool = True,
    ):
        super().__init__()
        if heads < 1 or (head_dim is None and dim % heads):
            raise OptionError(f"a width of {dim} does not divide into {heads} heads: give head_dim=")
        head_dim = dim // heads if head_dim is None else head_dim
        self.dim, self.heads, self.head_dim = dim, heads, head_dim
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, heads * head_dim, bias=bias) for _ in range(3))
        self.to_out = nn.Linear(heads * head_dim, dim, bias=bias)
        self.connectivity = Connectivity(
            num_tokens, heads, head_dim, keep=keep, threshold=threshold, prefix=prefix, reduce_n=reduce_n,
            reduce_c=reduce_c, coef_topk=coef_topk, coef_threshold=coef_threshold, basis_threshold=basis_threshold,
            shared=shared, scale=scale,
        )  # fmt: skip

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        padding: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Mix tokens (B, N, C). padding: bool (B, N), True = takes part; the rows of other tokens give exactly 0.

        Raises ShapeError for another number of tokens; Unsupported for a context or a causal call.
        """
        check_tokens(type(self).__name__, self.dim, x, context, padding, None, is_causal)
        if context is not None or is_causal:
            raise Unsupported(
                "the estimate of sparsifiner is of the tokens themselves, all at once: it reads no context and is not "
                "causal; softmax can both"
            )
        if x.shape[1] != self.connectivity.num_tokens:
            raise ShapeError(
                f"{x.shape[1]} tokens came, {self.connectivity.num_tokens} are required: the projections are bound to "
                "positions; resize P, P_back (connectivity.down, .up) for another number"
            )
        q, k, v = (to(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        chosen = self.connectivity(q, k, key_valid=padding)
        if chosen is None:
            within = None if padding is None else KeyValid(rows=True).bind(key_valid=padding)
            out = softmax_attention(q, k, v, pattern=within)
        else:
            out = gather(q, k, v, chosen).out
        out = self.to_out(out.transpose(1, 2).flatten(2))
        return out if padding is None else out.masked_fill(~padding[..., None], 0.0)
