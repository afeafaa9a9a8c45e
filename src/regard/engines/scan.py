"""Linear attention as a scan over chunks: a state of fixed size instead of a table of scores.

    S_t = exp(g_t) S_{t-1} + k_t v_t'        o_t = q_t S_t    [ / read-out of the same scan with v = 1 ]

The torch way runs over chunks (`scan_chunks`). All exponents are differences of cumulated log-decays and at most 0.
States are float32 at least.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract.dispatch import Implementation, choose
from regard.contract.errors import OptionError, ShapeError, Unsupported
from regard.engines import scan_native
from regard.engines.precision import accumulator, without_autocast
from regard.engines.scan_affine import affine_scan as affine_scan
from regard.engines.scan_chunks import cumulate, scan_chunks
from regard.engines.triton import fla
from regard.engines.triton import scan as triton_scan
from regard.patterns import Bound, Causal, Documents, Full, KeyValid, Pattern
from regard.primitives.state import State

DivideBy = Literal["none", "sum", "abs1"]
# below this a step forgets everything; -inf would give -inf - -inf
LEAST_LOG_DECAY = -100.0
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
    """One call of the engine. v carries a last column of ones if the read-out divides.

    q, k, v in the caller's dtype; s0 in the accumulator's. log_decay: (B|1, H, N|1) or (B, H, N, D), float32 at least.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
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
    log_decay: None, (H,) per head, (B, H, N) per step or (B, H, N, D) per step and key channel, at most 0. scale:
    multiplies q.
    divide_by: "sum" divides by q.z + eps, "abs1" by max(|q.z|, 1). key_valid: bool (B, M), False = padding, which
    neither adds nor decays. reset: bool (B, N), True where a document starts. chunk_size: steps; 64, or 128 for wide
    states; the native kernels have their own. Raises ShapeError, OptionError, Unsupported.
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
        g = _log_decay(log_decay, batch, heads, n, d, kind)
        if g is not None and k.shape[1] != heads:
            # a decay per query head makes a state per query head
            k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
        if divide_by != "none":
            v = torch.cat((v, torch.ones_like(v[..., :1])), -1)
        if key_valid is not None:
            keep = key_valid[:, None, :, None]
            k, v = k * keep, v * keep
            if g is not None:
                g = g * (keep if g.dim() == 4 else keep[..., 0])
        call = Call(
            q, k, v, scale, g, is_causal,
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


def _log_decay(g: Tensor | None, batch: int, heads: int, n: int, d: int, kind: torch.dtype) -> Tensor | None:
    if g is None:
        return None
    if tuple(g.shape) not in ((heads,), (batch, heads, n), (batch, heads, n, d)):
        raise ShapeError(
            f"log_decay is {tuple(g.shape)}; it must be (H,) = {(heads,)}, (B, H, N) = {(batch, heads, n)} or "
            f"(B, H, N, D) = {(batch, heads, n, d)}"
        )
    g = g.to(kind).clamp(min=LEAST_LOG_DECAY)
    return g[None, :, None] if g.dim() == 1 else g


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
    return s.to(accumulator(k.dtype))


def _divide(out: Tensor, divide_by: DivideBy, eps: float) -> Tensor:
    out, total = out[..., :-1], out[..., -1:]
    return out / (total + eps) if divide_by == "sum" else out / total.abs().clamp(min=1)


def _share(q: Tensor, s: Tensor) -> Tensor:
    batch, heads, n, d = q.shape
    groups = s.shape[1]
    return (q.reshape(batch, groups, heads // groups, n, d) @ s[:, :, None]).reshape(batch, heads, n, -1)


def _widen(call: Call) -> Call:
    """The call in the accumulator's dtype, the scale inside q."""
    kind = accumulator(call.q.dtype)
    q = call.q.to(kind)
    return replace(call, q=q if call.scale == 1 else q * call.scale, k=call.k.to(kind), v=call.v.to(kind), scale=1.0)


def _run_reference(call: Call) -> tuple[Tensor, Tensor]:
    """The definition: the whole table of decayed products."""
    call = _widen(call)
    q, heads, groups = call.q, call.q.shape[1], call.k.shape[1]
    n, m = q.shape[2], call.k.shape[2]
    k, v = (x.repeat_interleave(heads // groups, 1) for x in (call.k, call.v))
    if not call.is_causal:
        return q @ k.transpose(-1, -2) @ v, call.k.transpose(-1, -2) @ call.v
    pairs = torch.ones(n, m, dtype=torch.bool, device=q.device).tril()[None, None]
    if call.segment is not None:
        pairs = pairs & (call.segment[:, None, :, None] == call.segment[:, None, None, :])
    c = None if call.log_decay is None else _by_channel(cumulate(call.log_decay.expand(*_steps(call.log_decay, n)), 2))
    if c is None:
        table = q @ k.transpose(-1, -2)
    elif c.shape[-1] == 1:
        gap = (c - c.transpose(-1, -2)).masked_fill(~pairs, 0.0)
        table = q @ k.transpose(-1, -2) * gap.to(q.dtype).exp()
    else:
        gap = (c[..., :, None, :] - c[..., None, :, :]).masked_fill(~pairs[..., None], 0.0)
        table = torch.einsum("bhid,bhjd,bhijd->bhij", q, k, gap.to(q.dtype).exp())
    out = (table * pairs) @ v
    left = call.k if c is None else call.k * (c[:, :, -1:] - c).to(q.dtype).exp()
    if call.segment is not None:
        left = left * (call.segment == call.segment[:, -1:])[:, None, :, None]
    s = left.transpose(-1, -2) @ call.v
    if call.s0 is not None:
        start, kept = q, call.s0
        if c is not None:
            start, kept = start * c.to(q.dtype).exp(), kept * c[:, :, -1, :, None].to(q.dtype).exp()
        if call.segment is not None:
            start = start * (call.segment == 0)[:, None, :, None]
            kept = kept * (call.segment[:, -1] == 0)[:, None, None, None]
        out, s = out + _share(start, call.s0), s + kept
    return out, s


def _steps(g: Tensor, n: int) -> tuple[int, ...]:
    return (*g.shape[:2], n, *g.shape[3:])


def _by_channel(g: Tensor) -> Tensor:
    return g if g.dim() == 4 else g[..., None]


def _not_step(call: Call) -> list[str]:
    reasons = []
    if call.q.shape[2] != 1 or not call.is_causal:
        reasons.append("it is not one causal step")
    if call.segment is not None:
        reasons.append("there are document starts")
    return reasons


def _run_step(call: Call) -> tuple[Tensor, Tensor]:
    kind = accumulator(call.q.dtype)
    q, k, v, g, s0 = call.q.to(kind), call.k.to(kind).transpose(-1, -2), call.v.to(kind), call.log_decay, call.s0
    if s0 is None:
        s = k * v
    else:
        s = torch.addcmul(s0 if g is None else s0 * _by_channel(g.exp()).transpose(-1, -2), k, v)
    q = q if call.scale == 1 else q * call.scale
    return q @ s if q.shape[1] == s.shape[1] else _share(q, s), s


def _no_native(call: Call) -> list[str]:
    reasons = scan_native.cannot(call.q, call.k, call.v, call.log_decay)
    if not call.is_causal:
        reasons.append("it is not causal")
    return reasons


def _run_native(call: Call) -> tuple[Tensor, Tensor]:
    return scan_native.scan(call.q, call.k, call.v, call.scale, call.log_decay, call.s0, call.segment)


def _no_triton(call: Call) -> list[str]:
    reasons = triton_scan.cannot(call.q, call.k, call.v, call.log_decay)
    return reasons if call.is_causal else [*reasons, "it is not causal"]


def _run_triton(call: Call) -> tuple[Tensor, Tensor]:
    return triton_scan.scan(call.q, call.k, call.v, call.scale, call.log_decay, call.s0, call.segment)


def _no_fla(call: Call) -> list[str]:
    reasons = fla.cannot(call.q, call.k, call.v, call.log_decay, call.segment)
    return reasons if call.is_causal else [*reasons, "it is not causal"]


def _run_fla(call: Call) -> tuple[Tensor, Tensor]:
    return fla.scan(call.q, call.k, call.v, call.scale, call.log_decay, call.s0)


def _run_chunks(call: Call) -> tuple[Tensor, Tensor]:
    call = _widen(call)
    if not call.is_causal:
        total = call.k.transpose(-1, -2) @ call.v
        return _share(call.q, total), total
    return scan_chunks(call.q, call.k, call.v, call.log_decay, call.s0, call.segment, call.chunk_size)


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
    Implementation("scan:native", _no_native, _run_native),
    Implementation("scan:fla", _no_fla, _run_fla),
    Implementation("scan:torch", lambda call: [], _run_chunks),
    # never measured on a GPU: by name only
    Implementation("scan:triton", _no_triton, _run_triton),
    Implementation("scan:reference", lambda call: [], _run_reference),
)
