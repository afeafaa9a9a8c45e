"""The causal scan of linear attention on GPUs, by kernels of its own, as operators and a differentiable function.

`regard::triton_scan_forward` and `regard::triton_scan_backward` see plain tensors and numbers only. The backward pass
keeps the inputs alone and makes the states anew; it has no derivatives itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.engines import triton as home
from regard.engines.precision import without_autocast
from regard.engines.scan_chunks import cumulate
from regard.engines.scan_native import outside_transforms

CHUNK = 64
# widest tile of a state
TILE = 64
LIBRARY = torch.library.Library("regard", "FRAGMENT")
LIBRARY.define(
    "triton_scan_forward(Tensor q, Tensor k, Tensor v, float scale, Tensor? g, Tensor? s0, Tensor? segment) "
    "-> (Tensor, Tensor)"
)
LIBRARY.define(
    "triton_scan_backward(Tensor dout, Tensor ds, Tensor q, Tensor k, Tensor v, float scale, Tensor? g, Tensor? s0, "
    "Tensor? segment) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def cannot(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> list[str]:
    """Why the kernels cannot run a call."""
    reasons = outside_transforms(home.cannot(q, k, v))
    if 0 in (*q.shape, v.shape[3]):
        reasons.append("there is nothing to do")
    if g is not None and g.dim() == 4:
        reasons.append("the decay is by key channel")
    return reasons


def scan(
    q: Tensor, k: Tensor, v: Tensor, scale: float, g: Tensor | None, s0: Tensor | None, segment: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The causal scan: (out (B, H, N, E) in q's dtype, final state (B, G, D, E) float32); see `scan_chunks`."""
    if torch.compiler.is_compiling():
        # torch.compile refuses one tensor in two places
        k, v = k.view_as(k), v.view_as(v)
    result: tuple[Tensor, Tensor] = _Scan.apply(q, k, v, scale, g, s0, segment)  # type: ignore[no-untyped-call]
    return result


def _forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, g: Tensor | None, s0: Tensor | None, segment: Tensor | None
) -> tuple[Tensor, Tensor]:
    frame = _Frame(q, k, g, segment)
    q, k, v = (_with_rows(x) for x in (q, k, v))
    before, last = frame.states(k, v, s0, scale=1.0, turned=False)
    return frame.outputs(q, k, v, before, (v.shape[3], 1), scale, scale, turned=False), last


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
    frame = _Frame(q, k, g, segment)
    dout, q, k, v = (_with_rows(x) for x in (dout.to(q.dtype), q, k, v))
    width = v.shape[3]
    before, last = frame.states(k, v, s0, scale=1.0, turned=False)
    after, ds0 = frame.states(q, dout, ds, scale=scale, turned=True)
    dq = frame.outputs(dout, v, k, before, (1, width), scale, scale, turned=False)
    dk = frame.outputs(v, dout, q, after, (1, width), scale, 1.0, turned=True)
    dv = frame.outputs(k, q, dout, after, (width, 1), scale, 1.0, turned=True)
    dg = ds.new_empty(0)
    if g is not None:
        later = (last * ds).sum((-1, -2))
        dg = frame.decay_gradient((q.float() * dq - k.float() * dk).sum(-1), later).sum_to_size(g.shape)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dg, ds0


class _Frame:
    """The chunks of a call: decays cumulated inside each, what each leaves of the state, and the documents."""

    def __init__(self, q: Tensor, k: Tensor, g: Tensor | None, segment: Tensor | None):
        from regard.engines.triton import scan_kernels

        self.kernels, self.q = scan_kernels, q
        self.batch, self.heads, self.n, _ = q.shape
        self.groups = k.shape[1]
        self.chunks = -(-self.n // CHUNK)
        self.has_decay = g is not None
        behind = self.chunks * CHUNK - self.n
        self.c: tuple[Tensor | None, Tensor | None] = (None, None)
        left = None
        if g is not None:
            # steps behind the end keep everything
            steps = F.pad(g.expand(*g.shape[:2], self.n), (0, behind)).unflatten(2, (self.chunks, CHUNK))
            c = cumulate(steps, 3)
            left, self.c = c[..., -1].double().exp(), _in_two(c.flatten(2))
        self.segment = segment
        if segment is not None:
            last = segment[:, -1:].expand(-1, behind)
            self.segment = torch.cat((segment, last), 1).int().contiguous()
            ends = F.pad(self.segment[:, CHUNK - 1 :: CHUNK], (1, 0))
            alive = (ends[:, 1:] == ends[:, :-1])[:, None]
            left = alive.double() if left is None else left * alive
        self.left = None if left is None else left.contiguous()

    def states(
        self, x: Tensor, y: Tensor, start: Tensor | None, *, scale: float, turned: bool
    ) -> tuple[Tensor, Tensor]:
        """(the state before each chunk (B, G, T, X, Y), behind the last); turned: from the end to the start."""
        size = (x.shape[3], y.shape[3])
        states = x.new_empty(self.batch, self.groups, self.chunks, *size, dtype=torch.float32)
        last = x.new_empty(self.batch, self.groups, *size, dtype=torch.float32)
        x_lanes, y_lanes = (min(home.lanes(s), TILE) for s in size)
        tiles = -(-size[0] // x_lanes) * -(-size[1] // y_lanes)
        sizes = (self.n, self.chunks, self.groups, self.heads // self.groups if turned else 1)
        home.run(
            x, self.kernels.chunk_states, tiles * self.chunks * self.batch * self.groups, x, y, states, *self.c,
            self.segment, x.stride(), y.stride(), _strides(self.c[0]), sizes, scale, REVERSED=turned, X=size[0],
            Y=size[1], X_LANES=x_lanes, Y_LANES=y_lanes, CHUNK=CHUNK,
        )  # fmt: skip
        numbers = size[0] * size[1]
        home.run(
            x, self.kernels.prefix_states, -(-numbers // 256) * self.batch * self.groups, states,
            None if start is None else start.float().contiguous(), last, self.left, _strides(self.left), sizes,
            REVERSED=turned, SIZE=numbers, LANES=256,
        )  # fmt: skip
        return states, last

    def outputs(
        self,
        x: Tensor,
        y: Tensor,
        z: Tensor,
        states: Tensor,
        states_at: tuple[int, int],
        near: float,
        far: float,
        *,
        turned: bool,
    ) -> Tensor:
        """(B, ·, N, Z): rows of x on the pairs of their chunk and on the state that reaches them."""
        heads = self.groups if turned else self.heads
        width, depth = x.shape[3], z.shape[3]
        # the gradient of the decay is a difference of large sums: what it is made from is not rounded
        kind = torch.float32 if self.has_decay else x.dtype
        out = x.new_empty(self.batch, heads, self.n, depth, dtype=kind)
        x_lanes, z_lanes = (min(home.lanes(s), TILE) for s in (width, depth))
        home.run(
            x, self.kernels.chunk_outputs, -(-depth // z_lanes) * self.chunks * self.batch * heads, x, y, z, states,
            out, *self.c, self.segment, x.stride(), y.stride(), z.stride(), states_at, _strides(self.c[0]),
            (self.n, self.chunks, heads, self.heads // self.groups), near, far, REVERSED=turned, X=width, Z=depth,
            X_LANES=x_lanes, Z_LANES=z_lanes, CHUNK=CHUNK,
        )  # fmt: skip
        return out

    def decay_gradient(self, dc: Tensor, later: Tensor) -> Tensor:
        """dg (B, H, N): the sum of dc over this and all later steps of the document; later (B, H): behind the end."""
        sums = cumulate(torch.cat((dc, later[..., None]), 2).flip(2), 2).flip(2)
        if self.segment is None:
            return sums[..., :-1].to(dc.dtype)
        segment = self.segment[:, : self.n].contiguous()
        # the last document reaches behind the end
        end = torch.searchsorted(F.pad(segment, (0, 1), mode="replicate"), segment, right=True)
        beyond = F.pad(sums, (0, 1)).gather(2, end[:, None].expand(-1, dc.shape[1], -1))
        inside = segment == F.pad(segment, (1, 0))[:, :-1]
        return ((sums[..., :-1] - beyond) * inside[:, None]).to(dc.dtype)


def _in_two(x: Tensor) -> tuple[Tensor, Tensor]:
    """A float64 as a float32 and its remainder."""
    high = x.float()
    return high.contiguous(), (x - high).float().contiguous()


def _with_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor | None) -> tuple[int, int] | None:
    """Of the batch rows and the heads, 0 where they are broadcast."""
    return None if x is None else (0 if x.shape[0] == 1 else x.stride(0), 0 if x.shape[1] == 1 else x.stride(1))


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    state = k.new_empty(*k.shape[:2], k.shape[3], v.shape[3], dtype=torch.float32)
    return q.new_empty(*q.shape[:3], v.shape[3]), state


def _backward_fake(
    dout: Tensor, ds: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, g: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, ds.new_empty(0 if g is None else g.shape), ds.new_empty(ds.shape)


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("triton_scan_forward", _forward, _device)
    LIBRARY.impl("triton_scan_backward", _backward, _device)
torch.library.register_fake("regard::triton_scan_forward", _forward_fake, lib=LIBRARY)
torch.library.register_fake("regard::triton_scan_backward", _backward_fake, lib=LIBRARY)
_forward_op = torch.ops.regard.triton_scan_forward.default
_backward_op = torch.ops.regard.triton_scan_backward.default


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
    @once_differentiable
    def backward(ctx, dout, ds):  # type: ignore[no-untyped-def]
        q, k, v, g, s0, segment = ctx.saved_tensors
        with without_autocast(q.device):
            dq, dk, dv, dg, ds0 = _backward_op(dout, ds, q, k, v, ctx.scale, g, s0, segment)
        return dq, dk, dv, None, None if g is None else dg, None if s0 is None else ds0, None
