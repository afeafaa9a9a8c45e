"""Softplus attention with re-weighting (LSSA, LSSAR): unit queries and keys, a length scale, sharpened rows.

    A = softplus(ln d ln n_i  q_i.k_j / (|q_i| |k_j|)),  rows over their sums            (LSSA)
    A = relu(n_i A - offset)^power,  rows over their sums                                (LSSAR)

n_i is the number of keys that row i may see. Departs from the paper: a row in which no weight exceeds the mean keeps
its first-stage weights (the paper's form gives 0 there); the row maximum is divided out before the power.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.errors import OptionError
from regard.contract.operator import operator
from regard.engines.automatic import attend
from regard.engines.dense import check_table
from regard.engines.precision import accumulator
from regard.patterns import Bound, Causal, Full, Pattern
from regard.primitives.length_scale import log_scale
from regard.primitives.normalisers import L1, Sharpen

CARD = OpCard(
    slug="softplus_reweight",
    title="Softplus attention with re-weighting (LSSAR)",
    paper="Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models",
    exports=("softplus_attention",),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=10 m=12 d=8 e=6",
    attends=("self", "causal_self", "cross", "causal_cross"),
    accepts=("pattern", "mask"),
    padding=True,
    documents=True,
    decode="kv",
    time="n m",
    memory="n m",
    engines=("dense", "block_sparse"),
)


@operator(CARD)
def softplus_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    power: float | None = 15.0,
    offset: float = 1.0,
    offset_free_rows: int = 3,
    eps: float = 1e-8,
    pattern: Pattern | Bound | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    q_offset: int = 0,
    engine: str | None = None,
) -> Tensor:
    """Softplus attention, re-weighted (the paper's LSSAR); power=None leaves out the second stage (LSSA).

    power: above 0; 3 suits the training length, 15 lengths beyond it. offset: in units of the mean weight.
    offset_free_rows: rows with at most so many visible keys use offset 0. eps: added to the row sums, at least 0.
    pattern, mask, is_causal, q_offset: as for `softmax_attention`; there is no scale, for q and k are unit vectors.
    Raises OptionError, ShapeError.
    """
    if power is not None and power <= 0:
        raise OptionError(f"softplus attention needs a power above 0 (or None for LSSA), not {power}")
    if eps < 0:
        raise OptionError(f"softplus attention needs eps >= 0, not {eps}")
    if is_causal and pattern is None and mask is None and not q_offset:
        pattern, is_causal = Causal(), False
    # accumulate in float32: the length scale multiplies rounding of half-precision unit vectors
    kind = accumulator(q.dtype)
    counts = _counts(pattern, mask, is_causal, q, k, q_offset)
    factor = log_scale(counts, "log_d_log_n", d=q.shape[-1])[..., None].to(kind)
    normaliser = L1("softplus", eps)
    out = attend(
        F.normalize(q.to(kind), dim=-1) * factor, F.normalize(k.to(kind), dim=-1), v.to(kind), pattern,
        mask=mask, is_causal=is_causal, q_offset=q_offset, scale=1.0, engine=engine,
        normaliser=normaliser if power is None else Sharpen(normaliser, power, offset, offset_free_rows, eps),
    ).out  # fmt: skip
    return out.to(v.dtype)


def _counts(
    pattern: Pattern | Bound | None, mask: Tensor | None, is_causal: bool, q: Tensor, k: Tensor, q_offset: int
) -> Tensor:
    n, m, device = q.shape[2], k.shape[2], q.device
    if mask is not None and not torch.compiler.is_compiling():
        check_table(q, k, mask, None)
    pattern = Full() if pattern is None else pattern
    if is_causal:
        pattern = pattern & Causal()
    if mask is None:
        return pattern.row_counts(n, m, q_offset=q_offset, device=device)
    return (pattern.dense(n, m, q_offset=q_offset, device=device) & mask).sum(-1)
