"""Attention over the tiles of a block layout: time and memory follow the pairs that may meet, not N x M.

    s = scale q k' ; s = s + bias + each indexed bias ; masked ; weights = normaliser(s) ; dropped ; out = weights v

Implementations, best first: the native kernels (CPU), FlexAttention (CUDA), plain torch over key blocks with a
backward pass of its own, and the definition: the dense mask through the dense engine. Accumulated in float32 (float64
stays).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from regard.contract.dispatch import Implementation, choose
from regard.contract.errors import OptionError, ShapeError
from regard.contract.shapes import bind, check_types, parse
from regard.engines import block_ops, flex, groups, native_blocks
from regard.engines.dense import Attended, Call, ScoreMod, prepare, refuse_nan, run_explicit
from regard.engines.triton import blocks as triton_blocks
from regard.patterns import Bound, Causal, Explicit, Full, Pattern
from regard.patterns.layout import BlockLayout
from regard.patterns.selection import BlockSelection, Permuted, TokenSelection
from regard.primitives.biases import Indexed
from regard.primitives.merge import merge
from regard.primitives.normalisers import Normaliser, Softmax

AnyPattern: TypeAlias = Pattern | Bound | BlockLayout | BlockSelection | TokenSelection | Permuted
MASK = "mask of the call"
_SPEC = parse("q: b h n d, k: b g m d, v: b g m e -> b h n e")


def block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: AnyPattern | None = None,
    *,
    bias: Tensor | None = None,
    indexed: Sequence[Indexed] = (),
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
    engine: str | None = None,
) -> Attended:
    """Attend to the pairs of a pattern, of a layout or of a router's selection; see the module for the order.

    q (B, H, N, D), k (B, G, M, D), v (B, G, M, E), H a multiple of G. pattern: all pairs if None; a layout carries its
    own q_offset. bias: broadcastable to (B, H, N, M) and never spread, with gradient; -inf hides, and in the native
    kernels so does anything below -1e20. indexed: biases read from tables. scale: D^-1/2 if None. q_offset: position
    of the first query. sinks: (B|1, H|1, N|1), the logit of a key without value, for softmax. extra_k (B, G, X, D),
    extra_v (B, G, X, E): keys that every query sees, in the same normalisation; no bias reaches them. dropout_p: share
    of the weights that is dropped, by seed (drawn from torch's generator if None), batch row, head and positions
    alone. lse (B, H, N), float32 (float64 for float64), with gradient: the log-sum-exp of the softmax scores, extra
    keys and sinks included, -inf for a row of nothing.
    First derivatives only; `engine="reference"` has all. Raises ShapeError, OptionError; Unsupported with reasons.
    """
    tensors = (q, k, v)
    bind(_SPEC, tensors, "block_sparse")
    check_types(tensors, ("q", "k", "v"), "block_sparse")
    call = prepare(
        q, k, v, pattern, bias=bias, indexed=indexed, scale=scale, q_offset=q_offset, normaliser=normaliser,
        score_mod=score_mod, sinks=sinks, extra_k=extra_k, extra_v=extra_v, dropout_p=dropout_p, seed=seed,
        return_lse=return_lse,
    )  # fmt: skip
    return choose(IMPLEMENTATIONS, engine, call).run(call)


def check_pattern(call: Call) -> None:
    """Raise ShapeError or OptionError if a layout or a selection does not fit the call."""
    pattern, (batch, heads, n, _), m = call.pattern, call.q.shape, call.k.shape[2]
    if n >= 2**31 or m >= 2**31:
        raise ShapeError(f"{n} queries and {m} keys: positions in a layout are int32, below 2^31; split the call")
    if isinstance(pattern, BlockLayout):
        if (pattern.n, pattern.m) != (n, m):
            raise ShapeError(
                f"the layout is for {pattern.n} queries and {pattern.m} keys, q and k have {n} and {m}: lay the "
                "pattern out for these"
            )
        if call.q_offset not in (0, pattern.q_offset):
            raise OptionError(f"the layout is for q_offset={pattern.q_offset}, but q_offset={call.q_offset} was given")
        _check_extent("layout", (pattern.crow.shape[0], pattern.crow.shape[1]), batch, heads)
    elif isinstance(pattern, BlockSelection | TokenSelection):
        indices = pattern.indices
        rows = n if isinstance(pattern, TokenSelection) else -(-n // pattern.block_q)
        if indices.shape[2] != rows:
            raise ShapeError(
                f"the indices of the selection are {tuple(indices.shape)}; they must be (B, H, {rows}, K) for {n} "
                "queries"
            )
        _check_extent("selection", (indices.shape[0], _as_queries(indices.shape[1], heads)), batch, heads)
    elif isinstance(pattern, Pattern | Bound):
        value, data = (pattern.pattern, pattern.data) if isinstance(pattern, Bound) else (pattern, {})
        value.check(n, m, call.q_offset, data)
        rows, slabs = value.extent(data)
        _check_extent(f"data of the pattern {value}", (rows, value.heads or slabs), batch, heads)
    elif isinstance(pattern, Permuted):
        shape = pattern.q_index.shape
        _check_extent("selection", (shape[0], _as_queries(shape[1], heads)), batch, heads)


def _as_queries(selected: int, heads: int) -> int:
    # heads that share keys may share their selection
    return heads if selected and heads % selected == 0 else selected


def _check_extent(what: str, sizes: tuple[int, int], batch: int, heads: int) -> None:
    if sizes[0] not in (1, batch) or sizes[1] not in (1, heads):
        raise ShapeError(f"the {what} is for batch {sizes[0]} and {sizes[1]} heads; q has {batch} and {heads}")


def no_blocks(call: Call) -> list[str]:
    """Why no way over tiles can run a call."""
    check_pattern(call)
    if isinstance(call.pattern, Permuted):
        return ["a Permuted selection is worked on group by group: block_sparse:groups"]
    reasons = []
    if call.score_mod is not None:
        reasons.append("a score_mod is a Python function; biases and indexed biases travel into the blocks")
    if call.return_weights:
        reasons.append("the weights are asked for; readout gives parts of them")
    if type(call.normaliser) not in block_ops.NORMALISERS:
        reasons.append(f"the normaliser {type(call.normaliser).__name__} is unknown to the blocks")
    if call.mask is not None and (call.q_offset or not isinstance(call.pattern, Pattern | Bound | None)):
        reasons.append("a mask goes with a pattern that begins at position 0")
    if call.extra_k is not None and not adds_up(call.normaliser):
        reasons.append(f"{type(call.normaliser).__name__} does not add up over two sets of keys")
    if isinstance(call.pattern, BlockSelection) and call.pattern.weights is not None:
        reasons.append("the selection has weights")
    if isinstance(call.pattern, TokenSelection) and call.pattern.bias is not None:
        reasons.append("the selection has a bias; gather takes it")
    if call.return_lse and type(call.normaliser) is not Softmax:
        reasons.append(f"{type(call.normaliser).__name__} has no log-sum-exp")
    return reasons


def adds_up(normaliser: Normaliser) -> bool:
    """Whether the result over two sets of keys follows from the results over each."""
    return type(normaliser) is Softmax or (normaliser.kind == "additive" and not normaliser.needs_counts)


def _run_blocks(way: str) -> Callable[[Call], Attended]:
    def run(call: Call) -> Attended:
        if 0 in (*call.q.shape, call.k.shape[2], call.v.shape[3]):
            return run_reference(call)
        if way != "native":
            refuse_nan(call.bias)
        q, k, v = lower(call)
        pattern = _whole_pattern(call)
        q_offset = pattern.q_offset if isinstance(pattern, BlockLayout) else call.q_offset
        parcel = block_ops.pack(
            way, pattern, bias=four_axes(call.bias), indexed=call.indexed, sinks=call.sinks,
            normaliser=call.normaliser, scale=call.scale, q_offset=q_offset, dropout_p=call.dropout_p, seed=call.seed,
        )  # fmt: skip
        out, lse = block_ops.attend(q, k, v, parcel)
        if call.extra_k is not None and call.extra_v is not None:
            # other random words than those of the keys inside
            seed = None if call.seed is None else call.seed + 1
            parcel = block_ops.pack(
                way, Full(), bias=None, indexed=(), sinks=None, normaliser=call.normaliser, scale=call.scale,
                q_offset=q_offset, dropout_p=call.dropout_p, seed=seed,
            )  # fmt: skip
            more, more_lse = block_ops.attend(q, call.extra_k.to(q.dtype), call.extra_v.to(q.dtype), parcel)
            if type(call.normaliser) is Softmax:
                out, lse = merge((out, more), (lse, more_lse))
            else:
                out = out + more
        return Attended(out, lse if call.return_lse else None)

    return run


def lower(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as autocast wants them; float64 stays."""
    q, k, v = call.q, call.k, call.v
    if q.device.type == "meta" or not torch.is_autocast_enabled(q.device.type) or q.dtype == torch.float64:
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _whole_pattern(call: Call) -> Any:
    """The pattern, the mask and is_causal as one."""
    pattern = call.pattern
    if pattern is None:
        pattern = Causal() if call.is_causal else Full()
    if call.mask is not None:
        mask = call.mask[(None,) * (4 - call.mask.dim())]
        shape = (mask.shape[0], mask.shape[1], call.q.shape[2], call.k.shape[2])
        pattern = pattern & Explicit(MASK).bind(**{MASK: mask.expand(shape)})
    return pattern


def four_axes(bias: Tensor | None) -> Tensor | None:
    """With axes of size 1 in front."""
    return None if bias is None else bias[(None,) * (4 - bias.dim())]


def run_reference(call: Call) -> Attended:
    """The dense mask of whatever the pattern is, through the definition."""
    if isinstance(call.pattern, Permuted):
        return groups.attend(call, run_explicit)
    return run_explicit(with_mask(call))


def with_mask(call: Call) -> Call:
    """The call with a mask (and a bias) in place of a layout or a selection."""
    pattern, bias = call.pattern, call.bias
    n, m, heads = call.q.shape[2], call.k.shape[2], call.q.shape[1]
    if isinstance(pattern, BlockLayout):
        return replace(call, pattern=None, mask=pattern.dense(), q_offset=pattern.q_offset)
    if isinstance(pattern, BlockSelection | TokenSelection):
        mask = pattern.dense(n, m, q_offset=call.q_offset, heads=heads)
        if isinstance(pattern, TokenSelection) and pattern.bias is not None:
            listed = _spread(pattern, heads, m)
            bias = listed if bias is None else bias + listed
        return replace(call, pattern=None, mask=mask, bias=bias)
    return call


def lay_out(call: Call, block: tuple[int, int] | None) -> BlockLayout:
    """The layout of a call; block None takes what comes cheapest. Raises OptionError for a layout of other blocks."""
    pattern, n, m = _whole_pattern(call), call.q.shape[2], call.k.shape[2]
    if isinstance(pattern, BlockLayout):
        if block not in (None, (pattern.block_q, pattern.block_k)):
            raise OptionError(
                f"the layout has blocks of {pattern.block_q} x {pattern.block_k}, {block[0]} x {block[1]} are asked "
                "for: give the pattern itself"
            )
        return pattern
    block = block or (64, 64)
    if isinstance(pattern, BlockSelection | TokenSelection):
        return pattern.to_layout(n, m, block=block, q_offset=call.q_offset, heads=call.q.shape[1])
    return pattern.layout(n, m, block=block, q_offset=call.q_offset, device=call.q.device)


def _spread(selection: TokenSelection, heads: int, m: int) -> Tensor:
    """The bias of the listed keys over all pairs (B|1, H|1, N, M)."""
    indices, bias = selection.indices.long(), selection.bias
    if bias is None:
        raise OptionError("the selection has no bias")
    empty = indices < 0
    # empty slots write behind the end
    spread = bias.new_zeros(*indices.shape[:3], m + 1)
    spread = spread.scatter(3, indices.masked_fill(empty, m), bias.masked_fill(empty, 0.0))
    return _over_heads(spread[..., :m], heads)


def _over_heads(x: Tensor, heads: int) -> Tensor:
    # heads that share keys share their selection
    return x if x.shape[1] in (1, heads) else x.repeat_interleave(heads // x.shape[1], 1)


def no_reference(call: Call) -> list[str]:
    """Why the definition cannot run a call."""
    check_pattern(call)
    reasons = []
    if call.return_lse and type(call.normaliser) is not Softmax:
        reasons.append(f"{type(call.normaliser).__name__} has no log-sum-exp")
    if isinstance(call.pattern, Permuted):
        return reasons + groups.cannot(call)
    if isinstance(call.pattern, BlockSelection) and call.pattern.weights is not None:
        reasons.append("the selection has weights")
    if not isinstance(call.pattern, Pattern | Bound | None) and call.mask is not None:
        reasons.append("a mask goes with a pattern, not with a selection")
    return reasons


def _no_native(call: Call) -> list[str]:
    return no_blocks(call) + native_blocks.cannot(call)


def _no_triton(call: Call) -> list[str]:
    return no_blocks(call) + triton_blocks.cannot(call)


IMPLEMENTATIONS = (
    Implementation("block_sparse:native", _no_native, _run_blocks("native")),
    Implementation("block_sparse:flex", flex.cannot, flex.run),
    Implementation("block_sparse:torch", no_blocks, _run_blocks("torch")),
    # never measured on a GPU: by name only, behind what runs everything that it runs
    Implementation("block_sparse:triton", _no_triton, _run_blocks("triton")),
    Implementation("block_sparse:groups", groups.cannot, groups.run),
    Implementation("block_sparse:reference", no_reference, run_reference),
)
