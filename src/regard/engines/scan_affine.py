"""The elementwise scan h_t = a_t h_{t-1} + b_t, for factors of any sign and size or from their logarithms.

Factors: about sqrt(N) steps inside all chunks at once, the carries from chunk to chunk, then one pass that adds them.
Logarithms at most 0 of factors shared by many elements: products over time, L b with L_ij = exp(c_i - c_j).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract.errors import ShapeError
from regard.engines.precision import accumulator, without_autocast
from regard.engines.scan_chunks import scan_chunks

# elements that share a factor, from which on a product over time pays
SHARED = 16
LEAST_LOG_FACTOR = -100.0
CHUNK = 64


def affine_scan(a: Tensor, b: Tensor, h0: Tensor | None = None, *, is_log: bool = False) -> Tensor:
    """h_t = a_t h_{t-1} + b_t over axis 1: b (B, N, …) -> h (B, N, …), in b's dtype, from h0 (B, …) or 0.

    a: (B, N), or more axes in the order of b's, each of b's size or 1; those it lacks are 1. is_log: a holds
    logarithms, at most 0. Derivatives of any order. Raises ShapeError.
    """
    if a.dim() < 2 or a.dim() > b.dim() or any(x not in (1, y) for x, y in zip(a.shape, b.shape, strict=False)):
        raise ShapeError(f"a is {tuple(a.shape)}; it must be (B, N, …), broadcast over b, {tuple(b.shape)}")
    if h0 is not None and h0.shape != b.shape[:1] + b.shape[2:]:
        raise ShapeError(f"h0 is {tuple(h0.shape)}; it must be b without its steps, {tuple(b.shape[:1] + b.shape[2:])}")
    kind = accumulator(b.dtype)
    with without_autocast(b.device):
        wide = b.to(kind)
        a = a.to(kind).reshape(*a.shape, *(1,) * (b.dim() - a.dim())).expand(*b.shape[:2], *(-1,) * (b.dim() - 2))
        h0 = None if h0 is None else h0.to(kind)
        if not is_log:
            return _by_factors(a, wide, h0).to(b.dtype)
        split = a.dim()
        while split > 2 and a.shape[split - 1] == 1:
            split -= 1
        if math.prod(b.shape[split:]) < SHARED:
            return _by_factors(a.exp(), wide, h0).to(b.dtype)
        return _by_products(a, wide, h0, split).to(b.dtype)


def _by_products(g: Tensor, b: Tensor, h0: Tensor | None, split: int) -> Tensor:
    """The scan of linear attention with q = k = 1; the axes before `split` are its heads, the others its values."""
    heads = b.shape[2:split]
    g = g.expand(*b.shape[:split], *(1,) * (b.dim() - split)).reshape(*b.shape[:2], -1).transpose(1, 2)
    v = b.reshape(*b.shape[:2], math.prod(heads), -1).transpose(1, 2)
    one = torch.ones_like(v[..., :1])
    s0 = None if h0 is None else h0.reshape(h0.shape[0], math.prod(heads), 1, -1)
    out, _ = scan_chunks(one, one, v, g.clamp(min=LEAST_LOG_FACTOR), s0, None, CHUNK)
    return out.transpose(1, 2).reshape(b.shape)


def _by_factors(a: Tensor, b: Tensor, h0: Tensor | None) -> Tensor:
    kind = _Affine if torch.compiler.is_compiling() else _AffineBothWays
    result: Tensor = kind.apply(a, b, h0)  # type: ignore[no-untyped-call]
    return result


def _forward(a: Tensor, b: Tensor, h0: Tensor | None) -> Tensor:
    n = b.shape[1]
    size = math.isqrt(n - 1) + 1
    chunks = -(-n // size)
    pad = chunks * size - n
    if pad:
        after = (0, 0) * (b.dim() - 2) + (0, pad)
        a, b = F.pad(a, after), F.pad(b, after)
    a, b = (x.unflatten(1, (chunks, size)) for x in (a, b))
    h = None
    rows = []
    for x, y in zip(a.unbind(2), b.unbind(2), strict=True):
        h = y if h is None else torch.addcmul(y, x, h)
        rows.append(h)
    near = torch.stack(rows, 2)
    if chunks == 1 and h0 is None:
        return near.flatten(1, 2)[:, :n]
    product = a.cumprod(2)
    carry = torch.zeros_like(near[:, 0, 0]) if h0 is None else h0
    carries = []
    for x, y in zip(product[:, :, -1].unbind(1), rows[-1].unbind(1), strict=True):
        carries.append(carry)
        carry = torch.addcmul(y, x, carry)
    return torch.addcmul(near, product, torch.stack(carries, 1)[:, :, None]).flatten(1, 2)[:, :n]


class _Affine(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a, b, h0):  # type: ignore[no-untyped-def]
        return _forward(a, b, h0)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        a, _, h0 = inputs
        ctx.save_for_backward(a, h0, output)
        ctx.save_for_forward(a, h0, output)

    @staticmethod
    def backward(ctx, dh):  # type: ignore[no-untyped-def]
        a, h0, h = ctx.saved_tensors
        after = torch.cat((a[:, 1:], torch.zeros_like(a[:, :1])), 1)
        db = _by_factors(after.flip(1), dh.flip(1), None).flip(1)
        da = (db * _before(h, h0)).sum_to_size(a.shape)
        return da, db, None if h0 is None else a[:, 0] * db[:, 0]


class _AffineBothWays(_Affine):
    """With forward mode, apart because torch.compile refuses a Function that has it."""

    @staticmethod
    def jvp(ctx, da, db, dh0):  # type: ignore[no-untyped-def]
        a, h0, h = ctx.saved_tensors
        moved = torch.zeros_like(h) if db is None else db
        return _by_factors(a, moved if da is None else moved + da * _before(h, h0), dh0)


def _before(h: Tensor, h0: Tensor | None) -> Tensor:
    first = torch.zeros_like(h[:, :1]) if h0 is None else h0[:, None]
    return torch.cat((first, h[:, :-1]), 1)
