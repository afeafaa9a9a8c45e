"""RSA, ring attention in two passes: keys travel until every row of scores is complete, then values.

    S = scale q [k_1 … k_P]' ;  P = softmax(S), masked ;  out = sum over ranks s of P[:, s] v_s

Memory for scores is C x N a head and process. Gradients of keys and values are formed for the whole sequence and summed
by a reduce-scatter (the paper: an all-reduce, of which each process keeps its part).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.engines.precision import accumulator, without_autocast
from regard.parallel.blocks import RingCall
from regard.parallel.exchange import Exchange, place, positions_of, ring_exchange, scatter_sum
from regard.primitives.normalisers import Softmax


def two_pass(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, call: RingCall) -> Tensor:
    """Ring attention as in the paper (section 3.2); the arguments are those of `ring_attention`, checked."""
    out: Tensor = _TwoPass.apply(q, k, v, valid, call)  # type: ignore[no-untyped-call]
    return out


class _TwoPass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, valid, call):  # type: ignore[no-untyped-def]
        out, weights = _forward(q, k, v, valid, call)
        ctx.save_for_backward(q, k, v, weights)
        ctx.call = call
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        q, k, v, weights = ctx.saved_tensors
        with without_autocast(q.device):
            return *_backward(dout, q, k, v, weights, ctx.call), None, None


def _forward(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, call: RingCall) -> tuple[Tensor, Tensor]:
    rank, size = place(call.group)
    kind, groups = accumulator(q.dtype), k.shape[1]
    by_group = _share(q.to(kind), groups) * call.scale
    scores, seen = [by_group] * size, [torch.empty(0)] * size
    for source, travel in _round([k] if valid is None else [k, valid], call):
        scores[source] = by_group @ travel[0].to(kind)[:, :, None].transpose(-1, -2)
        pairs = _pairs(call, rank, source, q.device)
        seen[source] = pairs if valid is None else pairs & travel[1][:, None, None, None]
    mask = torch.cat([pairs.expand(q.shape[0], 1, 1, *pairs.shape[3:]) for pairs in seen], -1)
    table = torch.cat(scores, -1)
    # rows of the whole table are complete: plain softmax, with 0 where a row sees nothing
    weights = Softmax()(table, mask, None)
    parts = weights.chunk(size, -1)
    out = torch.zeros(*by_group.shape[:-1], v.shape[3], dtype=kind, device=q.device)
    for source, (values,) in _round([v], call):
        out += parts[source] @ values.to(kind)[:, :, None]
    return out.flatten(1, 2).to(q.dtype), weights


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, call: RingCall
) -> tuple[Tensor, Tensor, Tensor]:
    _, size = place(call.group)
    kind, groups = accumulator(q.dtype), k.shape[1]
    given, by_group = _share(dout.to(kind), groups), _share(q.to(kind), groups) * call.scale
    dweights = [given] * size
    for source, (values,) in _round([v], call):
        dweights[source] = given @ values.to(kind)[:, :, None].transpose(-1, -2)
    whole = torch.cat(dweights, -1)
    dscores = weights * (whole - (whole * weights).sum(-1, keepdim=True))
    parts = dscores.chunk(size, -1)
    dq = torch.zeros_like(by_group)
    for source, (keys,) in _round([k], call):
        dq += parts[source] @ keys.to(kind)[:, :, None]
    dk, dv = (
        scatter_sum((table.transpose(-1, -2) @ rows).sum(2).unflatten(2, (size, -1)).movedim(2, 0), call.group)
        for table, rows in ((dscores, by_group), (weights, given))
    )
    return (dq * call.scale).flatten(1, 2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _round(tensors: list[Tensor], call: RingCall) -> Iterator[tuple[int, list[Tensor]]]:
    """(source rank, its tensors) for every process in the order of the ring; the next exchange runs meanwhile."""
    rank, size = place(call.group)
    for hop in range(size):
        coming: Exchange | None = ring_exchange(tensors, call.group) if hop + 1 < size else None
        yield (rank - hop) % size, tensors
        if coming is not None:
            tensors = coming.wait()


def _pairs(call: RingCall, rank: int, source: int, device: torch.device) -> Tensor:
    """Bool (1, 1, 1, C, C): which of the source's keys a query may see, by positions in the whole sequence."""
    i, j = (positions_of(call.held[r]).to(device) for r in (rank, source))
    away = i[:, None] - j[None]
    seen = torch.ones_like(away, dtype=torch.bool)
    if call.is_causal:
        seen = seen & (away >= 0)
    if call.window is not None:
        seen = seen & (away.abs() < call.window)
    return seen[None, None, None]


def _share(x: Tensor, groups: int) -> Tensor:
    """The query heads that share each key head: (B, G, R, C, ·)."""
    return x.unflatten(1, (groups, -1))
