"""Block-sparse attention through torch's FlexAttention, for CUDA: the pattern becomes a BlockMask, biases a score_mod."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from regard.engines.dense import Attended, Call, refuse_nan
from regard.patterns import Bound, Causal, Full, Pattern
from regard.primitives.normalisers import Softmax


def cannot(call: Call) -> list[str]:
    """Why FlexAttention cannot run a call."""
    reasons = []
    if call.q.device.type != "cuda":
        reasons.append(f"FlexAttention is for CUDA; its backward pass is not compiled on {call.q.device.type}")
    if not isinstance(call.pattern, Pattern | Bound | None):
        reasons.append(f"a {type(call.pattern).__name__} is not a pattern")
    if type(call.normaliser) is not Softmax:
        reasons.append(f"the normaliser is {type(call.normaliser).__name__}, not Softmax")
    if call.mask is not None:
        reasons.append("there is a mask: bind it as the pattern Explicit()")
    if call.dropout_p:
        reasons.append("FlexAttention drops no weights")
    if call.extra_k is not None:
        reasons.append("there are extra keys")
    if call.return_weights:
        reasons.append("the weights are asked for")
    if call.q.dtype == torch.float64:
        reasons.append("the dtype is float64")
    return reasons


def run(call: Call) -> Attended:
    """Through the compiled kernel."""
    return attend(call, _compiled())


def attend(call: Call, flex_attention: Any) -> Attended:
    """A call lowered to FlexAttention; flex_attention: torch's function, compiled or not."""
    refuse_nan(call.bias)
    q, k, v = call.q, call.k, call.v
    pattern = (Causal() if call.is_causal else Full()) if call.pattern is None else call.pattern
    block_mask = pattern.flex(q.shape[0], q.shape[1], q.shape[2], k.shape[2], q_offset=call.q_offset, device=q.device)
    grouped = True if q.shape[1] != k.shape[1] else False  # noqa: SIM210  a branch makes a guard for torch.compile
    out, lse = flex_attention(
        q, k, v, score_mod=_score_mod(call), block_mask=block_mask, scale=call.scale, enable_gqa=grouped,
        return_lse=True,
    )  # fmt: skip
    if call.sinks is not None:
        # a sink takes its share of every row afterwards: out is linear in the share
        sinks = call.sinks.to(lse.dtype)
        whole = torch.logaddexp(lse, sinks)
        empty = torch.isneginf(whole)
        share = torch.exp(lse - whole.masked_fill(empty, 0.0))
        out, lse = out * share[..., None].to(out.dtype), whole
    return Attended(out, lse if call.return_lse else None)


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _score_mod(call: Call) -> Any:
    if call.score_mod is None and call.bias is None and not call.indexed:
        return None
    bias = None if call.bias is None else call.bias[(None,) * (4 - call.bias.dim())]

    def modify(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if call.score_mod is not None:
            score = call.score_mod(score, b, h, i + call.q_offset, j)
        if bias is not None:
            score = score + bias[_places(bias, b, h, i, j)]
        for term in call.indexed:
            place = (term.key_index[j] - term.query_index[i]).clamp(0, term.table.shape[3] - 1)
            score = score + term.table[(*_places(term.table, b, h, i, j)[:3], place)]
        return score

    return modify


def _places(tensor: Tensor, *places: Tensor) -> tuple[Tensor, ...]:
    # an axis of size 1 is read at 0
    return tuple(p if size > 1 else p * 0 for p, size in zip(places, tensor.shape, strict=True))
