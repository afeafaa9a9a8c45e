"""The native scan as operators and a differentiable function.

`regard::linear_scan_forward` and `regard::linear_scan_backward` see plain tensors and numbers only, so that
torch.compile, export and meta tensors go through. Second derivatives come from the torch way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.engines import scan_chunks
from regard.engines.native import scan as kernels
from regard.engines.precision import without_autocast

LIBRARY = torch.library.Library("regard", "FRAGMENT")
LIBRARY.define(
    "linear_scan_forward(Tensor q, Tensor k, Tensor v, float scale, Tensor? g, Tensor? s0, Tensor? segment) "
    "-> (Tensor, Tensor)"
)
LIBRARY.define(
    "linear_scan_backward(Tensor dout, Tensor ds, Tensor q, Tensor k, Tensor v, float scale, Tensor? g, Tensor? s0, "
    "Tensor? segment) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# steps of a chunk where the torch way stands in for the kernels
CHUNK = 64
# torch.compile cannot look into the loading of a library, and need not: the answer never changes
torch.compiler.assume_constant_result(kernels.missing)


def cannot(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> list[str]:
    """Why the kernels cannot run a call."""
    return outside_transforms(kernels.cannot(q, k, v, g))


def outside_transforms(reasons: list[str]) -> list[str]:
    """The reasons of a kernel, and those of a function that runs in no transform."""
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():
            reasons.append("a transform of torch.func is active")
        if torch.autograd.forward_ad._current_level >= 0:
            reasons.append("forward mode is active")
    return reasons


def may_differentiate_again() -> bool:
    """Whether a backward pass must be made of plain operations."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()


def scan(
    q: Tensor, k: Tensor, v: Tensor, scale: float, g: Tensor | None, s0: Tensor | None, segment: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The causal scan: (out (B, H, N, E) in q's dtype, final state (B, G, D, E) float32); see `scan_chunks`."""
    if not torch.compiler.is_compiling():
        inputs = (q, k, v, g, s0)
        if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)):
            return _forward_op(q, k, v, scale, g, s0, segment)
    else:
        # torch.compile refuses one tensor in two places
        k, v = k.view_as(k), v.view_as(v)
    result: tuple[Tensor, Tensor] = _Scan.apply(q, k, v, scale, g, s0, segment)  # type: ignore[no-untyped-call]
    return result


def _forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, g: Tensor | None, s0: Tensor | None, segment: Tensor | None
) -> tuple[Tensor, Tensor]:
    out, s = kernels.forward(q, k, v, scale, g, s0, segment)
    return out.contiguous(), s.contiguous()


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, scale: float, g: Tensor | None, s0: Tensor | None, segment: Tensor | None
) -> tuple[Tensor, Tensor]:
    return (
        q.new_empty(*q.shape[:-1], v.shape[-1]),
        k.new_empty(*k.shape[:2], k.shape[-1], v.shape[-1], dtype=torch.float32),
    )


def _backward(
    dout: Tensor,
    ds: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    g: Tensor | None,
    s0: Tensor | None,
    segment: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dg, ds0 = kernels.backward(dout, ds, q, k, v, scale, g, s0, segment)
    return (
        dq.contiguous(), dk.contiguous(), dv.contiguous(), ds.new_empty(0) if dg is None else dg, ds0.contiguous(),
    )  # fmt: skip


def _backward_fake(
    dout: Tensor,
    ds: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    g: Tensor | None,
    s0: Tensor | None,
    segment: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv, ds.new_empty(0) if g is None else g.new_empty(g.shape), ds.new_empty(ds.shape)


LIBRARY.impl("linear_scan_forward", _forward, "CPU")
LIBRARY.impl("linear_scan_backward", _backward, "CPU")
torch.library.register_fake("regard::linear_scan_forward", _forward_fake, lib=LIBRARY)
torch.library.register_fake("regard::linear_scan_backward", _backward_fake, lib=LIBRARY)
_forward_op = torch.ops.regard.linear_scan_forward.default
_backward_op = torch.ops.regard.linear_scan_backward.default


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(q, k, v, scale, g, s0, segment):  # type: ignore[no-untyped-def]
        return _forward_op(q, k, v, scale, g, s0, segment)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        q, k, v, scale, *rest = inputs
        ctx.save_for_backward(q, k, v, *rest)
        ctx.scale = scale

    @staticmethod
    def backward(ctx, dout, ds):  # type: ignore[no-untyped-def]
        q, k, v, g, s0, segment = ctx.saved_tensors
        if may_differentiate_again():
            dq, dk, dv, dg, ds0 = _in_torch(dout, ds, q, k, v, ctx.scale, g, s0, segment)
        else:
            with without_autocast(q.device):
                dq, dk, dv, dg, ds0 = _backward_op(dout, ds, q, k, v, ctx.scale, g, s0, segment)
        return dq, dk, dv, None, None if g is None else dg, None if s0 is None else ds0, None


def _in_torch(
    dout: Tensor,
    ds: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    g: Tensor | None,
    s0: Tensor | None,
    segment: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """The gradients by plain operations, which have derivatives themselves and run inside torch.func."""
    dq, dk, dv, dg, ds0 = scan_chunks.backward(
        dout.float(), ds, q.float() * scale, k.float(), v.float(), g, s0, segment, CHUNK
    )
    return (dq * scale).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dg, ds0
