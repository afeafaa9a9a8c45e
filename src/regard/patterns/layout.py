"""Block layouts: which tiles of the table of pairs an engine must visit, and which pairs of a tile may meet.

Built without the table: three-valued logic finds the tiles (coarse ones first), and the bits of a tile are evaluated
once for all tiles with equal marks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract.errors import OptionError, ShapeError
from regard.patterns.rules import Blocks, Data, HasRule, Rule, Runs, Tiles

WORD = 64
# coarse tiles are this many blocks square
COARSE = 16
# tiles whose pairs are evaluated at once
CHUNK = 128


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """The tiles of a pattern, by rows and by columns. B' is 1 or B, H' is 1 or H (query heads).

    block_q, block_k: rows and keys of a tile; query block = row // block_q, key block = key // block_k. n, m: rows and
    keys. q_offset: position of row 0. crow int32 (B', H', nQ + 1), col int32 (B', H', nnz) ascending in each row, -1
    behind the end; tile int32 (B', H', nnz): 0 = every valid pair (row < n, key < m) of the block may meet, t >= 1 =
    the pairs are in bits[t - 1]. bits int64 (T, block_q, ceil(block_k / 64)): bit j of word w of row r = key 64 w + j,
    to be read as uint64; bits_t: the same tiles transposed. crow_t (B', H', nK + 1), row_t, tile_t: the same by columns.
    """

    block_q: int
    block_k: int
    n: int
    m: int
    q_offset: int
    crow: Tensor
    col: Tensor
    tile: Tensor
    bits: Tensor
    bits_t: Tensor
    crow_t: Tensor
    row_t: Tensor
    tile_t: Tensor

    @property
    def batch(self) -> int:
        return self.crow.shape[0]

    @property
    def heads(self) -> int:
        return self.crow.shape[1]

    @property
    def visited(self) -> int:
        """How many tiles are visited, over all batch rows and heads."""
        return int(self.crow[..., -1].sum())

    @property
    def partial(self) -> int:
        """How many of them need their bits."""
        return int((self.tile > 0).sum())

    def empty_rows(self) -> Tensor:
        """Bool (B', H', n): rows that may attend nothing."""
        entry = _entries(self)
        seen = torch.zeros(self.batch * self.heads * _blocks(self.n, self.block_q), self.block_q, dtype=torch.bool)
        seen = seen.to(self.col.device)
        some = torch.cat((seen.new_ones(1, self.block_q), (self.bits != 0).any(-1)))
        # writing the same truth twice is harmless; False is never written
        place, within = some[entry.tile.long()].nonzero(as_tuple=True)
        seen[entry.row_of_all[place], within] = True
        return ~seen.view(self.batch, self.heads, -1)[:, :, : self.n]

    def pairs(self) -> int:
        """How many pairs may meet, over all batch rows and heads."""
        entry = _entries(self)
        full = entry.tile == 0
        tall = (self.n - entry.row * self.block_q).clamp(max=self.block_q)
        wide = (self.m - entry.column * self.block_k).clamp(max=self.block_k)
        held = _COUNTS.to(self.bits.device)[_bytes(self.bits).flatten(1).int()].sum(1)
        return int((tall * wide)[full].sum()) + int(held[entry.tile[~full].long() - 1].sum())

    def dense(self) -> Tensor:
        """The boolean mask (B', H', n, m); for tests and small sizes."""
        entry = _entries(self)
        rows, columns = _blocks(self.n, self.block_q), _blocks(self.m, self.block_k)
        bits = _unpack(self.bits, self.block_k)
        bits = torch.cat((bits.new_ones(1, self.block_q, self.block_k), bits))
        out = bits.new_zeros(self.batch * self.heads * rows, columns, self.block_q, self.block_k)
        out[entry.row_of_all, entry.column] = bits[entry.tile.long()]
        out = out.view(self.batch, self.heads, rows, columns, self.block_q, self.block_k).transpose(3, 4)
        return out.flatten(4, 5).flatten(2, 3)[:, :, : self.n, : self.m]

    def to(self, device: torch.device | str | None) -> BlockLayout:
        """The same layout on another device."""
        if device is None or torch.device(device) == self.col.device:
            return self
        moved = {name: getattr(self, name).to(device) for name in (*_INDICES, "bits", "bits_t")}
        return replace(self, **moved)

    def repeat(self, times: int) -> BlockLayout:
        """The layout for `times` batch rows, each with all batch rows of this one: B' grows by that factor."""
        if times == 1:
            return self
        many: dict[str, Any] = {name: getattr(self, name).repeat(times, 1, 1) for name in _INDICES}
        return replace(self, **many)

    def __or__(self, other: BlockLayout) -> BlockLayout:
        return _merge(self, other, union=True)

    def __and__(self, other: BlockLayout) -> BlockLayout:
        return _merge(self, other, union=False)


def lay_out(
    pattern: HasRule,
    n: int,
    m: int,
    block: tuple[int, int],
    q_offset: int,
    device: torch.device | str | None,
    data: Data,
) -> BlockLayout:
    """The layout of a pattern with its data; kept for pure patterns. Raises OptionError for a block below 1."""
    if min(block) < 1:
        raise OptionError(f"the blocks of a layout need at least 1 row and 1 key, not {block}")
    if pattern.needs:
        return _by_heads(pattern, n, m, block, q_offset, {name: data[name].cpu() for name in pattern.needs}).to(device)
    return _kept(pattern, n, m, block, q_offset, str(device or "cpu"))


def lay_out_blocks(pattern: HasRule, q: Blocks, k: Blocks, *, n: int, m: int, block: tuple[int, int]) -> BlockLayout:
    """The layout of a pattern without data on positions in any order, such as tiles of a grid."""
    layouts = {p: _build(p, q, k, (n, m, 0), block, {}) for p in dict.fromkeys(_heads_of(pattern))}
    return next(iter(layouts.values())) if len(layouts) == 1 else _stack([[layouts[p] for p in _heads_of(pattern)]])


def stack(layouts: list[BlockLayout]) -> BlockLayout:
    """Layouts of equal sizes as the batch rows of one."""
    return _stack([[layout] for layout in layouts])


def from_entries(
    key: Tensor, tile: Tensor, bits: Tensor, batch: int, heads: int, sizes: tuple[int, int, int], block: tuple[int, int]
) -> BlockLayout:
    """A layout from its tiles in order.

    key: int64 (nnz,), ((b * heads + h) * nQ + row block) * nK + key block, strictly ascending. tile: (nnz,), 0 or an
    index into bits + 1. sizes: n, m, q_offset.
    """
    n, m, q_offset = sizes
    rows, columns = _blocks(n, block[0]), _blocks(m, block[1])
    line, column = _divide(key, columns)
    slab, row = _divide(line, rows) if batch * heads > 1 else (None, line)
    line_t = column if slab is None else slab * columns + column
    order = _turned(line_t, batch * heads, rows, columns)
    crow, (col, tiles) = _compress(line, slab, (column, tile), batch * heads, rows)
    crow_t, (row_t, tiles_t) = _compress(
        line_t, None if slab is None else slab[order], (row[order], tile[order]), batch * heads, columns
    )
    shaped = (x.view(batch, heads, -1) for x in (crow, col, tiles, crow_t, row_t, tiles_t))
    crow, col, tiles, crow_t, row_t, tiles_t = shaped
    return BlockLayout(
        block[0], block[1], n, m, q_offset, crow, col, tiles, bits,
        pack(_unpack(bits, block[1]).transpose(1, 2)), crow_t, row_t, tiles_t,
    )  # fmt: skip


def _turned(line_t: Tensor, slabs: int, rows: int, columns: int) -> Tensor:
    """The places of the entries by slab, column, row."""
    if len(line_t) == slabs * rows * columns:
        every = torch.arange(len(line_t), device=line_t.device)
        return every.view(slabs, rows, columns).transpose(1, 2).flatten()
    # rows ascend already: a stable sort by columns turns the table
    return torch.sort(_narrow(line_t, slabs * columns), stable=True)[1]


def distinct_tiles(words: Tensor, every: Tensor) -> tuple[Tensor, Tensor]:
    """(tile numbers as in a layout, 0 where the words hold `every` valid pair; the bits of the others, each once)."""
    return _distinct(words, (words != every).flatten(1).any(1))


def pack(held: Tensor) -> Tensor:
    """Bool (T, rows, keys) as words int64 (T, rows, ceil(keys / 64)), the first key in the lowest bit."""
    count, rows, keys = held.shape
    words = _blocks(keys, WORD)
    held = F.pad(held, (0, words * WORD - keys)).contiguous()
    # eight bytes of 0 or 1 become one byte: the product brings byte k to bit 56 + k
    eighths = held.view(torch.uint8).view(torch.int64) if held.numel() else held.new_zeros(held.numel() // 8).long()
    packed = (eighths * 0x0102040810204080) >> 56 & 0xFF
    return packed.to(torch.uint8).view(-1, 8).view(torch.int64).view(count, rows, words)


@functools.lru_cache(maxsize=64)
def _kept(pattern: HasRule, n: int, m: int, block: tuple[int, int], q_offset: int, device: str) -> BlockLayout:
    if device != "cpu":
        return _kept(pattern, n, m, block, q_offset, "cpu").to(device)
    return _by_heads(pattern, n, m, block, q_offset, {})


def _by_heads(pattern: HasRule, n: int, m: int, block: tuple[int, int], q_offset: int, data: Data) -> BlockLayout:
    q, k = Runs(q_offset, n, block[0]), Runs(0, m, block[1])
    sizes = (n, m, q_offset)
    if pattern.heads is not None and pattern.extent(data)[1] > 1:
        # masks with heads of their own: each head has its slice
        of_head = [
            {name: x[:, h : h + 1] if x.dim() == 4 and x.shape[1] > 1 else x for name, x in data.items()}
            for h in range(pattern.heads)
        ]
        seen = _heads_of(pattern)
        return _stack([[_build(p, q, k, sizes, block, d) for p, d in zip(seen, of_head, strict=True)]])
    layouts = {p: _build(p, q, k, sizes, block, data) for p in dict.fromkeys(_heads_of(pattern))}
    return next(iter(layouts.values())) if len(layouts) == 1 else _stack([[layouts[p] for p in _heads_of(pattern)]])


def _heads_of(pattern: HasRule) -> list[HasRule]:
    return [pattern.for_head(h) for h in range(pattern.heads or 1)]


def _build(
    pattern: HasRule, q: Blocks, k: Blocks, sizes: tuple[int, int, int], block: tuple[int, int], data: Data
) -> BlockLayout:
    """The layout of a pattern that does not depend on the head, but for bound masks."""
    batch, heads = pattern.extent(data)
    rule = pattern.rule(data)
    empty = not (sizes[0] and sizes[1])
    key, full = (torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool)) if empty else _find(
        rule, q, k, batch, heads
    )  # fmt: skip
    mixed = (~full).nonzero()[:, 0]
    line, column = _divide(key if len(mixed) == len(key) else key[mixed], k.count)
    slab, row = _divide(line, q.count) if batch * heads > 1 else (torch.zeros_like(line), line)
    b, h = _divide(slab, heads) if heads > 1 else (slab, torch.zeros_like(slab))
    tiles = Tiles(q, k, row, column, b, h)
    marks = [*rule.marks(tiles), *(x[row] for x in q.form), *(x[column] for x in k.form)]
    kind, first = _classes(marks, len(mixed))
    shown = Tiles(q, k, *(x[first] for x in (row, column, b, h)))
    words = _evaluate(pattern, shown, data)
    behind = _outside(shown)
    everything = pack(torch.ones(1, 1, block[1], dtype=torch.bool))
    full_words = (words if behind is None else words | behind) == everything
    some = (words != 0).flatten(1).any(1)
    number, words = _distinct(words, some & ~full_words.flatten(1).all(1))
    number = number.masked_fill(~some, -1)
    tile = torch.zeros(len(key), dtype=torch.int32)
    tile[mixed] = number[kind]
    if not bool(some.all()):
        stays = tile >= 0
        key, tile = key[stays], tile[stays]
    return from_entries(key, tile, words, batch, heads, sizes, block)


def _find(rule: Rule, q: Blocks, k: Blocks, batch: int, heads: int) -> tuple[Tensor, Tensor]:
    """(keys of the tiles in which any pair may meet, ascending; which of them are surely full)."""
    if isinstance(q, Runs) and isinstance(k, Runs) and q.count * k.count > COARSE**4 // 4:
        coarse = _grid(q.coarse(COARSE), k.coarse(COARSE), batch, heads)
        some = _verdict(rule, coarse)[0].expand(batch, heads, coarse.q.count, coarse.k.count)
        if int(some.sum()) * 4 < some.numel():
            return _refine(rule, q, k, heads, some)
    some, every = _verdict(rule, _grid(q, k, batch, heads))
    table = (batch, heads, q.count, k.count)
    key = some.expand(table).flatten().nonzero()[:, 0]
    return key, every.expand(table).flatten()[key]


def _refine(rule: Rule, q: Blocks, k: Blocks, heads: int, coarse: Tensor) -> tuple[Tensor, Tensor]:
    inner = torch.arange(COARSE)
    b, h, row, column = (x.view(-1, 1, 1) for x in coarse.nonzero(as_tuple=True))
    row, column = row * COARSE + inner.view(1, -1, 1), column * COARSE + inner.view(1, 1, -1)
    inside = (row < q.count) & (column < k.count)
    tiles = Tiles(q, k, row.clamp(max=q.count - 1), column.clamp(max=k.count - 1), b, h)
    some, every = _verdict(rule, tiles)
    place = (some & inside).nonzero(as_tuple=True)
    key = (((b * heads + h) * q.count + row) * k.count + column)[place]
    key, order = key.sort()
    return key, every.expand(inside.shape)[place][order]


def _grid(q: Blocks, k: Blocks, batch: int, heads: int) -> Tiles:
    return Tiles(
        q,
        k,
        torch.arange(q.count).view(-1, 1),
        torch.arange(k.count),
        torch.arange(batch).view(-1, 1, 1, 1),
        torch.arange(heads).view(-1, 1, 1),
    )


def _verdict(rule: Rule, tiles: Tiles) -> tuple[Tensor, Tensor]:
    some, every = rule.look(tiles)
    for blocks, index in ((tiles.q, tiles.row), (tiles.k, tiles.column)):
        if blocks.exists is not None:
            some = some & blocks.exists[index]
        if blocks.padded is not None:
            every = every & ~blocks.padded[index]
    return some, every


def _evaluate(pattern: HasRule, tiles: Tiles, data: Data) -> Tensor:
    """The pairs of each tile that may meet, in words."""
    words = [torch.zeros(0, tiles.q.positions.shape[1], _blocks(tiles.k.positions.shape[1], WORD), dtype=torch.int64)]
    for row, column, b, h in zip(*(x.split(CHUNK) for x in tiles[2:]), strict=True):
        i, j = tiles.q.positions[row].unsqueeze(2), tiles.k.positions[column].unsqueeze(1)
        meet = pattern.allowed(b.view(-1, 1, 1), h.view(-1, 1, 1), i.clamp(min=0), j.clamp(min=0), data)
        if not tiles.q.complete:
            meet = meet & (i >= 0)
        if not tiles.k.complete:
            meet = meet & (j >= 0)
        words.append(pack(meet.expand(len(row), i.shape[1], j.shape[2])))
    return torch.cat(words)


def _outside(tiles: Tiles) -> Tensor | None:
    """The places of each tile behind the ends of the tensors, in words that broadcast; None if there are none."""
    q, k = tiles.q.outside, tiles.k.outside
    if q is None and k is None:
        return None
    keys = tiles.k.positions.shape[1]
    behind = torch.zeros(1, 1, 1, dtype=torch.int64)
    if k is not None:
        behind = behind | pack(k.unsqueeze(1))[tiles.column]
    if q is not None:
        everything = pack(torch.ones(1, 1, keys, dtype=torch.bool))
        behind = behind | torch.where(q[tiles.row].unsqueeze(2), everything, 0)
    return behind


def _classes(marks: list[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """(class of each of `count` tiles by equal marks, one tile of each class)."""
    code, span = torch.zeros(count, dtype=torch.int64), 1
    if not count:
        return code, code
    for mark in marks:
        mark = mark.expand(count)
        least = int(mark.min())
        width = int(mark.max()) - least + 1
        if width == 1:
            continue
        if span * width >= 2**62:
            code = torch.unique(code, return_inverse=True)[1]
            span = int(code.max()) + 1
        code = code * width + (mark - least)
        span *= width
    if span <= max(2**16, 4 * count):
        # few enough codes for a table of all of them
        first = torch.full((span,), -1)
        first[code] = torch.arange(count)
        found = first >= 0
        return (found.cumsum(0) - 1)[code], first[found]
    kind = torch.unique(code, return_inverse=True)[1]
    first = torch.empty(int(kind.max()) + 1, dtype=torch.int64)
    first[kind] = torch.arange(count)
    return kind, first


def _distinct(words: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """(number from 1 on among the distinct wanted tiles, 0 for the others; the distinct ones)."""
    number = torch.zeros(len(words), dtype=torch.int32, device=words.device)
    place = wanted.nonzero()[:, 0]
    if not len(place):
        return number, words[:0]
    kind, first = _equal_rows(words[place].flatten(1))
    number[place] = (kind + 1).int()
    return number, words[place[first]]


def _equal_rows(words: Tensor) -> tuple[Tensor, Tensor]:
    """(class of each row of equal words, one row of each class)."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (words.shape[1],), generator=generator) * 2 + 1
    kind = torch.unique((words * factors.to(words.device)).sum(1), return_inverse=True)[1]
    first = torch.empty(int(kind.max()) + 1, dtype=torch.int64, device=words.device)
    first[kind] = torch.arange(len(kind), device=words.device)
    if not torch.equal(words[first][kind], words):
        # two different rows with one sum: never seen, but not impossible
        kind = torch.unique(words, dim=0, return_inverse=True)[1]
        first = torch.empty(int(kind.max()) + 1, dtype=torch.int64, device=words.device)
        first[kind] = torch.arange(len(kind), device=words.device)
    return kind, first


def _compress(
    line: Tensor, slab: Tensor | None, values: tuple[Tensor, Tensor], slabs: int, lines: int
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """(starts of the lines, (slabs, lines + 1); values filled up with -1 and 0 to the longest slab)."""
    held = torch.bincount(line, minlength=slabs * lines).view(slabs, lines)
    starts = F.pad(held.cumsum(1), (1, 0))
    most = int(starts[:, -1].max()) if slabs else 0
    if slab is None:
        return starts.int(), (values[0].int()[None], values[1].int()[None])
    before = F.pad(starts[:, -1].cumsum(0), (1, 0))[:-1]
    place = torch.arange(len(line), device=line.device) - before[slab]
    filled = []
    for value, nothing in zip(values, (-1, 0), strict=True):
        out = torch.full((slabs, most), nothing, dtype=torch.int32, device=line.device)
        out[slab, place] = value.int()
        filled.append(out)
    return starts.int(), (filled[0], filled[1])


@dataclass(frozen=True)
class _Entries:
    """The tiles of a layout in order: slab = b * H' + h, row and key block, row block counted over all slabs."""

    slab: Tensor
    row: Tensor
    column: Tensor
    tile: Tensor
    row_of_all: Tensor


def _entries(layout: BlockLayout) -> _Entries:
    rows = _blocks(layout.n, layout.block_q)
    held = layout.crow.diff(dim=-1).flatten().long()
    line = torch.arange(len(held), device=held.device).repeat_interleave(held)
    there = layout.col.flatten(0, 1) >= 0
    column, tile = layout.col.flatten(0, 1)[there].long(), layout.tile.flatten(0, 1)[there]
    return _Entries(line // max(rows, 1), line % max(rows, 1), column, tile, line)


def _stack(layouts: list[list[BlockLayout]]) -> BlockLayout:
    """Layouts (batch by heads) of equal sizes as one; each may have batch rows of its own, then there is one column."""
    flat = [layout for line in layouts for layout in line]
    if len(flat) == 1:
        return flat[0]
    if len({(x.n, x.m, x.block_q, x.block_k, x.heads) for x in flat}) > 1:
        raise ShapeError("layouts of different sizes cannot be stacked")
    distinct = list({id(layout): layout for layout in flat}.values())
    bits, bits_t = (torch.cat([getattr(layout, name) for layout in distinct]) for name in ("bits", "bits_t"))
    number, first = _equal_rows(bits.flatten(1)) if len(bits) else (bits.flatten(), bits.flatten())
    # tile 0 stays 0; the others are counted over all layouts, equal ones once
    number = F.pad(number + 1, (1, 0)).int()
    shift, before = {}, 0
    for layout in distinct:
        shift[id(layout)] = before
        before += len(layout.bits)
    longest = max(layout.col.shape[-1] for layout in flat)
    batch = max(layout.batch for layout in flat)
    joined: dict[str, Any] = {}
    for name in _INDICES:
        lines = []
        for line in layouts:
            row = []
            for layout in line:
                x = getattr(layout, name)
                if name.startswith("tile"):
                    x = number[torch.where(x > 0, x + shift[id(layout)], 0).long()]
                if not name.startswith("crow"):
                    x = F.pad(x, (0, longest - x.shape[-1]), value=0 if name.startswith("tile") else -1)
                row.append(x.expand(batch if len(layouts) == 1 else -1, -1, -1))
            lines.append(torch.cat(row, 1))
        joined[name] = torch.cat(lines, 0).contiguous()
    return replace(flat[0], **joined, bits=bits[first], bits_t=bits_t[first])


def _merge(a: BlockLayout, b: BlockLayout, *, union: bool) -> BlockLayout:
    if (a.n, a.m, a.block_q, a.block_k) != (b.n, b.m, b.block_q, b.block_k):
        raise ShapeError("layouts of different sizes cannot be combined")
    batch, heads = max(a.batch, b.batch), max(a.heads, b.heads)
    rows, columns = _blocks(a.n, a.block_q), _blocks(a.m, a.block_k)
    (a_key, a_tile), (b_key, b_tile) = (_keyed(x, batch, heads, rows * columns, columns) for x in (a, b))
    key = torch.unique(torch.cat((a_key, b_key))) if union else a_key[_find_in(b_key, a_key) >= 0]
    # tile numbers from here on: -1 nothing, 0 full, t partial
    mine, other = _look_up(key, a_key, a_tile), _look_up(key, b_key, b_tile)
    tall, wide = a.block_q, a.block_k
    place = key % (rows * columns)
    edge = 2 * (place // columns == rows - 1).long() + (place % columns == columns - 1)
    pair = ((mine + 1) * (len(b.bits) + 2) + other + 1) * 4 + edge
    kinds, kind = torch.unique(pair, return_inverse=True)
    edge, kinds = kinds % 4, kinds // 4
    left, right = kinds // (len(b.bits) + 2) - 1, kinds % (len(b.bits) + 2) - 1
    every = pack(torch.ones(1, 1, wide, dtype=torch.bool, device=key.device))
    x, y = _with_trivial(a.bits, left, every), _with_trivial(b.bits, right, every)
    held = x | y if union else x & y
    full = ((left == 0) | (right == 0)) if union else ((left == 0) & (right == 0))
    some = (held != 0).flatten(1).any(1) | full
    # a union of partial tiles may be full
    outside_q = torch.arange(tall, device=key.device) >= torch.where(edge >= 2, a.n - (rows - 1) * tall, tall)[:, None]
    last_m = a.m - (columns - 1) * wide
    outside_k = torch.arange(wide, device=key.device) >= torch.where(edge % 2 == 1, last_m, wide)[:, None]
    behind = torch.where(outside_q[:, :, None], every, 0) | pack(outside_k[:, None])
    full = full | ((held | behind) == every).flatten(1).all(1)
    number, bits = _distinct(held, some & ~full)
    tile = number.masked_fill(~some, -1)[kind]
    stays = tile >= 0
    return from_entries(key[stays], tile[stays], bits, batch, heads, (a.n, a.m, a.q_offset), (tall, wide))


def _keyed(layout: BlockLayout, batch: int, heads: int, tiles: int, columns: int) -> tuple[Tensor, Tensor]:
    entry = _entries(layout)
    key = entry.row * columns + entry.column + entry.slab * tiles
    tile = entry.tile.long()
    if (layout.batch, layout.heads) == (batch, heads):
        return key, tile
    b, h = entry.slab // layout.heads, entry.slab % layout.heads
    local = entry.row * columns + entry.column
    keys, tile_list = [], []
    for row in range(batch):
        for head in range(heads):
            here = (b == min(row, layout.batch - 1)) & (h == min(head, layout.heads - 1))
            keys.append(local[here] + (row * heads + head) * tiles)
            tile_list.append(tile[here])
    return torch.cat(keys), torch.cat(tile_list)


def _find_in(table: Tensor, key: Tensor) -> Tensor:
    """Where each key stands in an ascending table, -1 if nowhere."""
    if not len(table):
        return torch.full_like(key, -1)
    place = torch.searchsorted(table, key).clamp(max=len(table) - 1)
    return torch.where(table[place] == key, place, -1)


def _look_up(key: Tensor, table: Tensor, tile: Tensor) -> Tensor:
    place = _find_in(table, key)
    return torch.where(place >= 0, tile[place], -1) if len(table) else place


def _with_trivial(bits: Tensor, tile: Tensor, every: Tensor) -> Tensor:
    """The words of tiles by number, -1 nothing and 0 everything."""
    whole = every.expand(1, *bits.shape[1:])
    return torch.cat((torch.zeros_like(whole), whole, bits))[tile + 1]


def _unpack(bits: Tensor, keys: int) -> Tensor:
    # bytes move an eighth of what words do
    places = 2 ** torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (_bytes(bits).unsqueeze(-1) & places).ne(0).flatten(2)[:, :, :keys]


def _bytes(bits: Tensor) -> Tensor:
    # an empty tensor may have strides that no view takes
    return bits.contiguous().view(torch.uint8) if bits.numel() else bits.byte().repeat(1, 1, 8)


def _narrow(x: Tensor, below: int) -> Tensor:
    # short integers are sorted in a third of the time
    return x.to(torch.int16 if below < 2**15 else torch.int32 if below < 2**31 else torch.int64)


def _divide(x: Tensor, by: int) -> tuple[Tensor, Tensor]:
    by = max(by, 1)
    quotient = x // by
    return quotient, x - quotient * by


def _blocks(length: int, size: int) -> int:
    return -(-length // size)


# how many bits of a byte are set
_COUNTS = torch.tensor([byte.bit_count() for byte in range(256)])
_INDICES = ("crow", "col", "tile", "crow_t", "row_t", "tile_t")
