"""Attention of every query to a list of keys of its own, gathered some queries at a time.

    keys of row i = (listed | force) & within ;  s, weights, out as in `block_sparse`, over these keys

For keys that lie scattered; where they come in blocks of 16 or more, `block_sparse` on the same selection is faster. The
keys that are forced are worked on by `block_sparse`, the listed others are gathered, and the two are merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from regard.contract.dispatch import Implementation, choose
from regard.contract.errors import OptionError
from regard.contract.shapes import bind, check_types, parse
from regard.engines import block_ops
from regard.engines.block_sparse import IMPLEMENTATIONS as BLOCKS
from regard.engines.block_sparse import adds_up, check_pattern, four_axes, lower, no_reference, run_reference
from regard.engines.dense import Attended, Call, prepare, refuse_nan
from regard.patterns.selection import TokenSelection
from regard.primitives.biases import Indexed
from regard.primitives.merge import merge
from regard.primitives.normalisers import Normaliser, Softmax

_SPEC = parse("q: b h n d, k: b g m d, v: b g m e -> b h n e")


def gather(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: TokenSelection,
    *,
    bias: Tensor | None = None,
    indexed: Sequence[Indexed] = (),
    scale: float | None = None,
    q_offset: int = 0,
    normaliser: Normaliser | None = None,
    sinks: Tensor | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    engine: str | None = None,
) -> Attended:
    """Attend to the keys of a token selection; its bias is added to the scores of the listed keys, with gradient.

    q (B, H, N, D), k (B, G, M, D), v (B, G, M, E), H a multiple of G. The options are those of `block_sparse`.
    Memory beyond the inputs is bounded by a budget. Raises ShapeError, OptionError; Unsupported with reasons.
    """
    if not isinstance(selection, TokenSelection):
        raise OptionError(f"gather takes a TokenSelection, not a {type(selection).__name__}; block_sparse takes others")
    bind(_SPEC, (q, k, v), "gather")
    check_types((q, k, v), ("q", "k", "v"), "gather")
    call = prepare(
        q, k, v, selection, bias=bias, indexed=indexed, scale=scale, q_offset=q_offset, normaliser=normaliser,
        sinks=sinks, extra_k=extra_k, extra_v=extra_v, dropout_p=dropout_p, seed=seed, return_lse=return_lse,
    )  # fmt: skip
    return choose(IMPLEMENTATIONS, engine, call).run(call)


def _no_rows(call: Call) -> list[str]:
    check_pattern(call)
    reasons = []
    if type(call.normaliser) not in block_ops.NORMALISERS:
        reasons.append(f"the normaliser {type(call.normaliser).__name__} is unknown to gather")
    if (call.pattern.force is not None or call.extra_k is not None) and not adds_up(call.normaliser):
        reasons.append(f"{type(call.normaliser).__name__} does not add up over two sets of keys")
    if call.pattern.force is not None and call.pattern.bias is not None:
        reasons.append("the selection has a bias for some of the keys that are forced")
    if call.return_lse and type(call.normaliser) is not Softmax:
        reasons.append(f"{type(call.normaliser).__name__} has no log-sum-exp")
    return reasons


def _run_rows(call: Call) -> Attended:
    selection = call.pattern
    if 0 in (*call.q.shape, call.k.shape[2], call.v.shape[3]):
        return run_reference(call)
    refuse_nan(call.bias)
    q, k, v = lower(call)
    parcel = block_ops.pack(
        "gather", selection, bias=four_axes(call.bias), indexed=call.indexed, sinks=call.sinks,
        normaliser=call.normaliser, scale=call.scale, q_offset=call.q_offset, dropout_p=call.dropout_p, seed=call.seed,
    )  # fmt: skip
    out, lse = block_ops.attend(q, k, v, parcel)
    others = []
    if selection.force is not None:
        pattern = selection.force if selection.within is None else selection.force & selection.within
        others.append(replace(call, pattern=pattern, sinks=None, extra_k=None, extra_v=None, return_lse=True))
    if call.extra_k is not None and call.extra_v is not None:
        others.append(
            replace(
                call,
                k=call.extra_k,
                v=call.extra_v,
                pattern=None,
                bias=None,
                indexed=(),
                sinks=None,
                extra_k=None,
                extra_v=None,
                seed=None if call.seed is None else call.seed + 1,
                return_lse=True,
            )
        )
    softmax = type(call.normaliser) is Softmax
    for other in others:
        other = replace(other, return_lse=softmax)
        more = choose(BLOCKS, None, other).run(other)
        if softmax and more.lse is not None:
            out, lse = merge((out, more.out.to(out.dtype)), (lse, more.lse))
        else:
            out = out + more.out
    return Attended(out, lse if call.return_lse else None)


IMPLEMENTATIONS = (
    Implementation("gather:torch", _no_rows, _run_rows),
    Implementation("gather:reference", no_reference, run_reference),
)
