"""The delta rule on the CPU: plain float32 tensors in and out, no autograd; chunks of 64 steps."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from regard.engines import native
from regard.engines.native import scan
from regard.engines.native.scan import Prepared, aligned, padded


def cannot(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    """Why the kernels cannot run such a call; empty if they can."""
    reasons = scan.cannot(q, k, v, None)
    if q.dtype in (torch.bfloat16, torch.float16):
        reasons.append(f"q is {q.dtype}, not float32")
    return reasons


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float,
    g: Tensor | None,
    s0: Tensor | None,
    segment: Tensor | None,
    isa: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(out (B, H, N, E), final state (B, H, D, E)); all float32 with H heads, beta (B, H, N), the rest as in the scan."""
    call = Prepared(q, k, v, scale, g, s0, segment, isa, beta)
    out = q.new_empty(*q.shape[:-1], call.v.shape[-1])
    s = q.new_empty(*k.shape[:2], call.k.shape[-1], call.v.shape[-1])
    call.problem.out, call.problem.s = out.data_ptr(), s.data_ptr()
    native.check(native.library().regard_delta_forward(ctypes.byref(call.problem)))
    return out[..., : v.shape[-1]], s[..., : q.shape[-1], : v.shape[-1]]


def backward(
    dout: Tensor,
    ds: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float,
    g: Tensor | None,
    s0: Tensor | None,
    segment: Tensor | None,
    isa: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """(dq, dk, dv, dbeta, dg, ds0) from the gradients of what `forward` returned."""
    call = Prepared(q, k, v, scale, g, s0, segment, isa, beta)
    dout, ds = aligned(dout), padded(ds)
    dq, dk, dv = (torch.empty(x.shape) for x in (call.q, call.k, call.v))
    dbeta, ds0 = torch.empty(beta.shape), torch.empty(ds.shape)
    dg = None if g is None else torch.empty(beta.shape)
    call.problem.dos[:] = dout.stride()[:3]
    call.point(dout=dout, ds=ds, dq=dq, dk=dk, dv=dv, ds0=ds0, dg=dg, dbeta=dbeta)
    native.check(native.library().regard_delta_backward(ctypes.byref(call.problem)))
    d, e = q.shape[-1], v.shape[-1]
    dg = None if g is None or dg is None else dg.sum_to_size(g.shape)
    return dq[..., :d], dk[..., :d], dv[..., :e], dbeta, dg, ds0[..., :d, :e]
