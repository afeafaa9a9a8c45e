"""Ring attention: queries stay, keys and values travel round the processes, every block is merged as it arrives.

    rank r at hop s holds block (r - s) mod P:  o, l = merge((o, l), block(q, k, v))        l: log-sum-exp

The paper's own algorithm, RSA, is algorithm="rsa" (`ring_two_pass`): it keeps whole rows of scores. Both give the same
numbers; the ring that merges needs memory for a few blocks alone. Departs from the paper: masks by position in the whole
sequence, the zigzag, windows; gradients are those of the sum of the processes' losses (the released code divides them
by the number of processes).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.contract.card import ParallelCard
from regard.contract.errors import OptionError
from regard.engines.precision import accumulator, without_autocast
from regard.parallel import blocks
from regard.parallel.blocks import RingCall, ring_call
from regard.parallel.exchange import Exchange, Group, Layout, Piece, place, ring_exchange
from regard.parallel.ring_two_pass import two_pass
from regard.primitives.merge import merge

CARD = ParallelCard(
    slug="ring_self_attention",
    title="Ring self-attention",
    paper="Sequence Parallelism: Long Sequence Training from System Perspective",
    exports=("ring_attention",),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=12 m=12 d=8 e=6",
    attends=("self", "causal_self"),
    whole="softmax",
    time="n m / P",
    memory="n / P",
    sends="2 (P - 1) blocks of keys or values forward, 4 (P - 1) backward",
)


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_valid: Tensor | None = None,
    window: int | None = None,
    layout: Layout = "contiguous",
    algorithm: Literal["online", "rsa"] = "online",
    group: Group = None,
) -> Tensor:
    """Softmax attention over a sequence of which every process of the group holds an equal part (section 3.2).

    q (B, H, C, D), k (B, G, C, D), v (B, G, C, E): this process's C = N / P tokens; H a multiple of G. scale: D^-1/2 if
    None. key_valid: bool (B, C), False = padding. window: only keys with |i - j| < window; hops that nobody needs are
    not made. layout: which tokens are held; "zigzag" evens out causal work. algorithm: "rsa" for two passes with C x N
    scores a head. First derivatives only; every process must run backward.
    Raises ShapeError, also for lengths that differ between processes; OptionError, PeerLost.
    """
    if algorithm not in ("online", "rsa"):
        raise OptionError(f"algorithm is {algorithm!r}; it is 'online' or 'rsa'")
    call = ring_call(q, k, v, is_causal, scale, key_valid, window, layout, group)
    with without_autocast(q.device):
        if algorithm == "rsa":
            return two_pass(q, k, v, key_valid, call)
        out: Tensor = _Ring.apply(q, k, v, key_valid, call)  # type: ignore[no-untyped-call]
        return out


def _forward(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, call: RingCall) -> tuple[Tensor, Tensor]:
    rank, size = place(call.group)
    mine = call.held[rank]
    parts: list[tuple[Tensor, Tensor] | None] = [None] * len(mine)
    travel = [k, v] if valid is None else [k, v, valid]
    for hop, step in call.steps():
        # posted before the block is computed, so that the two may overlap
        coming = ring_exchange(travel, call.group, step=step) if step else None
        theirs = call.held[(rank - hop) % size]
        for at, queries, keys, pattern in call.meetings(mine, theirs):
            new = blocks.forward(_cut(q, queries), *_cut_keys(travel, keys), pattern, call.scale)
            old = parts[at]
            parts[at] = new if old is None else merge((old[0], new[0]), (old[1], new[1]))
        if coming is not None:
            travel = coming.wait()
    kind = accumulator(q.dtype)
    outs, lses = [], []
    for piece, part in zip(mine, parts, strict=True):
        rows = (*q.shape[:2], piece.length)
        out, lse = part or (q.new_zeros(*rows, v.shape[3], dtype=kind), q.new_full(rows, float("-inf"), dtype=kind))
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 2).to(q.dtype), torch.cat(lses, 2)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    out: Tensor,
    lse: Tensor,
    call: RingCall,
) -> tuple[Tensor, Tensor, Tensor]:
    rank, size = place(call.group)
    mine, kind = call.held[rank], accumulator(q.dtype)
    dq = torch.zeros_like(q, dtype=kind)
    home = [torch.zeros_like(x, dtype=kind, memory_format=torch.contiguous_format) for x in (k, v)]
    travel = [k, v] if valid is None else [k, v, valid]
    owed: Exchange | None = None
    for hop, step in call.steps():
        coming = ring_exchange(travel, call.group, step=step) if step else None
        # the gradients of the own block stay; those of others go on with their block, and home from the last hop
        sums = [torch.zeros_like(x) for x in home] if hop else home
        for _, queries, keys, pattern in call.meetings(mine, call.held[(rank - hop) % size]):
            key, value, seen = _cut_keys(travel, keys)
            given, query, known, norm = (_cut(x, queries) for x in (dout, q, out, lse))
            dq_part, *parts = blocks.backward(given, query, key, value, known, norm, seen, pattern, call.scale)
            _cut(dq, queries).add_(dq_part)
            for total, part in zip(sums, parts, strict=True):
                _cut(total, keys).add_(part)
        if hop:
            if owed is not None:
                for total, part in zip(sums, owed.wait(), strict=True):
                    total.add_(part)
            # tags of their own: keys and values are on the way at the same time
            owed = ring_exchange(sums, call.group, step=step or size - hop, tag=len(travel))
        if coming is not None:
            travel = coming.wait()
    if owed is not None:
        for total, part in zip(home, owed.wait(), strict=True):
            total.add_(part)
    return dq.to(q.dtype), home[0].to(k.dtype), home[1].to(v.dtype)


def _cut(x: Tensor, piece: Piece) -> Tensor:
    return x[:, :, piece.at : piece.at + piece.length]


def _cut_keys(travel: Sequence[Tensor], piece: Piece) -> tuple[Tensor, Tensor, Tensor | None]:
    valid = travel[2][:, piece.at : piece.at + piece.length] if len(travel) > 2 else None
    return _cut(travel[0], piece), _cut(travel[1], piece), valid


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, valid, call):  # type: ignore[no-untyped-def]
        out, lse = _forward(q, k, v, valid, call)
        ctx.save_for_backward(q, k, v, valid, out, lse)
        ctx.call = call
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        q, k, v, valid, out, lse = ctx.saved_tensors
        with without_autocast(q.device):
            return *_backward(dout, q, k, v, valid, out, lse, ctx.call), None, None
