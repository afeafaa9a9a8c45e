"""Linear attention as a scan over chunks: a state of fixed size instead of a table of scores.

    S_t = exp(g_t) S_{t-1} + k_t v_t'        o_t = q_t S_t    [ / read-out of the same scan with v = 1 ]

Three primitives carry it: `chunk_states` (what a chunk adds), `prefix_states` (the state before each chunk) and
`chunk_outputs`. All exponents are differences of cumulated log-decays and at most 0. States are float32 at least.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract.dispatch import Implementation, choose
from regard.contract.errors import OptionError, ShapeError, Unsupported
from regard.engines.precision import accumulator, without_autocast
from regard.patterns import Bound, Causal, Documents, Full, KeyValid, Pattern
from regard.primitives.state import State

DivideBy = Literal["none", "sum", "abs1"]
# below this a step forgets everything; -inf would give -inf - -inf
LEAST_LOG_DECAY = -100.0
# positions handled at once: bounds the memory of the chunk-by-chunk decay table
SPAN = 8192
# the score of no key at all: finite, so that no -inf - -inf arises in a gradient
_NOTHING = -1e30


@dataclass(frozen=True)
class ScanState(State):
    """The state of a scan. s: (B, G|H, D, E) float32; z: (B, G|H, D), the sum of keys, None without a division."""

    s: Tensor
    z: Tensor | None = None
    seen: int = 0


@dataclass(frozen=True)
class SoftmaxState(State):
    """The state of a softmax scan. lse: (B, H), log-sum-exp of the scores so far; out: (B, H, E), the last output."""

    lse: Tensor
    out: Tensor
    seen: int = 0


@dataclass(frozen=True)
class Call:
    """One call of the engine. v carries a last column of ones if the read-out divides."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    is_causal: bool
    segment: Tensor | None
    s0: Tensor | None
    chunk_size: int


def linear_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    divide_by: DivideBy = "none",
    eps: float = 1e-6,
    is_causal: bool = True,
    key_valid: Tensor | None = None,
    reset: Tensor | None = None,
    initial_state: ScanState | None = None,
    chunk_size: int | None = None,
    engine: str | None = None,
) -> tuple[Tensor, ScanState]:
    """Linear attention with optional decay: (out (B, H, N, E), state after the last step).

    q (B, H, N, D), k (B, G, M, D), v (B, G, M, E), after the feature map; H a multiple of G.
    log_decay: None, (H,) per head or (B, H, N) per step, at most 0. scale: multiplies q.
    divide_by: "sum" divides by q.z + eps, "abs1" by max(|q.z|, 1). key_valid: bool (B, M), False = padding, which
    neither adds nor decays. reset: bool (B, N), True where a document starts. chunk_size: steps; 64, or 128 for wide
    states. Raises ShapeError, OptionError, Unsupported.
    """
    batch, heads, n, d = q.shape
    if divide_by not in ("none", "sum", "abs1"):
        raise OptionError(f"divide_by is {divide_by!r}; it is one of none, sum, abs1")
    if is_causal and n != k.shape[2]:
        raise Unsupported(f"a causal scan needs as many queries as keys; there are {n} and {k.shape[2]}")
    if not is_causal and (log_decay is not None or reset is not None or initial_state is not None):
        raise Unsupported("a decay, document starts and an initial state belong to a causal scan")
    if reset is not None:
        if tuple(reset.shape) not in ((batch, n), (1, n)):
            raise ShapeError(f"reset is {tuple(reset.shape)}; it must be bool (B, N) = {(batch, n)}")
        reset = reset.expand(batch, n)
    _check_valid(key_valid, batch, k.shape[2])
    if chunk_size is not None and chunk_size < 1:
        raise OptionError(f"a scan needs a chunk_size of at least 1 step, not {chunk_size}")
    kind = accumulator(q.dtype)
    with without_autocast(q.device):
        g = _log_decay(log_decay, batch, heads, n, kind, q)
        if g is not None and k.shape[1] != heads:
            # a decay per query head makes a state per query head
            k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
        k, v = k.to(kind), v.to(kind)
        if divide_by != "none":
            v = torch.cat((v, torch.ones_like(v[..., :1])), -1)
        if key_valid is not None:
            keep = key_valid[:, None, :, None]
            k, v = k * keep, v * keep
            if g is not None:
                g = g * key_valid[:, None]
        call = Call(
            q.to(kind) * scale, k, v, g, is_causal,
            None if reset is None else reset.cumsum(-1),
            _initial(initial_state, k, v, divide_by),
            chunk_size or (128 if d * v.shape[-1] >= 16384 else 64),
        )  # fmt: skip
        out, s = choose(IMPLEMENTATIONS, engine, call).run(call)
        seen = (initial_state.seen if initial_state is not None else 0) + n
        if divide_by == "none":
            return out.to(q.dtype), ScanState(s, None, seen)
        out, z = _divide(out, divide_by, eps), s[..., -1]
        return out.to(q.dtype), ScanState(s[..., :-1], z, seen)


def chunk_states(k: Tensor, v: Tensor, c: Tensor | None, last: Tensor | None = None) -> Tensor:
    """What each chunk adds to the state: k (…, C, D), v (…, C, E) -> (…, D, E).

    c: log-decay cumulated inside the chunk (…, C), or None. last: bool (…, C), which keys the next chunk may see.
    """
    if c is not None:
        k = k * (c[..., -1:] - c).to(k.dtype).exp()[..., None]
    if last is not None:
        k = k * last[..., None]
    return k.transpose(-1, -2) @ v


def prefix_states(
    added: Tensor, total: Tensor | None, s0: Tensor | None, alive: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The state before each chunk, and after the last: added (B, G, T, D, E) over T chunks -> (same, (B, G, D, E)).

    total: log-decay of each chunk (B, G, T), or None. s0: initial state (B, G, D, E), or None.
    alive: bool (B, 1, T + 1, T + 1); [a, b]: what chunk b - 1 left (b = 0: s0) is still the document after chunk a - 1.
    """
    chunks = added.shape[2]
    parts = torch.cat((torch.zeros_like(added[:, :, :1]) if s0 is None else s0[:, :, None], added), 2)
    step = torch.ones(chunks + 1, chunks + 1, dtype=torch.bool, device=added.device).tril()
    if total is None and alive is None:
        states = parts.cumsum(2)
    else:
        weight = step.to(added.dtype)[None, None]
        if total is not None:
            c = F.pad(_cumulate(total), (1, 0))
            gap = (c[..., :, None] - c[..., None, :]).masked_fill(~step, 0.0)
            weight = weight * gap.to(weight.dtype).exp()
        if alive is not None:
            weight = weight * alive
        states = (weight @ parts.flatten(-2)).unflatten(-1, parts.shape[-2:])
    return states[:, :, :-1], states[:, :, -1]


def chunk_outputs(
    q: Tensor, k: Tensor, v: Tensor, c: Tensor | None, s: Tensor, own: Tensor, carried: Tensor | None
) -> Tensor:
    """The outputs of each chunk: own keys by their table, earlier ones through the state s (B, G, T, D, E).

    q (B, G, R, T, C, D) with R query heads a key head; k, v (B, G, T, C, ·). own: bool (…, C, C), pairs that may meet.
    carried: bool (…, C), rows that may see the state, or None for all.
    """
    table = q @ k[:, :, None].transpose(-1, -2) * own
    reach = q
    if c is not None:
        gap = (c[..., :, None] - c[..., None, :]).masked_fill(~own.squeeze(2), 0.0)
        table = table * gap.to(q.dtype).exp()[:, :, None]
        reach = q * c.to(q.dtype).exp()[:, :, None, ..., None]
    if carried is not None:
        reach = reach * carried[..., None]
    return table @ v[:, :, None] + reach @ s[:, :, None]


def as_scan(pattern: Pattern | Bound | None, is_causal: bool, system: str) -> tuple[bool, Tensor | None, Tensor | None]:
    """(is_causal, key_valid, reset) of a pattern that is an intersection of Causal, KeyValid and Documents.

    Raises Unsupported for any other pattern: a state cannot tell pairs apart.
    """
    if pattern is None:
        return is_causal, None, None
    if is_causal:
        raise OptionError("is_causal together with a pattern says it twice: write Causal() & pattern")
    bound = pattern if isinstance(pattern, Bound) else Bound(pattern, {})
    causal, key_valid, doc = False, None, None
    for part in bound.pattern.conjuncts():
        for name in part.needs:
            if name not in bound.data:
                raise OptionError(f"the pattern {part} needs data: call .bind({name}=…) first")
        if isinstance(part, Causal) and not part.strict:
            causal = True
        elif isinstance(part, KeyValid) and not part.rows and key_valid is None:
            key_valid = bound.data[part.label]
        elif isinstance(part, Documents) and doc is None:
            doc = bound.data[part.label]
        elif not isinstance(part, Full):
            raise Unsupported(
                f"{system} keeps one state for all queries and cannot follow the pattern {part}; it can follow "
                "Causal() & KeyValid() & Documents(). softmax follows any pattern"
            )
    if doc is None:
        return causal, key_valid, None
    if not causal:
        raise Unsupported(f"{system} separates documents by starting anew at each: it needs Causal() & Documents()")
    if not torch.compiler.is_compiling() and bool((doc[:, 1:] < doc[:, :-1]).any()):
        raise OptionError("document ids must not decrease along the sequence for a scan: each document is one piece")
    return causal, key_valid, F.pad(doc[:, 1:] != doc[:, :-1], (1, 0))


def _check_valid(key_valid: Tensor | None, batch: int, m: int) -> None:
    if key_valid is None:
        return
    if key_valid.dtype != torch.bool or tuple(key_valid.shape) not in ((batch, m), (1, m)):
        raise ShapeError(
            f"key_valid is {key_valid.dtype} {tuple(key_valid.shape)}; it must be bool (B, M) = {(batch, m)}, "
            "True = takes part"
        )


def _cumulate(g: Tensor) -> Tensor:
    # the sum outgrows its differences, which are what counts: a float32 would lose their digits (Metal has no float64)
    return g.to(g.dtype if g.device.type == "mps" else torch.float64).cumsum(-1)


def _log_decay(g: Tensor | None, batch: int, heads: int, n: int, kind: torch.dtype, q: Tensor) -> Tensor | None:
    if g is None:
        return None
    if tuple(g.shape) not in ((heads,), (batch, heads, n)):
        raise ShapeError(
            f"log_decay is {tuple(g.shape)}; it must be (H,) = {(heads,)} or (B, H, N) = {(batch, heads, n)}"
        )
    g = g.to(kind).clamp(min=LEAST_LOG_DECAY)
    return g[None, :, None].expand(batch, heads, n) if g.dim() == 1 else g


def _initial(state: ScanState | None, k: Tensor, v: Tensor, divide_by: DivideBy) -> Tensor | None:
    if state is None:
        return None
    s = state.s
    if divide_by != "none":
        if state.z is None:
            raise OptionError("the state was made without a division; start from a state of the same kind")
        s = torch.cat((s, state.z[..., None]), -1)
    wanted = (k.shape[0], k.shape[1], k.shape[3], v.shape[3])
    if tuple(s.shape) != wanted:
        raise ShapeError(f"the initial state is {tuple(s.shape)}; it must be (B, G, D, E) = {wanted}")
    return s.to(k.dtype)


def _divide(out: Tensor, divide_by: DivideBy, eps: float) -> Tensor:
    out, total = out[..., :-1], out[..., -1:]
    return out / (total + eps) if divide_by == "sum" else out / total.abs().clamp(min=1)


def _share(q: Tensor, s: Tensor) -> Tensor:
    batch, heads, n, d = q.shape
    groups = s.shape[1]
    return (q.reshape(batch, groups, heads // groups, n, d) @ s[:, :, None]).reshape(batch, heads, n, -1)


def _run_reference(call: Call) -> tuple[Tensor, Tensor]:
    """The definition: the whole table of decayed products."""
    heads, groups = call.q.shape[1], call.k.shape[1]
    n, m = call.q.shape[2], call.k.shape[2]
    k, v = (x.repeat_interleave(heads // groups, 1) for x in (call.k, call.v))
    table = call.q @ k.transpose(-1, -2)
    if not call.is_causal:
        return table @ v, call.k.transpose(-1, -2) @ call.v
    pairs = torch.ones(n, m, dtype=torch.bool, device=table.device).tril()[None, None]
    alive = None
    if call.segment is not None:
        pairs = pairs & (call.segment[:, None, :, None] == call.segment[:, None, None, :])
        alive = call.segment[:, None, :] == call.segment[:, None, -1:]
    c = None if call.log_decay is None else _cumulate(call.log_decay)
    if c is not None:
        table = table * (c[..., :, None] - c[..., None, :]).masked_fill(~pairs, 0.0).to(table.dtype).exp()
    out = (table * pairs) @ v
    s = chunk_states(call.k, call.v, c, alive)
    if call.s0 is not None:
        start = call.q if c is None else call.q * c.to(call.q.dtype).exp()[..., None]
        if call.segment is not None:
            start = start * (call.segment == 0)[:, None, :, None]
        out = out + _share(start, call.s0)
        kept = call.s0 if c is None else call.s0 * c[..., -1:, None].to(call.s0.dtype).exp()
        s = s + (kept if call.segment is None else kept * (call.segment[:, -1] == 0)[:, None, None, None])
    return out, s


def _not_step(call: Call) -> list[str]:
    reasons = []
    if call.q.shape[2] != 1 or not call.is_causal:
        reasons.append("it is not one causal step")
    if call.segment is not None:
        reasons.append("there are document starts")
    return reasons


def _run_step(call: Call) -> tuple[Tensor, Tensor]:
    s = call.k.transpose(-1, -2) @ call.v
    if call.s0 is not None:
        s = s + (call.s0 if call.log_decay is None else call.s0 * call.log_decay.exp()[..., None])
    return _share(call.q, s), s


def _run_chunks(call: Call) -> tuple[Tensor, Tensor]:
    if not call.is_causal:
        total = call.k.transpose(-1, -2) @ call.v
        return _share(call.q, total), total
    n, s = call.q.shape[2], call.s0
    outs: list[Tensor] = []
    for start in range(0, n, SPAN):
        piece = slice(start, start + SPAN)
        segment = None if call.segment is None else call.segment[:, piece]
        out, s = _run_span(
            call.q[:, :, piece], call.k[:, :, piece], call.v[:, :, piece],
            None if call.log_decay is None else call.log_decay[:, :, piece],
            segment, 0 if start == 0 or call.segment is None else call.segment[:, start - 1 : start],
            s, call.chunk_size,
        )  # fmt: skip
        outs.append(out)
    assert s is not None
    return (torch.cat(outs, 2) if len(outs) > 1 else outs[0]), s


def _run_span(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    segment: Tensor | None,
    before: Tensor | int,
    s0: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    batch, heads, n, d = q.shape
    groups = k.shape[1]
    chunk = min(chunk, n)
    chunks = -(-n // chunk)
    pad = chunks * chunk - n
    if pad:
        # pads add nothing (k = 0) and do not decay (g = 0), so the final state is the state after step n
        q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
        g = None if g is None else F.pad(g, (0, pad))
        segment = None if segment is None else torch.cat((segment, segment[:, -1:].expand(-1, pad)), 1)
    q = q.reshape(batch, groups, heads // groups, chunks, chunk, d)
    k, v = (x.reshape(batch, groups, chunks, chunk, x.shape[-1]) for x in (k, v))
    c = None if g is None else _cumulate(g.reshape(batch, groups, chunks, chunk))
    own = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril().view(1, 1, 1, 1, chunk, chunk)
    last = carried = alive = None
    if segment is not None:
        piece = segment.reshape(batch, chunks, chunk)
        own = own & (piece[..., :, None] == piece[..., None, :])[:, None, None]
        last = (piece == piece[..., -1:])[:, None]
        first = torch.zeros_like(piece[:, 0, :1]) + before
        ends = torch.cat((first, piece[..., -1]), 1)
        alive = (ends[:, :, None] == ends[:, None, :])[:, None]
        carried = (piece == ends[:, :-1, None])[:, None, None]
    added = chunk_states(k, v, c, last)
    states, final = prefix_states(added, None if c is None else c[..., -1], s0, alive)
    out = chunk_outputs(q, k, v, c, states, own, carried)
    return out.reshape(batch, heads, chunks * chunk, -1)[:, :, :n], final


def softmax_scan(
    scores: Tensor,
    v: Tensor,
    *,
    key_valid: Tensor | None = None,
    reset: Tensor | None = None,
    initial_state: SoftmaxState | None = None,
    engine: str | None = None,
) -> tuple[Tensor, SoftmaxState]:
    """Softmax over every prefix with one score a key: o_t = sum over j <= t of softmax(scores_1..t)_j v_j.

    scores (B, H, N), v (B, H, N, E) -> (out (B, H, N, E), state). key_valid: bool (B, N); a prefix without a valid key
    gives 0. reset: bool (B, N), True where a document starts. It is a linear scan with log-decay lse_{t-1} - lse_t.
    """
    kind = accumulator(v.dtype)
    _check_valid(key_valid, v.shape[0], v.shape[2])
    with without_autocast(v.device):
        scores = scores.to(kind)
        if key_valid is not None:
            scores = scores.masked_fill(~key_valid[:, None], _NOTHING)
        before = (
            torch.full_like(scores[..., :1], _NOTHING)
            if initial_state is None
            else initial_state.lse[..., None].to(kind)
        )
        lse = _prefix_log_sum_exp(torch.cat((before, scores), -1), reset)
        weight = (scores - lse[..., 1:]).exp()
        if key_valid is not None:
            weight = weight * key_valid[:, None]
        start = None
        if initial_state is not None:
            start = ScanState(initial_state.out[..., None, :].to(kind), None, initial_state.seen)
        out, state = linear_scan(
            torch.ones_like(weight)[..., None], weight[..., None], v.to(kind), lse[..., :-1] - lse[..., 1:],
            reset=reset, initial_state=start, engine=engine,
        )  # fmt: skip
        return out.to(v.dtype), SoftmaxState(lse[..., -1], state.s.squeeze(-2), state.seen)


def _prefix_log_sum_exp(x: Tensor, reset: Tensor | None) -> Tensor:
    # by doubling: torch.logcumsumexp knows no documents
    n = x.shape[-1]
    segment = None if reset is None else F.pad(reset.cumsum(-1), (1, 0))[:, None]
    stride = 1
    while stride < n:
        earlier = x[..., :-stride]
        if segment is not None:
            same = segment[..., stride:] == segment[..., :-stride]
            earlier = torch.where(same, earlier, _NOTHING)
        # torch.logaddexp has a second derivative of inf / inf where its arguments lie far apart
        both = torch.logsumexp(torch.stack((x[..., stride:], earlier)), 0)
        x = torch.cat((x[..., :stride], both), -1)
        stride *= 2
    return x


IMPLEMENTATIONS = (
    Implementation("scan:step", _not_step, _run_step),
    Implementation("scan:torch", lambda call: [], _run_chunks),
    Implementation("scan:reference", lambda call: [], _run_reference),
)
