"""Attention over the whole table of scores.

    s = scale q k' ; s = score_mod(s, b, h, i, j) ; s = s + bias ; masked ; weights = normaliser(s) ; out = weights v

Implementations: torch's fused attention where the call is plain softmax, causal bands block by block, otherwise the
table itself. The explicit form is the reference. Everything is accumulated in float32 (float64 stays).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract.dispatch import Implementation, choose
from regard.contract.errors import OptionError, ShapeError
from regard.engines.precision import accumulator, without_autocast
from regard.patterns import Bound, Causal, Pattern, SlidingWindow
from regard.primitives.normalisers import Normaliser, Softmax

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Call:
    """One call of the engine: what the implementations look at."""

    q: Tensor
    k: Tensor
    v: Tensor
    pattern: Pattern | Bound | None
    mask: Tensor | None
    bias: Tensor | None
    is_causal: bool
    scale: float | None
    q_offset: int
    normaliser: Normaliser
    score_mod: ScoreMod | None
    dropout_p: float
    return_lse: bool
    return_weights: bool


@dataclass(frozen=True)
class Attended:
    """out (B, H, N, E); lse (B, H, N) float32 and weights (B, H, N, M), if they were asked for."""

    out: Tensor
    lse: Tensor | None = None
    weights: Tensor | None = None


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | Bound | None = None,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    q_offset: int = 0,
    normaliser: Normaliser | None = None,
    score_mod: ScoreMod | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    return_weights: bool = False,
    engine: str | None = None,
) -> Attended:
    """Attend with every option of the engine; see the module for the order of operations.

    q (B, H, N, D), k (B, G, M, D), v (B, G, M, E), H a multiple of G. mask: bool, bias: added to the scores, both
    broadcastable to (B, H, N, M). is_causal: top-left aligned, as torch has it. scale: D^-1/2 if None.
    q_offset: position of the first query. lse is the log-sum-exp of the softmax scores, -inf for a row without keys.
    Raises ShapeError, OptionError; Unsupported with reasons if the named engine cannot.
    """
    if is_causal and pattern is not None:
        raise OptionError("is_causal together with a pattern says it twice: write Causal() & pattern")
    if is_causal and q_offset:
        raise OptionError("is_causal is aligned to the first key; with q_offset write pattern=Causal()")
    if (mask is not None or bias is not None) and not torch.compiler.is_compiling():
        check_table(q, k, mask, bias)
    # torch's own attention cannot read masks over the keys alone
    mask, bias = (x[None] if x is not None and x.dim() < 2 else x for x in (mask, bias))
    call = Call(
        q, k, v, pattern, mask, bias, is_causal, scale, q_offset,
        normaliser or Softmax(), score_mod, dropout_p, return_lse, return_weights,
    )  # fmt: skip
    return choose(IMPLEMENTATIONS, engine, call).run(call)


def check_table(q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None) -> None:
    """Raise ShapeError or OptionError if a mask or a bias does not fit the table of scores."""
    table = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    for name, tensor in (("mask", mask), ("bias", bias)):
        if tensor is None:
            continue
        if len(tensor.shape) > 4 or any(s not in (1, t) for s, t in zip(tensor.shape[::-1], table[::-1], strict=False)):
            raise ShapeError(f"the {name} is {tuple(tensor.shape)}; it must broadcast to (B, H, N, M) = {table}")
    if mask is not None and mask.dtype != torch.bool:
        raise ShapeError(f"the mask is {mask.dtype}; a mask is bool (True = may attend), scores are added by bias=")
    if bias is not None:
        if not bias.is_floating_point():
            raise ShapeError(f"the bias is {bias.dtype}; it is added to scores and must be a floating dtype")
        # a look at the values is impossible under function transforms and pointless on meta tensors
        if not bias.is_meta and not torch._C._are_functorch_transforms_active() and bool(torch.isnan(bias).any()):
            raise OptionError("the bias (or float mask) holds NaN; use -inf to hide a key")


def visible(call: Call) -> Tensor | None:
    """The pairs that may meet, bool (B|1, H|1, N, M); None if all may."""
    n, m, device = call.q.shape[2], call.k.shape[2], call.q.device
    parts = []
    if call.is_causal:
        parts.append(Causal().dense(n, m, device=device))
    if call.pattern is not None and not _sees_all(call):
        pairs = call.pattern.dense(n, m, q_offset=call.q_offset, device=device)
        if pairs.shape[0] not in (1, call.q.shape[0]) or pairs.shape[1] not in (1, call.q.shape[1]):
            raise ShapeError(
                f"the data of the pattern {call.pattern} is for batch {pairs.shape[0]} and {pairs.shape[1]} heads; "
                f"q is {tuple(call.q.shape)}"
            )
        parts.append(pairs)
    if call.mask is not None:
        parts.append(call.mask)
    if not parts:
        return None
    out = parts[0]
    for part in parts[1:]:
        out = out & part
    return out


def _sees_all(call: Call) -> bool:
    # one query after all keys: the usual step of decoding
    return isinstance(call.pattern, Causal) and not call.pattern.strict and call.q_offset + 1 >= call.k.shape[2]


def _is_plain_causal(call: Call) -> bool:
    if call.mask is not None or call.bias is not None or call.q_offset:
        return False
    square = call.q.shape[2] == call.k.shape[2]
    return call.is_causal or (square and isinstance(call.pattern, Causal) and not call.pattern.strict)


def _not_fused(call: Call) -> list[str]:
    reasons = []
    if type(call.normaliser) is not Softmax:
        reasons.append(f"the normaliser is {type(call.normaliser).__name__}, not Softmax")
    if call.score_mod is not None:
        reasons.append("there is a score_mod")
    if call.return_lse:
        reasons.append("the log-sum-exp is asked for")
    if call.return_weights:
        reasons.append("the weights are asked for")
    return reasons


def _run_sdpa(call: Call) -> Attended:
    q, k, v = call.q, call.k, call.v
    grouped = True if q.shape[1] != k.shape[1] else False  # noqa: SIM210  a branch makes a guard for torch.compile
    causal = _is_plain_causal(call)
    pairs = None if causal else visible(call)
    table = pairs
    if call.bias is not None:
        table = call.bias.to(q.dtype)
        if pairs is not None:
            table = torch.where(pairs, table, float("-inf"))
    out = F.scaled_dot_product_attention(q, k, v, table, call.dropout_p, causal, scale=call.scale, enable_gqa=grouped)
    if table is not None and (table.dtype != torch.bool or table.device.type != "cpu"):
        # rows without keys: torch promises nothing about them outside bool masks on the CPU
        some = (table if table.dtype == torch.bool else ~torch.isneginf(table)).any(-1, keepdim=True)
        out = torch.where(some, out, torch.zeros_like(out))
    return Attended(out)


def _run_explicit(call: Call) -> Attended:
    q, k, v = call.q, call.k, call.v
    kind = accumulator(q.dtype)
    batch, heads, n, d = q.shape
    groups, m = k.shape[1], k.shape[2]
    with without_autocast(q.device):
        scale = d**-0.5 if call.scale is None else call.scale
        by_group = q.to(kind).reshape(batch, groups, heads // groups, n, d)
        scores = ((by_group * scale) @ k.to(kind)[:, :, None].transpose(-1, -2)).reshape(batch, heads, n, m)
        if call.score_mod is not None:
            b = torch.arange(batch, device=q.device).view(batch, 1, 1, 1)
            h = torch.arange(heads, device=q.device).view(1, heads, 1, 1)
            i = torch.arange(call.q_offset, call.q_offset + n, device=q.device).view(1, 1, n, 1)
            scores = call.score_mod(scores, b, h, i, torch.arange(m, device=q.device).view(1, 1, 1, m))
        pairs = visible(call)
        if call.bias is not None:
            # -inf hides a key for every normaliser, also for those that would turn it into a number
            hidden = torch.isneginf(call.bias)
            pairs = ~hidden if pairs is None else pairs & ~hidden
            scores = scores + call.bias.masked_fill(hidden, 0.0).to(kind)
        counts = None
        if call.normaliser.needs_counts:
            counts = torch.full((1, 1, n), m, device=q.device) if pairs is None else _row_sums(pairs, m)
        # a maximum over no keys at all does not exist; there is nothing to normalise
        weights = call.normaliser(scores, pairs, counts) if m else scores
        dropped = F.dropout(weights, call.dropout_p) if call.dropout_p else weights
        dropped = dropped.reshape(batch, groups, heads // groups, n, m)
        out = (dropped @ v.to(kind)[:, :, None]).reshape(batch, heads, n, v.shape[-1]).to(q.dtype)
        lse = _log_sum_exp(scores, pairs) if call.return_lse else None
    return Attended(out, lse, weights.to(q.dtype) if call.return_weights else None)


def _row_sums(pairs: Tensor, m: int) -> Tensor:
    # a mask that is broadcast over the keys counts every one of them
    return pairs.expand(*pairs.shape[:-1], m).sum(-1)


def _not_explicit(call: Call) -> list[str]:
    if call.return_lse and type(call.normaliser) is not Softmax:
        return [f"{type(call.normaliser).__name__} has no log-sum-exp"]
    return []


def _log_sum_exp(scores: Tensor, pairs: Tensor | None) -> Tensor:
    if pairs is None:
        return torch.logsumexp(scores, -1)
    empty = ~pairs.any(-1).expand(scores.shape[:-1])
    # empty rows take the branch of scores 0, so that no gradient of -inf - -inf arises, and are set afterwards
    filled = scores.masked_fill(~pairs & ~empty[..., None], float("-inf")).masked_fill(empty[..., None], 0.0)
    return torch.logsumexp(filled, -1).masked_fill(empty, float("-inf"))


def _band(call: Call) -> int:
    """The window of `Causal() & SlidingWindow(w)`, 0 for any other pattern."""
    parts = call.pattern.conjuncts() if isinstance(call.pattern, Pattern) else ()
    windows = [p.window for p in parts if isinstance(p, SlidingWindow)]
    causal = any(isinstance(p, Causal) and not p.strict for p in parts)
    return windows[0] if len(windows) == 1 and len(parts) == 2 and causal else 0


def _not_banded(call: Call) -> list[str]:
    reasons = _not_fused(call)
    window = _band(call)
    if not window:
        return [*reasons, "the pattern is not Causal() & SlidingWindow(w)"]
    n, m = call.q.shape[2], call.k.shape[2]
    if call.q_offset or n != m:
        reasons.append("queries and keys are not the same positions")
    if call.mask is not None or call.bias is not None:
        reasons.append("there is a mask or a bias")
    if n <= 2 * window:
        reasons.append(f"{n} positions are too few for blocks of {window}")
    return reasons


def _run_banded(call: Call) -> Attended:
    window = _band(call)
    batch, heads, n, d = call.q.shape
    groups, e = call.k.shape[1], call.v.shape[-1]
    blocks = -(-n // window)
    pad = blocks * window - n
    q = F.pad(call.q, (0, 0, 0, pad)).view(batch, heads, blocks, window, d).transpose(1, 2)
    # each block of queries meets its own block of keys and the one before
    k = F.pad(call.k, (0, 0, window, pad)).unfold(2, 2 * window, window).permute(0, 2, 1, 4, 3)
    v = F.pad(call.v, (0, 0, window, pad)).unfold(2, 2 * window, window).permute(0, 2, 1, 4, 3)
    row = torch.arange(window, device=q.device)[:, None] + window
    column = torch.arange(2 * window, device=q.device)[None]
    seen = (column <= row) & (row - column < window)
    first = seen & (column >= window)
    mask = torch.cat((first[None], seen[None].expand(blocks - 1, -1, -1))).repeat(batch, 1, 1)[:, None]
    out = F.scaled_dot_product_attention(
        q.reshape(batch * blocks, heads, window, d),
        k.reshape(batch * blocks, groups, 2 * window, d),
        v.reshape(batch * blocks, groups, 2 * window, e),
        mask,
        call.dropout_p,
        scale=call.scale,
        enable_gqa=True if heads != groups else False,  # noqa: SIM210
    )
    out = out.view(batch, blocks, heads, window, e).transpose(1, 2).reshape(batch, heads, blocks * window, e)
    return Attended(out[:, :, :n])


IMPLEMENTATIONS = (
    Implementation("dense:banded", _not_banded, _run_banded),
    Implementation("dense:sdpa", _not_fused, _run_sdpa),
    Implementation("dense:reference", _not_explicit, _run_explicit),
)
