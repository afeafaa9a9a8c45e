"""The scan of linear attention on the CPU: plain tensors in and out, no autograd.

out = ((Q K') * W) V + exp(c) Q S        S_next = exp(c_last) S + (exp(c_last - c) K)' V        in chunks of 64
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.engines import native
from regard.engines.native.abi import DTYPES

VERSION = 2
WIDEST = 256


class ScanProblem(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("batch", "heads", "groups", "n", "d", "e")),
        *((name, c_void_p) for name in ("q", "k", "v", "out")),
        *((name, c_int64 * 3) for name in ("qs", "ks", "vs")),
        ("g", c_void_p),
        ("gs", c_int64 * 3),
        ("segment", c_void_p),
        ("segment_stride", c_int64),
        *((name, c_void_p) for name in ("s0", "s", "dout")),
        ("dos", c_int64 * 3),
        *((name, c_void_p) for name in ("ds", "dq", "dk", "dv", "dg", "ds0")),
        ("beta", c_void_p),
        ("bs", c_int64 * 3),
        ("dbeta", c_void_p),
        ("scale", c_float),
        *((name, c_int32) for name in ("dtype", "isa", "threads")),
    )


def missing() -> str | None:
    """Why there is no native scan; None if there is."""
    reason = native.missing()
    if reason:
        return reason
    library = native.library()
    if not hasattr(library, "regard_scan_abi"):
        return "the native library was built before it had a scan"
    found, wanted = library.regard_scan_abi(), VERSION * 65536 + ctypes.sizeof(ScanProblem)
    if found != wanted:
        return f"the native library was built from another version of regard (its scan is {found}, not {wanted})"
    return None


def cannot(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> list[str]:
    """Why the kernels cannot run such a call; tensors without data are taken to stand for some on the CPU."""
    reason = missing()
    reasons = [reason] if reason else []
    reasons += native.outside(q, k, v, WIDEST)
    if g is not None and g.dim() == 4:
        reasons.append("the decay is by key channel")
    return reasons


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    g: Tensor | None,
    s0: Tensor | None,
    segment: Tensor | None,
    isa: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(out (B, H, N, E) in q's dtype, final state (B, G, D, E) float32).

    q (B, H, N, D), k (B, G, N, D), v (B, G, N, E); g: float32 (B|1, H, N|1), needs G = H; s0: float32 (B, G, D, E);
    segment: int64 (B, N), the document of each step; s0 belongs to document 0.
    """
    call = Prepared(q, k, v, scale, g, s0, segment, isa)
    out = q.new_empty(*q.shape[:-1], call.v.shape[-1])
    s = torch.empty(*k.shape[:2], call.k.shape[-1], call.v.shape[-1])
    call.problem.out, call.problem.s = out.data_ptr(), s.data_ptr()
    native.check(native.library().regard_scan_forward(ctypes.byref(call.problem)))
    return out[..., : v.shape[-1]], s[..., : q.shape[-1], : v.shape[-1]]


def backward(
    dout: Tensor,
    ds: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    g: Tensor | None,
    s0: Tensor | None,
    segment: Tensor | None,
    isa: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """(dq, dk, dv, dg, ds0) from the gradients of what `forward` returned; dg and ds0 float32, dg in g's shape."""
    call = Prepared(q, k, v, scale, g, s0, segment, isa)
    problem = call.problem
    dout, ds = aligned(dout.to(q.dtype)), padded(ds.float())
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (call.q, call.k, call.v))
    ds0 = torch.empty(ds.shape)
    dg = None if g is None else torch.empty(q.shape[:-1])
    problem.dos[:] = dout.stride()[:3]
    call.point(dout=dout, ds=ds, dq=dq, dk=dk, dv=dv, ds0=ds0, dg=dg)
    native.check(native.library().regard_scan_backward(ctypes.byref(problem)))
    d, e = q.shape[-1], v.shape[-1]
    dg = None if g is None or dg is None else dg.sum_to_size(g.shape)
    return dq[..., :d], dk[..., :d], dv[..., :e], dg, ds0[..., :d, :e]


class Prepared:
    """A call made ready: rows contiguous, widths padded to what the kernels take."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        g: Tensor | None,
        s0: Tensor | None,
        segment: Tensor | None,
        isa: str | None,
        beta: Tensor | None = None,
    ) -> None:
        native.refuse("scan", cannot(q, k, v, g), q)
        # what the problem points to must live as long as the call
        self.q, self.k, self.v = (aligned(x) for x in (q, k, v))
        self.g = None if g is None else g.float()
        self.s0 = None if s0 is None else padded(s0.float())
        self.segment = None if segment is None else segment.contiguous()
        batch, heads, n, d = self.q.shape
        p = self.problem = ScanProblem(
            batch=batch, heads=heads, groups=k.shape[1], n=n, d=d, e=self.v.shape[-1], scale=scale,
            dtype=DTYPES[q.dtype], isa=native.isa_code(isa), threads=native.threads(),
        )  # fmt: skip
        self.beta = beta
        self.point(q=self.q, k=self.k, v=self.v, s0=self.s0, segment=self.segment, g=self.g, beta=beta)
        p.qs[:], p.ks[:], p.vs[:] = (x.stride()[:3] for x in (self.q, self.k, self.v))
        if self.segment is not None:
            p.segment_stride = self.segment.stride(0)
        if self.g is not None:
            p.gs[:] = self.g.expand(batch, heads, n).stride()
        if beta is not None:
            p.bs[:] = beta.stride()

    def point(self, **tensors: Tensor | None) -> None:
        """Hand over tensors, which must live until the kernel is done."""
        for name, tensor in tensors.items():
            setattr(self.problem, name, None if tensor is None else tensor.data_ptr())


def aligned(x: Tensor) -> Tensor:
    """Rows contiguous and as wide as whole vectors."""
    # zeros change no sum
    if x.shape[-1] % 16:
        return F.pad(x, (0, -x.shape[-1] % 16)).contiguous()
    return x if x.stride(-1) == 1 else x.contiguous()


def padded(s: Tensor) -> Tensor:
    """A state as wide as whole vectors."""
    return F.pad(s, (0, -s.shape[-1] % 16, 0, -s.shape[-2] % 16)).contiguous()
