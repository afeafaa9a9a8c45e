"""One attention call as the engines take it."""

from __future__ import annotations

from typing import Any

from regard.contract.attach import AttentionCall
from regard.patterns import Bound, Causal, Explicit, KeyValid


def one_pattern(call: AttentionCall) -> tuple[Any, int]:
    """(pattern and mask of a call as one pattern, or None where all may meet; the position of its first query)."""
    if call.mask is None:
        return call.pattern, call.q_offset
    mask = call.visible()
    assert mask is not None
    # the rows of an explicit mask are counted from 0
    return Explicit().bind(mask=mask.expand(-1, -1, call.q.shape[2], -1)), 0


def is_causal_alone(call: AttentionCall) -> bool:
    """Whether a call is softmax over earlier keys and pads, with no other mask, bias, sink, cap or cut in the cache."""
    pattern = call.pattern.pattern if isinstance(call.pattern, Bound) else call.pattern
    others = (call.mask, call.bias, call.sinks, call.softcap, call.positions)
    return pattern in (Causal(), Causal() & KeyValid()) and all(x is None for x in others) and not call.instead
