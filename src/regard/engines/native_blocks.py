"""The native kernels of block-sparse attention, seen as the plain torch body is seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.engines import native
from regard.engines.chunks import Gradients, Options, keeps_statistic
from regard.engines.dense import Call
from regard.engines.native import block_sparse as kernels
from regard.engines.native.abi import INDEXED
from regard.primitives.normalisers import Softmax

if TYPE_CHECKING:
    from regard.patterns.layout import BlockLayout

# torch.compile cannot look into the loading of a library, and need not: the answer never changes. This is what
# torch.compiler.assume_constant_result sets; calling it would import the compiler
native.missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def cannot(call: Call) -> list[str]:
    """Why the kernels cannot run a call."""
    reasons = kernels.cannot(call.q, call.k, call.v, call.normaliser)
    if len(call.indexed) > INDEXED:
        reasons.append(f"there are {len(call.indexed)} indexed biases, more than {INDEXED}")
    return reasons


def forward(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, options: Options) -> tuple[Tensor, Tensor]:
    """(out (B, H, N, E), statistic (B, H, N), or (0,) where the normaliser keeps none)."""
    out, lse = kernels.forward(
        q, k, v, layout, scale=options.scale, bias=options.bias, indexed=options.indexed,
        normaliser=options.normaliser, sinks=options.sinks, dropout=_dropout(options),
    )  # fmt: skip
    return out.contiguous(), q.new_empty(0, dtype=torch.float32) if lse is None else lse


def backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: BlockLayout,
    options: Options,
) -> Gradients:
    """The gradients of `forward`, from its results."""
    dq, dk, dv, dbias, dtables, dsinks = kernels.backward(
        dout, dlse if type(options.normaliser) is Softmax else None, q, k, v, out,
        lse if keeps_statistic(type(options.normaliser)) else None, layout, scale=options.scale, bias=options.bias,
        indexed=options.indexed, normaliser=options.normaliser, sinks=options.sinks, dropout=_dropout(options),
        bias_grad=options.bias_grad,
    )  # fmt: skip
    return Gradients(dq.contiguous(), dk.contiguous(), dv.contiguous(), dbias, dtables, dsinks, None)


def _dropout(options: Options) -> tuple[float, int]:
    return (options.dropout_p, int(options.seed)) if options.seed is not None else (0.0, 0)
