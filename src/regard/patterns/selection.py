"""What a router chose: which blocks or tokens each query reads, for engines that take a layout or gather.

    pairs that may meet = (selected | force) & within

Slots are -1 (empty) or an index; their order means nothing; a key named twice would count twice and is refused. Indices
carry no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from regard.contract.errors import OptionError, ShapeError
from regard.patterns.algebra import Bound, Pattern
from regard.patterns.grids import Geometry
from regard.patterns.layout import BlockLayout, distinct_tiles, from_entries


class Router(Protocol):
    """Chooses pairs. Auxiliary losses go to `regard.add_loss`.

    causal: True only if what is chosen for position i does not change when a token behind i (or behind the end of its
    query block) changes. route: with a state and one query it gives the row that the whole route gives, if causal.
    """

    causal: bool

    def route(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None = None,
        *,
        q_offset: int = 0,
        geometry: Geometry | None = None,
        key_valid: Tensor | None = None,
        state: Any = None,
    ) -> Selection: ...

    def init_state(self) -> Any: ...

    def append(self, state: Any, k: Tensor, v: Tensor) -> Any: ...


@dataclass(frozen=True, eq=False)
class BlockSelection:
    """Blocks of keys for each block of queries.

    block_q, block_k: rows and keys of a block, at least 1; query block = row // block_q, key block = key // block_k.
    indices: int (B, H'|1, nQ, K) with H' the query or key heads. weights: float of the same shape, or None: multiplies a
    block's part of the output after normalisation. force: what is read in any case; within: what may be read at all.
    """

    block_q: int
    block_k: int
    indices: Tensor
    weights: Tensor | None = None
    force: Pattern | Bound | None = None
    within: Pattern | Bound | None = None

    def __post_init__(self) -> None:
        if min(self.block_q, self.block_k) < 1:
            raise OptionError(f"selected blocks hold at least 1 row and 1 key, not {self.block_q} and {self.block_k}")
        _check_slots("indices", self.indices, self.weights, "weights")

    def check(self, n: int, m: int) -> None:
        """Raise ShapeError for slots that do not fit n rows and m keys, OptionError for a block named twice."""
        _check_rows(self.indices, _ceil(n, self.block_q), f"{n} rows in blocks of {self.block_q}")
        _check_range(self.indices, _ceil(m, self.block_k), f"{m} keys in blocks of {self.block_k}")
        _check_twice(self.indices)

    def dense(self, n: int, m: int, *, q_offset: int = 0, heads: int | None = None) -> Tensor:
        """The mask (B, H', n, m), bool; for tests and small sizes. heads: query heads, to repeat key heads up to."""
        self.check(n, m)
        chosen = _scatter(_to_heads(self.indices, heads), _ceil(m, self.block_k))
        chosen = chosen.repeat_interleave(self.block_q, 2).repeat_interleave(self.block_k, 3)[:, :, :n, :m]
        return _limited(chosen, self.force, self.within, q_offset)

    def to_layout(
        self, n: int, m: int, *, block: tuple[int, int] = (64, 64), q_offset: int = 0, heads: int | None = None
    ) -> BlockLayout:
        """The tiles of the mask; where the blocks differ from `block`, tiles are cut or joined with bits."""
        _check_rows(self.indices, _ceil(n, self.block_q), f"{n} rows in blocks of {self.block_q}")
        _check_range(self.indices, _ceil(m, self.block_k), f"{m} keys in blocks of {self.block_k}")
        indices = _to_heads(self.indices, heads)
        slab, row, _, index = _slots(indices)
        tall, wide = self.block_q, self.block_k
        sizes = (n, m, q_offset)
        if tall % block[0] == 0 and wide % block[1] == 0:
            chosen = _whole_tiles(slab, row, index, (tall // block[0], wide // block[1]), indices.shape, sizes, block)
        else:
            # rows that no edge of a block or tile parts read the same keys
            unit = math.gcd(tall, block[0])
            lines = (row[:, None] * (tall // unit) + torch.arange(tall // unit, device=row.device)).flatten()
            inside = lines * unit < n
            slab, first = (x.repeat_interleave(tall // unit)[inside] for x in (slab, index * wide))
            runs = _Runs(slab, lines[inside], first, (first + wide).clamp(max=m), wide, unit)
            chosen = _tiles_of_runs(runs, indices.shape, sizes, block)
        return _limited_layout(chosen, self.force, self.within)


@dataclass(frozen=True, eq=False)
class TokenSelection:
    """Keys for each query.

    indices: int (B, H'|1, N, K) with H' the query or key heads. bias: float of the same shape, or None: added to the
    scores of the selected keys. force: what is read in any case; within: what may be read at all.
    """

    indices: Tensor
    bias: Tensor | None = None
    force: Pattern | Bound | None = None
    within: Pattern | Bound | None = None

    def __post_init__(self) -> None:
        _check_slots("indices", self.indices, self.bias, "bias")

    def check(self, n: int, m: int) -> None:
        """Raise ShapeError for slots that do not fit n rows and m keys, OptionError for a key named twice."""
        _check_rows(self.indices, n, f"{n} rows")
        _check_range(self.indices, m, f"{m} keys")
        _check_twice(self.indices)

    def dense(self, n: int, m: int, *, q_offset: int = 0, heads: int | None = None) -> Tensor:
        """The mask (B, H', n, m), bool. heads: query heads, to repeat key heads up to."""
        self.check(n, m)
        return _limited(_scatter(_to_heads(self.indices, heads), m), self.force, self.within, q_offset)

    def to_layout(
        self, n: int, m: int, *, block: tuple[int, int] = (64, 64), q_offset: int = 0, heads: int | None = None
    ) -> BlockLayout:
        """The tiles of the mask, all with bits where they are not full."""
        _check_rows(self.indices, n, f"{n} rows")
        _check_range(self.indices, m, f"{m} keys")
        indices = _to_heads(self.indices, heads)
        slab, row, _, index = _slots(indices)
        chosen = _tiles_of_runs(_Runs(slab, row, index, index + 1, 1, 1), indices.shape, (n, m, q_offset), block)
        return _limited_layout(chosen, self.force, self.within)


@dataclass(frozen=True, eq=False)
class Permuted:
    """Groups of queries that read groups of keys.

    q_index: int (B, H', G, wq) rows, k_index: int (B, H', G, wk) keys; -1 is an empty slot. inner: a pattern on absolute
    positions, inside each group. reduce: how the outputs of a query that is in several groups become one: their "mean",
    a merge by log-sum-exp ("lse": a key met in two groups counts twice), or "disjoint" if there is one group at most.
    """

    q_index: Tensor
    k_index: Tensor
    inner: Pattern | Bound
    reduce: Literal["mean", "lse", "disjoint"] = "mean"

    def __post_init__(self) -> None:
        if self.reduce not in ("mean", "lse", "disjoint"):
            raise OptionError(f"groups are reduced by 'mean', 'lse' or 'disjoint', not {self.reduce!r}")
        _check_slots("q_index", self.q_index, None, "")
        _check_slots("k_index", self.k_index, None, "")
        if self.q_index.shape[:3] != self.k_index.shape[:3]:
            raise ShapeError(
                f"q_index is {tuple(self.q_index.shape)} and k_index {tuple(self.k_index.shape)}; they must agree in "
                "batch, heads and groups"
            )

    def check(self, n: int, m: int) -> None:
        """Raise ShapeError for indices beyond n rows or m keys, OptionError for one that a group names twice."""
        _check_range(self.q_index, n, f"{n} rows")
        _check_range(self.k_index, m, f"{m} keys")
        _check_twice(self.q_index)
        _check_twice(self.k_index)
        if self.reduce == "disjoint" and bool((self.memberships(n) > 1).any()):
            raise OptionError("reduce='disjoint' is for queries in one group at most; use 'mean' or 'lse'")

    def memberships(self, n: int) -> Tensor:
        """In how many groups each query is: int64 (B, H', n)."""
        flat = self.q_index.flatten(2).long()
        out = flat.new_zeros(*flat.shape[:2], n + 1)
        return out.scatter_add_(2, torch.where(flat < 0, n, flat), torch.ones_like(flat))[:, :, :n]

    def grouped(self, *, q_offset: int = 0) -> Tensor:
        """The mask of the gathered problem, bool (B, H', G, wq, wk)."""
        batch, heads = self.q_index.shape[:2]
        device = self.q_index.device
        i, j = self.q_index.long().unsqueeze(-1), self.k_index.long().unsqueeze(-2)
        b = torch.arange(batch, device=device).view(-1, 1, 1, 1, 1)
        h = torch.arange(heads, device=device).view(-1, 1, 1, 1)
        pattern, data = (self.inner.pattern, self.inner.data) if isinstance(self.inner, Bound) else (self.inner, {})
        meet = pattern.allowed(b, h, i.clamp(min=0) + q_offset, j.clamp(min=0), data)
        return meet & (i >= 0) & (j >= 0)

    def dense(self, n: int, m: int, *, q_offset: int = 0, heads: int | None = None) -> Tensor:
        """The pairs that meet in some group: bool (B, H', n, m). heads: query heads, to repeat key heads up to."""
        self.check(n, m)
        b, h, i, j = self._pairs(q_offset)
        out = torch.zeros(*self.q_index.shape[:2], n, m, dtype=torch.bool, device=self.q_index.device)
        out[b, h, i, j] = True
        return _to_heads(out, heads)

    def to_layout(
        self, n: int, m: int, *, block: tuple[int, int] = (64, 64), q_offset: int = 0, heads: int | None = None
    ) -> BlockLayout:
        """The tiles of `dense`, in the order of positions; time and memory grow with the pairs."""
        self.check(n, m)
        b, h, i, j = self._pairs(q_offset)
        slabs = self.q_index.shape[1]
        place = torch.unique(((b * slabs + h) * n + i) * m + j)
        lines, key = place // m, place % m
        index = torch.full((self.q_index.shape[0] * slabs * n, int(_most(lines))), -1, device=key.device)
        # the k-th pair of a row goes into its k-th slot
        starts = torch.searchsorted(lines, lines)
        index[lines, torch.arange(len(lines), device=key.device) - starts] = key
        chosen = TokenSelection(index.view(self.q_index.shape[0], slabs, n, -1))
        return chosen.to_layout(n, m, block=block, q_offset=q_offset, heads=heads)

    def _pairs(self, q_offset: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        b, h, g, x, y = self.grouped(q_offset=q_offset).nonzero(as_tuple=True)
        return b, h, self.q_index[b, h, g, x].long(), self.k_index[b, h, g, y].long()


@dataclass(frozen=True)
class _Runs:
    """Runs of keys first..last-1, none longer than `longest`, read by `unit` rows; line = row // unit, slab = b * H' + h."""

    slab: Tensor
    line: Tensor
    first: Tensor
    last: Tensor
    longest: int
    unit: int


def _whole_tiles(
    slab: Tensor,
    row: Tensor,
    index: Tensor,
    times: tuple[int, int],
    shape: Sequence[int],
    sizes: tuple[int, int, int],
    block: tuple[int, int],
) -> BlockLayout:
    rows, columns = _ceil(sizes[0], block[0]), _ceil(sizes[1], block[1])
    down = row[:, None, None] * times[0] + torch.arange(times[0], device=row.device).view(-1, 1)
    across = index[:, None, None] * times[1] + torch.arange(times[1], device=row.device)
    key = (slab[:, None, None] * rows + down) * columns + across
    named = key[(down < rows) & (across < columns)]
    key = torch.unique(named)
    if len(key) < len(named):
        raise OptionError(_TWICE)
    bits = key.new_zeros(0, block[0], _ceil(block[1], 64))
    return from_entries(key, torch.zeros_like(key, dtype=torch.int32), bits, shape[0], shape[1], sizes, block)


def _tiles_of_runs(
    runs: _Runs, shape: Sequence[int], sizes: tuple[int, int, int], block: tuple[int, int]
) -> BlockLayout:
    (tall, wide), (n, m, _), unit = block, sizes, runs.unit
    rows, columns, words, lines = _ceil(n, tall), _ceil(m, wide), _ceil(wide, 64), tall // unit
    height = (n - runs.line * unit).clamp(max=unit)
    parts = []
    # a run reaches over so many tiles at most
    for ahead in range((runs.longest + wide - 2) // wide + 1):
        column = runs.first // wide + ahead
        first = (runs.first - column * wide).clamp(min=0)
        last = (runs.last - column * wide).clamp(max=wide)
        there = first < last
        key = (runs.slab * rows + runs.line // lines) * columns + column
        parts.append(torch.stack((key, runs.line % lines, first, last, height))[:, there])
    key, line, first, last, height = torch.cat(parts, 1)
    tiles, slot = torch.unique(key, return_inverse=True)
    held = key.new_zeros(len(tiles) * lines * words)
    for word in range(words):
        mask = _below((last - 64 * word).clamp(0, 64)) & ~_below((first - 64 * word).clamp(0, 64))
        held.index_add_(0, (slot * lines + line) * words + word, mask)
    every = _valid_words(tiles, rows, columns, sizes, block)
    held = held.view(len(tiles), lines, words).repeat_interleave(unit, 1) & every
    number, bits = distinct_tiles(held, every)
    found = from_entries(tiles, number, bits, shape[0], shape[1], sizes, block)
    # words were added: a key that is named twice carries, and bits are lost
    if found.pairs() != int(((last - first) * height).sum()):
        raise OptionError(_TWICE)
    return found


def _valid_words(tiles: Tensor, rows: int, columns: int, sizes: tuple[int, int, int], block: tuple[int, int]) -> Tensor:
    """All valid pairs of each tile, in words."""
    (tall, wide), (n, m, _) = block, sizes
    place = tiles % max(rows * columns, 1)
    high = (n - place // max(columns, 1) * tall).clamp(max=tall)
    broad = (m - place % max(columns, 1) * wide).clamp(max=wide)
    starts = torch.arange(0, wide, 64, device=tiles.device)
    words = _below((broad[:, None, None] - starts).clamp(0, 64))
    return torch.where(torch.arange(tall, device=tiles.device)[:, None] < high[:, None, None], words, 0)


def _below(count: Tensor) -> Tensor:
    """Words with the lowest `count` bits set, 0 to 64."""
    return torch.where(count >= 64, -1, (torch.ones_like(count) << count.clamp(max=63)) - 1)


def _limited(chosen: Tensor, force: Pattern | Bound | None, within: Pattern | Bound | None, q_offset: int) -> Tensor:
    n, m = chosen.shape[2:]
    if force is not None:
        chosen = chosen | force.dense(n, m, q_offset=q_offset, device=chosen.device)
    return chosen if within is None else chosen & within.dense(n, m, q_offset=q_offset, device=chosen.device)


def _limited_layout(chosen: BlockLayout, force: Pattern | Bound | None, within: Pattern | Bound | None) -> BlockLayout:
    block = (chosen.block_q, chosen.block_k)
    for limit in (force, within):
        if limit is None:
            continue
        other = limit.layout(chosen.n, chosen.m, block=block, q_offset=chosen.q_offset, device=chosen.col.device)
        chosen = chosen | other if limit is force else chosen & other
    return chosen


def _slots(indices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(slab, row, slot, index) of every slot that is not empty."""
    b, h, row, slot = (indices >= 0).nonzero(as_tuple=True)
    return b * indices.shape[1] + h, row, slot, indices[b, h, row, slot].long()


def _scatter(indices: Tensor, places: int) -> Tensor:
    index = indices.long()
    out = torch.zeros(*index.shape[:3], places + 1, dtype=torch.bool, device=index.device)
    return out.scatter_(3, torch.where(index < 0, places, index), True)[..., :places]


def _to_heads(x: Tensor, heads: int | None) -> Tensor:
    """One entry per query head where there is one per key head; one entry for all stays one."""
    if heads is None or x.shape[1] in (1, heads):
        return x
    if heads % x.shape[1]:
        raise ShapeError(f"a selection for {x.shape[1]} heads does not fit {heads} query heads")
    return x.repeat_interleave(heads // x.shape[1], 1)


def _most(lines: Tensor) -> Tensor:
    return torch.bincount(lines).max() if len(lines) else torch.zeros(())


def _check_slots(name: str, indices: Tensor, values: Tensor | None, values_name: str) -> None:
    if indices.dim() != 4 or indices.is_floating_point() or indices.dtype == torch.bool:
        raise ShapeError(
            f"{name} is {indices.dtype} {tuple(indices.shape)}; it must be integer with 4 axes, -1 = empty"
        )
    if values is not None and values.shape != indices.shape:
        raise ShapeError(
            f"{values_name} is {tuple(values.shape)}; it must have the shape of {name}, {tuple(indices.shape)}"
        )


def _check_rows(indices: Tensor, rows: int, what: str) -> None:
    if indices.shape[2] != rows:
        raise ShapeError(f"the selection has {indices.shape[2]} rows of slots; {what} need {rows}")


def _check_range(indices: Tensor, below: int, what: str) -> None:
    if indices.numel() and (int(indices.max()) >= below or int(indices.min()) < -1):
        raise ShapeError(
            f"the selection names {int(indices.min())} to {int(indices.max())}; with {what} it must be -1 to {below - 1}"
        )


def _check_twice(indices: Tensor) -> None:
    ordered = indices.sort(-1)[0]
    if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()):
        raise OptionError(_TWICE)


def _ceil(length: int, size: int) -> int:
    return -(-length // size)


Selection = BlockSelection | TokenSelection | Permuted
_TWICE = "the selection names a block or key twice in one row, which would count it twice; use -1 for empty slots"
