"""`regard.attend`: torch's scaled_dot_product_attention, with patterns, biases, normalisers and the log-sum-exp."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract.errors import ShapeError
from regard.contract.shapes import bind, check_types, parse
from regard.engines import automatic
from regard.patterns import Bound, Pattern
from regard.primitives.normalisers import Normaliser

_SPEC = parse("query: b h n d, key: b g m d, value: b g m e -> b h n e")
_NAMES = ("query", "key", "value")


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    pattern: Pattern | Bound | None = None,
    bias: Tensor | None = None,
    normaliser: Normaliser | None = None,
    q_offset: int = 0,
    engine: str | None = None,
) -> Tensor:
    """Attend: a drop-in for `torch.nn.functional.scaled_dot_product_attention`, with its arguments in its order.

    query (B, H, N, D), key (B, G, M, D), value (B, G, M, E), H a multiple of G -> (B, H, N, E).
    attn_mask: bool (True = may attend) or float (added to the scores), broadcastable to (B, H, N, M).
    dropout_p: share of the weights that is dropped; the same ones whatever the engine, others than torch drops.
    is_causal: top-left aligned as in torch; together with a mask both hold. scale: D^-1/2 if None.
    enable_gqa: only for torch's callers; grouped heads are seen from the shapes.
    pattern: which positions may meet, such as `Causal() & SlidingWindow(256)`. bias: added to the scores.
    normaliser: how scores become weights, softmax if None. q_offset: position of the first query, for caches.
    engine: None for the best one; "reference", "dense:sdpa", … for a named one, which runs or raises.
    A row that may attend to nothing gives exactly 0, with gradient 0.
    Raises ShapeError, OptionError, Unsupported.
    """
    if (
        pattern is None
        and bias is None
        and normaliser is None
        and engine is None
        and attn_mask is None
        and not q_offset
        and not dropout_p
        and not (query.is_cpu and _is_long(query, key, value, is_causal))
    ):
        if query.dim() == 4 and query.shape[1] != key.shape[1]:
            bind(_SPEC, (query, key, value), "attend")
            enable_gqa = True
        return F.scaled_dot_product_attention(
            query, key, value, None, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    bind(_SPEC, (query, key, value), "attend")
    check_types((query, key, value), _NAMES, "attend")
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        if bias is not None:
            raise ShapeError("a float attn_mask is a bias already; add the two, or pass a bool mask")
        attn_mask, bias = None, attn_mask
    return automatic.attend(
        query, key, value, pattern, mask=attn_mask, bias=bias, is_causal=is_causal, scale=scale, q_offset=q_offset,
        normaliser=normaliser, dropout_p=dropout_p, engine=engine,
    ).out  # fmt: skip


def _is_long(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> bool:
    """Whether the native kernels beat torch's here; cheap for calls that are short."""
    if query.dim() != 4 or query.shape[2] * key.shape[-2] < 1 << 14 or torch.compiler.is_compiling():
        return False
    return automatic.beats_torch(query, key, value, is_causal)
