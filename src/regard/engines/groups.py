"""Attention inside groups of queries and keys that a router put together (`Permuted`): gather, attend, scatter.

Every group is a small dense problem; the outputs of a query that is in several groups become one as the selection says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from regard.engines import dense
from regard.engines.dense import Attended, Call
from regard.patterns.selection import Permuted
from regard.primitives.normalisers import Softmax


def cannot(call: Call) -> list[str]:
    """Why the groups cannot be worked on."""
    if not isinstance(call.pattern, Permuted):
        return ["the pattern is not a Permuted selection"]
    reasons = []
    for given, what in (
        (call.mask, "a mask"), (call.bias, "a bias"), (call.indexed or None, "an indexed bias"), (call.sinks, "sinks"),
        (call.extra_k, "extra keys"), (call.score_mod, "a score_mod"),
    ):  # fmt: skip
        if given is not None:
            reasons.append(f"{what} cannot be read group by group")
    if call.dropout_p:
        reasons.append("dropout is by position, and a pair may meet in several groups")
    if call.return_weights:
        reasons.append("the weights are asked for")
    softmax = type(call.normaliser) is Softmax
    if call.pattern.reduce == "lse" and not softmax:
        reasons.append(f'reduce="lse" needs a log-sum-exp, which {type(call.normaliser).__name__} does not have')
    if call.return_lse and (call.pattern.reduce == "mean" or not softmax):
        reasons.append("a mean over groups has no log-sum-exp")
    return reasons


def run(call: Call) -> Attended:
    """By the fastest dense way."""
    return attend(call, _fastest)


def attend(call: Call, inner: Callable[[Call], Attended]) -> Attended:
    """Gather the groups, attend by `inner`, scatter; q (B, H, N, D) as in `block_sparse`."""
    selection: Permuted = call.pattern
    (batch, heads, n, _), kv_heads = call.q.shape, call.k.shape[1]
    q_index, k_index = (x.long().expand(batch, -1, -1, -1) for x in (selection.q_index, selection.k_index))
    # keys are gathered once per key head, unless query heads choose for themselves
    shared = q_index.shape[1] in (1, kv_heads)
    rows = _to_heads(q_index, heads)
    columns = _to_heads(k_index, kv_heads if shared else heads)
    k, v = (x if shared else x.repeat_interleave(heads // kv_heads, 1) for x in (call.k, call.v))
    groups = rows.shape[2]
    mask = _to_heads(selection.grouped(q_offset=call.q_offset).expand(batch, -1, -1, -1, -1), heads)
    inside = replace(
        call, q=_take(call.q, rows), k=_take(k, columns), v=_take(v, columns), pattern=None, q_offset=0,
        mask=mask.transpose(1, 2).flatten(0, 1), return_lse=selection.reduce == "lse" or call.return_lse,
    )  # fmt: skip
    got = inner(inside)
    out = got.out.unflatten(0, (batch, groups)).transpose(1, 2).flatten(2, 3)
    # empty slots go to a row behind the end
    place = rows.flatten(2)
    place = place.masked_fill(place < 0, n)
    if got.lse is None:
        total = _add_up(out, place, n)
        if selection.reduce == "mean":
            counts = _to_heads(selection.memberships(n), heads).clamp(min=1)
            total = total / counts[..., None].to(total.dtype)
        return Attended(total)
    lse = got.lse.unflatten(0, (batch, groups)).transpose(1, 2).flatten(2, 3)
    nothing = torch.isneginf(lse)
    top = torch.full((batch, heads, n + 1), float("-inf"), dtype=lse.dtype, device=lse.device)
    top = top.scatter_reduce(2, place, lse.detach(), "amax")
    top = torch.where(torch.isneginf(top), torch.zeros_like(top), top)
    shares = torch.exp(lse.masked_fill(nothing, 0.0) - top.gather(2, place)).masked_fill(nothing, 0.0)
    sums = _add_up(shares[..., None], place, n)[..., 0]
    safe = torch.where(sums == 0, torch.ones_like(sums), sums)
    total = _add_up(out * shares[..., None].to(out.dtype), place, n) / safe[..., None].to(out.dtype)
    whole = torch.where(sums == 0, float("-inf"), safe.log() + top[..., :n])
    return Attended(total, whole if call.return_lse else None)


def _fastest(call: Call) -> Attended:
    return next(i for i in dense.IMPLEMENTATIONS if not i.cannot(call)).run(call)


def _to_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """(B, H, N, D) by (B, H, G, w) -> (B G, H, w, D); empty slots take row 0, which the mask hides."""
    flat = index.clamp(min=0).flatten(2)[..., None].expand(-1, -1, -1, x.shape[3])
    return x.gather(2, flat).unflatten(2, index.shape[2:]).transpose(1, 2).flatten(0, 1)


def _add_up(x: Tensor, place: Tensor, n: int) -> Tensor:
    index = place[..., None].expand(x.shape)
    return x.new_zeros(*x.shape[:2], n + 1, x.shape[3]).scatter_add(2, index, x)[:, :, :n]
