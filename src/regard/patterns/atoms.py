"""The atoms of the pattern algebra. i, j are absolute query and key positions; all data is bound by name."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.contract.errors import OptionError
from regard.patterns.algebra import NO_DATA, Data, Pattern


@dataclass(frozen=True, repr=False)
class Full(Pattern):
    """Every query may see every key."""

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor:
        return (i == i) & (j == j)


@dataclass(frozen=True, repr=False)
class Causal(Pattern):
    """j <= i; with strict, j < i."""

    strict: bool = False

    @property
    def causal(self) -> bool:
        return True

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor:
        return j < i if self.strict else j <= i

    def row_counts(
        self, n: int, m: int, *, q_offset: int = 0, device: torch.device | str | None = None, data: Data = NO_DATA
    ) -> Tensor:
        first = q_offset + (0 if self.strict else 1)
        return torch.arange(first, first + n, device=device).clamp(max=m).view(1, 1, n)


@dataclass(frozen=True, repr=False)
class SlidingWindow(Pattern):
    """|i - j| < window. With Causal: `window` keys, the query's own among them.

    window: keys, at least 1.
    """

    window: int

    def __post_init__(self) -> None:
        if self.window < 1:
            raise OptionError(f"SlidingWindow needs a window of at least 1 key, not {self.window}")

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor:
        return (i - j < self.window) & (j - i < self.window)

    def needed_after(self, h: int, j: int) -> float:
        return j + self.window - 1


@dataclass(frozen=True, repr=False)
class Sinks(Pattern):
    """The first `count` keys, for every query at or after them; with causal=False for every query.

    count: keys, at least 1. Causal by default, because `Causal() & SlidingWindow(w) | Sinks(n)` parses as
    `(Causal() & SlidingWindow(w)) | Sinks(n)`, in which plain `j < n` would show the future to the first rows.
    """

    count: int
    causal: bool = True  # type: ignore[assignment,misc]

    def __post_init__(self) -> None:
        if self.count < 1:
            raise OptionError(f"Sinks needs at least 1 key, not {self.count}")

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor:
        first = (j < self.count) & (i == i)
        return first & (j <= i) if self.causal else first


@dataclass(frozen=True, repr=False)
class Prefix(Pattern):
    """The first `count` keys for every query: `Causal() | Prefix(n)` is a prefix language model. Not causal."""

    count: int

    def __post_init__(self) -> None:
        if self.count < 0:
            raise OptionError(f"Prefix needs a count of at least 0 keys, not {self.count}")

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor:
        return (j < self.count) & (i == i)


@dataclass(frozen=True, repr=False)
class Documents(Pattern):
    """Queries see only keys of their own document. Data: integer ids (B, M), bound under `label`."""

    label: str = "doc"

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.label,)

    @property
    def needs_rows(self) -> tuple[str, ...]:
        return (self.label,)

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor:
        ids = data[self.label]
        b = _row(b, ids)
        return ids[b, i] == ids[b, j]


@dataclass(frozen=True, repr=False)
class KeyValid(Pattern):
    """Keys that are real, not padding. Data: bool (B, M), bound under `label`, True = takes part.

    rows: also empty the rows of queries that are padding, so that their output is exactly 0.
    """

    rows: bool = False
    label: str = "key_valid"

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.label,)

    @property
    def needs_rows(self) -> tuple[str, ...]:
        return (self.label,) if self.rows else ()

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor:
        valid = data[self.label]
        if valid.dtype != torch.bool:
            raise OptionError(f"the data {self.label!r} is {valid.dtype}; it must be bool, True = takes part")
        b = _row(b, valid)
        keys = valid[b, j] & (i == i)
        return keys & valid[b, i] if self.rows else keys


@dataclass(frozen=True, repr=False)
class Explicit(Pattern):
    """Any mask. Data: bool (B|1, H|1, N, M) bound under `label`; row i of the mask is absolute position i."""

    label: str = "mask"

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.label,)

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor:
        mask = data[self.label]
        return mask[_row(b, mask), h.clamp(max=mask.shape[1] - 1), i, j]


def _row(b: Tensor, table: Tensor) -> Tensor:
    # data with one batch row serves every row
    return b.clamp(max=table.shape[0] - 1)
