"""Combiner: every token attended, near ones directly, far ones through the conditional expectation of their span.

    out_i = sum over direct j of p(j|i) v_j + sum over spans S of p(S|i) e_S,   one softmax over [direct | spans]
    score of a span: q_i . pool(k_j, j in S);   e_S = softmax(pool(q_j) . k_j over j in S) v_j

Spans divide what is not direct, so the weights p(S|i) p(j|S) of all tokens sum to 1.
Departs from the paper: none; the variant whose spans are rows with learned summaries is not built.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.errors import OptionError, ShapeError, Unsupported
from regard.contract.operator import operator
from regard.engines.dense import dense
from regard.patterns import Causal
from regard.primitives.merge import merge

CARD = OpCard(
    slug="combiner",
    title="Combiner",
    paper="Combiner: Full Attention Transformer with Sparse Computation Cost",
    exports=("combiner_attention",),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=11 m=11 d=8 e=6",
    attends=("self", "causal_self"),
    accepts=("scale",),
    time="n n^1/2 d",
    memory="n n^1/2",
    engines=("dense",),
)

Pool = Literal["max", "mean"]
Parts = list[tuple[Tensor, Tensor]]
VARIANTS = ("fixed", "log", "axial_vertical", "axial_horizontal", "axial_mixture")


@operator(CARD)
def combiner_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    variant: Literal["fixed", "log", "axial_vertical", "axial_horizontal", "axial_mixture"] = "fixed",
    segment: int | None = None,
    shape: tuple[int, int] | None = None,
    pool: Pool = "max",
    official: bool = False,
    is_causal: bool = False,
    scale: float | None = None,
    engine: str | None = None,
) -> Tensor:
    """Attention to all tokens through spans (sections 4 and 5).

    variant: "fixed": spans are the other segments (causal: the earlier ones). "log": spans of 2^l tokens, one for each
    bit of the position. "axial_*" on a grid: own row and column directly; spans are the other columns ("vertical"), the
    parts of the rows above on both sides ("horizontal"), or both at once ("mixture": no partition, each far token is
    reached by two spans). segment: tokens, in [1, N], of "fixed"; the root of N, rounded up, if None. shape: rows and
    columns of "axial_*". pool: how keys, and queries, of a span become one. official: the own segment is a span too, so
    that own tokens count twice (two-sided "fixed", as released). scale: D^-1/2 if None.
    Raises OptionError, ShapeError; Unsupported for a two-sided "log" or "axial_*".
    """
    n = q.shape[2]
    if k.shape[2] != n:
        raise ShapeError(f"combiner mixes a sequence with itself; there are {n} queries and {k.shape[2]} keys")
    if variant not in VARIANTS:
        raise OptionError(f"the variant is {variant!r}; it is one of {', '.join(VARIANTS)}")
    if pool not in ("max", "mean"):
        raise OptionError(f"pool is {pool!r}; it is 'max' or 'mean'")
    if variant != "fixed" and not is_causal:
        raise Unsupported(f"the variant {variant!r} is causal only: pass is_causal=True; 'fixed' works both ways")
    if segment is not None and variant != "fixed":
        raise OptionError(f"segment= is for the variant 'fixed', not for {variant!r}")
    if official and (variant != "fixed" or is_causal):
        raise OptionError("official= is for the variant 'fixed' with is_causal=False")
    if (shape is not None) is not variant.startswith("axial"):
        raise OptionError(
            f"the variants 'axial_*' need shape=(rows, columns), others have none; got {variant!r}, {shape}"
        )
    if variant == "fixed":
        size = math.isqrt(max(n - 1, 0)) + 1 if segment is None else segment
        if not 1 <= size <= n:
            raise OptionError(f"segments of {size} tokens do not fit {n} tokens; a segment has 1 to {n}")
        if is_causal:
            return causal_segments(q, k, v, None, segment=size, pool=pool, scale=scale, engine=engine)[0]
        return _two_sided(q, k, v, size, pool, official, scale, engine)
    if variant == "log":
        return _log_sparse(q, k, v, pool, scale, engine)
    assert shape is not None
    if shape[0] * shape[1] != n:
        raise ShapeError(f"a grid of {shape[0]} rows and {shape[1]} columns does not have {n} tokens")
    return _axial(q, k, v, shape, variant, pool, scale, engine)


def causal_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    earlier: tuple[Tensor, Tensor] | None,
    *,
    segment: int,
    pool: Pool = "max",
    rows: int | None = None,
    scale: float | None = None,
    engine: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The causal variant "fixed" from the start of a segment on: (out of the last `rows` tokens, all spans).

    earlier: keys (B, H, P, D) and values (B, H, P, E) of the spans before; the spans that are given back have those of
    every segment that is complete now behind them.
    """
    n = q.shape[2]
    rows = n if rows is None else rows
    own_k, own_v = _spans(q, k, v, segment, pool, scale, engine)
    before = 0 if earlier is None else earlier[0].shape[2]
    if earlier is not None:
        own_k, own_v = torch.cat((earlier[0], own_k), 2), torch.cat((earlier[1], own_v), 2)
    late = q[:, :, n - rows :]
    if n <= segment and not before:
        return dense(late, k, v, Causal(), q_offset=n - rows, scale=scale, engine=engine).out, (own_k, own_v)
    if n <= segment:
        near = _attend(late, k, v, Causal(), None, scale, engine, n - rows)
    else:
        inside = _along_rows(*_each(lambda x: _pad(x, segment), q, k, v), Causal(), None, scale, engine)
        near = inside[0].flatten(2, 3)[:, :, n - rows : n], inside[1].flatten(2, 3)[:, :, n - rows : n]
    own = before + torch.arange(n - rows, n, device=q.device) // segment
    seen = torch.arange(own_k.shape[2], device=q.device) < own[:, None]
    far = _attend(late, own_k, own_v, None, seen, scale, engine)
    return _together([near, far]), (own_k, own_v)


def _two_sided(
    q: Tensor, k: Tensor, v: Tensor, size: int, pool: Pool, official: bool, scale: float | None, engine: str | None
) -> Tensor:
    n = q.shape[2]
    whole = n // size * size
    span_k, span_v = _spans(q, k, v, size, pool, scale, engine)
    if whole < n:
        last_k, last_v = _spans(*_each(lambda x: x[:, :, whole:], q, k, v), n - whole, pool, scale, engine)
        span_k, span_v = torch.cat((span_k, last_k), 2), torch.cat((span_v, last_v), 2)
    padded = _each(lambda x: _pad(x, size), q, k, v)
    real = (torch.arange(padded[0].shape[2] * size, device=q.device) < n).view(-1, 1, 1, size)
    inside = _along_rows(*padded, None, real, scale, engine)
    own = torch.arange(n, device=q.device)[:, None] // size
    seen = None if official else torch.arange(span_k.shape[2], device=q.device) != own
    far = _attend(q, span_k, span_v, None, seen, scale, engine)
    return _together([(inside[0].flatten(2, 3)[:, :, :n], inside[1].flatten(2, 3)[:, :, :n]), far])


def _log_sparse(q: Tensor, k: Tensor, v: Tensor, pool: Pool, scale: float | None, engine: str | None) -> Tensor:
    batch, heads, n, _ = q.shape
    i = torch.arange(n, device=q.device)
    keys, values = [_repeat(k, heads)], [_repeat(v, heads)]
    seen = [torch.ones(n, dtype=torch.bool, device=q.device)]
    for level in range((n - 1).bit_length()):
        span_k, span_v = _spans(q, k, v, 1 << level, pool, scale, engine)
        # a position whose bit is set sees the block that ends where its own begins
        index = ((i >> level) - 1).clamp(min=0)
        keys.append(span_k[:, :, index])
        values.append(span_v[:, :, index])
        seen.append((i >> level) % 2 == 1)
    mask = torch.stack(seen, -1).repeat(batch, 1)[:, None, None]
    folded_k, folded_v = _fold(torch.stack(keys, 3)), _fold(torch.stack(values, 3))
    out = dense(_fold(q[:, :, :, None]), folded_k, folded_v, mask=mask, scale=scale, engine=engine).out
    return _unfold(out, batch).flatten(2, 3)


def _axial(
    q: Tensor, k: Tensor, v: Tensor, shape: tuple[int, int], variant: str, pool: Pool, scale: float | None,
    engine: str | None,
) -> Tensor:  # fmt: skip
    grids = _each(lambda x: x.unflatten(2, shape), q, k, v)
    parts = [
        _along_rows(*grids, Causal(), None, scale, engine),
        _along_columns(*grids, Causal(True), None, scale, engine),
    ]
    if variant != "axial_horizontal":
        parts.append(_other_columns(*grids, pool, scale, engine))
    if variant != "axial_vertical":
        parts.append(_left_parts(*grids, pool, scale, engine))
        out, lse = _left_parts(*_each(lambda x: x.flip(3), *grids), pool, scale, engine)
        parts.append((out.flip(3), lse.flip(3)))
    return _together(parts).flatten(2, 3)


def _other_columns(
    q: Tensor, k: Tensor, v: Tensor, pool: Pool, scale: float | None, engine: str | None
) -> tuple[Tensor, Tensor]:
    # of every other column, the rows above are one span
    rows, columns = q.shape[2:4]
    span_v, _ = _along_columns(_before(q, 2, pool), k, v, Causal(True), None, scale, engine)
    other = ~torch.eye(columns, dtype=torch.bool, device=q.device).expand(rows, 1, -1, -1)
    other = other & (torch.arange(rows, device=q.device) > 0)[:, None, None, None]
    return _along_rows(q, _repeat(_before(k, 2, pool), q.shape[1]), span_v, None, other, scale, engine)


def _left_parts(
    q: Tensor, k: Tensor, v: Tensor, pool: Pool, scale: float | None, engine: str | None
) -> tuple[Tensor, Tensor]:
    # of every row above, the columns before the own one are one span
    rows, columns = q.shape[2:4]
    span_v, _ = _along_rows(_before(q, 3, pool), k, v, Causal(True), None, scale, engine)
    above = Causal(True).dense(rows, rows, device=q.device).expand(columns, -1, -1, -1)
    above = above & (torch.arange(columns, device=q.device) > 0)[:, None, None, None]
    return _along_columns(q, _repeat(_before(k, 3, pool), q.shape[1]), span_v, None, above, scale, engine)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, pattern: Causal | None, mask: Tensor | None, scale: float | None,
    engine: str | None, q_offset: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    found = dense(q, k, v, pattern, mask=mask, scale=scale, q_offset=q_offset, return_lse=True, engine=engine)
    assert found.lse is not None
    return found.out, found.lse


def _along_rows(
    q: Tensor, k: Tensor, v: Tensor, pattern: Causal | None, mask: Tensor | None, scale: float | None,
    engine: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention inside every row of a grid (B, H, R, C, D): (out, log-sum-exp)."""
    mask = None if mask is None else mask.repeat(q.shape[0], 1, 1, 1)
    out, lse = _attend(_fold(q), _fold(k), _fold(v), pattern, mask, scale, engine)
    return _unfold(out, q.shape[0]), _unfold(lse, q.shape[0])


def _along_columns(
    q: Tensor, k: Tensor, v: Tensor, pattern: Causal | None, mask: Tensor | None, scale: float | None,
    engine: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = _along_rows(*_each(lambda x: x.transpose(2, 3), q, k, v), pattern, mask, scale, engine)
    return out.transpose(2, 3), lse.transpose(2, 3)


def _spans(
    q: Tensor, k: Tensor, v: Tensor, size: int, pool: Pool, scale: float | None, engine: str | None
) -> tuple[Tensor, Tensor]:
    """Keys (B, H, P, D) and values (B, H, P, E) of the P complete spans of `size` tokens."""
    count = q.shape[2] // size
    q, k, v = (x[:, :, : count * size].unflatten(2, (count, size)) for x in (q, k, v))
    keys = _repeat(_pool(k, pool), q.shape[1])
    if not count:
        return keys, v.new_zeros(*keys.shape[:3], v.shape[-1])
    values = dense(_fold(_pool(q, pool)[:, :, :, None]), _fold(k), _fold(v), scale=scale, engine=engine).out
    return keys, _unfold(values, q.shape[0]).flatten(2, 3)


def _each(change: Callable[[Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return change(q), change(k), change(v)


def _pool(x: Tensor, pool: Pool) -> Tensor:
    return x.amax(3) if pool == "max" else x.mean(3)


def _before(x: Tensor, axis: int, pool: Pool) -> Tensor:
    """What is pooled over all places before each one; 0 at the first, where there are none."""
    n = x.shape[axis]
    earlier = x.narrow(axis, 0, n - 1)
    if pool == "max":
        running = torch.cummax(earlier, axis).values if n > 1 else earlier
    else:
        counts = torch.arange(1, n, device=x.device, dtype=x.dtype)
        running = earlier.cumsum(axis) / counts.view(-1, *(1,) * (x.dim() - 1 - axis))
    return torch.cat((torch.zeros_like(x.narrow(axis, 0, 1)), running), axis)


def _repeat(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _pad(x: Tensor, size: int) -> Tensor:
    """(B, H, N, D) -> (B, H, segments, size, D), zeros behind the end."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size))


def _fold(x: Tensor) -> Tensor:
    """(B, H, P, …) -> (B P, H, …)."""
    return x.transpose(1, 2).flatten(0, 1)


def _unfold(x: Tensor, batch: int) -> Tensor:
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def _together(parts: Parts) -> Tensor:
    return merge([out for out, _ in parts], [lse for _, lse in parts])[0]
