"""Attention over the whole table of scores.

    s = scale q k' ; s = score_mod(s, b, h, i, j) ; s = s + bias ; masked ; weights = normaliser(s) ; dropped ;
    out = weights v

Implementations: torch's fused attention where the call is plain softmax, otherwise the table itself. The explicit
form is the reference. Everything is accumulated in float32 (float64 stays).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract.dispatch import Implementation, choose
from regard.contract.errors import OptionError, ShapeError, Unsupported
from regard.engines.philox import draw_seed, keep
from regard.engines.precision import accumulator, without_autocast
from regard.patterns import Bound, Causal, Pattern
from regard.primitives.biases import NAN_BIAS, Indexed
from regard.primitives.normalisers import Normaliser, Softmax

SOFTMAX = Softmax()
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Call:
    """One call of the engine: what the implementations look at."""

    q: Tensor
    k: Tensor
    v: Tensor
    pattern: Any = None
    mask: Tensor | None = None
    bias: Tensor | None = None
    indexed: tuple[Indexed, ...] = ()
    is_causal: bool = False
    scale: float | None = None
    q_offset: int = 0
    normaliser: Normaliser = SOFTMAX
    score_mod: ScoreMod | None = None
    sinks: Tensor | None = None
    extra_k: Tensor | None = None
    extra_v: Tensor | None = None
    dropout_p: float = 0.0
    seed: Tensor | None = None
    return_lse: bool = False
    return_weights: bool = False


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
    indexed: Sequence[Indexed] = (),
    is_causal: bool = False,
    scale: float | None = None,
    q_offset: int = 0,
    normaliser: Normaliser | None = None,
    score_mod: ScoreMod | None = None,
    sinks: Tensor | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    return_weights: bool = False,
    engine: str | None = None,
) -> Attended:
    """Attend with every option of the engine; see the module for the order of operations.

    q (B, H, N, D), k (B, G, M, D), v (B, G, M, E), H a multiple of G. mask: bool, bias: added to the scores, both
    broadcastable to (B, H, N, M). indexed: biases read from tables. is_causal: top-left aligned, as torch has it.
    scale: D^-1/2 if None. q_offset: position of the first query. sinks: (B|1, H|1, N|1), the logit of a key without
    value, for softmax. extra_k (B, G, X, D), extra_v (B, G, X, E): keys that every query sees, in the same
    normalisation; no bias reaches them. dropout_p: share of the weights that is dropped; seed: of the dropout, drawn
    from torch's generator if None. lse is the log-sum-exp of the softmax scores, extra keys and sinks included, -inf
    for a row of nothing. weights are before dropout, without those of extra keys and sinks.
    Raises ShapeError, OptionError; Unsupported with reasons if the named engine cannot.
    """
    call = prepare(
        q, k, v, pattern, mask=mask, bias=bias, indexed=indexed, is_causal=is_causal, scale=scale, q_offset=q_offset,
        normaliser=normaliser, score_mod=score_mod, sinks=sinks, extra_k=extra_k, extra_v=extra_v, dropout_p=dropout_p,
        seed=seed, return_lse=return_lse, return_weights=return_weights,
    )  # fmt: skip
    return choose(IMPLEMENTATIONS, engine, call).run(call)


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Any = None,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    indexed: Sequence[Indexed] = (),
    is_causal: bool = False,
    scale: float | None = None,
    q_offset: int = 0,
    normaliser: Normaliser | None = None,
    score_mod: ScoreMod | None = None,
    sinks: Tensor | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    return_weights: bool = False,
) -> Call:
    """The call, checked; options as for `dense`. Raises ShapeError, OptionError."""
    if is_causal and pattern is not None:
        raise OptionError("is_causal together with a pattern says it twice: write Causal() & pattern")
    if is_causal and q_offset:
        raise OptionError("is_causal is aligned to the first key; with q_offset write pattern=Causal()")
    if q_offset < 0:
        raise OptionError(f"q_offset is the position of the first query, at least 0, not {q_offset}")
    if not 0 <= dropout_p < 1:
        raise OptionError(f"dropout_p is a share of the weights in [0, 1), not {dropout_p}")
    if (mask is not None or bias is not None) and not torch.compiler.is_compiling():
        check_table(q, k, mask, bias)
    # torch's own attention cannot read masks over the keys alone
    mask, bias = (x[None] if x is not None and x.dim() < 2 else x for x in (mask, bias))
    normaliser = normaliser or SOFTMAX
    if indexed or sinks is not None or extra_k is not None or extra_v is not None:
        _check_additions(q, k, v, indexed, normaliser, sinks, extra_k, extra_v)
    drawn = None
    if dropout_p:
        drawn = draw_seed(q.device) if seed is None else torch.as_tensor(seed, dtype=torch.int64, device=q.device)
    return Call(
        q, k, v, pattern, mask, bias, tuple(indexed), is_causal, scale, q_offset, normaliser, score_mod, sinks,
        extra_k, extra_v, dropout_p, drawn, return_lse, return_weights,
    )  # fmt: skip


def _check_additions(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indexed: Sequence[Indexed],
    normaliser: Normaliser,
    sinks: Tensor | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
) -> None:
    batch, heads, n, _ = q.shape
    for term in indexed:
        term.check(batch, heads, n, k.shape[2])
    if sinks is not None:
        if type(normaliser) is not Softmax:
            raise Unsupported(f"a sink is a logit of the softmax; {type(normaliser).__name__} has no place for it")
        if sinks.dim() != 3 or any(s not in (1, t) for s, t in zip(sinks.shape, (batch, heads, n), strict=True)):
            raise ShapeError(
                f"the sinks are {tuple(sinks.shape)}; they must broadcast to (B, H, N) = {(batch, heads, n)} and have "
                "three axes: per head is (1, H, 1)"
            )
        if not sinks.is_floating_point():
            raise ShapeError(f"the sinks are {sinks.dtype}; logits must be a floating dtype")
    if (extra_k is None) is not (extra_v is None):
        raise OptionError("extra_k and extra_v belong together: give both")
    if extra_k is not None and extra_v is not None:
        for name, tensor, like in (("extra_k", extra_k, k), ("extra_v", extra_v, v)):
            fits = tensor.dim() == 4 and tensor.shape[:2] == like.shape[:2] and tensor.shape[3] == like.shape[3]
            if not fits or tensor.shape[2] != extra_k.shape[2]:
                raise ShapeError(
                    f"{name} is {tuple(tensor.shape)}; it must be (B, G, X, width) with B, G and width of "
                    f"{tuple(like.shape)} and one X for both"
                )


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
    if bias is not None and not bias.is_floating_point():
        raise ShapeError(f"the bias is {bias.dtype}; it is added to scores and must be a floating dtype")


def refuse_nan(bias: Tensor | None) -> None:
    """Raise OptionError for a bias that holds NaN. The native kernels see it themselves, in pairs that may meet."""
    if bias is None or bias.is_meta or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        # a look at the values is impossible under transforms and pointless on meta tensors
        return
    if bool(torch.isnan(bias).any()):
        raise OptionError(NAN_BIAS)


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
    if call.sinks is not None:
        reasons.append("there are sinks")
    if call.extra_k is not None:
        reasons.append("there are extra keys")
    if call.indexed:
        reasons.append("there are biases read from tables")
    if call.dropout_p:
        reasons.append("torch drops other weights than the other engines")
    if call.return_lse:
        reasons.append("the log-sum-exp is asked for")
    if call.return_weights:
        reasons.append("the weights are asked for")
    return reasons


def _run_sdpa(call: Call) -> Attended:
    refuse_nan(call.bias)
    q, k, v = call.q, call.k, call.v
    grouped = True if q.shape[1] != k.shape[1] else False  # noqa: SIM210  a branch makes a guard for torch.compile
    causal = _is_plain_causal(call)
    pairs = None if causal else visible(call)
    table = pairs
    if call.bias is not None:
        table = call.bias.to(q.dtype)
        if pairs is not None:
            table = torch.where(pairs, table, float("-inf"))
    out = F.scaled_dot_product_attention(q, k, v, table, 0.0, causal, scale=call.scale, enable_gqa=grouped)
    if table is not None and (table.dtype != torch.bool or table.device.type != "cpu"):
        # rows without keys: torch promises nothing about them outside bool masks on the CPU
        some = (table if table.dtype == torch.bool else ~torch.isneginf(table)).any(-1, keepdim=True)
        out = torch.where(some, out, torch.zeros_like(out))
    return Attended(out)


def run_explicit(call: Call) -> Attended:
    """The definition: every score, every weight."""
    refuse_nan(call.bias)
    q, k, v = call.q, call.k, call.v
    kind = accumulator(q.dtype)
    batch, heads, n, d = q.shape
    groups, m, device = k.shape[1], k.shape[2], q.device
    with without_autocast(device):
        scale = d**-0.5 if call.scale is None else call.scale
        by_group = q.to(kind).reshape(batch, groups, heads // groups, n, d) * scale
        scores = (by_group @ k.to(kind)[:, :, None].transpose(-1, -2)).reshape(batch, heads, n, m)
        b = torch.arange(batch, device=device).view(batch, 1, 1, 1)
        h = torch.arange(heads, device=device).view(1, heads, 1, 1)
        i = torch.arange(call.q_offset, call.q_offset + n, device=device).view(1, 1, n, 1)
        j = torch.arange(m, device=device).view(1, 1, 1, m)
        if call.score_mod is not None:
            scores = call.score_mod(scores, b, h, i, j)
        pairs = visible(call)
        if call.bias is not None:
            # -inf hides a key for every normaliser, also for those that would turn it into a number
            hidden = torch.isneginf(call.bias)
            pairs = ~hidden if pairs is None else pairs & ~hidden
            scores = scores + call.bias.masked_fill(hidden, 0.0).to(kind)
        for term in call.indexed:
            _check_places(term, pairs)
            scores = scores + term.dense().to(kind)
        scores, pairs = _with_extra(call, by_group, scores, pairs)
        keys = scores.shape[-1] - (call.sinks is not None)
        counts = None
        if call.normaliser.needs_counts:
            counts = torch.full((1, 1, n), keys, device=device) if pairs is None else _row_sums(pairs, keys)
        # a maximum over no keys at all does not exist; there is nothing to normalise
        width = scores.shape[-1]
        columns = torch.arange(width, device=device)
        weights = call.normaliser.weigh(scores, pairs, counts, columns) if width else scores
        dropped = weights[..., :keys]
        if call.dropout_p and call.seed is not None:
            kept = keep(call.seed, call.dropout_p, b, h, i, j)
            if keys > m:
                more = keep(call.seed + 1, call.dropout_p, b, h, i, torch.arange(keys - m, device=device))
                kept = torch.cat((kept, more), -1)
            dropped = (dropped * kept) / (1 - call.dropout_p)
        dropped = dropped.reshape(batch, groups, heads // groups, n, keys)
        values = v if call.extra_v is None else torch.cat((v, call.extra_v), 2)
        out = (dropped @ values.to(kind)[:, :, None]).reshape(batch, heads, n, v.shape[-1]).to(q.dtype)
        lse = _log_sum_exp(scores, pairs) if call.return_lse else None
    return Attended(out, lse, weights[..., :m].to(q.dtype) if call.return_weights else None)


def _check_places(term: Indexed, pairs: Tensor | None) -> None:
    if torch.compiler.is_compiling() or term.table.is_meta or torch._C._are_functorch_transforms_active():
        return
    places = term.places()
    outside = (places < 0) | (places >= term.table.shape[3])
    if bool((outside if pairs is None else outside & pairs).any()):
        raise OptionError(
            f"an indexed bias looks outside its table of {term.table.shape[3]} entries for a pair that may meet: "
            "key_index[j] - query_index[i] must be one of them"
        )


def _with_extra(call: Call, q: Tensor, scores: Tensor, pairs: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scores and mask with the columns of the extra keys, then that of the sinks."""
    batch, heads, n, m = scores.shape
    columns = [scores]
    if call.extra_k is not None:
        more = q @ call.extra_k.to(q.dtype)[:, :, None].transpose(-1, -2)
        columns.append(more.reshape(batch, heads, n, -1))
    if call.sinks is not None:
        columns.append(call.sinks.to(scores.dtype)[..., None].expand(batch, heads, n, 1))
    if len(columns) == 1:
        return scores, pairs
    whole = torch.cat(columns, -1)
    if pairs is not None:
        pairs = pairs.expand(*pairs.shape[:-1], m)
        pairs = torch.cat((pairs, pairs.new_ones(*pairs.shape[:-1], whole.shape[-1] - m)), -1)
    if call.sinks is not None:
        # a sink of -inf is none
        real = ~torch.isneginf(whole[..., -1:])
        rest = whole[..., :-1].new_ones((), dtype=torch.bool).expand(batch, heads, n, whole.shape[-1] - 1)
        sink = torch.cat((rest, real), -1)
        pairs = sink if pairs is None else pairs & sink
    return whole, pairs


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


IMPLEMENTATIONS = (
    Implementation("dense:sdpa", _not_fused, _run_sdpa),
    Implementation("dense:reference", _not_explicit, run_explicit),
)
