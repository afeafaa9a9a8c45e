"""Softmax attention of some queries to some keys of a longer sequence, forward and backward.

Forward gives the output over these keys alone and the log-sum-exp of their scores, which `merge` joins with those of
other keys. Backward takes the output and the log-sum-exp over all keys:

    p = exp(s - lse) ; ds = p (dout v' - rowsum(dout out)) ; dq = ds k ; dk = ds' q ; dv = p' dout

Which blocks meet, and which hops of the ring are made, follows from the positions that every process holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from regard.contract.errors import OptionError, ShapeError
from regard.contract.shapes import bind, check_types, parse
from regard.engines import block_ops, native_blocks
from regard.engines.dense import prepare
from regard.engines.precision import accumulator
from regard.parallel.exchange import Group, Layout, Piece, agree, pieces, place
from regard.patterns import Bound, Full, KeyValid, Pattern
from regard.patterns.rules import Data, Distance, OnLine, Rule
from regard.primitives.normalisers import Softmax

_SPEC = parse("q: b h n d, k: b g m d, v: b g m e -> b h n e")


@dataclass(frozen=True)
class RingCall:
    """A call of ring attention. held: the pieces of every process, by rank. hops: those of the ring that are made."""

    is_causal: bool
    scale: float
    window: int | None
    held: tuple[tuple[Piece, ...], ...]
    hops: tuple[int, ...]
    group: Group

    def steps(self) -> Iterator[tuple[int, int]]:
        """(hop, how much further round the ring the next one is, 0 for the last)."""
        for hop, after in zip(self.hops, (*self.hops[1:], None), strict=True):
            yield hop, 0 if after is None else after - hop

    def meetings(self, mine: Sequence[Piece], theirs: Sequence[Piece]) -> Iterator[tuple[int, Piece, Piece, Pattern]]:
        """(place of the queries, queries, keys, which pairs meet) for the pieces of two processes that have any."""
        for at, queries in enumerate(mine):
            for keys in theirs:
                pattern = meeting(queries, keys, self.is_causal, self.window)
                if pattern is not None:
                    yield at, queries, keys, pattern


def ring_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool,
    scale: float | None,
    key_valid: Tensor | None,
    window: int | None,
    layout: Layout,
    group: Group,
) -> RingCall:
    """The call, checked here and against the other processes. Raises ShapeError, OptionError, PeerLost."""
    _, size = place(group)
    sizes = bind(_SPEC, (q, k, v), "ring_attention")
    check_types((q, k, v), ("q", "k", "v"), "ring_attention")
    length = q.shape[2]
    if sizes["n"] != sizes["m"]:
        raise ShapeError(
            f"ring_attention has {sizes['n']} queries and {sizes['m']} keys in one process: both are the same tokens"
        )
    if key_valid is not None and (key_valid.dtype != torch.bool or key_valid.shape != (q.shape[0], length)):
        raise ShapeError(
            f"key_valid is {key_valid.dtype} {tuple(key_valid.shape)}; it must be bool (B, C) = "
            f"{(q.shape[0], length)}, for this process's tokens, True = takes part"
        )
    if window is not None and window < 1:
        raise OptionError(f"a window has at least 1 key, the query's own, not {window}")
    agree(
        {
            "local sequence lengths": length,
            "batches": q.shape[0],
            "query heads": q.shape[1],
            "key heads": k.shape[1],
            "head widths": q.shape[3],
            "value widths": v.shape[3],
            "bytes a number": q.element_size(),
            "is_causal": int(is_causal),
            "windows": window or 0,
            "layouts": int(layout == "zigzag"),
            "key_valid given": int(key_valid is not None),
        },
        group,
    )
    held, hops = _round(length, size, layout, is_causal, window)
    return RingCall(is_causal, q.shape[3] ** -0.5 if scale is None else scale, window, held, hops, group)


@lru_cache(maxsize=64)
def _round(
    length: int, size: int, layout: Layout, is_causal: bool, window: int | None
) -> tuple[tuple[tuple[Piece, ...], ...], tuple[int, ...]]:
    """(what every process holds, the hops that bring some process a key it may see; the own block is always one)."""
    held = tuple(pieces(length, rank, size, layout) for rank in range(size))

    def is_needed(hop: int) -> bool:
        return any(
            meeting(queries, keys, is_causal, window) is not None
            for rank in range(size)
            for queries in held[rank]
            for keys in held[(rank - hop) % size]
        )

    return held, tuple(hop for hop in range(size) if hop == 0 or is_needed(hop))


@dataclass(frozen=True, repr=False)
class Apart(Pattern):
    """least <= i - j <= most; None is no limit."""

    least: int | None
    most: int | None

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor:
        away = i - j
        seen = torch.ones_like(away, dtype=torch.bool)
        if self.least is not None:
            seen = seen & (away >= self.least)
        return seen if self.most is None else seen & (away <= self.most)

    def rule(self, data: Data) -> Rule:
        return OnLine(Distance(self.least, self.most))


def meeting(queries: Piece, keys: Piece, is_causal: bool, window: int | None) -> Pattern | None:
    """Which pairs of two pieces may meet, counted from the start of each; None if none may.

    window: |i - j| < window in the whole sequence.
    """
    ahead = queries.start - keys.start
    nearest, farthest = 1 - keys.length, queries.length - 1
    least, most = nearest, farthest
    if is_causal:
        least = max(least, -ahead)
    if window is not None:
        least, most = max(least, 1 - window - ahead), min(most, window - 1 - ahead)
    if least > most:
        return None
    if (least, most) == (nearest, farthest):
        return Full()
    return Apart(None if least == nearest else least, None if most == farthest else most)


def forward(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, pattern: Pattern, scale: float
) -> tuple[Tensor, Tensor]:
    """(out (B, H, n, E), log-sum-exp (B, H, n)), float32 at least. valid: bool (B, m), which keys take part."""
    p = _parcel(q, k, v, valid, pattern, scale)
    out, lse = torch.ops.regard.block_sparse_forward.default(
        q, k, v, None, None, None, [], list(p.data), list(p.code), list(p.numbers), p.scale
    )
    return out.to(accumulator(q.dtype)), lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    valid: Tensor | None,
    pattern: Pattern,
    scale: float,
) -> list[Tensor]:
    """What these keys add to dq, dk and dv, float32 at least. out, lse: over all keys."""
    p = _parcel(q, k, v, valid, pattern, scale)
    # the kernels take it for a row after the other
    lse = lse.contiguous()
    grads = torch.ops.regard.block_sparse_backward.default(
        dout, torch.zeros_like(lse), q, k, v, out, lse, None, None, None, [], list(p.data), list(p.code),
        list(p.numbers), p.scale,
    )[:3]  # fmt: skip
    return [grad.to(accumulator(q.dtype)) for grad in grads]


def _parcel(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, pattern: Pattern | Bound, scale: float
) -> block_ops.Parcel:
    if valid is not None:
        pattern = pattern & KeyValid().bind(key_valid=valid)
    way = "torch" if native_blocks.cannot(prepare(q, k, v, pattern)) else "native"
    return block_ops.pack(
        way, pattern, bias=None, indexed=(), sinks=None, normaliser=Softmax(), scale=scale, q_offset=0, dropout_p=0.0,
        seed=None,
    )  # fmt: skip
