"""The atoms on a line. i, j are absolute query and key positions; // rounds down; all data is bound by name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regard.contract.errors import OptionError, ShapeError
from regard.patterns.algebra import NO_DATA, Data, HeadScope, Pattern
from regard.patterns.rules import (
    AllOf,
    Always,
    AnyOf,
    BlockDistance,
    ClosedGroups,
    Distance,
    DistanceResidue,
    KeyResidue,
    KeysBelow,
    NoneOf,
    OnLine,
    Rule,
    SameLabel,
    Table,
    Valid,
)


@dataclass(frozen=True, repr=False)
class Full(Pattern):
    """Every query may see every key."""

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor:
        return (i == i) & (j == j)

    @property
    def translation(self) -> int | None:
        return 1

    @property
    def kv_efficient(self) -> bool:
        return True

    def rule(self, data: Data) -> Rule:
        return Always(True)


@dataclass(frozen=True, repr=False)
class Empty(Pattern):
    """No query sees any key."""

    @property
    def causal(self) -> bool:
        return True

    @property
    def translation(self) -> int | None:
        return 1

    @property
    def kv_efficient(self) -> bool:
        return True

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor:
        return (i != i) & (j != j)

    def rule(self, data: Data) -> Rule:
        return Always(False)

    def needed_after(self, h: int, j: int) -> float:
        return -1


@dataclass(frozen=True, repr=False)
class Causal(Pattern):
    """j <= i; with strict, j < i."""

    strict: bool = False

    @property
    def causal(self) -> bool:
        return True

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor:
        return j < i if self.strict else j <= i

    @property
    def translation(self) -> int | None:
        return 1

    @property
    def kv_efficient(self) -> bool:
        return not self.strict

    def rule(self, data: Data) -> Rule:
        return OnLine(Distance(1 if self.strict else 0, None))

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

    @property
    def translation(self) -> int | None:
        return 1

    @property
    def kv_efficient(self) -> bool:
        return True

    def rule(self, data: Data) -> Rule:
        return OnLine(Distance(1 - self.window, self.window - 1))

    def needed_after(self, h: int, j: int) -> float:
        return j + self.window - 1


@dataclass(frozen=True, repr=False)
class Band(Pattern):
    """-left <= j - i <= right: left + 1 + right keys with the own one. left, right: keys, at least 0."""

    left: int
    right: int

    def __post_init__(self) -> None:
        if self.left < 0 or self.right < 0:
            raise OptionError(
                f"Band needs at least 0 keys on each side, not {self.left} and {self.right}; for a side without limit "
                "write Causal() or ~Causal(strict=True)"
            )

    @property
    def causal(self) -> bool:
        return self.right == 0

    @property
    def translation(self) -> int | None:
        return 1

    @property
    def kv_efficient(self) -> bool:
        return True

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor:
        return (i - j <= self.left) & (j - i <= self.right)

    def rule(self, data: Data) -> Rule:
        return OnLine(Distance(-self.right, self.left))

    def needed_after(self, h: int, j: int) -> float:
        return j + self.left


@dataclass(frozen=True, repr=False)
class DilatedWindow(Pattern):
    """|i - j| < window * dilation, and i - j a multiple of dilation: every dilation-th key of a wider window.

    window: keys on each side with the own one, at least 1. dilation: at least 1.
    """

    window: int
    dilation: int

    def __post_init__(self) -> None:
        _at_least("DilatedWindow", 1, window=self.window, dilation=self.dilation)

    @property
    def translation(self) -> int | None:
        return 1

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor:
        reach = self.window * self.dilation
        return (i - j < reach) & (j - i < reach) & ((i - j) % self.dilation == 0)

    def rule(self, data: Data) -> Rule:
        reach = (self.window - 1) * self.dilation
        return AllOf((OnLine(Distance(-reach, reach)), OnLine(DistanceResidue(self.dilation, 0))))

    def needed_after(self, h: int, j: int) -> float:
        return j + (self.window - 1) * self.dilation


@dataclass(frozen=True, repr=False)
class Strided(Pattern):
    """Every stride-th key: (i - j) % stride == offset, or with of="key" j % stride == offset, for every query.

    stride: at least 1. offset: 0 to stride - 1.
    """

    stride: int
    offset: int = 0
    of: Literal["distance", "key"] = "distance"

    def __post_init__(self) -> None:
        _at_least("Strided", 1, stride=self.stride)
        if not 0 <= self.offset < self.stride:
            raise OptionError(f"Strided needs an offset from 0 to stride - 1 = {self.stride - 1}, not {self.offset}")
        if self.of not in ("distance", "key"):
            raise OptionError(f"Strided counts of='distance' or of='key', not {self.of!r}")

    @property
    def translation(self) -> int | None:
        return 1 if self.of == "distance" else self.stride

    @property
    def kv_efficient(self) -> bool:
        return self.of == "key"

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor:
        if self.of == "key":
            return (j % self.stride == self.offset) & (i == i)
        return (i - j) % self.stride == self.offset

    def rule(self, data: Data) -> Rule:
        if self.of == "key":
            return OnLine(KeyResidue(1, self.stride, self.offset))
        return OnLine(DistanceResidue(self.stride, self.offset))

    def needed_after(self, h: int, j: int) -> float:
        return -1 if self.of == "key" and j % self.stride != self.offset else math.inf


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

    @property
    def kv_efficient(self) -> bool:
        return True

    def rule(self, data: Data) -> Rule:
        first = OnLine(KeysBelow(self.count))
        return AllOf((first, OnLine(Distance(0, None)))) if self.causal else first


@dataclass(frozen=True, repr=False)
class Prefix(Pattern):
    """The first `count` keys for every query: `Causal() | Prefix(n)` is a prefix language model. Not causal."""

    count: int

    def __post_init__(self) -> None:
        if self.count < 0:
            raise OptionError(f"Prefix needs a count of at least 0 keys, not {self.count}")

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor:
        return (j < self.count) & (i == i)

    @property
    def kv_efficient(self) -> bool:
        return True

    def rule(self, data: Data) -> Rule:
        return OnLine(KeysBelow(self.count))


@dataclass(frozen=True, repr=False)
class BlockLocal(Pattern):
    """-after <= i // size - j // size <= before: the own block, `before` blocks before it and `after` behind it.

    size: positions, at least 1. before, after: blocks, at least 0.
    """

    size: int
    before: int
    after: int

    def __post_init__(self) -> None:
        _at_least("BlockLocal", 1, size=self.size)
        _at_least("BlockLocal", 0, before=self.before, after=self.after)

    @property
    def translation(self) -> int | None:
        return self.size

    @property
    def kv_efficient(self) -> bool:
        return True

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor:
        apart = i // self.size - j // self.size
        return (apart <= self.before) & (apart >= -self.after)

    def rule(self, data: Data) -> Rule:
        return OnLine(BlockDistance(self.size, -self.after, self.before))

    def needed_after(self, h: int, j: int) -> float:
        return (j // self.size + self.before + 1) * self.size - 1


@dataclass(frozen=True, repr=False)
class Blocks(Pattern):
    """i // size == j // size: every block sees itself. size: positions, at least 1."""

    size: int

    def __post_init__(self) -> None:
        _at_least("Blocks", 1, size=self.size)

    @property
    def translation(self) -> int | None:
        return self.size

    @property
    def kv_efficient(self) -> bool:
        return True

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor:
        return i // self.size == j // self.size

    def rule(self, data: Data) -> Rule:
        return OnLine(BlockDistance(self.size, 0, 0))

    def needed_after(self, h: int, j: int) -> float:
        return (j // self.size + 1) * self.size - 1


@dataclass(frozen=True, repr=False)
class BlockCausal(Pattern):
    """j // size <= i // size: causal over blocks, full inside one. size: positions, at least 1."""

    size: int

    def __post_init__(self) -> None:
        _at_least("BlockCausal", 1, size=self.size)

    @property
    def causal(self) -> bool:
        return self.size == 1

    @property
    def translation(self) -> int | None:
        return self.size

    @property
    def kv_efficient(self) -> bool:
        return True

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor:
        return j // self.size <= i // self.size

    def rule(self, data: Data) -> Rule:
        return OnLine(BlockDistance(self.size, 0, None))


@dataclass(frozen=True, repr=False)
class SinkBand(Pattern):
    """j // size < sink_blocks, or i // size - j // size < band_blocks: to be combined with Causal().

    size: positions, at least 1. sink_blocks: at least 0. band_blocks: at least 1, the own block among them.
    """

    size: int
    sink_blocks: int
    band_blocks: int

    def __post_init__(self) -> None:
        _at_least("SinkBand", 1, size=self.size, band_blocks=self.band_blocks)
        _at_least("SinkBand", 0, sink_blocks=self.sink_blocks)

    @property
    def kv_efficient(self) -> bool:
        return True

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor:
        key = j // self.size
        return (key < self.sink_blocks) | (i // self.size - key < self.band_blocks)

    def rule(self, data: Data) -> Rule:
        sinks = OnLine(KeysBelow(self.sink_blocks * self.size))
        return AnyOf((sinks, OnLine(BlockDistance(self.size, None, self.band_blocks - 1))))

    def needed_after(self, h: int, j: int) -> float:
        block = j // self.size
        return math.inf if block < self.sink_blocks else (block + self.band_blocks) * self.size - 1


@dataclass(frozen=True, repr=False)
class StridedBlocks(Pattern):
    """Causal, and near or in the shard of the head: P - R < local or (R + m * step + offset) % vstride == 0.

    P, R: the block of the query and of the key; m: the key head. block: positions, a power of two from 16 on. local:
    blocks, the own one among them, at least 1 unless vstride is 1. vstride: every how many blocks a head keeps one.
    dense_heads: so many last key heads see everything before them. step: 1 with "cover", max(1, vstride // heads) with
    "official". homo: all heads have one shard. heads, kv_heads: query and key heads, needed unless homo; kv_heads is
    heads if None. Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads.
    """

    block: int = 64
    local: int = 16
    vstride: int = 8
    dense_heads: int = 0
    step: int | Literal["cover", "official"] = "cover"
    offset: int = 0
    homo: bool = False
    heads: int | None = None  # type: ignore[assignment]
    kv_heads: int | None = None

    def __post_init__(self) -> None:
        _at_least("StridedBlocks", 1, vstride=self.vstride)
        _at_least("StridedBlocks", 0, local=self.local, dense_heads=self.dense_heads)
        if self.block < 16 or self.block & (self.block - 1):
            raise OptionError(f"StridedBlocks needs a block that is a power of two from 16 on, not {self.block}")
        if self.local < 1 and self.vstride > 1:
            raise OptionError("StridedBlocks with local=0 leaves the first rows without keys; use local=1 or more")
        if self.homo and self.dense_heads:
            raise OptionError("StridedBlocks with homo gives all heads one shard; dense_heads contradicts it")
        if isinstance(self.step, str) and self.step not in ("cover", "official"):
            raise OptionError(f"StridedBlocks takes a step of 'cover', 'official' or a number, not {self.step!r}")
        if self.homo:
            return
        if self.heads is None or self.heads < 1:
            raise OptionError(f"StridedBlocks needs heads=, the number of query heads, not {self.heads}; or homo=True")
        if self.heads % self._kv or self._kv < 1:
            raise OptionError(f"StridedBlocks needs heads as a multiple of kv_heads, not {self.heads} of {self._kv}")
        if self.dense_heads > self._kv:
            raise OptionError(f"StridedBlocks cannot make {self.dense_heads} of {self._kv} key heads dense")

    @property
    def causal(self) -> bool:
        return True

    @property
    def head_scope(self) -> HeadScope:
        return "all" if self.homo else "kv"

    @property
    def translation(self) -> int | None:
        return self.block * self.vstride

    @property
    def kv_efficient(self) -> bool:
        return True

    def covers(self) -> bool:
        """Does every key before a query belong to the shard of some head?"""
        if self.vstride == 1 or self.dense_heads:
            return True
        if self.homo:
            return False
        return len({head * self._stride % self.vstride for head in range(self._kv)}) == self.vstride

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor:
        key = j // self.block
        shift = 0 if self.homo else h // self._share * self._stride
        seen = (i // self.block - key < self.local) | ((key + shift + self.offset) % self.vstride == 0)
        if self.dense_heads:
            seen = seen | (h // self._share >= self._kv - self.dense_heads)
        return seen & (j <= i)

    def rule(self, data: Data) -> Rule:
        near = OnLine(BlockDistance(self.block, None, self.local - 1))
        shard = OnLine(KeyResidue(self.block, self.vstride, -self.offset % self.vstride))
        return AllOf((AnyOf((near, shard)), OnLine(Distance(0, None))))

    def for_head(self, h: int) -> Pattern:
        if self.homo:
            return self
        head = h // self._share
        if head >= self._kv - self.dense_heads:
            return Causal()
        shift = (head * self._stride + self.offset) % self.vstride
        return StridedBlocks(self.block, self.local, self.vstride, offset=shift, homo=True)

    def needed_after(self, h: int, j: int) -> float:
        seen = self.for_head(h)
        if seen is not self:
            return seen.needed_after(h, j)
        block = j // self.block
        return math.inf if (block + self.offset) % self.vstride == 0 else (block + self.local) * self.block - 1

    @property
    def _kv(self) -> int:
        return (self.heads or 1) if self.kv_heads is None else self.kv_heads

    @property
    def _share(self) -> int:
        return (self.heads or 1) // self._kv

    @property
    def _stride(self) -> int:
        if self.step == "official":
            return max(1, self.vstride // (self.heads or 1))
        return 1 if isinstance(self.step, str) else self.step


@dataclass(frozen=True, repr=False)
class CoreContext(Pattern):
    """Pooled keys of closed groups far away, single keys near: every earlier position is covered exactly once.

    Row i has c = max(0, (i + 1 - window) // group) closed groups: it sees the pooled keys 0..c-1 ("cores") and the keys
    c * group..i ("tokens"). part: which of them the columns are; with "both" the first `cores` columns are the pooled
    keys and the tokens follow. group, window: keys, at least 1. Core Context Aware Attention, section 3.
    """

    group: int
    window: int
    part: Literal["cores", "tokens", "both"] = "both"
    cores: int | None = None

    def __post_init__(self) -> None:
        _at_least("CoreContext", 1, group=self.group, window=self.window)
        if self.part not in ("cores", "tokens", "both"):
            raise OptionError(f"CoreContext has the parts 'cores', 'tokens' and 'both', not {self.part!r}")
        if (self.part == "both") != (self.cores is not None):
            raise OptionError("CoreContext with part='both' needs cores=, the number of pooled keys; the others do not")
        if self.cores is not None:
            _at_least("CoreContext", 0, cores=self.cores)

    @property
    def causal(self) -> bool:
        return self.part != "both"

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor:
        closed = ((i + 1 - self.window) // self.group).clamp(min=0)
        if self.part == "cores":
            return j < closed
        if self.part == "tokens":
            return (j >= closed * self.group) & (j <= i)
        token = j - self._ahead
        return (token < 0) & (j < closed) | (token >= 0) & (token >= closed * self.group) & (token <= i)

    def check(self, n: int, m: int, q_offset: int, data: Data) -> None:
        super().check(n, m, q_offset, data)
        closed = max(0, (q_offset + n - self.window) // self.group)
        if self.part == "both" and closed > self._ahead:
            raise ShapeError(f"the query at {q_offset + n - 1} has {closed} closed groups, but cores={self.cores}")

    def rule(self, data: Data) -> Rule:
        cores = OnLine(ClosedGroups(self.group, self.window, 0, of_cores=True))
        tokens = AllOf((
            OnLine(ClosedGroups(self.group, self.window, self._ahead, of_cores=False)),
            OnLine(Distance(-self._ahead, None)),
        ))  # fmt: skip
        if self.part != "both":
            return cores if self.part == "cores" else tokens
        first = OnLine(KeysBelow(self._ahead))
        return AnyOf((AllOf((first, cores)), AllOf((NoneOf(first), tokens))))

    def needed_after(self, h: int, j: int) -> float:
        if self.part == "cores" or j < self._ahead:
            return math.inf
        return ((j - self._ahead) // self.group + 1) * self.group + self.window - 2

    @property
    def _ahead(self) -> int:
        return self.cores or 0


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

    def rule(self, data: Data) -> Rule:
        return SameLabel(data[self.label])


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

    def rule(self, data: Data) -> Rule:
        keys = Valid(data[self.label])
        return AllOf((keys, Valid(data[self.label], rows=True))) if self.rows else keys


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

    @property
    def head_scope(self) -> HeadScope:
        return "head"

    def rule(self, data: Data) -> Rule:
        return Table(data[self.label])


def _row(b: Tensor, table: Tensor) -> Tensor:
    # data with one batch row serves every row
    return b.clamp(max=table.shape[0] - 1)


def _at_least(pattern: str, least: int, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < least:
            raise OptionError(f"{pattern} needs {name} of at least {least}, not {size}")
