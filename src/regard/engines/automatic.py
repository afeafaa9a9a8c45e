"""Attention by whichever engine is fastest for the call: the dense ones or block-sparse, by measurement.

A named engine runs or raises. Without a name, those that can run the call are ordered by an estimate from figures
measured on this machine (`calibration`), or by a fixed rule where measuring is off.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from regard.contract.dispatch import Implementation, choose, is_listened_to
from regard.engines import block_sparse, calibration, dense
from regard.engines.dense import Attended, Call, prepare
from regard.patterns import Bound, Causal, Full, Pattern, Prefix, Sinks, SlidingWindow
from regard.patterns.algebra import And, Or, PerHead
from regard.patterns.layout import BlockLayout
from regard.primitives.normalisers import Normaliser

IMPLEMENTATIONS = (*dense.IMPLEMENTATIONS, *block_sparse.IMPLEMENTATIONS)
_BY_NAME = {i.name: i for i in IMPLEMENTATIONS}
# pairs below which a call is too short for the order to matter
SMALL = 1 << 18
# without figures: patterns that visit less than this share of the tiles go to the blocks
SPARSE = 0.4


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Any = None,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    q_offset: int = 0,
    normaliser: Normaliser | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    engine: str | None = None,
) -> Attended:
    """Attend; the options are those of `dense` and `block_sparse`. Raises ShapeError, OptionError, Unsupported."""
    call = prepare(
        q, k, v, pattern, mask=mask, bias=bias, is_causal=is_causal, scale=scale, q_offset=q_offset,
        normaliser=normaliser, dropout_p=dropout_p, return_lse=return_lse,
    )  # fmt: skip
    if engine is not None:
        return choose(IMPLEMENTATIONS, engine, call).run(call)
    order, notes = ranked(call)
    return choose(order, None, call, notes).run(call)


def ranked(call: Call) -> tuple[tuple[Implementation, ...], dict[str, str]]:
    """(the implementations, the one estimated to be fastest first; why, by name, if anybody listens)."""
    pairs = _pairs(call.q, call.k, call.v)
    if pairs < SMALL:
        return _order(("dense:sdpa", "block_sparse:native", "dense:reference")), {}
    if call.q.device.type not in ("cpu", "meta"):
        blocks = ("block_sparse:flex", "block_sparse:torch")
        fast = ("dense:sdpa", *blocks) if _share(call) >= SPARSE else (*blocks, "dense:sdpa")
        return _order((*fast, "dense:reference")), {}
    share = _share(call)
    figures = calibration.rates(call.q.dtype)
    if figures is None:
        if share < SPARSE:
            return _order(("block_sparse:native", "block_sparse:torch", "dense:sdpa")), {}
        return _order(("dense:sdpa", "block_sparse:native", "dense:reference", "block_sparse:torch")), {}
    times = {"dense:sdpa": figures[_sdpa_way(call)].estimate_us(pairs)}
    times["dense:reference"] = figures["reference"].estimate_us(pairs)
    times["block_sparse:torch"] = figures["torch"].estimate_us(share * pairs)
    if "native" in figures:
        times["block_sparse:native"] = figures["native"].estimate_us(share * pairs)
    notes = {}
    if is_listened_to():
        notes = {name: f"{us / 1e3:.3g} ms by the figures measured on this machine" for name, us in times.items()}
    return _order(tuple(sorted(times, key=lambda name: times[name]))), notes


def beats_torch(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> bool:
    """Whether the native kernels beat torch's attention on the CPU, without pattern, mask or bias."""
    pairs = _pairs(q, k, v)
    if pairs < SMALL:
        return False
    figures = calibration.rates(q.dtype)
    if figures is None or "native" not in figures:
        return False
    theirs = figures["sdpa causal" if is_causal else "sdpa full"].estimate_us(pairs)
    return figures["native"].estimate_us(pairs * (0.5 if is_causal else 1.0)) < theirs


def _pairs(q: Tensor, k: Tensor, v: Tensor) -> float:
    # in units of 64 + 64 numbers, the widths that were measured
    return q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * (q.shape[3] + v.shape[3]) / 128


def _sdpa_way(call: Call) -> str:
    if call.mask is not None or call.bias is not None or call.q_offset:
        return "sdpa masked"
    if call.is_causal or type(call.pattern) is Causal:
        return "sdpa causal"
    return "sdpa full" if call.pattern is None or type(call.pattern) is Full else "sdpa masked"


def _order(first: tuple[str, ...]) -> tuple[Implementation, ...]:
    rest = tuple(name for name in _BY_NAME if name not in first)
    return tuple(_BY_NAME[name] for name in (*first, *rest))


def _share(call: Call) -> float:
    """The share of the tiles that a block engine visits."""
    pattern, n, m = call.pattern, call.q.shape[2], call.k.shape[2]
    if call.mask is not None:
        return 1.0
    if pattern is None:
        return 0.5 if call.is_causal else 1.0
    if isinstance(pattern, BlockLayout):
        tiles = pattern.crow.shape[0] * pattern.crow.shape[1] * -(-n // pattern.block_q) * -(-m // pattern.block_k)
        return pattern.visited / max(tiles, 1)
    if torch.compiler.is_compiling() or not isinstance(pattern, Pattern) or pattern.needs:
        return estimated_share(pattern, m)
    return _counted_share(pattern, n, m, call.q_offset)


@lru_cache(maxsize=256)
def _counted_share(pattern: Pattern, n: int, m: int, q_offset: int) -> float:
    layout = pattern.layout(n, m, q_offset=q_offset)
    return layout.visited / max(layout.crow.shape[1] * -(-n // 64) * -(-m // 64), 1)


def estimated_share(pattern: Pattern | Bound | Any, m: int) -> float:
    """The share of the tiles that a pattern is likely to visit, from what it is made of; 1 for what is unknown."""
    if isinstance(pattern, Bound):
        return estimated_share(pattern.pattern, m)
    if isinstance(pattern, And):
        return estimated_share(pattern.left, m) * estimated_share(pattern.right, m)
    if isinstance(pattern, Or):
        return min(1.0, estimated_share(pattern.left, m) + estimated_share(pattern.right, m))
    if isinstance(pattern, PerHead):
        return sum(estimated_share(p, m) for p in pattern.patterns) / len(pattern.patterns)
    if isinstance(pattern, Causal):
        return 0.5
    if isinstance(pattern, SlidingWindow):
        return min(1.0, (2 * pattern.window + 128) / max(m, 1))
    if isinstance(pattern, Sinks | Prefix):
        return min(1.0, (pattern.count + 64) / max(m, 1))
    return 1.0
