"""The delta rule: a state that is corrected towards each new value instead of only added to, with optional decay.

    S_t = exp(g_t) S_{t-1} + k_t u_t'        u_t = beta_t (v_t - exp(g_t) S_{t-1}' k_t)        o_t = scale S_t' q_t

Yang et al., 2024, "Parallelizing Linear Transformers with the Delta Rule"; with decay, "Gated Delta Networks".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.contract.dispatch import Implementation, choose
from regard.contract.errors import OptionError, ShapeError
from regard.engines import delta_native
from regard.engines.delta_chunks import delta_chunks
from regard.engines.precision import accumulator, without_autocast
from regard.engines.scan import LEAST_LOG_DECAY, ScanState


@dataclass(frozen=True)
class Call:
    """One call of the engine, in the accumulator's dtype and with as many heads everywhere."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log_decay: Tensor | None
    segment: Tensor | None
    s0: Tensor | None
    chunk_size: int


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    key_valid: Tensor | None = None,
    reset: Tensor | None = None,
    initial_state: ScanState | None = None,
    chunk_size: int = 64,
    engine: str | None = None,
) -> tuple[Tensor, ScanState]:
    """The (gated) delta rule: (out (B, H, N, E), state after the last step).

    q, k (B, G, N, D), v (B, G, N, E), each with its own G that divides H, the largest of them; beta (B, H, N), how much
    of the error is corrected, in [0, 2]. log_decay: None, (H,) per head or (B, H, N) per step, at most 0. scale:
    multiplies q. Keys are taken as they are: the rule is stable for |k|^2 beta <= 2, so make them unit vectors.
    key_valid: bool (B, N), False = padding, which neither writes nor decays. reset: bool (B, N), True where a document
    starts. Raises ShapeError, OptionError, Unsupported.
    """
    heads = max(x.shape[1] for x in (q, k, v))
    batch, _, n, _ = q.shape
    _check(q, k, v, beta, log_decay, heads)
    if chunk_size < 1:
        raise OptionError(f"the delta rule needs a chunk_size of at least 1 step, not {chunk_size}")
    for name, mask in (("key_valid", key_valid), ("reset", reset)):
        if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) not in ((batch, n), (1, n))):
            raise ShapeError(f"{name} is {mask.dtype} {tuple(mask.shape)}; it must be bool (B, N) = {(batch, n)}")
    kind = accumulator(q.dtype)
    with without_autocast(q.device):
        wide, k, v = (x.to(kind).repeat_interleave(heads // x.shape[1], 1) for x in (q, k, v))
        beta, g = beta.to(kind), log_decay
        if g is not None:
            g = g.to(kind).clamp(min=LEAST_LOG_DECAY)
            g = g[None, :, None].expand(batch, heads, n) if g.dim() == 1 else g
        if key_valid is not None:
            keep = key_valid[:, None]
            # whatever stands at padding, were it not a number
            k, v = (x.masked_fill(~keep[..., None], 0.0) for x in (k, v))
            beta = beta.masked_fill(~keep, 0.0)
            g = None if g is None else g * keep
        s0 = None
        if initial_state is not None:
            s0, wanted = initial_state.s.to(kind), (batch, heads, k.shape[-1], v.shape[-1])
            if tuple(s0.shape) != wanted:
                raise ShapeError(f"the initial state is {tuple(s0.shape)}; it must be (B, H, D, E) = {wanted}")
        segment = None if reset is None else reset.expand(batch, n).cumsum(-1)
        call = Call(wide if scale == 1 else wide * scale, k, v, beta, g, segment, s0, min(chunk_size, n))
        out, s = choose(IMPLEMENTATIONS, engine, call).run(call)
        return out.to(q.dtype), ScanState(s, None, (0 if initial_state is None else initial_state.seen) + n)


def _check(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, heads: int) -> None:
    batch, _, n, d = q.shape
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape[0] != batch or x.shape[2] != n or heads % x.shape[1] or (name == "k" and x.shape[3] != d):
            raise ShapeError(
                f"{name} is {tuple(x.shape)} beside q of {tuple(q.shape)}; it must be (B, G, N, ·) with G a divisor of "
                f"{heads} heads, and q and k equally wide"
            )
    if tuple(beta.shape) != (batch, heads, n):
        raise ShapeError(f"beta is {tuple(beta.shape)}; it must be (B, H, N) = {(batch, heads, n)}")
    if g is not None and tuple(g.shape) not in ((heads,), (batch, heads, n)):
        raise ShapeError(
            f"log_decay is {tuple(g.shape)}; it must be (H,) = {(heads,)} or (B, H, N) = {(batch, heads, n)}"
        )


def _run_reference(call: Call) -> tuple[Tensor, Tensor]:
    """The definition: one step after the other."""
    batch, heads, n, d = call.k.shape
    s = call.k.new_zeros(batch, heads, d, call.v.shape[-1]) if call.s0 is None else call.s0
    outs = []
    for t in range(n):
        if call.segment is not None:
            same = call.segment[:, t] == (call.segment[:, t - 1] if t else 0)
            s = torch.where(same[:, None, None, None], s, 0.0)
        s = _next_state(s, call, t)
        outs.append(torch.einsum("bhd,bhde->bhe", call.q[:, :, t], s))
    return torch.stack(outs, 2), s


def _next_state(s: Tensor, call: Call, t: int) -> Tensor:
    if call.log_decay is not None:
        s = s * call.log_decay[:, :, t, None, None].exp()
    k = call.k[:, :, t, :, None]
    error = call.v[:, :, t] - (k.transpose(-1, -2) @ s).squeeze(-2)
    return s + k * (call.beta[:, :, t, None] * error)[..., None, :]


def _not_step(call: Call) -> list[str]:
    reasons = []
    if call.q.shape[2] != 1:
        reasons.append("it is not one step")
    if call.segment is not None:
        reasons.append("there are document starts")
    return reasons


def _run_step(call: Call) -> tuple[Tensor, Tensor]:
    if call.s0 is None:
        s = call.k.transpose(-1, -2) @ (call.beta[..., None] * call.v)
    else:
        s = _next_state(call.s0, call, 0)
    return call.q @ s, s


def _no_native(call: Call) -> list[str]:
    return delta_native.cannot(call.q, call.k, call.v)


def _run_native(call: Call) -> tuple[Tensor, Tensor]:
    return delta_native.scan(call.q, call.k, call.v, call.beta, call.log_decay, call.s0, call.segment)


def _run_chunks(call: Call) -> tuple[Tensor, Tensor]:
    return delta_chunks(call.q, call.k, call.v, call.beta, call.log_decay, call.s0, call.segment, call.chunk_size)


IMPLEMENTATIONS = (
    Implementation("delta:step", _not_step, _run_step),
    Implementation("delta:native", _no_native, _run_native),
    Implementation("delta:torch", lambda call: [], _run_chunks),
    Implementation("delta:reference", lambda call: [], _run_reference),
)
