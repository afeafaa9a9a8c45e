"""Parts and sums of the attention weights in tiles, from q, k and the saved log-sum-exp; never an N x M table.

    w_ij = exp(s_ij - lse_i) over the pairs that may meet (or the weights of another normaliser)

Memory beyond the result grows with N. Weights are float32 (float64 for float64), before dropout, without gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract.dispatch import Implementation, choose
from regard.contract.errors import OptionError, ShapeError, Unsupported, near
from regard.contract.shapes import bind, check_types, parse
from regard.engines import native_blocks
from regard.engines.block_sparse import AnyPattern, check_pattern, four_axes, lay_out, with_mask
from regard.engines.chunks import Chunk, Options, TileWork
from regard.engines.dense import Call, prepare, refuse_nan, run_explicit, visible
from regard.engines.native import block_sparse as kernels
from regard.engines.native import readout as readings
from regard.engines.precision import accumulator, without_autocast
from regard.patterns.layout import BlockLayout
from regard.primitives.biases import Indexed
from regard.primitives.normalisers import L1, Normaliser, Softmax

What = Literal["rows", "heads", "column_sums", "entropy", "sink_mass", "block_max", "block_sum", "top_k"]
_SPEC = parse("q: b h n d, k: b g m d -> b h n m")


@dataclass(frozen=True)
class Top:
    """The largest weights of every row: weights (B, H, N, count), descending; keys int64, -1 where there are fewer."""

    weights: Tensor
    keys: Tensor


@dataclass(frozen=True)
class Reading:
    """What is asked for, of which call."""

    call: Call
    lse: Tensor | None
    what: What
    rows: Tensor | None
    heads: Tensor | None
    count: int
    block: tuple[int, int]


def readout(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    pattern: AnyPattern | None = None,
    *,
    what: What = "rows",
    rows: Sequence[int] | Tensor | None = None,
    heads: Sequence[int] | Tensor | None = None,
    count: int = 1,
    block: tuple[int, int] = (64, 64),
    normaliser: Normaliser | None = None,
    bias: Tensor | None = None,
    indexed: Sequence[Indexed] = (),
    scale: float | None = None,
    q_offset: int = 0,
    engine: str | None = None,
) -> Any:
    """Read from the weights that attention with the same options gives.

    q (B, H, N, D), k (B, G, M, D). lse (B, H, N): as an engine returned it (extra keys and sinks then have had their
    share), or None to normalise over these keys. what, and what comes back:
    "rows": the weights of some query rows, (B, H, R, M); "heads": of some heads, (B, heads, N, M);
    "column_sums": what each key gets from all rows, or from `rows`, (B, H, M); "entropy": of each row in nats,
    (B, H, N); "sink_mass": of each row on the first `count` keys, (B, H, N); "block_max", "block_sum": over blocks of
    `block` queries and keys, (B, H, nQ, nK); "top_k": the `count` largest of each row, `Top`.
    Rows that attend nothing weigh 0. Raises ShapeError, OptionError.
    """
    bind(_SPEC, (q, k), "readout")
    check_types((q, k), ("q", "k"), "readout")
    if what not in get_args(What):
        raise OptionError(f"there is no readout {what!r}{near(what, get_args(What))}; there are {get_args(What)}")
    if lse is not None and lse.shape != q.shape[:3]:
        raise ShapeError(f"lse is {tuple(lse.shape)}; it must be (B, H, N) = {tuple(q.shape[:3])}")
    if lse is not None and type(normaliser or Softmax()) is not Softmax:
        raise OptionError(f"{type(normaliser).__name__} has no log-sum-exp: leave lse out")
    if count < 1:
        raise OptionError(f"count is a number of keys, at least 1, not {count}")
    if min(block) < 1:
        raise OptionError(f"block is a number of queries and of keys, at least 1, not {block}")
    with torch.no_grad():
        call = prepare(
            q.detach(), k.detach(), k.detach(), pattern, bias=None if bias is None else bias.detach(), indexed=indexed,
            scale=scale, q_offset=q_offset, normaliser=normaliser,
        )  # fmt: skip
        reading = Reading(
            call, lse, what, _places("rows", rows, q.shape[2], q.device, what),
            _places("heads", heads, q.shape[1], q.device, what), count, block,
        )  # fmt: skip
        return choose(IMPLEMENTATIONS, engine, reading).run(reading)


def _places(
    name: str, given: Sequence[int] | Tensor | None, size: int, device: torch.device, what: str
) -> Tensor | None:
    if given is None:
        if what == name:
            raise OptionError(f'what="{name}" needs {name}=, the places to read')
        return None
    if what not in {"rows": ("rows", "column_sums"), "heads": ("heads",)}[name]:
        raise OptionError(f'{name}= has no meaning for what="{what}"')
    places = torch.as_tensor(given, dtype=torch.int64, device=device)
    if places.dim() != 1 or (len(places) and not (-size <= int(places.min()) and int(places.max()) < size)):
        raise OptionError(f"{name} must be places in 0 to {size - 1}, not {given}")
    places = places % max(size, 1)
    if len(torch.unique(places)) != len(places):
        raise OptionError(f"{name} names a place twice: {given}")
    return places


def _no_tiles(reading: Reading) -> list[str]:
    check_pattern(reading.call)
    return []


def _run_tiles(reading: Reading) -> Any:
    call = reading.call
    refuse_nan(call.bias)
    q, k = call.q, call.k
    batch, heads, n, d = q.shape
    m, kind = k.shape[2], accumulator(q.dtype)
    tall, wide = reading.block
    result = _Result(reading, kind)
    if 0 in (batch, heads, n, m):
        return result.done()
    with without_autocast(q.device):
        layout = lay_out(call, (tall, wide) if reading.what.startswith("block") else None)
        options = Options(
            d**-0.5 if call.scale is None else call.scale, call.q_offset, call.normaliser, four_axes(call.bias),
            call.indexed,
        )  # fmt: skip
        work = TileWork(q, k, k[..., :0], layout, options)
        lse = None
        if reading.lse is not None:
            safe = reading.lse.to(kind)
            lse = work.in_blocks(safe.masked_fill(torch.isneginf(safe), float("inf"))[..., None], float("inf"))
        for chunk in work.chunks(result.items(work)):
            scores, mask = chunk.scores()
            if lse is None:
                weights = chunk.weigh(scores, mask)
            else:
                weights = torch.exp(scores.masked_fill_(~mask, float("-inf")) - lse[chunk.item])
            result.add(chunk, weights, mask)
    return result.done()


class _Result:
    """What is read, gathered from chunks of whole rows (C, block_q, columns)."""

    def __init__(self, reading: Reading, kind: torch.dtype):
        self.reading = reading
        q, m = reading.call.q, reading.call.k.shape[2]
        self.shape = batch, heads, n, _ = q.shape
        tall, wide = reading.block
        sizes = {
            "rows": (heads, 0 if reading.rows is None else len(reading.rows), m),
            "heads": (0 if reading.heads is None else len(reading.heads), n, m),
            "column_sums": (heads, m),
            "block_max": (heads, -(-n // tall), -(-m // wide)),
            "block_sum": (heads, -(-n // tall), -(-m // wide)),
            "top_k": (heads, n, reading.count),
        }.get(reading.what, (heads, n))
        self.out = torch.zeros((batch, *sizes), dtype=kind, device=q.device)
        self.keys = torch.full_like(self.out, -1, dtype=torch.int64) if reading.what == "top_k" else None
        # where a row or a head stands in the result; one more place takes what was not asked for
        self.place_of_row = _inverse(reading.rows, n, q.device)
        self.place_of_head = _inverse(reading.heads, heads, q.device)

    def items(self, work: TileWork) -> Tensor | None:
        """The query blocks that hold anything that was asked for."""
        item = torch.arange(work.items, device=work.q.device)
        if self.reading.rows is not None:
            blocks = torch.unique(self.reading.rows // work.block_q)
            return item[torch.isin(item % work.n_q, blocks)]
        if self.reading.heads is not None:
            return item[torch.isin(item // work.n_q % work.heads, self.reading.heads)]
        return None

    def add(self, chunk: Chunk, weights: Tensor, mask: Tensor) -> None:
        what = self.reading.what
        b, h = chunk.b[:, None], chunk.h[:, None]
        row = chunk.row
        real = row < self.shape[2]
        weights = weights * real[..., None]
        if what in ("rows", "heads"):
            self._add_table(chunk, weights, real)
        elif what == "column_sums":
            if self.reading.rows is not None:
                weights = weights * (self._place_of(row) >= 0)[..., None]
            column = chunk.column
            inside = column < self.out.shape[2]
            self.out.index_put_(
                (b, h, column.clamp(max=self.out.shape[2] - 1)), weights.sum(1) * inside, accumulate=True
            )
        elif what in ("block_max", "block_sum"):
            tiles = weights.unflatten(2, (-1, chunk.work.block_k))
            block = chunk.item[:, None] % chunk.work.n_q
            at = (b, h, block, chunk.column[:, :: chunk.work.block_k] // chunk.work.block_k)
            if what == "block_sum":
                self.out.index_put_(at, tiles.sum((1, 3)), accumulate=True)
            else:
                # a padded slot looks at the last tile of the list once more, at weights of 0
                flat = ((at[0] * self.out.shape[1] + at[1]) * self.out.shape[2] + at[2]) * self.out.shape[3] + at[3]
                self.out.view(-1).scatter_reduce_(0, flat.flatten(), tiles.amax((1, 3)).flatten(), "amax")
        else:
            self._add_rows(chunk, weights, mask, real)

    def done(self) -> Any:
        return self.out if self.keys is None else Top(self.out, self.keys)

    def _place_of(self, row: Tensor) -> Tensor:
        return self.place_of_row[row.clamp(max=self.shape[2] - 1)]

    def _add_table(self, chunk: Chunk, weights: Tensor, real: Tensor) -> None:
        place, head = self._place_of(chunk.row), self.place_of_head[chunk.h][:, None]
        c, r = (real & (place >= 0) & (head >= 0)).nonzero(as_tuple=True)
        last = self.out.shape[3] - 1
        at = (chunk.b[c, None], head[c], place[c, r][:, None], chunk.column[c].clamp(max=last))
        self.out.index_put_(at, weights[c, r] * (chunk.column[c] <= last), accumulate=True)

    def _add_rows(self, chunk: Chunk, weights: Tensor, mask: Tensor, real: Tensor) -> None:
        what, count = self.reading.what, self.reading.count
        c, r = real.nonzero(as_tuple=True)
        at = (chunk.b[c], chunk.h[c], chunk.row[c, r])
        if what == "entropy":
            self.out[at] = torch.special.entr(weights).sum(-1)[c, r]
        elif what == "sink_mass":
            self.out[at] = (weights * (chunk.column < count)[:, None]).sum(-1)[c, r]
        elif self.keys is not None:
            found = min(count, weights.shape[2])
            # a visible key of weight 0 comes before hidden ones
            top, place = weights.masked_fill(~mask, -1.0).topk(found, -1)
            keys = chunk.column[:, None].expand(weights.shape).gather(-1, place).masked_fill(top < 0, -1)
            self.out[(*at, slice(found))] = top.clamp(min=0)[c, r]
            self.keys[(*at, slice(found))] = keys[c, r]


def _inverse(places: Tensor | None, size: int, device: torch.device) -> Tensor:
    everywhere = torch.arange(size, device=device)
    if places is None:
        return everywhere
    return torch.full_like(everywhere, -1).index_put_((places,), torch.arange(len(places), device=device))


def _run_reference(reading: Reading) -> Any:
    weights, mask = _whole_table(reading)
    n, m = weights.shape[2:]
    what, count = reading.what, reading.count
    tall, wide = reading.block
    if what == "rows":
        return weights[:, :, reading.rows]
    if what == "heads":
        return weights[:, reading.heads]
    if what == "column_sums":
        return (weights if reading.rows is None else weights[:, :, reading.rows]).sum(2)
    if what == "entropy":
        return torch.special.entr(weights).sum(-1)
    if what == "sink_mass":
        return weights[..., :count].sum(-1)
    if what == "top_k":
        top, keys = weights.masked_fill(~mask, -1.0).topk(min(count, m), -1)
        missing = (0, max(count - m, 0))
        return Top(F.pad(top.clamp(min=0), missing), F.pad(keys.masked_fill(top < 0, -1), missing, value=-1))
    blocks = F.pad(weights, (0, -m % wide, 0, -n % tall)).unflatten(3, (-1, wide)).unflatten(2, (-1, tall))
    return blocks.amax((3, 5)) if what == "block_max" else blocks.sum((3, 5))


def _whole_table(reading: Reading) -> tuple[Tensor, Tensor]:
    """All weights and the mask of the pairs that may meet."""
    call, softmax = with_mask(reading.call), type(reading.call.normaliser) is Softmax
    kind = accumulator(call.q.dtype)
    q, k = call.q.to(kind), call.k.to(kind)
    got = run_explicit(replace(call, q=q, k=k, v=k[..., :1], return_weights=True, return_lse=softmax))
    weights, pairs = got.weights, visible(call)
    if weights is None:
        raise Unsupported("the definition gave no weights")
    if reading.lse is not None and got.lse is not None:
        given = reading.lse.to(kind)
        weights = weights * torch.exp(got.lse - given.masked_fill(torch.isneginf(given), float("inf")))[..., None]
    seen = torch.ones_like(weights, dtype=torch.bool)
    for mask in (pairs, None if call.bias is None else ~torch.isneginf(call.bias)):
        seen = seen if mask is None else seen & mask
    return weights, seen


# the names of the kernels where they differ
_KERNELS = {"column_sums": "column_sum"}


def _no_native(reading: Reading) -> list[str]:
    call, what = reading.call, reading.what
    check_pattern(call)
    reasons = native_blocks.cannot(call)
    if call.q.is_meta:
        reasons.append("there is nothing to read from tensors without data")
    if what == "column_sums" and reading.rows is not None:
        reasons.append("the kernels add up all rows")
    if what.startswith("block") and reading.block != (64, 64):
        reasons.append(f"the kernels take blocks of 64 x 64, not {reading.block[0]} x {reading.block[1]}")
    if isinstance(call.pattern, BlockLayout) and (call.pattern.block_q, call.pattern.block_k) != (64, 64):
        reasons.append("the layout has other blocks than 64 x 64")
    if what == "entropy" and type(call.normaliser) not in (Softmax, L1):
        reasons.append(f"the kernels know no entropy of {type(call.normaliser).__name__}")
    if 0 in (*call.q.shape, call.k.shape[2]):
        reasons.append("a size is 0")
    return reasons


def _run_native(reading: Reading) -> Any:
    call = reading.call
    layout = lay_out(call, None)
    options: dict[str, Any] = {
        "scale": call.scale, "bias": four_axes(call.bias), "indexed": call.indexed, "normaliser": call.normaliser
    }  # fmt: skip
    lse = reading.lse
    if lse is None:
        _, lse = kernels.forward(call.q, call.k, call.k[..., :1], layout, **options)
    found = readings.readout(
        call.q, call.k, lse, layout, _KERNELS.get(reading.what, reading.what), rows=reading.rows, heads=reading.heads,
        first=reading.count, top=reading.count, **options,
    )  # fmt: skip
    return Top(*found) if isinstance(found, tuple) else found


IMPLEMENTATIONS = (
    Implementation("readout:native", _no_native, _run_native),
    Implementation("readout:torch", _no_tiles, _run_tiles),
    Implementation("readout:reference", _no_tiles, _run_reference),
)
