"""The native delta rule as operators and a differentiable function.

`regard::delta_rule_forward` and `regard::delta_rule_backward` see plain tensors and numbers only, so that
torch.compile, export and meta tensors go through. Second derivatives come from the torch way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.engines import delta_chunks
from regard.engines.native import delta as kernels
from regard.engines.precision import without_autocast
from regard.engines.scan_native import CHUNK, may_differentiate_again, outside_transforms

LIBRARY = torch.library.Library("regard", "FRAGMENT")
LIBRARY.define(
    "delta_rule_forward(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor? s0, Tensor? segment) "
    "-> (Tensor, Tensor)"
)
LIBRARY.define(
    "delta_rule_backward(Tensor dout, Tensor ds, Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor? s0, "
    "Tensor? segment) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def cannot(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    """Why the kernels cannot run a call; tensors without data are taken to stand for some on the CPU."""
    return outside_transforms(kernels.cannot(q, k, v))


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    s0: Tensor | None,
    segment: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out (B, H, N, E), final state (B, H, D, E)), all float32; see `delta_chunks`."""
    if not torch.compiler.is_compiling():
        inputs = (q, k, v, beta, g, s0)
        if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)):
            return _forward_op(q, k, v, beta, g, s0, segment)
    else:
        # torch.compile refuses one tensor in two places
        k, v = k.view_as(k), v.view_as(v)
    result: tuple[Tensor, Tensor] = _Delta.apply(q, k, v, beta, g, s0, segment)  # type: ignore[no-untyped-call]
    return result


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    s0: Tensor | None,
    segment: Tensor | None,
) -> tuple[Tensor, Tensor]:
    out, s = kernels.forward(q, k, v, beta, 1.0, g, s0, segment)
    return out.contiguous(), s.contiguous()


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    s0: Tensor | None,
    segment: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(v.shape), k.new_empty(*k.shape[:2], k.shape[-1], v.shape[-1])


def _backward(
    dout: Tensor,
    ds: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    s0: Tensor | None,
    segment: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dbeta, dg, ds0 = kernels.backward(dout, ds, q, k, v, beta, 1.0, g, s0, segment)
    grads = (dq.contiguous(), dk.contiguous(), dv.contiguous(), dbeta)
    return *grads, ds.new_empty(0) if dg is None else dg, ds0.contiguous()


def _backward_fake(
    dout: Tensor,
    ds: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    s0: Tensor | None,
    segment: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dbeta = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, beta))
    return dq, dk, dv, dbeta, ds.new_empty(0) if g is None else g.new_empty(g.shape), ds.new_empty(ds.shape)


LIBRARY.impl("delta_rule_forward", _forward, "CPU")
LIBRARY.impl("delta_rule_backward", _backward, "CPU")
torch.library.register_fake("regard::delta_rule_forward", _forward_fake, lib=LIBRARY)
torch.library.register_fake("regard::delta_rule_backward", _backward_fake, lib=LIBRARY)
_forward_op = torch.ops.regard.delta_rule_forward.default
_backward_op = torch.ops.regard.delta_rule_backward.default


class _Delta(torch.autograd.Function):
    @staticmethod
    def forward(q, k, v, beta, g, s0, segment):  # type: ignore[no-untyped-def]
        return _forward_op(q, k, v, beta, g, s0, segment)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dout, ds):  # type: ignore[no-untyped-def]
        tensors = ctx.saved_tensors
        if may_differentiate_again():
            grads = delta_chunks.backward(dout, ds, tensors, CHUNK)
        else:
            with without_autocast(dout.device):
                grads = _backward_op(dout, ds, *tensors)
        *first, dg, ds0 = grads
        return *first, None if tensors[4] is None else dg, None if tensors[5] is None else ds0, None
