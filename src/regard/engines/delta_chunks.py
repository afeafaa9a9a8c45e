"""The delta rule over chunks of C steps in WY form, in plain torch, with a backward pass of its own.

With W_ij = exp(c_i - c_j), L = tril(beta (K K') * W, -1) and T = (I + L)^-1 the corrections of a chunk are
U = T beta (V - exp(c) K S), and the rest is the scan of linear attention of (K, U). Only the states pass from chunk to
chunk. Yang et al., 2024, section 3; with decay "Gated Delta Networks", section 3. The backward pass keeps the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.engines.scan_affine import affine_scan
from regard.engines.scan_chunks import cumulate


def delta_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    s0: Tensor | None,
    segment: Tensor | None,
    size: int,
) -> tuple[Tensor, Tensor]:
    """(out (B, H, N, E), final state (B, H, D, E)), with derivatives of any order.

    q, k (B, H, N, D), v (B, H, N, E), beta, g (B, H, N), s0 (B, H, D, E). segment: int (B, N), the document of each
    position; s0 belongs to document 0. size: steps of a chunk.
    """
    if torch.compiler.is_compiling():
        # torch.compile refuses one tensor in two places
        k, v = k.view_as(k), v.view_as(v)
    result: tuple[Tensor, Tensor] = _Delta.apply(q, k, v, beta, g, s0, segment, size)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True)
class _Chunks:
    """The sequence in T chunks, and what of each needs no state. The last axes of tables are (T, C, C)."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    # pairs of one document, j <= i, and their exp(c_i - c_j)
    own: Tensor
    pairs: Tensor
    # (…, C, 1): what is left of the state before the chunk at each step; of each step at the end of the chunk
    head: Tensor
    tail: Tensor
    # (B, H, T, 1, 1): what is left of the state before the chunk at its end
    over: Tensor
    table: Tensor
    inverse: Tensor
    # U = fresh - stale S
    fresh: Tensor
    stale: Tensor
    # bool (B, 1, T, C): steps of the document before the chunk, and of the one at its end
    first: Tensor | None
    end: Tensor | None


def _cut(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, segment: Tensor | None, size: int) -> _Chunks:
    n = q.shape[2]
    pad = -n % size
    if pad:
        # steps that write nothing and forget nothing
        q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
        beta = F.pad(beta, (0, pad))
        g = None if g is None else F.pad(g, (0, pad))
        segment = None if segment is None else torch.cat((segment, segment[:, -1:].expand(-1, pad)), 1)
    q, k, v, beta = (_chunked(x, size) for x in (q, k, v, beta[..., None]))
    own = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    head = torch.ones_like(beta[:1, :1, :1])
    tail, over = head, head[..., :1, :]
    first = end = None
    if segment is not None:
        cut = segment.reshape(segment.shape[0], 1, -1, size)
        before = F.pad(cut[..., :-1, -1:], (0, 0, 1, 0))
        own = own & (cut[..., :, None] == cut[..., None, :])
        first, end = (cut == before), (cut == cut[..., -1:])
    pairs = own.to(q.dtype)
    if g is not None:
        c = cumulate(_chunked(g, size))
        pairs = (c[..., :, None] - c[..., None, :]).to(q.dtype).masked_fill(~own, float("-inf")).exp()
        head, tail = c.to(q.dtype).exp()[..., None], (c[..., -1:] - c).to(q.dtype).exp()[..., None]
        over = head[..., -1:, :]
    if first is not None and end is not None:
        head, tail, over = head * first[..., None], tail * end[..., None], over * first[..., -1:, None]
    inverse = _invert((beta * (k @ k.transpose(-1, -2)) * pairs).tril(-1))
    return _Chunks(
        q, k, v, beta, own, pairs, head, tail, over, (q @ k.transpose(-1, -2)) * pairs, inverse,
        inverse @ (beta * v), inverse @ (beta * head * k), first, end,
    )  # fmt: skip


def _chunked(x: Tensor, size: int) -> Tensor:
    return x.reshape(*x.shape[:2], -1, size, *x.shape[3:])


def _invert(strict: Tensor) -> Tensor:
    """(I + L)^-1 of strictly lower L (…, C, C)."""
    eye = torch.eye(strict.shape[-1], dtype=strict.dtype, device=strict.device)
    return torch.linalg.solve_triangular(strict + eye, eye.expand_as(strict), upper=False, unitriangular=True)


def _states(x: _Chunks, s0: Tensor | None) -> tuple[Tensor, Tensor]:
    """(the state before each chunk (B, H, T, D, E), the last), from chunk to chunk."""
    left, over = (x.k * x.tail).transpose(-1, -2), x.over.expand(*x.q.shape[:3], 1, 1)
    s = torch.zeros_like(x.k[:, :, 0, :1].transpose(-1, -2) @ x.v[:, :, 0, :1]) if s0 is None else s0
    before = []
    for k, fresh, stale, kept in zip(*(t.unbind(2) for t in (left, x.fresh, x.stale, over)), strict=True):
        before.append(s)
        s = kept * s + k @ (fresh - stale @ s)
    return torch.stack(before, 2), s


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    s0: Tensor | None,
    segment: Tensor | None,
    size: int,
) -> tuple[Tensor, Tensor]:
    x = _cut(q, k, v, beta, g, segment, size)
    before, s = _states(x, s0)
    out = x.table @ (x.fresh - x.stale @ before) + (x.head * x.q) @ before
    return out.flatten(2, 3)[:, :, : q.shape[2]], s.clone()


def backward(
    dout: Tensor, ds: Tensor, tensors: Sequence[Tensor | None], size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """(dq, dk, dv, dbeta, dg, ds0); a key is read, at its row of L, and written, at the columns."""
    q, k, v, beta, g, s0, segment = tensors
    assert q is not None and k is not None and v is not None and beta is not None
    n = q.shape[2]
    x = _cut(q, k, v, beta, g, segment, size)
    before, s = _states(x, s0)
    u = x.fresh - x.stale @ before
    last = (ds * s).sum((-1, -2))
    dout = _chunked(F.pad(dout, (0, 0, 0, -n % size)), size)
    # what reaches U from its own chunk and the state from the queries; what comes from later chunks is added in turn
    near, read = x.table.transpose(-1, -2) @ dout, (x.head * x.q).transpose(-1, -2) @ dout
    left, over = x.k * x.tail, x.over.expand(*x.q.shape[:3], 1, 1)
    dus, later = [], []
    for here, seen, w, stale, kept in zip(
        *(reversed(t.unbind(2)) for t in (near, read, left, x.stale, over)), strict=True
    ):
        later.append(ds)
        dus.append(here + w @ ds)
        ds = kept * ds + seen - stale.transpose(-1, -2) @ dus[-1]
    du, after = torch.stack(dus[::-1], 2), torch.stack(later[::-1], 2)
    dx = x.inverse.transpose(-1, -2) @ du
    # through L_ij = beta_i W_ij k_i . k_j
    lower = -(dx @ u.transpose(-1, -2)).tril(-1) * x.pairs
    pulled = (dout @ u.transpose(-1, -2)) * x.pairs
    dstale = x.head * (dx @ before.transpose(-1, -2))
    dbeta = ((lower @ x.k - dstale) * x.k).sum(-1) + (dx * x.v).sum(-1)
    scaled = x.beta * lower
    dread = scaled @ x.k - x.beta * dstale
    dwritten = scaled.transpose(-1, -2) @ x.k + pulled.transpose(-1, -2) @ x.q + x.tail * (u @ after.transpose(-1, -2))
    dq = pulled @ x.k + x.head * (dout @ before.transpose(-1, -2))
    dg = None
    if g is not None:
        dc = (x.q * dq + x.k * (dread - dwritten)).sum(-1)
        dg = _decay_gradient(dc, last, x)[:, :, :n].to(g.dtype)
        if segment is not None:
            # nothing passes into the first step of a document
            dg = dg * (segment == F.pad(segment[:, :-1], (1, 0)))[:, None]
    dq, dk, dv, dbeta = (t.flatten(2, 3)[:, :, :n] for t in (dq, dread + dwritten, x.beta * dx, dbeta))
    return dq, dk, dv, dbeta, dg, ds


def _decay_gradient(dc: Tensor, last: Tensor, x: _Chunks) -> Tensor:
    """The sum of dc (B, H, T, C) over each and all later steps of its document; last (B, H) comes after all."""
    if x.first is None or x.end is None:
        return cumulate(torch.cat((last[..., None], dc.flatten(2).flip(-1)), -1))[..., 1:].flip(-1)
    near = (x.own.to(dc.dtype).transpose(-1, -2) @ dc[..., None]).squeeze(-1)
    seen, through = (dc * x.first).sum(-1), x.first[..., -1]
    sums = affine_scan(through.transpose(1, 2).flip(1), seen.transpose(1, 2).flip(1), last).flip(1).transpose(1, 2)
    far = torch.cat((sums[:, :, 1:], last[..., None]), 2)
    return (near + far[..., None] * x.end).flatten(2)


class _Delta(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v, beta, g, s0, segment, size):  # type: ignore[no-untyped-def]
        return _forward(q, k, v, beta, g, s0, segment, size)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        *tensors, size = inputs
        ctx.save_for_backward(*tensors)
        ctx.size = size

    @staticmethod
    def backward(ctx, dout, ds):  # type: ignore[no-untyped-def]
        # plain operations, so that it has derivatives itself
        *grads, ds0 = backward(dout, ds, ctx.saved_tensors, ctx.size)
        return *grads, (None if ctx.saved_tensors[5] is None else ds0), None, None
