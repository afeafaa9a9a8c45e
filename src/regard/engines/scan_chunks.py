"""The scan of linear attention over chunks, in plain torch, with a backward pass of its own.

    out = ((Q K') * W) V + exp(c) Q S        S_next = exp(c_last) S + (exp(c_last - c) K)' V        W_ij = exp(c_i - c_j)

c is the log-decay cumulated inside the chunk: one number a step, or one a key channel. Three primitives carry it:
`chunk_states` (what a chunk adds), `prefix_states` (the state before each chunk), `chunk_outputs`. All exponents are
differences of cumulated log-decays and at most 0. The backward pass keeps the inputs alone and makes the states anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# positions of all heads handled at once: their tables stay in the cache
POSITIONS = 2048
# steps handled at once, at least: below, the calls cost more than the arithmetic
SPAN = 256
# rows of a chunk whose decayed products by channel are formed one by one
ROWS = 16


def scan_chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, s0: Tensor | None, segment: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """The causal scan: (out (B, H, N, E), final state (B, G, D, E)), with derivatives of any order.

    q (B, H, N, D), k (B, G, N, D), v (B, G, N, E). g: (B|1, H, N|1) or (B|1, H, N|1, D), needs G = H. s0: (B, G, D, E).
    segment: int (B, N), the document of each position; s0 belongs to document 0.
    """
    kind: type[_Scan] = _ScanBothWays
    if torch.compiler.is_compiling():
        # torch.compile refuses one tensor in two places, too
        kind, k, v = _Scan, k.view_as(k), v.view_as(v)
    result: tuple[Tensor, Tensor] = kind.apply(q, k, v, g, s0, segment, chunk)  # type: ignore[no-untyped-call]
    return result


def chunk_states(k: Tensor, v: Tensor, c: Tensor | None, last: Tensor | None = None) -> Tensor:
    """What each chunk adds to the state: k (…, C, D), v (…, C, E) -> (…, D, E).

    c: log-decay cumulated inside the chunk, (…, C) or (…, C, D), or None. last: bool (…, C), which keys the next chunk
    may see.
    """
    if c is not None:
        c = c if c.dim() == k.dim() else c[..., None]
        k = k * (c[..., -1:, :] - c).to(k.dtype).exp()
    if last is not None:
        k = k * last[..., None]
    return k.transpose(-1, -2) @ v


def prefix_states(
    added: Tensor, total: Tensor | None, s0: Tensor | None, alive: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The state before each chunk, and after the last: added (B, G, T, D, E) over T chunks -> (same, (B, G, D, E)).

    total: log-decay of each chunk (B, G, T) or (B, G, T, D), or None. s0: initial state (B, G, D, E), or None.
    alive: bool (B, 1, T + 1, T + 1); [a, b]: what chunk b - 1 left (b = 0: s0) is still the document after chunk a - 1.
    """
    weight = _prefix_weights(added, total, alive)
    states = _weigh(weight, torch.cat((_start(added, s0), added), 2))
    return states[:, :, :-1], states[:, :, -1]


def chunk_outputs(
    q: Tensor, k: Tensor, v: Tensor, c: Tensor | None, s: Tensor, own: Tensor, carried: Tensor | None
) -> Tensor:
    """The outputs of each chunk: own keys by their table, earlier ones through the state s (B, G, T, D, E).

    q (B, G, R, T, C, D) with R query heads a key head; k, v (B, G, T, C, ·). own: bool (…, C, C), pairs that may meet.
    carried: bool (…, C), rows that may see the state, or None for all.
    """
    if c is not None and c.dim() == k.dim():
        table = _channel_table(q[:, :, 0], k, c, own.squeeze(2))[:, :, None]
    else:
        table = (q @ k[:, :, None].transpose(-1, -2)) * _pair_weights(c, own, q.dtype)
    return table @ v[:, :, None] + _reach(q, c, carried) @ s[:, :, None]


def cumulate(g: Tensor, dim: int = -1) -> Tensor:
    """The cumulated sum in float64: it outgrows its differences, and a float32 would lose their digits."""
    # Metal has no float64
    return g.to(g.dtype if g.device.type == "mps" else torch.float64).cumsum(dim)


def _start(added: Tensor, s0: Tensor | None) -> Tensor:
    return torch.zeros_like(added[:, :, :1]) if s0 is None else s0[:, :, None]


def _prefix_weights(added: Tensor, total: Tensor | None, alive: Tensor | None) -> Tensor:
    """How much of each part (the start, then the chunks) is left before each chunk and at the end: (…, T + 1, T + 1)."""
    chunks = added.shape[2]
    step = torch.ones(chunks + 1, chunks + 1, dtype=torch.bool, device=added.device).tril()
    weight = step.to(added.dtype)[None, None]
    if total is not None:
        if total.dim() == 4:
            total, weight = total.transpose(-1, -2), weight[None]
        c = F.pad(cumulate(total.expand(*total.shape[:-1], chunks)), (1, 0))
        gap = (c[..., :, None] - c[..., None, :]).masked_fill(~step, 0.0)
        weight = weight * gap.to(weight.dtype).exp()
    if alive is not None:
        weight = weight * (alive if weight.dim() == 4 else alive[:, :, None])
    return weight


def _weigh(weight: Tensor, parts: Tensor) -> Tensor:
    if weight.dim() == 4:
        return (weight @ _joined(parts, 3)).reshape(parts.shape)
    return (weight @ parts.transpose(2, 3)).transpose(2, 3)


def _pair_weights(c: Tensor | None, own: Tensor, kind: torch.dtype) -> Tensor:
    """exp(c_i - c_j) of the pairs that may meet, 0 of the others: (…, 1, T, C, C)."""
    if c is None:
        return own.to(kind)
    gap = (c[..., :, None] - c[..., None, :]).to(kind)[:, :, None]
    return gap.masked_fill(~own, float("-inf")).exp()


def _channel_table(q: Tensor, k: Tensor, c: Tensor, own: Tensor) -> Tensor:
    """sum over d of q_id k_jd exp(c_id - c_jd): (…, C, C), from q, k, c (…, C, D)."""
    size = q.shape[-2]
    rows = []
    for at in range(0, size, ROWS):
        here = slice(at, at + ROWS)
        near = (q[..., here, None, :] * k[..., None, here, :] * _near_weights(c, here, q.dtype)).sum(-1)
        parts = [near, near.new_zeros(()).expand(*near.shape[:-1], size - at - near.shape[-1])]
        if at:
            fall, rise = _far_weights(c, at, here, q.dtype)
            parts.insert(0, (q[..., here, :] * fall) @ (k[..., :at, :] * rise).transpose(-1, -2))
        rows.append(torch.cat(parts, -1))
    return torch.cat(rows, -2) * own


def _channel_pull(p: Tensor, q: Tensor, k: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of q and k from p, that of the table."""
    dq, dk = [], torch.zeros_like(k)
    for at in range(0, q.shape[-2], ROWS):
        here = slice(at, at + ROWS)
        table = p[..., here, here, None] * _near_weights(c, here, q.dtype)
        pulled = (table * k[..., None, here, :]).sum(-2)
        own = (table * q[..., here, None, :]).sum(-3)
        if at:
            fall, rise = _far_weights(c, at, here, q.dtype)
            far = p[..., here, :at]
            pulled = pulled + fall * (far @ (k[..., :at, :] * rise))
            own = torch.cat((rise * (far.transpose(-1, -2) @ (q[..., here, :] * fall)), own), -2)
        dk = dk + F.pad(own, (0, 0, 0, k.shape[-2] - own.shape[-2]))
        dq.append(pulled)
    return torch.cat(dq, -2), dk


def _near_weights(c: Tensor, here: slice, kind: torch.dtype) -> Tensor:
    gap = c[..., here, None, :] - c[..., None, here, :]
    return gap.clamp(max=0.0).to(kind).exp()


def _far_weights(c: Tensor, at: int, here: slice, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    # both from the step before the rows, so that neither exponent is above 0
    edge = c[..., at - 1 : at, :]
    return (c[..., here, :] - edge).to(kind).exp(), (edge - c[..., :at, :]).to(kind).exp()


def _reach(q: Tensor, c: Tensor | None, carried: Tensor | None) -> Tensor:
    """The queries as they meet the state."""
    if c is not None:
        c = c[:, :, None] if c.dim() == q.dim() - 1 else c[:, :, None, ..., None]
        q = q * c.to(q.dtype).exp()
    return q if carried is None else q * carried[..., None]


@dataclass(frozen=True)
class _Piece:
    """A span of the sequence, cut into T chunks."""

    q: Tensor
    k: Tensor
    v: Tensor
    c: Tensor | None
    own: Tensor
    last: Tensor | None
    carried: Tensor | None
    alive: Tensor | None
    # bool (B, N): not the first of a document
    inside: Tensor | None

    @property
    def total(self) -> Tensor | None:
        if self.c is None:
            return None
        return self.c[..., -1] if self.c.dim() == 4 else self.c[..., -1, :]


def _bounds(q: Tensor, chunk: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, chunk) of the spans; what is left of the last chunk is a span of its own."""
    batch, heads, n, _ = q.shape
    chunk = min(chunk, n)
    steps = max(SPAN, POSITIONS // (batch * heads))
    whole, span = n // chunk * chunk, max(steps // chunk, 1) * chunk
    for start in range(0, whole, span):
        yield start, min(start + span, whole), chunk
    if whole < n:
        yield whole, n, n - whole


def _piece(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, segment: Tensor | None, bounds: tuple[int, int, int]
) -> _Piece:
    start, stop, chunk = bounds
    chunks, groups = (stop - start) // chunk, k.shape[1]
    q = _share(_cut(q, start, stop, chunk), groups)
    k, v = (_cut(x, start, stop, chunk) for x in (k, v))
    c = None
    if g is not None:
        dim = 2 if g.shape[2] == 1 else 3
        # a steady decay is that of one chunk
        g = g.expand(*g.shape[:2], chunk, *g.shape[3:])[:, :, None] if dim == 2 else _cut(g, start, stop, chunk)
        c = cumulate(g, 3)
    own = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril().view(1, 1, 1, 1, chunk, chunk)
    if segment is None:
        return _Piece(q, k, v, c, own, None, None, None, None)
    here = segment[:, start:stop]
    before = segment[:, start - 1 : start] if start else torch.zeros_like(segment[:, :1])
    cut = here.reshape(-1, chunks, chunk)
    ends = torch.cat((before, cut[..., -1]), 1)
    return _Piece(
        q, k, v, c,
        own & (cut[..., :, None] == cut[..., None, :])[:, None, None],
        (cut == cut[..., -1:])[:, None],
        (cut == ends[:, :-1, None])[:, None, None],
        (ends[:, :, None] == ends[:, None, :])[:, None],
        here == torch.cat((before, here[:, :-1]), 1),
    )  # fmt: skip


def _cut(x: Tensor, start: int, stop: int, chunk: int) -> Tensor:
    # contiguous: a product would copy it at every use
    x = x[:, :, start:stop].contiguous()
    return x.reshape(*x.shape[:2], -1, chunk, *x.shape[3:])


def _joined(x: Tensor, at: int) -> Tensor:
    """Two neighbouring axes as one."""
    return x.reshape(*x.shape[:at], -1, *x.shape[at + 2 :])


def _share(q: Tensor, groups: int) -> Tensor:
    """The heads that share each state: (B, G, R, …)."""
    return q.reshape(q.shape[0], groups, -1, *q.shape[2:])


def _join(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, s0: Tensor | None, segment: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    s = s0
    outs = []
    for bounds in _bounds(q, chunk):
        p = _piece(q, k, v, g, segment, bounds)
        states, s = prefix_states(chunk_states(p.k, p.v, p.c, p.last), p.total, s, p.alive)
        outs.append(_joined(_joined(chunk_outputs(p.q, p.k, p.v, p.c, states, p.own, p.carried), 3), 1))
    assert s is not None
    # a copy, or it would keep the states of all chunks alive
    return _join(outs), s.clone()


def backward(
    dout: Tensor,
    ds: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    s0: Tensor | None,
    segment: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """(dq, dk, dv, dg, ds0), from the last span to the first, from the gradients of what `scan_chunks` returned."""
    spans = list(_bounds(q, chunk))
    s = s0
    states = []
    for bounds in spans:
        p = _piece(q, k, v, g, segment, bounds)
        before, s = prefix_states(chunk_states(p.k, p.v, p.c, p.last), p.total, s, p.alive)
        states.append(before)
    assert s is not None
    # what the later steps tell of the decay: at the end, how the final state was used
    later = (s * ds).sum(-1) if g is not None and g.dim() == 4 else (s * ds).sum((-1, -2))[..., None]
    dqs, dks, dvs, dgs = [], [], [], []
    for bounds, before in zip(reversed(spans), reversed(states), strict=True):
        start, stop, size = bounds
        p = _piece(q, k, v, g, segment, bounds)
        dq, dk, dv, ds = _piece_backward(_share(_cut(dout, start, stop, size), k.shape[1]), ds, p, before)
        if g is not None:
            dc = p.q[:, :, 0] * dq[:, :, 0] - p.k * dk
            dg, later = _decay_gradient(dc if g.dim() == 4 else dc.sum(-1, keepdim=True), later, p)
            dgs.append(dg.to(q.dtype))
        dqs.append(_joined(_joined(dq, 3), 1))
        dks.append(_joined(dk, 2))
        dvs.append(_joined(dv, 2))
    dq, dk, dv = (_join(x[::-1]) for x in (dqs, dks, dvs))
    if g is None:
        return dq, dk, dv, None, ds
    dg = _join(dgs[::-1])
    return dq, dk, dv, (dg if g.dim() == 4 else dg.squeeze(-1)).sum_to_size(g.shape), ds


def _piece_backward(dout: Tensor, ds: Tensor, p: _Piece, s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, gradient of the state before the span) from that of the state after it, ds."""
    v, k = p.v[:, :, None], p.k[:, :, None]
    # the gradient of the state before each chunk, from the queries that read it
    read = _sum_shared(_reach(p.q, p.c, p.carried).transpose(-1, -2) @ dout)
    weight = _prefix_weights(read, p.total, p.alive)
    ds_all = _weigh(weight.transpose(-1, -2), torch.cat((read, ds[:, :, None]), 2))
    added = ds_all[:, :, 1:]
    pulled = dout @ v.transpose(-1, -2)
    if p.c is not None and p.c.dim() == p.k.dim():
        own = p.own.squeeze(2)
        table = _channel_table(p.q[:, :, 0], p.k, p.c, own)[:, :, None]
        dq, dk = _channel_pull(pulled[:, :, 0] * own, p.q[:, :, 0], p.k, p.c)
        dq = dq[:, :, None]
    else:
        pairs = _pair_weights(p.c, p.own, p.q.dtype)
        table, pulled = (p.q @ k.transpose(-1, -2)) * pairs, pulled * pairs
        dq = pulled @ k
        dk = _sum_shared(pulled.transpose(-1, -2) @ p.q)
    dq = dq + _reach(dout @ s[:, :, None].transpose(-1, -2), p.c, p.carried)
    fade = None
    if p.c is not None:
        c = p.c if p.c.dim() == p.k.dim() else p.c[..., None]
        fade = (c[..., -1:, :] - c).to(p.k.dtype).exp()
    if p.last is not None:
        fade = p.last[..., None] if fade is None else fade * p.last[..., None]
    kept = p.v @ added.transpose(-1, -2)
    dv = _sum_shared(table.transpose(-1, -2) @ dout)
    if fade is None:
        return dq, dk + kept, dv + p.k @ added, ds_all[:, :, 0]
    return dq, dk + kept * fade, dv + (p.k * fade) @ added, ds_all[:, :, 0]


def _sum_shared(x: Tensor) -> Tensor:
    return x.squeeze(2) if x.shape[2] == 1 else x.sum(2)


def _decay_gradient(dc: Tensor, later: Tensor, p: _Piece) -> tuple[Tensor, Tensor]:
    """The sum of dc (B, H, T, C, ·) over this and all later steps of the same document: ((B, H, N, ·), the whole sum).

    later (B, H, ·): the sum over the steps after the span.
    """
    size = dc.shape[3]
    if p.alive is None:
        sums = cumulate(torch.cat((later[:, :, None], _joined(dc, 2).flip(2)), 2), 2)[:, :, 1:].flip(2)
        return sums, sums[:, :, 0].to(later.dtype)
    assert p.last is not None and p.carried is not None and p.inside is not None
    own = p.own.squeeze(2).to(dc.dtype)
    near = own.transpose(-1, -2) @ dc
    seen = (dc * p.carried.squeeze(2)[..., None]).sum(3)
    far = p.alive.tril().to(dc.dtype).transpose(-1, -2) @ torch.cat((seen, later[:, :, None]), 2)
    sums = near + far[:, :, 1:, None].expand(-1, -1, -1, size, -1) * p.last[..., None]
    return _joined(sums, 2) * p.inside[:, None, :, None], far[:, :, 0]


class _Scan(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v, g, s0, segment, chunk):  # type: ignore[no-untyped-def]
        return _forward(q, k, v, g, s0, segment, chunk)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        *tensors, chunk = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.chunk = chunk

    @staticmethod
    def backward(ctx, dout, ds):  # type: ignore[no-untyped-def]
        # plain operations, so that it has derivatives itself
        q, k, v, g, s0, segment = ctx.saved_tensors
        *grads, ds0 = backward(dout, ds, q, k, v, g, s0, segment, ctx.chunk)
        return *grads, (None if s0 is None else ds0), None, None


class _ScanBothWays(_Scan):
    """With forward mode, apart because torch.compile refuses a Function that has it."""

    @staticmethod
    def jvp(ctx, dq, dk, dv, dg, ds0, *_):  # type: ignore[no-untyped-def]
        q, k, v, g, s0, segment = ctx.saved_tensors
        out = q.new_zeros(*q.shape[:-1], v.shape[-1])
        ds = k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
        fall = None
        if dg is not None:
            # exp(c_i - c_j) moves by the differences of what is cumulated, which go to the query and to the key
            fall = cumulate(dg.expand(*dg.shape[:2], q.shape[2], *dg.shape[3:]), 2).to(q.dtype)
            fall = fall if fall.dim() == 4 else fall[..., None]
            dq = q * fall if dq is None else dq + q * fall
            dk = -k * fall if dk is None else dk - k * fall
        if dq is not None:
            more, s = scan_chunks(dq, k, v, g, s0, segment, ctx.chunk)
            out = out + more
            if fall is not None:
                ds = ds + s * fall[:, :, -1, :, None]
        if dk is not None or ds0 is not None:
            more, s = scan_chunks(q, torch.zeros_like(k) if dk is None else dk, v, g, ds0, segment, ctx.chunk)
            out, ds = out + more, ds + s
        if dv is not None:
            more, s = scan_chunks(q, k, dv, g, None, segment, ctx.chunk)
            out, ds = out + more, ds + s
        return out, ds
