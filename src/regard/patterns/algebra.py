"""The pattern algebra: patterns as values, `&`, `|`, `~`, bound data, the dense mask.

A pattern speaks of absolute positions: row r of q has position `i = q_offset + r`, column j is position j.
`allowed(b, h, i, j, data)` is the one definition of a pattern; everything else is derived from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from regard.contract.errors import OptionError, ShapeError

Data = Mapping[str, Tensor]
NO_DATA: Data = {}


@dataclass(frozen=True, repr=False)
class Pattern:
    """A hashable value: which query position may attend to which key position.

    causal: True only if no query may see a later key. needs: names of the tensors to bind before use.
    """

    @property
    def causal(self) -> bool:
        return False

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

    def needed_after(self, h: int, j: int) -> float:
        """The last query position that can still see key j (math.inf if any later one may): a cache may drop it then."""
        return math.inf

    def bind(self, **tensors: Tensor) -> Bound:
        """Attach run-time data by name, such as `doc=` (B, M) or `key_valid=` (B, M)."""
        return Bound(self, {}).bind(**tensors)

    def dense(
        self, n: int, m: int, *, q_offset: int = 0, device: torch.device | str | None = None, data: Data = NO_DATA
    ) -> Tensor:
        """The boolean mask (B|1, H|1, n, m), True = may attend. Raises OptionError if data is missing."""
        missing = [name for name in self.needs if name not in data]
        if missing:
            calls = ", ".join(f"{name}=…" for name in missing)
            raise OptionError(f"the pattern {self} needs data: call .bind({calls}) first")
        for name in self.needs:
            device = data[name].device
            _check_data(name, data[name], n, m, q_offset, name in self.needs_rows)
        batch, heads = _extent(self.needs, data)
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

    def conjuncts(self) -> tuple[Pattern, ...]:
        """The parts of `a & b & …`; a pattern that is not an intersection is its own only part."""
        return (self,)

    def __and__(self, other: Any) -> Any:
        return _combine(And, self, other)

    def __or__(self, other: Any) -> Any:
        return _combine(Or, self, other)

    def __invert__(self) -> Pattern:
        return Not(self)

    def _text(self) -> str:
        options = [f"{f.name}={v!r}" for f in fields(self) if (v := getattr(self, f.name)) != f.default]
        return f"{type(self).__name__}({', '.join(options)})"

    def __repr__(self) -> str:
        return self._text() + (" [causal]" if self.causal else "")


@dataclass(frozen=True, repr=False)
class And(Pattern):
    """Pairs that both patterns allow."""

    left: Pattern
    right: Pattern

    @property
    def causal(self) -> bool:
        return self.left.causal or self.right.causal

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.left.needs + self.right.needs))

    @property
    def needs_rows(self) -> tuple[str, ...]:
        return self.left.needs_rows + self.right.needs_rows

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor:
        return self.left.allowed(b, h, i, j, data) & self.right.allowed(b, h, i, j, data)

    def needed_after(self, h: int, j: int) -> float:
        return min(self.left.needed_after(h, j), self.right.needed_after(h, j))

    def conjuncts(self) -> tuple[Pattern, ...]:
        return self.left.conjuncts() + self.right.conjuncts()

    def _text(self) -> str:
        return f"({self.left._text()} & {self.right._text()})"


@dataclass(frozen=True, repr=False)
class Or(Pattern):
    """Pairs that either pattern allows."""

    left: Pattern
    right: Pattern

    @property
    def causal(self) -> bool:
        return self.left.causal and self.right.causal

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.left.needs + self.right.needs))

    @property
    def needs_rows(self) -> tuple[str, ...]:
        return self.left.needs_rows + self.right.needs_rows

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor:
        return self.left.allowed(b, h, i, j, data) | self.right.allowed(b, h, i, j, data)

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

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor:
        return ~self.inner.allowed(b, h, i, j, data)

    def _text(self) -> str:
        return f"~{self.inner._text()}"


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

    def __repr__(self) -> str:
        return f"{self.pattern!r} with {', '.join(self.data) or 'no data'}"


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
