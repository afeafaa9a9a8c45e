"""Three-valued logic on tiles: a rule says of a block of queries and a block of keys whether any pair, or every pair, may meet.

`look` gives (any, all), bool by broadcast; `any` may be too large and `all` too small, never the other way round.
`marks` gives integers such that two tiles with equal marks (of all rules of a pattern) have equal bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Verdict = tuple[Tensor, Tensor]
Data = Mapping[str, Tensor]


class Span(NamedTuple):
    """Coordinates that a block covers: all lie in lo..hi; blocks with equal marks differ by their lo alone."""

    lo: Tensor
    hi: Tensor
    marks: tuple[Tensor, ...] = ()


class Blocks:
    """Positions cut into blocks of equal size.

    positions: int64 (count, size), -1 where there is none. form: facts per block that its shape depends on. complete:
    there is a position in every place. outside: bool (count, size), the places behind the end of the tensor, or None if
    the size divides it; a place that is inside and has no position is padding, which meets nothing.
    """

    def __init__(self, positions: Tensor, form: tuple[Tensor, ...] = (), outside: Tensor | None = None):
        self.positions = positions
        self.form = form
        self.outside = outside
        self.complete = bool((positions >= 0).all())
        self._spans: dict[tuple, Span] = {}

    @property
    def count(self) -> int:
        return self.positions.shape[0]

    @property
    def exists(self) -> Tensor | None:
        """Bool (count,): the block has a position at all; None if all have."""
        return None

    @property
    def padded(self) -> Tensor | None:
        """Bool (count,): the block holds padding; None if none does."""
        return None

    def line(self, before: int = 0) -> Span:
        """The positions themselves, counted from `before`; blocks that begin earlier are cut there."""
        return self._keep(("line", before), lambda: self._line(before))

    def axis(self, shape: tuple[int, ...], axis: int, before: int = 0) -> Span:
        """The coordinates on one axis of a row-major grid that begins at position `before`."""
        return self._keep((shape, axis, before), lambda: self._axis(shape, axis, before))

    def _keep(self, key: tuple, make: Callable[[], Span]) -> Span:
        if key not in self._spans:
            self._spans[key] = make()
        return self._spans[key]

    def _line(self, before: int) -> Span:
        lo, hi = self._bounds()
        if not before:
            return Span(lo, hi)
        return Span((lo - before).clamp(min=0), hi - before, (_early(lo - before),))

    def _axis(self, shape: tuple[int, ...], axis: int, before: int) -> Span:
        raise NotImplementedError

    def _bounds(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class Runs(Blocks):
    """`size` consecutive positions a block, from `start` on, `length` in all."""

    def __init__(self, start: int, length: int, size: int):
        count = -(-length // size)
        self.start, self.length, self.size = start, length, size
        place = torch.arange(count * size).view(count, size)
        outside = place >= length
        ragged = length % size != 0
        first = torch.arange(count) * size
        held = (length - first).clamp(max=size)
        self._first, self._last = first + start, first + start + held - 1
        super().__init__(
            (place + start).masked_fill(outside, -1), (held,) if ragged else (), outside if ragged else None
        )

    def coarse(self, factor: int) -> Runs:
        return Runs(self.start, self.length, self.size * factor)

    def _bounds(self) -> tuple[Tensor, Tensor]:
        return self._first, self._last

    def _axis(self, shape: tuple[int, ...], axis: int, before: int) -> Span:
        lo, hi, marks = self.line(before)
        hi = hi.clamp(min=0)
        inner, length = _inner(shape, axis), shape[axis]
        wraps = lo // (inner * length) != hi // (inner * length)
        first = lo // inner % length
        if inner > 1:
            marks = (*marks, lo % inner)
        if axis:
            marks = (*marks, torch.where(wraps, first, -1))
        return Span(first.masked_fill(wraps, 0), (hi // inner % length).masked_fill(wraps, length - 1), marks)


class Boxes(Blocks):
    """Tiles of a grid. positions (count, size), -1 for padding; corners: first and last coordinates, (count, axes)."""

    def __init__(self, shape: tuple[int, ...], positions: Tensor, first: Tensor, last: Tensor):
        self.shape, self.first, self.last = shape, first, last
        extents = last - first
        super().__init__(positions, tuple(extents.unbind(1)))
        self._padded = (positions < 0).any(1)
        self._exists = (extents >= 0).all(1)

    @property
    def exists(self) -> Tensor | None:
        return self._exists

    @property
    def padded(self) -> Tensor | None:
        return self._padded

    def _bounds(self) -> tuple[Tensor, Tensor]:
        strides = torch.tensor([_inner(self.shape, a) for a in range(len(self.shape))])
        return (self.first * strides).sum(1), (self.last.clamp(min=0) * strides).sum(1)

    def _axis(self, shape: tuple[int, ...], axis: int, before: int) -> Span:
        if shape == self.shape and not before:
            return Span(self.first[:, axis], self.last[:, axis].clamp(min=0))
        # another grid than the one that was cut into tiles: its coordinates are looked up, no two blocks are alike
        place = (self.positions - before).clamp(min=0)
        there = place // _inner(shape, axis) % shape[axis]
        none = self.positions < 0
        lo = there.masked_fill(none, shape[axis] - 1).amin(1)
        return Span(lo, there.masked_fill(none, 0).amax(1), (torch.arange(self.count),))


class Tiles(NamedTuple):
    """Pairs of blocks: which block of queries, which of keys, of which batch row and head; integers that broadcast."""

    q: Blocks
    k: Blocks
    row: Tensor
    column: Tensor
    b: Tensor
    h: Tensor

    def lines(self, before: int) -> tuple[Span, Span]:
        return _take(self.q.line(before), self.row), _take(self.k.line(before), self.column)

    def axes(self, shape: tuple[int, ...], axis: int, before: int) -> tuple[Span, Span]:
        q, k = self.q.axis(shape, axis, before), self.k.axis(shape, axis, before)
        return _take(q, self.row), _take(k, self.column)


class HasRule(Protocol):
    """What layouts ask of a pattern; see `Pattern`."""

    def __hash__(self) -> int: ...

    @property
    def needs(self) -> tuple[str, ...]: ...

    @property
    def heads(self) -> int | None: ...

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor: ...

    def rule(self, data: Data) -> Rule: ...

    def for_head(self, h: int) -> HasRule: ...

    def extent(self, data: Data) -> tuple[int, int]: ...


class Rule:
    """What a pattern says of tiles. before: positions before the first one that the rule counts."""

    def look(self, tiles: Tiles, before: int = 0) -> Verdict:
        raise NotImplementedError

    def marks(self, tiles: Tiles, before: int = 0) -> list[Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class Always(Rule):
    """Every pair, or none."""

    answer: bool

    def look(self, tiles: Tiles, before: int = 0) -> Verdict:
        said = torch.full((1,), self.answer)
        return said, said

    def marks(self, tiles: Tiles, before: int = 0) -> list[Tensor]:
        return []


@dataclass(frozen=True)
class AllOf(Rule):
    rules: tuple[Rule, ...]

    def look(self, tiles: Tiles, before: int = 0) -> Verdict:
        some, every = self.rules[0].look(tiles, before)
        for rule in self.rules[1:]:
            a, b = rule.look(tiles, before)
            some, every = some & a, every & b
        return some, every

    def marks(self, tiles: Tiles, before: int = 0) -> list[Tensor]:
        return _marks_of_parts(self.rules, tiles, before)


@dataclass(frozen=True)
class AnyOf(Rule):
    rules: tuple[Rule, ...]

    def look(self, tiles: Tiles, before: int = 0) -> Verdict:
        some, every = self.rules[0].look(tiles, before)
        for rule in self.rules[1:]:
            a, b = rule.look(tiles, before)
            some, every = some | a, every | b
        return some, every

    def marks(self, tiles: Tiles, before: int = 0) -> list[Tensor]:
        return _marks_of_parts(self.rules, tiles, before)


@dataclass(frozen=True)
class NoneOf(Rule):
    rule: Rule

    def look(self, tiles: Tiles, before: int = 0) -> Verdict:
        some, every = self.rule.look(tiles, before)
        return ~every, ~some

    def marks(self, tiles: Tiles, before: int = 0) -> list[Tensor]:
        return self.rule.marks(tiles, before)


@dataclass(frozen=True)
class Behind(Rule):
    """A rule on the positions behind `prefix` tokens, which meet everything."""

    rule: Rule
    prefix: int

    def look(self, tiles: Tiles, before: int = 0) -> Verdict:
        q, k = tiles.lines(before)
        some, every = self.rule.look(tiles, before + self.prefix)
        some = some | (q.lo < self.prefix) | (k.lo < self.prefix)
        return some, every | (q.hi < self.prefix) | (k.hi < self.prefix)

    def marks(self, tiles: Tiles, before: int = 0) -> list[Tensor]:
        q, k = tiles.lines(before)
        cut = [_early(q.lo - self.prefix), _early(k.lo - self.prefix)]
        return [*cut, *_marks_of_parts((self.rule,), tiles, before + self.prefix)]


@dataclass(frozen=True)
class OnLine(Rule):
    """A relation between positions."""

    relation: Relation

    def look(self, tiles: Tiles, before: int = 0) -> Verdict:
        return self.relation.look(*tiles.lines(before))

    def marks(self, tiles: Tiles, before: int = 0) -> list[Tensor]:
        q, k = tiles.lines(before)
        return [*self.relation.marks(q, k), *q.marks, *k.marks]


@dataclass(frozen=True)
class OnAxis(Rule):
    """A relation between coordinates on one axis of a grid."""

    shape: tuple[int, ...]
    axis: int
    relation: Relation

    def look(self, tiles: Tiles, before: int = 0) -> Verdict:
        return self.relation.look(*tiles.axes(self.shape, self.axis, before))

    def marks(self, tiles: Tiles, before: int = 0) -> list[Tensor]:
        q, k = tiles.axes(self.shape, self.axis, before)
        return [*self.relation.marks(q, k), *q.marks, *k.marks]


class Relation:
    """A relation between a query coordinate x and a key coordinate y."""

    def look(self, x: Span, y: Span) -> Verdict:
        raise NotImplementedError

    def marks(self, x: Span, y: Span) -> list[Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class Distance(Relation):
    """least <= x - y <= most; None is no limit."""

    least: int | None
    most: int | None

    def look(self, x: Span, y: Span) -> Verdict:
        some, every = [], []
        if self.least is not None:
            some.append(y.lo + self.least <= x.hi)
            every.append(y.hi + self.least <= x.lo)
        if self.most is not None:
            some.append(x.lo - self.most <= y.hi)
            every.append(x.hi - self.most <= y.lo)
        return _both(some), _both(every)

    def marks(self, x: Span, y: Span) -> list[Tensor]:
        return [x.lo - y.lo]


@dataclass(frozen=True)
class KeysBelow(Relation):
    """y < count."""

    count: int

    def look(self, x: Span, y: Span) -> Verdict:
        return y.lo < self.count, y.hi < self.count

    def marks(self, x: Span, y: Span) -> list[Tensor]:
        return [y.lo]


@dataclass(frozen=True)
class DistanceResidue(Relation):
    """(x - y) % step == rest."""

    step: int
    rest: int

    def look(self, x: Span, y: Span) -> Verdict:
        return _has_multiple(x.lo - y.hi - self.rest, x.hi - y.lo - self.rest, self.step)

    def marks(self, x: Span, y: Span) -> list[Tensor]:
        return [(x.lo - y.lo) % self.step]


@dataclass(frozen=True)
class KeyResidue(Relation):
    """(y // size) % step == rest."""

    size: int
    step: int
    rest: int

    def look(self, x: Span, y: Span) -> Verdict:
        return _has_multiple(y.lo // self.size - self.rest, y.hi // self.size - self.rest, self.step)

    def marks(self, x: Span, y: Span) -> list[Tensor]:
        return [y.lo % (self.size * self.step)]


@dataclass(frozen=True)
class BlockDistance(Relation):
    """least <= (x + shift) // size - (y + shift) // size <= most; None is no limit."""

    size: int
    least: int | None
    most: int | None
    shift: int = 0

    def look(self, x: Span, y: Span) -> Verdict:
        return Distance(self.least, self.most).look(self._cut(x), self._cut(y))

    def marks(self, x: Span, y: Span) -> list[Tensor]:
        a, b = x.lo + self.shift, y.lo + self.shift
        return [a % self.size, b % self.size, a // self.size - b // self.size]

    def _cut(self, x: Span) -> Span:
        return Span((x.lo + self.shift) // self.size, (x.hi + self.shift) // self.size)


@dataclass(frozen=True)
class AroundBlock(Relation):
    """x // size * size - halo <= y < x // size * size + size + halo."""

    size: int
    halo: int

    def look(self, x: Span, y: Span) -> Verdict:
        first, last = x.lo // self.size * self.size, x.hi // self.size * self.size
        above, below = self.size + self.halo - 1, self.halo
        some = (first - below <= y.hi) & (y.lo <= last + above)
        return some, (last - below <= y.lo) & (y.hi <= first + above)

    def marks(self, x: Span, y: Span) -> list[Tensor]:
        return [x.lo % self.size, x.lo - y.lo]


@dataclass(frozen=True)
class ClosedGroups(Relation):
    """With c = max(0, (x + 1 - window) // group) groups closed: y is one of them, or (of tokens) y - ahead in none."""

    group: int
    window: int
    ahead: int
    of_cores: bool

    def look(self, x: Span, y: Span) -> Verdict:
        least, most = self._closed(x.lo), self._closed(x.hi)
        if self.of_cores:
            return y.lo < most, y.hi < least
        return y.hi - self.ahead >= least * self.group, y.lo - self.ahead >= most * self.group

    def marks(self, x: Span, y: Span) -> list[Tensor]:
        closed = self._closed(x.lo)
        apart = closed - y.lo if self.of_cores else closed * self.group - y.lo
        return [apart, (x.lo + 1 - self.window) % self.group, x.lo.clamp(max=self.window)]

    def _closed(self, x: Tensor) -> Tensor:
        return ((x + 1 - self.window) // self.group).clamp(min=0)


@dataclass(frozen=True)
class Near(Relation):
    """The neighbourhood of `kernel` keys on an axis of `length`; the exact rule stands at `Neighborhood`."""

    length: int
    kernel: int
    dilation: int
    stride: int
    causal: bool

    def look(self, x: Span, y: Span) -> Verdict:
        d = self.dilation
        shortest: Tensor | int = self.length
        longest: Tensor | int = self.length
        some = every = None
        u, t = x, y
        if d > 1:
            some, every = _has_multiple(x.lo - y.hi, x.hi - y.lo, d)
            u, t = Span(x.lo // d, x.hi // d), Span(y.lo // d, y.hi // d)
            # the groups of one rest modulo d differ in length; a single query has one of these lengths
            held = self.length // d + (x.lo % d < self.length % d).long()
            alone = x.lo == x.hi
            shortest = torch.where(alone, held, self.length // d)
            longest = torch.where(alone, held, -(-self.length // d))
        meets = (self._start(u.lo, shortest) <= t.hi) & (t.lo <= self._end(u.hi, longest))
        inside = (self._start(u.hi, longest) <= t.lo) & (t.hi <= self._end(u.lo, shortest))
        return (meets, inside) if some is None or every is None else (some & meets, every & inside)

    def marks(self, x: Span, y: Span) -> list[Tensor]:
        first = x.lo // self.dilation // self.stride * self.stride
        last = x.hi // self.dilation // self.stride * self.stride
        shortest = self.length // self.dilation
        # away from the borders a window lies where its leader says
        if self.causal:
            ahead = self.stride - 1
            moved = (first + ahead < self.kernel - 1) | (last + ahead >= shortest)
        else:
            left, ahead = self.kernel // 2, self.stride // 2
            moved = (first + ahead < left) | (last + ahead >= shortest - self.kernel + left + 1)
        return [x.lo % (self.stride * self.dilation), x.lo - y.lo, torch.where(moved, x.lo, -1)]

    def _start(self, u: Tensor, length: Tensor | int) -> Tensor:
        group = u // self.stride * self.stride
        if self.causal:
            return (_least(group + self.stride - 1, length - 1) - self.kernel + 1).clamp(min=0)
        left = self.kernel // 2
        leader = _least(group + self.stride // 2, length - 1)
        return _least(leader.clamp(min=left), length - self.kernel + left) - left

    def _end(self, u: Tensor, length: Tensor | int) -> Tensor:
        return u if self.causal else self._start(u, length) + self.kernel - 1


@dataclass(frozen=True, eq=False)
class SameLabel(Rule):
    """Labels of query and key position are equal: labels (B, M)."""

    labels: Tensor

    def look(self, tiles: Tiles, before: int = 0) -> Verdict:
        q_lo, q_hi = (end[_row(tiles.b, end), tiles.row] for end in _ends(self.labels, tiles.q))
        k_lo, k_hi = (end[_row(tiles.b, end), tiles.column] for end in _ends(self.labels, tiles.k))
        return (q_lo <= k_hi) & (k_lo <= q_hi), (q_lo == q_hi) & (k_lo == k_hi) & (q_lo == k_lo)

    def marks(self, tiles: Tiles, before: int = 0) -> list[Tensor]:
        return [_row(tiles.b, self.labels), tiles.row, tiles.column]


@dataclass(frozen=True, eq=False)
class Valid(Rule):
    """The key (or with rows the query) position is valid: valid (B, M)."""

    valid: Tensor
    rows: bool = False

    def look(self, tiles: Tiles, before: int = 0) -> Verdict:
        blocks, index = (tiles.q, tiles.row) if self.rows else (tiles.k, tiles.column)
        every, some = (end[_row(tiles.b, end), index].bool() for end in _ends(self.valid.to(torch.uint8), blocks))
        return some, every

    def marks(self, tiles: Tiles, before: int = 0) -> list[Tensor]:
        blocks, index = (tiles.q, tiles.row) if self.rows else (tiles.k, tiles.column)
        held = self.valid[:, blocks.positions.clamp(min=0)] & (blocks.positions >= 0)
        # blocks with the same keys are alike, and there are few kinds of them where padding is contiguous
        kind = torch.unique(held.flatten(0, 1), dim=0, return_inverse=True)[1].view(held.shape[:2])
        return [kind[_row(tiles.b, kind), index]]


@dataclass(frozen=True, eq=False)
class Table(Rule):
    """A whole mask: bool (B|1, H|1, N, M); row i is position i."""

    mask: Tensor
    _kept: dict = field(default_factory=dict, repr=False)

    def look(self, tiles: Tiles, before: int = 0) -> Verdict:
        some, every = self._reduced(tiles.q, tiles.k)
        place = (_row(tiles.b, some), tiles.h.clamp(max=some.shape[1] - 1), tiles.row, tiles.column)
        return some[place], every[place]

    def marks(self, tiles: Tiles, before: int = 0) -> list[Tensor]:
        return [_row(tiles.b, self.mask), tiles.h.clamp(max=self.mask.shape[1] - 1), tiles.row, tiles.column]

    def _reduced(self, q: Blocks, k: Blocks) -> Verdict:
        key = (id(q), id(k))
        if key not in self._kept:
            part = self.mask[:, :, q.positions.clamp(min=0).flatten()][:, :, :, k.positions.clamp(min=0).flatten()]
            part = part.unflatten(3, k.positions.shape).unflatten(2, q.positions.shape)
            missing = (q.positions < 0)[:, :, None, None] | (k.positions < 0)
            some = (part & ~missing).any(5).any(3)
            self._kept[key] = (some, (part | missing).all(5).all(3), q, k)
        return self._kept[key][:2]


def _inner(shape: tuple[int, ...], axis: int) -> int:
    size = 1
    for length in shape[axis + 1 :]:
        size *= length
    return size


def _early(lo: Tensor) -> Tensor:
    # where a block begins before the first position that counts, it matters by how much
    return lo.clamp(max=1)


def _take(span: Span, index: Tensor) -> Span:
    return Span(span.lo[index], span.hi[index], tuple(mark[index] for mark in span.marks))


def _both(conditions: list[Tensor]) -> Tensor:
    return conditions[0] if len(conditions) == 1 else conditions[0] & conditions[1]


def _least(x: Tensor, limit: Tensor | int) -> Tensor:
    return x.clamp(max=limit) if isinstance(limit, int) else torch.minimum(x, limit)


def _has_multiple(least: Tensor, most: Tensor, step: int) -> Verdict:
    """Is any (or every) whole number in least..most a multiple of step?"""
    if step == 1:
        true = torch.ones_like(least, dtype=torch.bool)
        return true, true
    some = most // step * step >= least
    return some, some & (least == most)


def _marks_of_parts(rules: tuple[Rule, ...], tiles: Tiles, before: int) -> list[Tensor]:
    out = []
    for rule in rules:
        some, every = rule.look(tiles, before)
        settled = every | ~some
        # a part that is all or nothing on this tile says no more than that
        out += [torch.where(settled, -1, mark) for mark in rule.marks(tiles, before)]
        out.append(every.long() + some)
    return out


def _ends(values: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Least and largest value of each block, (B, count)."""
    held = values[:, blocks.positions.clamp(min=0)]
    none = blocks.positions < 0
    if not bool(none.any()):
        return held.amin(2), held.amax(2)
    # places without a position repeat the first one of the block
    held = torch.where(none, held[:, :, :1], held)
    return held.amin(2), held.amax(2)


def _row(b: Tensor, table: Tensor) -> Tensor:
    # data with one batch row serves every row
    return b.clamp(max=table.shape[0] - 1)
