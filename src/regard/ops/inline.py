"""InLine attention: linear attention whose rows sum to 1 by subtraction, so that different queries get different weights.

W_ij = A_ij - (1/M) sum_j A_ij + 1/M,      A_ij = scale/M phi(q_i).phi(k_j)
out  = q (scale/M k'v) + (1 - scale q.mean(k)) mean(v)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.errors import OptionError, Unsupported
from regard.contract.operator import operator
from regard.engines.precision import accumulator, without_autocast
from regard.engines.scan import as_scan, linear_scan
from regard.patterns import Bound, Pattern

CARD = OpCard(
    slug="inline",
    title="InLine attention",
    paper="Bridging the Divide: Reconsidering Softmax and Linear Attention",
    exports=("inline_attention",),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=10 m=12 d=8 e=6",
    attends=("self", "cross"),
    accepts=("pattern", "scale"),
    padding=True,
    time="n d e",
    memory="n d",
    engines=("scan",),
)

_PHI: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "exp": torch.exp,
    "elu1": lambda x: F.elu(x) + 1,
}


@operator(CARD)
def inline_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Pattern | Bound | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    phi: Literal["identity", "relu", "exp", "elu1"] = "identity",
    engine: str | None = None,
) -> Tensor:
    """InLine attention (equation 5). Weights of a row sum to 1 and may be negative; q and 2q weigh differently.

    pattern: KeyValid(); hidden keys do not count in M. scale: D^-1/2 if None. phi: of queries and keys.
    Not causal: the means run over all keys. Raises OptionError, ShapeError, Unsupported.
    """
    if phi not in _PHI:
        raise OptionError(f"phi is {phi!r}; it is one of {', '.join(_PHI)}")
    is_causal, key_valid, _ = as_scan(pattern, is_causal, "inline")
    if is_causal:
        raise Unsupported("inline takes means over all keys and is not causal; linear and lightning are")
    kind = accumulator(q.dtype)
    with without_autocast(q.device):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        query, key, value = _PHI[phi](q.to(kind)), _PHI[phi](k.to(kind)), v.to(kind)
        count: Tensor | int = max(k.shape[2], 1)
        if key_valid is not None:
            keep = key_valid[:, None, :, None]
            key, value = key * keep, value.masked_fill(~keep, 0.0)
            count = key_valid.sum(-1).clamp(min=1)[:, None, None, None].to(kind)
        repeats = q.shape[1] // k.shape[1]
        mean_k = (key.sum(2, keepdim=True) / count).repeat_interleave(repeats, 1)
        mean_v = (value.sum(2, keepdim=True) / count).repeat_interleave(repeats, 1)
        # the factor is split so that sums over many keys stay small
        out = linear_scan(query * scale, key / count, value, is_causal=False, engine=engine)[0]
        return (out + (1 - scale * (query * mean_k).sum(-1, keepdim=True)) * mean_v).to(q.dtype)
