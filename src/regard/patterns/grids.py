"""The atoms on a grid: positions are the cells in row-major order, the last axis fastest; x, y are the coordinates of i, j."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.contract.errors import OptionError
from regard.patterns.algebra import Data, Pattern, PerHead
from regard.patterns.rules import (
    AllOf,
    Always,
    AroundBlock,
    BlockDistance,
    Distance,
    DistanceResidue,
    Near,
    OnAxis,
    Relation,
    Rule,
)

Sizes = int | tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """A grid of tokens behind `prefix` others (a class token, text, registers), which meet everything."""

    shape: tuple[int, ...]
    prefix: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", _shape(self.shape))
        if self.prefix < 0:
            raise OptionError(f"a prefix holds at least 0 tokens, not {self.prefix}")

    @property
    def tokens(self) -> int:
        """All of them, the prefix with them."""
        return self.prefix + math.prod(self.shape)


@dataclass(frozen=True, repr=False)
class GridPattern(Pattern):
    """A pattern that is a relation on every axis of a grid. shape: cells on each axis."""

    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", _shape(self.shape))

    @property
    def tokens(self) -> int | None:
        return math.prod(self.shape)

    @property
    def translation(self) -> int | None:
        step = self._period()
        return None if step is None else step * math.prod(self.shape[1:])

    def allowed(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor, data: Data) -> Tensor:
        last = len(self.shape) - 1
        inner = self.shape[last]
        out = self._meets(last, i % inner, j % inner)
        for axis in range(last - 1, -1, -1):
            length = self.shape[axis]
            out = out & self._meets(axis, i // inner % length, j // inner % length)
            inner *= length
        return out

    def rule(self, data: Data) -> Rule:
        found = [(axis, self._relation(axis)) for axis in range(len(self.shape))]
        rules = tuple(OnAxis(self.shape, axis, relation) for axis, relation in found if relation is not None)
        return AllOf(rules) if rules else Always(True)

    def needed_after(self, h: int, j: int) -> float:
        last, inner = 0, 1
        for axis in reversed(range(len(self.shape))):
            last += self._last(axis, j // inner % self.shape[axis]) * inner
            inner *= self.shape[axis]
        return last

    def _meets(self, axis: int, x: Tensor, y: Tensor) -> Tensor:
        """Bool: may coordinate x of a query and y of a key meet on this axis?"""
        raise NotImplementedError

    def _relation(self, axis: int) -> Relation | None:
        """The same for intervals; None if all coordinates meet."""
        raise NotImplementedError

    def _last(self, axis: int, y: int) -> int:
        """The last coordinate of a query that sees y."""
        raise NotImplementedError

    def _period(self) -> int | None:
        """By how much both coordinates of the first axis may be moved; None if by nothing known."""
        return None

    def _each(self, name: str, least: int) -> None:
        """Write option `name` as one number per axis."""
        value = getattr(self, name)
        sizes = (value,) * len(self.shape) if isinstance(value, int) else tuple(value)
        if len(sizes) != len(self.shape):
            raise OptionError(
                f"{type(self).__name__} has {len(self.shape)} axes {self.shape}, but {name} has {len(sizes)}: {sizes}"
            )
        if min(sizes) < least:
            raise OptionError(f"{type(self).__name__} needs {name} of at least {least} on every axis, not {sizes}")
        object.__setattr__(self, name, sizes)


@dataclass(frozen=True, repr=False)
class Window(GridPattern):
    """Cells of the same window: (x + shift) // window == (y + shift) // window on every axis.

    window: cells, at least 1, a number or one per axis. shift: cells, 0 to window - 1; window - s is the mask of windows
    on a grid rolled by -s, with the regions that the roll brings together kept apart.
    """

    window: Sizes
    shift: Sizes = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._each("window", 1)
        self._each("shift", 0)
        if any(s >= w for s, w in zip(self.shift, self.window, strict=True)):  # type: ignore[arg-type]
            raise OptionError(f"Window needs a shift from 0 to window - 1, not {self.shift} with windows {self.window}")

    def _meets(self, axis: int, x: Tensor, y: Tensor) -> Tensor:
        size, shift = self.window[axis], self.shift[axis]  # type: ignore[index]
        return (x + shift) // size == (y + shift) // size

    def _relation(self, axis: int) -> Relation | None:
        return BlockDistance(self.window[axis], 0, 0, self.shift[axis])  # type: ignore[index]

    def _last(self, axis: int, y: int) -> int:
        size, shift = self.window[axis], self.shift[axis]  # type: ignore[index]
        return min(((y + shift) // size + 1) * size - shift, self.shape[axis]) - 1

    def _period(self) -> int | None:
        return self.window[0]  # type: ignore[index]


@dataclass(frozen=True, repr=False)
class GridWindow(GridPattern):
    """Cells that lie `length / grid` apart: x % (length / grid) == y % (length / grid) on every axis.

    grid: cells that meet along an axis, a divisor of its length; a number or one per axis.
    """

    grid: Sizes

    def __post_init__(self) -> None:
        super().__post_init__()
        self._each("grid", 1)
        if any(length % g for length, g in zip(self.shape, self.grid, strict=True)):  # type: ignore[arg-type]
            raise OptionError(f"GridWindow needs axes that its grid divides; {self.grid} does not divide {self.shape}")

    def _meets(self, axis: int, x: Tensor, y: Tensor) -> Tensor:
        return x % self._step(axis) == y % self._step(axis)

    def _relation(self, axis: int) -> Relation | None:
        return DistanceResidue(self._step(axis), 0)

    def _last(self, axis: int, y: int) -> int:
        return self.shape[axis] - self._step(axis) + y % self._step(axis)

    def _period(self) -> int | None:
        return 1

    def _step(self, axis: int) -> int:
        return self.shape[axis] // self.grid[axis]  # type: ignore[index]


@dataclass(frozen=True, repr=False)
class Axial(GridPattern):
    """Cells of one line along `axis`: x == y on every other axis. axis: may be negative."""

    axis: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -len(self.shape) <= self.axis < len(self.shape):
            raise OptionError(f"Axial needs an axis of a grid with {len(self.shape)}, not {self.axis}")
        object.__setattr__(self, "axis", self.axis % len(self.shape))

    def _meets(self, axis: int, x: Tensor, y: Tensor) -> Tensor:
        return (x == x) & (y == y) if axis == self.axis else x == y

    def _relation(self, axis: int) -> Relation | None:
        return None if axis == self.axis else Distance(0, 0)

    def _last(self, axis: int, y: int) -> int:
        return self.shape[axis] - 1 if axis == self.axis else y

    def _period(self) -> int | None:
        return 1


@dataclass(frozen=True, repr=False)
class Halo(GridPattern):
    """Query blocks that see themselves and a rim: x // block * block - halo <= y < x // block * block + block + halo.

    block: cells, at least 1; halo: cells, at least 0; a number or one per axis. Cut off at the borders.
    """

    block: Sizes
    halo: Sizes

    def __post_init__(self) -> None:
        super().__post_init__()
        self._each("block", 1)
        self._each("halo", 0)

    def _meets(self, axis: int, x: Tensor, y: Tensor) -> Tensor:
        size, halo = self.block[axis], self.halo[axis]  # type: ignore[index]
        first = x // size * size
        return (first - halo <= y) & (y < first + size + halo)

    def _relation(self, axis: int) -> Relation | None:
        return AroundBlock(self.block[axis], self.halo[axis])  # type: ignore[index]

    def _last(self, axis: int, y: int) -> int:
        size, halo = self.block[axis], self.halo[axis]  # type: ignore[index]
        return min(((y + halo) // size + 1) * size, self.shape[axis]) - 1

    def _period(self) -> int | None:
        return self.block[0]  # type: ignore[index]


@dataclass(frozen=True, repr=False)
class Neighborhood(GridPattern):
    """The `kernel` nearest cells on every axis: exactly kernel many, the window moves inside at the borders.

    Per axis, in the group of cells with one rest modulo dilation (u = x // dilation, t = y // dilation, L its length):
    stride queries share the window of a leader. Not causal: leader = min(u // S * S + S // 2, L - 1), its centre moved
    so that centre - K // 2 .. centre + K - 1 - K // 2 lies inside. Causal: leader = min(u // S * S + S - 1, L - 1),
    max(leader - K + 1, 0) <= t <= u, cut off at the border. kernel, dilation, stride: at least 1; is_causal: bool; each
    one value or one per axis. Raises OptionError for kernel * dilation > length, stride > kernel. A kernel of 1 and axes of
    length 1, which NATTEN refuses, are allowed: the cell itself. Generalized Neighborhood Attention, section 3.
    """

    kernel: Sizes
    dilation: Sizes = 1
    stride: Sizes = 1
    is_causal: bool | tuple[bool, ...] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        axes = len(self.shape)
        for name in ("kernel", "dilation", "stride"):
            self._each(name, 1)
        causal = (self.is_causal,) * axes if isinstance(self.is_causal, bool) else tuple(map(bool, self.is_causal))
        if len(causal) != axes:
            raise OptionError(f"Neighborhood has {axes} axes {self.shape}, but is_causal has {len(causal)}: {causal}")
        object.__setattr__(self, "is_causal", causal)
        for axis in range(axes):
            length, kernel, dilation, stride, _ = self._settings(axis)
            if kernel * dilation > length:
                raise OptionError(
                    f"kernel*dilation exceeds the input: {kernel} * {dilation} > {length} on axis {axis} of {self.shape}"
                )
            if stride > kernel:
                raise OptionError(f"a stride of {stride} needs a kernel of at least that, not {kernel} (axis {axis})")

    @property
    def causal(self) -> bool:
        # on an axis with a kernel of 1 a cell sees itself alone
        return all(c or k == 1 for c, k in zip(self.is_causal, self.kernel, strict=True))  # type: ignore[arg-type]

    def subgrid(self, dilation: tuple[int, ...], rest: tuple[int, ...]) -> Neighborhood:
        """The pattern among the cells with one rest modulo `dilation`, which must divide the pattern's own."""
        if len(dilation) != len(self.shape) or any(d % e for d, e in zip(self.dilation, dilation, strict=True)):  # type: ignore[arg-type]
            raise OptionError(f"{self} does not fall into groups of cells {dilation} apart")
        sides = zip(self.shape, dilation, rest, strict=True)
        return Neighborhood(
            tuple(-(-(length - r) // d) for length, d, r in sides),
            self.kernel,
            tuple(d // e for d, e in zip(self.dilation, dilation, strict=True)),  # type: ignore[arg-type]
            self.stride,
            self.is_causal,
        )

    def _settings(self, axis: int) -> tuple[int, int, int, int, bool]:
        return (
            self.shape[axis],
            self.kernel[axis],  # type: ignore[index]
            self.dilation[axis],  # type: ignore[index]
            self.stride[axis],  # type: ignore[index]
            self.is_causal[axis],  # type: ignore[index]
        )

    def _meets(self, axis: int, x: Tensor, y: Tensor) -> Tensor:
        length, kernel, d, stride, causal = self._settings(axis)
        u, t = x // d, y // d
        # groups differ in length by one where the dilation does not divide the axis
        last = length // d - 1 + (x % d < length % d).long()
        group = u // stride * stride
        if causal:
            start = (torch.minimum(group + stride - 1, last) - (kernel - 1)).clamp(min=0)
            meets = (start <= t) & (t <= u)
        else:
            left, right = kernel // 2, kernel - 1 - kernel // 2
            centre = torch.minimum(torch.minimum(group + stride // 2, last).clamp(min=left), last - right)
            meets = (centre - left <= t) & (t <= centre + right)
        return meets if d == 1 else meets & (x % d == y % d)

    def _relation(self, axis: int) -> Relation | None:
        return Near(*self._settings(axis))

    def _last(self, axis: int, y: int) -> int:
        length, kernel, d, stride, causal = self._settings(axis)
        rest, t = y % d, y // d
        last = (length - 1 - rest) // d
        # the last leader whose window still begins at or before t
        leader = t + kernel - 1 if causal else t + kernel // 2
        if leader >= last if causal else t > last - kernel:
            return last * d + rest
        ahead = stride - 1 if causal else stride // 2
        return min((leader - ahead) // stride * stride + stride - 1, last) * d + rest

    def _period(self) -> int | None:
        length, _, dilation, stride, causal = self._settings(0)
        if not causal:
            return None
        if stride == 1:
            return 1
        return stride if dilation == 1 and length % stride == 0 else None


def BlockGrid(shape: tuple[int, ...], window: Sizes, grid: Sizes, heads: int) -> PerHead:
    """Windows for the first half of the heads, the grid of cells far apart for the second. heads: even."""
    if heads < 2 or heads % 2:
        raise OptionError(f"BlockGrid needs an even number of heads, not {heads}")
    return PerHead((Window(shape, window),) * (heads // 2) + (GridWindow(shape, grid),) * (heads // 2))


def _shape(shape: tuple[int, ...] | int) -> tuple[int, ...]:
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if not sizes or min(sizes) < 1:
        raise OptionError(f"a grid needs axes of at least one cell, not {sizes}")
    return sizes
