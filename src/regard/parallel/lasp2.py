"""LASP-2: linear attention over split sequences, by one all-gather of states forward and one backward.

    M_t = sum over the part of rank t of exp(c_last - c) k v',  G_t = c_last       gathered from all, c: cumulated log-decay
    S_t = prefix of (M, G) before rank t;    out = scan from S_t
    dM_t = sum of exp(c) q dout'  gathered;  R_t = suffix of (dM, G) after rank t;  gradients = scan backward from R_t

What is sent does not depend on the length. LASP-2H: softmax layers of a hybrid gather keys and values instead
(`allgather_attention`). Departs from the paper: decay, read-outs that divide and initial states, by the same two
collectives; the part of a process is one scan that begins in S_t, not two passes of which one hides the gathering;
a mask is 0 or 1 (the paper writes -inf, but multiplies).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.contract.card import ParallelCard
from regard.contract.dispatch import Implementation, choose
from regard.contract.errors import Unsupported
from regard.contract.shapes import bind, check_types, parse
from regard.contract.split import splitting
from regard.engines import scan
from regard.engines.block_sparse import block_sparse
from regard.engines.precision import accumulator, without_autocast
from regard.engines.scan_chunks import chunk_states, cumulate, prefix_states
from regard.parallel.blocks import ring_call
from regard.parallel.exchange import Group, gather, place, scatter_sum
from regard.patterns import Bound, Causal, Full, KeyValid, Pattern, SlidingWindow

CARD = ParallelCard(
    slug="lasp2",
    title="LASP-2 and LASP-2H",
    paper="LASP-2: Rethinking Sequence Parallelism for Linear Attention and Its Hybrid",
    exports=("lasp2", "allgather_attention"),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=11 m=11 d=8 e=6",
    attends=("causal_self",),
    whole="lightning",
    whole_options={"decay": (1.0, 1.0, 1.0, 1.0)},
    time="n d e / P",
    memory="n d / P + P d e",
    sends="one state forward, one backward",
)
_SPEC = parse(CARD.spec)


def lasp2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    divide_by: scan.DivideBy = "none",
    eps: float = 1e-6,
    is_causal: bool = True,
    key_valid: Tensor | None = None,
    initial_state: scan.ScanState | None = None,
    return_state: bool = False,
    group: Group = None,
) -> Tensor | tuple[Tensor, scan.ScanState]:
    """`linear_scan` over a sequence of which rank t holds part t: out, or (out, state after the whole sequence).

    q (B, H, C, D), k (B, G, C, D), v (B, G, C, E), after the feature map; C may differ between processes.
    log_decay: None, (H,), (B, H, C) or (B, H, C, D). initial_state: before the whole sequence, the same on every
    process. The other options are those of `linear_scan`. Gradients are those of the sum of the processes' losses: that
    of a decay a head or of the initial state is this process's share of a sum. First derivatives only; every process
    must run backward.
    Raises ShapeError, OptionError, PeerLost; Unsupported for all keys with a decay.
    """
    bind(_SPEC, (q, k, v), "lasp2")
    check_types((q, k, v), ("q", "k", "v"), "lasp2")
    engine = ScanOver(group, return_state)
    with splitting(engine):
        out, state = scan.linear_scan(
            q, k, v, log_decay, scale=scale, divide_by=divide_by, eps=eps, is_causal=is_causal, key_valid=key_valid,
            initial_state=initial_state,
        )  # fmt: skip
    if not return_state:
        return out
    before = 0 if initial_state is None else initial_state.seen
    return out, replace(state, seen=before + engine.tokens)


def allgather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_valid: Tensor | None = None,
    window: int | None = None,
    group: Group = None,
) -> Tensor:
    """Softmax attention of this process's queries to the keys and values of all, gathered (section 3.4, LASP-2H).

    The arguments are those of `ring_attention`, contiguous; memory grows with N (D + E) a key head. Gradients of keys and
    values are formed for the whole sequence and summed by a reduce-scatter. Raises as `ring_attention`.
    """
    call = ring_call(q, k, v, is_causal, scale, key_valid, window, "contiguous", group)
    rank, _ = place(group)
    packed = torch.cat((k, v), -1)
    if key_valid is not None:
        packed = torch.cat((packed, key_valid[:, None, :, None].expand(*k.shape[:3], 1).to(k.dtype)), -1)
    whole: Tensor = _GatherKeys.apply(packed, group)  # type: ignore[no-untyped-call]
    pattern: Pattern | Bound = Causal() if is_causal else Full()
    if window is not None:
        pattern = pattern & SlidingWindow(window)
    if key_valid is not None:
        pattern = pattern & KeyValid().bind(key_valid=whole[:, 0, :, -1] > 0.5)
    keys, values = whole.split((k.shape[3], whole.shape[3] - k.shape[3]), -1)
    with splitting(None):
        offset = rank * q.shape[2]
        return block_sparse(q, keys, values[..., : v.shape[3]], pattern, scale=call.scale, q_offset=offset).out


class ScanOver:
    """The scan engine over a split sequence. tokens: how many the whole had, after a call.

    keep_state: whether the state after the whole sequence is wanted, with its gradient.
    """

    def __init__(self, group: Group, keep_state: bool):
        self.group, self.keep_state, self.tokens = group, keep_state, 0

    def admit(self, slug: str) -> None:
        """Only engines are asked inside a scan."""

    def positions(self, start: int, n: int, device: torch.device) -> Tensor:
        raise Unsupported("a scan asks for no positions")

    def implementation(
        self, implementations: Sequence[Implementation], requested: str | None, call: scan.Call
    ) -> Implementation:
        if call.segment is not None:
            raise Unsupported("lasp2 carries no document starts over processes: give every process whole documents")
        return Implementation("scan:lasp2", lambda call: [], self._run)

    def _run(self, call: scan.Call) -> tuple[Tensor, Tensor]:
        out, state, tokens = _Lasp2.apply(call.q, call.k, call.v, call.log_decay, call.s0, call, self)  # type: ignore[no-untyped-call]
        self.tokens = int(tokens)
        return out, state


@dataclass(frozen=True)
class _Gathered:
    """The states that all parts add (B, G, P, D, E), their log-decays (B, G, P[, D]) or None, tokens of all."""

    added: Tensor
    total: Tensor | None
    tokens: Tensor


class _Lasp2(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, s0, call, engine):  # type: ignore[no-untyped-def]
        rank, _ = place(engine.group)
        c = None if g is None else cumulate(g.expand(*g.shape[:2], q.shape[2], *g.shape[3:]), 2)
        parts = _gather_states(k, v, c, engine.group)
        if not call.is_causal:
            whole = parts.added.sum(2)
            ctx.save_for_backward(q, k, v, whole)
            ctx.rest = None, call, engine
            out = _read(q, whole, call.scale)
            ctx.mark_non_differentiable(parts.tokens, *([] if engine.keep_state else [whole]))
            return out, whole, parts.tokens
        before, last = prefix_states(parts.added, parts.total, s0, None)
        # the graph of the local scan waits for what the later processes say about its state
        given = (q, k, v, g, None if rank == 0 and s0 is None else before[:, :, rank])
        inputs = [None if x is None else x.detach().requires_grad_() for x in given]
        with torch.enable_grad(), splitting(None):
            local = replace(call, q=inputs[0], k=inputs[1], v=inputs[2], log_decay=inputs[3], s0=inputs[4])
            outs = choose(scan.IMPLEMENTATIONS, None, local).run(local)
        ctx.save_for_backward(q, c, parts.total)
        ctx.rest = (inputs, outs), call, engine
        # a copy, or it would keep the states of all parts alive
        last = last.clone()
        ctx.mark_non_differentiable(parts.tokens, *([] if engine.keep_state else [last]))
        return outs[0].detach(), last, parts.tokens

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlast, _):  # type: ignore[no-untyped-def]
        graph, call, engine = ctx.rest
        with without_autocast(dout.device):
            if graph is None:
                q, k, v, whole = ctx.saved_tensors
                return *_all_keys_backward(dout, dlast, q, k, v, whole, call.scale, engine), None, None, None, None
            q, c, total = ctx.saved_tensors
            return *_causal_backward(dout, dlast, q, c, total, graph, call, engine), None, None


def _gather_states(k: Tensor, v: Tensor, c: Tensor | None, group: Group) -> _Gathered:
    """The one collective of the forward pass, of numbers in the accumulator's dtype."""
    kind = accumulator(k.dtype)
    added = chunk_states(k.to(kind), v.to(kind), c)
    sent = [added.flatten(), added.new_tensor([k.shape[2]])]
    shape: tuple[int, ...] = ()
    if c is not None:
        shape = (k.shape[0], *c.shape[1:2], *c.shape[3:])
        sent.append(c[:, :, -1].expand(shape).to(kind).flatten())
    parts = torch.stack(gather(torch.cat(sent), group))
    states, tokens, totals = parts.split((added.numel(), 1, parts.shape[1] - added.numel() - 1), 1)
    return _Gathered(
        states.unflatten(1, added.shape).movedim(0, 2),
        None if c is None else totals.unflatten(1, shape).movedim(0, 2),
        tokens.sum().round().long(),
    )


def _causal_backward(
    dout: Tensor,
    dlast: Tensor,
    q: Tensor,
    c: Tensor | None,
    total: Tensor | None,
    graph: tuple[list[Tensor | None], tuple[Tensor, Tensor]],
    call: scan.Call,
    engine: ScanOver,
) -> tuple[Tensor | None, ...]:
    rank, size = place(engine.group)
    inputs, outs = graph
    reach = q.to(dlast.dtype) * call.scale
    if c is not None:
        reach = reach * _as_keys(c, 3).to(reach.dtype).exp()
    read = _read_backward(reach, dout, dlast)
    sent = torch.stack((read, dlast)) if engine.keep_state else read[None]
    parts = torch.stack(gather(sent, engine.group))
    later = parts[:, 0].movedim(0, 2).flip(2)
    after, _ = prefix_states(
        later, None if total is None else total.flip(2), parts[:, 1].sum(0) if engine.keep_state else None, None
    )
    wanted = [x for x in inputs if x is not None]
    # kept, for a caller who runs backward twice
    found = iter(torch.autograd.grad(outs, wanted, (dout, after[:, :, size - 1 - rank]), retain_graph=True))
    dq, dk, dv, dg = (None if x is None else next(found) for x in inputs[:4])
    if call.s0 is None:
        return dq, dk, dv, dg, None
    ds0 = read
    if total is not None:
        ds0 = read * _as_keys(total[:, :, :rank].sum(2), 2).exp()[..., None]
    if engine.keep_state:
        kept = dlast if total is None else dlast * _as_keys(total.sum(2), 2).exp()[..., None]
        ds0 = ds0 + kept
    return dq, dk, dv, dg, ds0


def _all_keys_backward(
    dout: Tensor, dwhole: Tensor, q: Tensor, k: Tensor, v: Tensor, whole: Tensor, scale: float, engine: ScanOver
) -> tuple[Tensor, Tensor, Tensor]:
    kind = whole.dtype
    read = _read_backward(q.to(kind) * scale, dout, whole)
    added = torch.stack(gather(read + dwhole if engine.keep_state else read, engine.group)).sum(0)
    dq = _read(dout, whole.transpose(-1, -2), scale)
    dk, dv = v.to(kind) @ added.transpose(-1, -2), k.to(kind) @ added
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _read(q: Tensor, s: Tensor, scale: float) -> Tensor:
    """What the queries (B, H, C, D) read from a state (B, G, D, E)."""
    return (q.to(s.dtype).unflatten(1, (s.shape[1], -1)) @ s[:, :, None]).flatten(1, 2) * scale


def _read_backward(q: Tensor, dout: Tensor, s: Tensor) -> Tensor:
    """The gradient of a state like s (B, G, D, E) from that of what was read."""
    q, dout = (x.to(s.dtype).unflatten(1, (s.shape[1], -1)) for x in (q, dout))
    return (q.transpose(-1, -2) @ dout).sum(2)


def _as_keys(c: Tensor, axes: int) -> Tensor:
    """A log-decay a head with an axis of size 1 for the key channels; one by channel has it."""
    return c[..., None] if c.dim() == axes else c


class _GatherKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed, group):  # type: ignore[no-untyped-def]
        ctx.group = group
        return torch.cat(gather(packed, group), 2)

    @staticmethod
    def backward(ctx, dwhole):  # type: ignore[no-untyped-def]
        _, size = place(ctx.group)
        parts = dwhole.to(accumulator(dwhole.dtype)).unflatten(2, (size, -1)).movedim(2, 0)
        return scatter_sum(parts, ctx.group).to(dwhole.dtype), None
