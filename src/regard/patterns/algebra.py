"""The pattern algebra: patterns as values, `&`, `|`, `~`, `-`, one pattern per head, bound data, the dense mask.

A pattern speaks of absolute positions: row r of q has position `i = q_offset + r`, column j is position j.
`allowed(b, h, i, j, data)` is the one definition of a pattern; everything else is derived from it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from regard.contract.errors import OptionError, ShapeError
from regard.patterns.layout import BlockLayout, lay_out
from regard.patterns.rules import AllOf, AnyOf, Behind, Data, NoneOf, Rule

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

HeadScope = Literal["all", "kv", "head"]
NO_DATA: Data = {}
_KINDS: dict[int, type[Pattern]] = {}


@dataclass(frozen=True, repr=False)
class Pattern:
    """A hashable value: which query position may attend to which key position.

    causal: True only if no query may see a later key. needs: names of the tensors to bind before use.
    """

    opcode: ClassVar[int] = 0

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.opcode = zlib.crc32(cls.__name__.encode())
        _KINDS[cls.opcode] = cls

    @property
    def causal(self) -> bool:
        return False

    @property
    def heads(self) -> int | None:
        """How many query heads the pattern speaks of; None if it is the same for any number of them."""
        return None

    @property
    def head_scope(self) -> HeadScope:
        """ "all" heads see the same, or those of one "kv" head do, or every "head" has a pattern of its own."""
        return "all"

    @property
    def batch_scope(self) -> bool:
        """True if rows of the batch may differ, because the pattern has run-time data."""
        return bool(self.needs)

    @property
    def translation(self) -> int | None:
        """A period p: allowed(i + p, j + p) == allowed(i, j) wherever both exist. None if none is known."""
        return None

    @property
    def kv_efficient(self) -> bool:
        """True only if a key that some query at or after it does not see is seen by no later one."""
        return False

    @property
    def tokens(self) -> int | None:
        """How many positions there are, for patterns on a grid."""
        return None

    @property
    def needs(self) -> tuple[str, ...]:
        return ()

    @property
    def needs_rows(self) -> tuple[str, ...]:
        """Those of `needs` that are also read at query positions, so that their data must reach these."""
        return ()

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor:
        """Bool by broadcast of integer tensors: may query position i of head h, batch row b see key position j?"""
        raise NotImplementedError

    def rule(self, data: Data) -> Rule:
        """What the pattern, as one head sees it, says of whole tiles: `allowed` in three-valued logic."""
        raise NotImplementedError

    def for_head(self, h: int) -> Pattern:
        """What query head h sees, as a pattern without heads."""
        return self

    def needed_after(self, h: int, j: int) -> float:
        """The last query position that can still see key j (math.inf if any later one may): a cache may drop it then."""
        return math.inf

    def on(self, *, prefix: int) -> Pattern:
        """The pattern behind `prefix` more tokens, which see everything and are seen by everything."""
        return On(self, prefix)

    def code(self) -> tuple[int, ...]:
        """The pattern as integers, for operators that take nothing else; `decode` reads them."""
        out: list[int] = [self.opcode]
        for f in fields(self):
            out += _encode(getattr(self, f.name))
        return tuple(out)

    def bind(self, **tensors: Tensor) -> Bound:
        """Attach run-time data by name, such as `doc=` (B, M) or `key_valid=` (B, M)."""
        return Bound(self, {}).bind(**tensors)

    def dense(
        self, n: int, m: int, *, q_offset: int = 0, device: torch.device | str | None = None, data: Data = NO_DATA
    ) -> Tensor:
        """The boolean mask (B|1, H|1, n, m), True = may attend. Raises OptionError if data is missing."""
        self.check(n, m, q_offset, data)
        for name in self.needs:
            device = data[name].device
        batch, heads = self.extent(data)
        if self.heads is not None:
            heads = self.heads
        i = torch.arange(q_offset, q_offset + n, device=device).view(1, 1, n, 1)
        j = torch.arange(m, device=device).view(1, 1, 1, m)
        b = torch.arange(batch, device=device).view(batch, 1, 1, 1)
        h = torch.arange(heads, device=device).view(1, heads, 1, 1)
        mask = self.allowed(b, h, i, j, data)
        return mask.expand(mask.shape[0], mask.shape[1], n, m)

    def row_counts(
        self, n: int, m: int, *, q_offset: int = 0, device: torch.device | str | None = None, data: Data = NO_DATA
    ) -> Tensor:
        """How many keys each query sees: int64 (B|1, H|1, n)."""
        return self.dense(n, m, q_offset=q_offset, device=device, data=data).sum(-1)

    def layout(
        self,
        n: int,
        m: int,
        *,
        block: tuple[int, int] = (64, 64),
        q_offset: int = 0,
        device: torch.device | str | None = None,
        data: Data = NO_DATA,
    ) -> BlockLayout:
        """The tiles that may hold a pair, for engines that work in blocks; see `BlockLayout`. Kept for pure patterns."""
        self.check(n, m, q_offset, data)
        return lay_out(self, n, m, (block[0], block[1]), q_offset, device, data)

    def flex(
        self,
        batch: int,
        heads: int,
        n: int,
        m: int,
        *,
        block: int = 128,
        q_offset: int = 0,
        device: torch.device | str | None = None,
        data: Data = NO_DATA,
    ) -> BlockMask:
        """The pattern as a BlockMask of torch's flex_attention, made from the layout."""
        from regard.patterns.flex import block_mask

        self.check(n, m, q_offset, data)
        return block_mask(self, batch, heads, n, m, block, q_offset, device, data)

    def check(self, n: int, m: int, q_offset: int, data: Data) -> None:
        """Raise OptionError if data is missing, ShapeError if it or the grid does not reach the positions."""
        missing = [name for name in self.needs if name not in data]
        if missing:
            calls = ", ".join(f"{name}=…" for name in missing)
            raise OptionError(f"the pattern {self} needs data: call .bind({calls}) first")
        for name in self.needs:
            _check_data(name, data[name], n, m, q_offset, name in self.needs_rows)
        if self.tokens is not None and (q_offset + n > self.tokens or m > self.tokens):
            raise ShapeError(
                f"the pattern {self} has {self.tokens} positions, but there is a query at {q_offset + n - 1} and "
                f"there are {m} keys; other tokens go in front by .on(prefix=…)"
            )

    def extent(self, data: Data) -> tuple[int, int]:
        """(batch rows, heads) of the data."""
        return _extent(self.needs, data)

    def conjuncts(self) -> tuple[Pattern, ...]:
        """The parts of `a & b & …`; a pattern that is not an intersection is its own only part."""
        return (self,)

    def __and__(self, other: Any) -> Any:
        return _combine(And, self, other)

    def __or__(self, other: Any) -> Any:
        return _combine(Or, self, other)

    def __invert__(self) -> Pattern:
        return Not(self)

    def __sub__(self, other: Any) -> Any:
        return _combine(And, self, _inverse(other))

    def _text(self) -> str:
        options = [f"{f.name}={v!r}" for f in fields(self) if (v := getattr(self, f.name)) != f.default]
        return f"{type(self).__name__}({', '.join(options)})"

    def __repr__(self) -> str:
        return self._text() + (" [causal]" if self.causal else "")


@dataclass(frozen=True, repr=False)
class Pair(Pattern):
    """What `&` and `|` have in common."""

    left: Pattern
    right: Pattern

    def __post_init__(self) -> None:
        _same_heads((self.left, self.right))

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.left.needs + self.right.needs))

    @property
    def needs_rows(self) -> tuple[str, ...]:
        return self.left.needs_rows + self.right.needs_rows

    @property
    def heads(self) -> int | None:
        return self.right.heads if self.left.heads is None else self.left.heads

    @property
    def head_scope(self) -> HeadScope:
        return _widest((self.left, self.right))

    @property
    def translation(self) -> int | None:
        return _period((self.left, self.right))

    @property
    def kv_efficient(self) -> bool:
        return self.left.kv_efficient and self.right.kv_efficient

    @property
    def tokens(self) -> int | None:
        return _fewest((self.left, self.right))

    def for_head(self, h: int) -> Pattern:
        return type(self)(self.left.for_head(h), self.right.for_head(h))


@dataclass(frozen=True, repr=False)
class And(Pair):
    """Pairs that both patterns allow."""

    @property
    def causal(self) -> bool:
        return self.left.causal or self.right.causal

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor:
        return self.left.allowed(b, h, i, j, data) & self.right.allowed(b, h, i, j, data)

    def rule(self, data: Data) -> Rule:
        return AllOf((self.left.rule(data), self.right.rule(data)))

    def needed_after(self, h: int, j: int) -> float:
        return min(self.left.needed_after(h, j), self.right.needed_after(h, j))

    def conjuncts(self) -> tuple[Pattern, ...]:
        return self.left.conjuncts() + self.right.conjuncts()

    def _text(self) -> str:
        return f"({self.left._text()} & {self.right._text()})"


@dataclass(frozen=True, repr=False)
class Or(Pair):
    """Pairs that either pattern allows."""

    @property
    def causal(self) -> bool:
        return self.left.causal and self.right.causal

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor:
        return self.left.allowed(b, h, i, j, data) | self.right.allowed(b, h, i, j, data)

    def rule(self, data: Data) -> Rule:
        return AnyOf((self.left.rule(data), self.right.rule(data)))

    def needed_after(self, h: int, j: int) -> float:
        return max(self.left.needed_after(h, j), self.right.needed_after(h, j))

    def _text(self) -> str:
        return f"({self.left._text()} | {self.right._text()})"


@dataclass(frozen=True, repr=False)
class Not(Pattern):
    """Pairs that a pattern does not allow; never counted as causal."""

    inner: Pattern

    @property
    def needs(self) -> tuple[str, ...]:
        return self.inner.needs

    @property
    def needs_rows(self) -> tuple[str, ...]:
        return self.inner.needs_rows

    @property
    def heads(self) -> int | None:
        return self.inner.heads

    @property
    def head_scope(self) -> HeadScope:
        return self.inner.head_scope

    @property
    def translation(self) -> int | None:
        return self.inner.translation

    @property
    def tokens(self) -> int | None:
        return self.inner.tokens

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor:
        return ~self.inner.allowed(b, h, i, j, data)

    def rule(self, data: Data) -> Rule:
        return NoneOf(self.inner.rule(data))

    def for_head(self, h: int) -> Pattern:
        return Not(self.inner.for_head(h))

    def _text(self) -> str:
        return f"~{self.inner._text()}"


@dataclass(frozen=True, repr=False)
class PerHead(Pattern):
    """A pattern for every query head. kv_heads: if given, heads that share keys must share their pattern."""

    patterns: tuple[Pattern, ...]
    kv_heads: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "patterns", tuple(self.patterns))
        if not self.patterns:
            raise OptionError("PerHead needs a pattern for every query head; none was given")
        for p in self.patterns:
            if not isinstance(p, Pattern):
                raise OptionError(f"PerHead takes patterns without bound data, not {type(p).__name__}; bind the whole")
        _same_heads((self, *self.patterns))
        if self.kv_heads is not None and not self._is_grouped(self.kv_heads):
            raise OptionError(
                f"the {len(self.patterns)} heads do not fall into {self.kv_heads} groups with one pattern each; "
                "leave kv_heads out or give the heads of a group the same pattern"
            )

    @property
    def causal(self) -> bool:
        return all(p.causal for p in self.patterns)

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for p in self.patterns for name in p.needs))

    @property
    def needs_rows(self) -> tuple[str, ...]:
        return tuple(name for p in self.patterns for name in p.needs_rows)

    @property
    def heads(self) -> int | None:
        return len(self.patterns)

    @property
    def head_scope(self) -> HeadScope:
        if len({p.for_head(h) for h, p in enumerate(self.patterns)}) == 1:
            return "all"
        return "head" if self.kv_heads is None else "kv"

    @property
    def translation(self) -> int | None:
        return _period(self.patterns)

    @property
    def kv_efficient(self) -> bool:
        return all(p.kv_efficient for p in self.patterns)

    @property
    def tokens(self) -> int | None:
        return _fewest(self.patterns)

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor:
        out = (h == 0) & self.patterns[0].allowed(b, h, i, j, data)
        for head, p in enumerate(self.patterns[1:], 1):
            out = out | (h == head) & p.allowed(b, h, i, j, data)
        return out

    def for_head(self, h: int) -> Pattern:
        return self.patterns[h].for_head(h)

    def needed_after(self, h: int, j: int) -> float:
        return self.patterns[h].needed_after(h, j)

    def _is_grouped(self, kv_heads: int) -> bool:
        if kv_heads < 1 or len(self.patterns) % kv_heads:
            return False
        size = len(self.patterns) // kv_heads
        seen = [p.for_head(h) for h, p in enumerate(self.patterns)]
        return all(seen[h] == seen[h - h % size] for h in range(len(seen)))

    def _text(self) -> str:
        groups = "" if self.kv_heads is None else f", kv_heads={self.kv_heads}"
        return f"PerHead(({''.join(p._text() + ', ' for p in self.patterns)}){groups})"


@dataclass(frozen=True, repr=False)
class On(Pattern):
    """A pattern behind `prefix` tokens that see everything and are seen by everything."""

    inner: Pattern
    prefix: int

    def __post_init__(self) -> None:
        if self.prefix < 0:
            raise OptionError(f"a prefix holds at least 0 tokens, not {self.prefix}")
        if self.inner.needs:
            raise OptionError(f"{self.inner} has data bound by position: put .on(prefix=…) around the rest alone")

    @property
    def causal(self) -> bool:
        return self.inner.causal and not self.prefix

    @property
    def heads(self) -> int | None:
        return self.inner.heads

    @property
    def head_scope(self) -> HeadScope:
        return self.inner.head_scope

    @property
    def translation(self) -> int | None:
        return None if self.prefix else self.inner.translation

    @property
    def kv_efficient(self) -> bool:
        return self.inner.kv_efficient

    @property
    def tokens(self) -> int | None:
        return None if self.inner.tokens is None else self.inner.tokens + self.prefix

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor:
        behind = self.inner.allowed(b, h, (i - self.prefix).clamp(min=0), (j - self.prefix).clamp(min=0), data)
        return (i < self.prefix) | (j < self.prefix) | behind

    def rule(self, data: Data) -> Rule:
        return Behind(self.inner.rule(data), self.prefix)

    def for_head(self, h: int) -> Pattern:
        return On(self.inner.for_head(h), self.prefix)

    def needed_after(self, h: int, j: int) -> float:
        if j < self.prefix:
            return math.inf
        return max(self.inner.needed_after(h, j - self.prefix) + self.prefix, self.prefix - 1)

    def _text(self) -> str:
        return f"{self.inner._text()}.on(prefix={self.prefix})"


class Bound:
    """A pattern with its run-time tensors; not hashable. `&`, `|`, `~` work as for patterns.

    pattern: the value. data: name -> tensor.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, pattern: Pattern, data: Data):
        self.pattern = pattern
        self.data = data

    @property
    def causal(self) -> bool:
        return self.pattern.causal

    def bind(self, **tensors: Tensor) -> Bound:
        """Attach more data. Raises OptionError for a name the pattern does not use or that holds other data already."""
        for name, tensor in tensors.items():
            if name not in self.pattern.needs:
                known = ", ".join(self.pattern.needs) or "none"
                raise OptionError(f"the pattern {self.pattern} takes no data {name!r}; it takes: {known}")
            if name in self.data and self.data[name] is not tensor:
                raise OptionError(
                    f"the data {name!r} of {self.pattern} is bound already; give one of them another label"
                )
        return Bound(self.pattern, {**self.data, **tensors})

    def dense(self, n: int, m: int, *, q_offset: int = 0, device: torch.device | str | None = None) -> Tensor:
        """The boolean mask (B|1, H|1, n, m)."""
        return self.pattern.dense(n, m, q_offset=q_offset, device=device, data=self.data)

    def row_counts(self, n: int, m: int, *, q_offset: int = 0, device: torch.device | str | None = None) -> Tensor:
        """How many keys each query sees: int64 (B|1, H|1, n)."""
        return self.pattern.row_counts(n, m, q_offset=q_offset, device=device, data=self.data)

    def layout(
        self,
        n: int,
        m: int,
        *,
        block: tuple[int, int] = (64, 64),
        q_offset: int = 0,
        device: torch.device | str | None = None,
    ) -> BlockLayout:
        """The tiles that may hold a pair; see `BlockLayout`."""
        return self.pattern.layout(n, m, block=block, q_offset=q_offset, device=device, data=self.data)

    def flex(
        self,
        batch: int,
        heads: int,
        n: int,
        m: int,
        *,
        block: int = 128,
        q_offset: int = 0,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """The pattern as a BlockMask of torch's flex_attention."""
        return self.pattern.flex(
            batch, heads, n, m, block=block, q_offset=q_offset, device=device, data=self.data
        )  # fmt: skip

    def __and__(self, other: Any) -> Bound:
        return _combine(And, self, other)

    def __or__(self, other: Any) -> Bound:
        return _combine(Or, self, other)

    def __rand__(self, other: Pattern) -> Bound:
        return _combine(And, other, self)

    def __ror__(self, other: Pattern) -> Bound:
        return _combine(Or, other, self)

    def __invert__(self) -> Bound:
        return Bound(~self.pattern, self.data)

    def __sub__(self, other: Any) -> Bound:
        return _combine(And, self, _inverse(other))

    def __rsub__(self, other: Pattern) -> Bound:
        return _combine(And, other, _inverse(self))

    def __repr__(self) -> str:
        return f"{self.pattern!r} with {', '.join(self.data) or 'no data'}"


def decode(code: tuple[int, ...] | list[int]) -> Pattern:
    """The pattern that `Pattern.code` wrote. Raises OptionError for other integers."""
    numbers = iter(code)
    try:
        found = _read(numbers)
    except (StopIteration, KeyError) as error:
        raise OptionError("these integers are no code of a pattern, or of one that is not imported") from error
    if next(numbers, None) is not None:
        raise OptionError("there are integers behind the code of the pattern")
    return found


def _encode(value: Any) -> list[int]:
    if isinstance(value, Pattern):
        return [_PATTERN, *value.code()]
    if isinstance(value, bool):
        return [_BOOL, 1 if value else 0]
    if value is None:
        return [_NONE]
    if isinstance(value, str):
        return [_TEXT, len(value), *[ord(c) for c in value]]
    if isinstance(value, tuple):
        return [_TUPLE, len(value), *[number for item in value for number in _encode(item)]]
    return [_INT, value]


def _read(numbers: Iterator[int]) -> Pattern:
    kind = _KINDS[next(numbers)]
    return kind(*[_read_value(numbers) for _ in fields(kind)])


def _read_value(numbers: Iterator[int]) -> Any:
    return _READERS[next(numbers)](numbers)


def _inverse(other: Any) -> Any:
    # torch.compile does not trace ~ on objects; what is no pattern is refused where it is combined
    if isinstance(other, Bound):
        return Bound(Not(other.pattern), other.data)
    return Not(other) if isinstance(other, Pattern) else other


def _same_heads(patterns: tuple[Pattern, ...]) -> None:
    counts = [p.heads for p in patterns if p.heads is not None]
    if counts and min(counts) != max(counts):
        raise OptionError(f"patterns for different numbers of heads do not combine: {sorted(set(counts))}")


def _widest(patterns: tuple[Pattern, ...]) -> HeadScope:
    scopes = [p.head_scope for p in patterns]
    return "head" if "head" in scopes else "kv" if "kv" in scopes else "all"


def _period(patterns: tuple[Pattern, ...]) -> int | None:
    periods = [p.translation for p in patterns]
    known = [period for period in periods if period is not None]
    return math.lcm(*known) if len(known) == len(periods) else None


def _fewest(patterns: tuple[Pattern, ...]) -> int | None:
    known = [p.tokens for p in patterns if p.tokens is not None]
    return min(known) if known else None


def _combine(kind: type[And] | type[Or], left: Any, right: Any) -> Any:
    for side in (left, right):
        if not isinstance(side, Pattern | Bound):
            raise OptionError(f"a pattern combines with patterns only, not with {type(side).__name__}")
    if isinstance(left, Pattern) and isinstance(right, Pattern):
        return kind(left, right)
    a = left if isinstance(left, Bound) else Bound(left, {})
    b = right if isinstance(right, Bound) else Bound(right, {})
    return Bound(kind(a.pattern, b.pattern), a.data).bind(**b.data)


def _check_data(name: str, tensor: Tensor, n: int, m: int, q_offset: int, reads_rows: bool) -> None:
    if tensor.dim() == 2:
        if tensor.shape[1] != m:
            raise ShapeError(f"the pattern data {name!r} has {tensor.shape[1]} positions, but there are {m} keys")
        if reads_rows and q_offset + n > m:
            raise ShapeError(f"the pattern data {name!r} has {m} positions, but there is a query at {q_offset + n - 1}")
        return
    if tensor.dim() != 4:
        raise ShapeError(
            f"the pattern data {name!r} has shape {tuple(tensor.shape)}; it must be (B, M) or (B, H, N, M)"
        )
    if tensor.dtype != torch.bool:
        raise ShapeError(f"the mask {name!r} is {tensor.dtype}; it must be bool, True = may attend")
    if tensor.shape[2] < q_offset + n or tensor.shape[3] < m:
        raise ShapeError(
            f"the mask {name!r} is {tuple(tensor.shape)}; it must reach query position {q_offset + n - 1} and key {m - 1}"
        )


def _extent(needs: tuple[str, ...], data: Data) -> tuple[int, int]:
    # torch.compile knows no max with a default
    batches = [data[name].shape[0] for name in needs] or [1]
    heads = [data[name].shape[1] for name in needs if data[name].dim() == 4] or [1]
    return max(batches), max(heads)


_PATTERN, _BOOL, _NONE, _TEXT, _TUPLE, _INT = range(6)
_READERS: dict[int, Callable[[Iterator[int]], Any]] = {
    _PATTERN: _read,
    _BOOL: lambda numbers: bool(next(numbers)),
    _NONE: lambda numbers: None,
    _TEXT: lambda numbers: "".join(chr(next(numbers)) for _ in range(next(numbers))),
    _TUPLE: lambda numbers: tuple(_read_value(numbers) for _ in range(next(numbers))),
    _INT: lambda numbers: next(numbers),
}
