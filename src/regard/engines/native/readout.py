"""Numbers about the weights of attention on the CPU, read in tiles from q, k and the log-sum-exp: no table is made."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard.contract.errors import OptionError, ShapeError
from regard.engines import native
from regard.engines.native.abi import Reading
from regard.engines.native.block_sparse import TILE, _Call
from regard.primitives.normalisers import L1, Normaliser, Softmax

WHAT = ("rows", "heads", "column_sum", "entropy", "sink_mass", "block_max", "block_sum", "top_k")


def readout(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    layout: Any,
    what: str,
    *,
    rows: Sequence[int] | Tensor | None = None,
    heads: Sequence[int] | Tensor | None = None,
    first: int = 1,
    top: int = 1,
    scale: float | None = None,
    bias: Tensor | None = None,
    indexed: Sequence[Any] = (),
    normaliser: Normaliser | None = None,
    isa: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """What is asked for, float32, for the query heads in `heads` (all if None), H' of them. No gradient.

    "rows": the weights of the rows in `rows`, (B, H', R, M). "heads": of all rows, (B, H', N, M). "column_sum": over
    the queries, (B, H', M). "entropy": of each row in nats, (B, H', N); Softmax and L1 only. "sink_mass": on the first
    `first` keys, (B, H', N). "block_max", "block_sum": over blocks of 64 x 64, (B, H', nQ, nK), 0 where nothing may
    meet. "top_k": (weights, keys int64), both (B, H', N, top), in falling order, key -1 where a row has fewer.
    lse: what `block_sparse.forward` kept of each row; the other arguments are those of the forward call.
    Raises OptionError, ShapeError, Unsupported.
    """
    if what not in WHAT:
        raise OptionError(f"readout knows no {what!r}; it knows {', '.join(WHAT)}")
    if (what == "rows") != (rows is not None):
        raise OptionError('rows= goes with what="rows"')
    if what == "entropy" and not isinstance(normaliser or Softmax(), (Softmax, L1)):
        raise OptionError(f"the weights of {type(normaliser).__name__} are no distribution: they have no entropy")
    if what == "top_k" and top < 1:
        raise OptionError(f"top_k needs top >= 1, not {top}")
    call = _Call(q, k, k, layout, scale, bias, indexed, normaliser, None, (0.0, 0), isa)
    batch, heads_in_all, n, _ = q.shape
    m = k.shape[2]
    if call.has_statistic and (lse is None or lse.shape != q.shape[:3]):
        raise ShapeError(
            f"lse is {None if lse is None else tuple(lse.shape)}; {type(call.normaliser).__name__} needs what "
            f"the forward pass kept of each row, {tuple(q.shape[:3])}"
        )
    chosen = _chosen("heads", range(heads_in_all) if heads is None else heads, heads_in_all)
    picked = _chosen("rows", () if rows is None else rows, n)
    count = chosen.shape[0]
    blocks = (-(-n // TILE), -(-m // TILE))
    shape = {
        "rows": (picked.shape[0], m),
        "heads": (n, m),
        "column_sum": (m,),
        "entropy": (n,),
        "sink_mass": (n,),
        "block_max": blocks,
        "block_sum": blocks,
        "top_k": (n, top),
    }[what]
    out = torch.zeros(batch, count, *shape)
    index = torch.full((batch, count, *shape), -1) if what == "top_k" else None
    if out.numel() and m:
        kept = lse.float().contiguous() if lse is not None and call.has_statistic else None
        # by query blocks; a row asked for twice is written twice
        order = picked.argsort(stable=True)
        row = picked[order]
        start = torch.searchsorted(row, torch.arange(blocks[0] + 1) * TILE).int()
        within, to = (row % TILE).int(), order.int()
        reading = Reading(
            problem=call.problem(out, kept), what=WHAT.index(what), head_count=count, row_count=picked.shape[0],
            top=top, first=first, out=out.data_ptr(), heads=chosen.data_ptr(), row_start=start.data_ptr(),
            row=within.data_ptr(), row_to=to.data_ptr(), index=None if index is None else index.data_ptr(),
        )  # fmt: skip
        native.check(native.library().regard_readout(ctypes.byref(reading)))
    return out if index is None else (out, index)


def _chosen(name: str, picked: Any, count: int) -> Tensor:
    x = torch.as_tensor(list(picked) if not isinstance(picked, Tensor) else picked, dtype=torch.int64).reshape(-1)
    if x.numel() and (int(x.min()) < -count or int(x.max()) >= count):
        raise OptionError(f"{name} are {x.tolist()}; there are {count}")
    x = torch.where(x < 0, x + count, x)
    return x.int() if name == "heads" else x
