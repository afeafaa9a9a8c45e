"""Every atom with its definition in plain integers: what the patterns are compared with."""

from __future__ import annotations

import math

from regard.patterns import (
    Axial,
    Band,
    BlockCausal,
    BlockGrid,
    BlockLocal,
    Blocks,
    Causal,
    CoreContext,
    DilatedWindow,
    Empty,
    Full,
    GridWindow,
    Halo,
    Neighborhood,
    PerHead,
    Prefix,
    SinkBand,
    Sinks,
    SlidingWindow,
    Strided,
    StridedBlocks,
    Window,
)


def cell(i, shape):
    out = []
    for length in reversed(shape):
        out.append(i % length)
        i //= length
    return tuple(reversed(out))


def on_axes(shape, rule):
    """The rule on every axis; rule(axis, x, y)."""
    return lambda h, i, j: all(
        rule(a, x, y) for a, (x, y) in enumerate(zip(cell(i, shape), cell(j, shape), strict=True))
    )


def neighbours(length, kernel, stride, dilation, causal, x):
    """The keys that x sees on one axis, written from the text of the definition with lists."""
    group = list(range(x % dilation, length, dilation))
    u = group.index(x)
    first = u - u % stride
    if causal:
        leader = min(first + stride - 1, len(group) - 1)
        return [group[t] for t in range(max(leader - kernel + 1, 0), u + 1)]
    leader = min(first + stride // 2, len(group) - 1)
    window = list(range(leader - kernel // 2, leader + kernel - kernel // 2))
    while window[0] < 0:
        window = [t + 1 for t in window]
    while window[-1] > len(group) - 1:
        window = [t - 1 for t in window]
    return [group[t] for t in window]


def sharded(block, local, vstride, offset, step, dense_from):
    return lambda h, i, j: (
        j <= i
        and (i // block - j // block < local or (j // block + h * step + offset) % vstride == 0 or h >= dense_from)
    )


def core_context(group, window, cores):
    def rule(h, i, j):
        closed = max(0, math.floor((i + 1 - window) / group))
        return j < closed if j < cores else closed * group <= j - cores <= i

    return rule


G2, G3 = (6, 7), (3, 4, 5)
ATOMS = {
    "full": (Full(), lambda h, i, j: True),
    "empty": (Empty(), lambda h, i, j: False),
    "causal": (Causal(), lambda h, i, j: j <= i),
    "strict": (Causal(strict=True), lambda h, i, j: j < i),
    "window 1": (SlidingWindow(1), lambda h, i, j: i == j),
    "window 9": (SlidingWindow(9), lambda h, i, j: abs(i - j) < 9),
    "band": (Band(5, 2), lambda h, i, j: -5 <= j - i <= 2),
    "band 0": (Band(7, 0), lambda h, i, j: -7 <= j - i <= 0),
    "dilated": (DilatedWindow(4, 3), lambda h, i, j: abs(i - j) < 12 and (i - j) % 3 == 0),
    "dilated 1": (DilatedWindow(4, 1), lambda h, i, j: abs(i - j) < 4),
    "strided": (Strided(5, 2), lambda h, i, j: (i - j) % 5 == 2),
    "strided keys": (Strided(5, 2, "key"), lambda h, i, j: j % 5 == 2),
    "strided 1": (Strided(1), lambda h, i, j: True),
    "sinks": (Sinks(3), lambda h, i, j: j < 3 and j <= i),
    "sinks open": (Sinks(3, causal=False), lambda h, i, j: j < 3),
    "prefix": (Prefix(11), lambda h, i, j: j < 11),
    "prefix 0": (Prefix(0), lambda h, i, j: False),
    "blocks": (Blocks(5), lambda h, i, j: i // 5 == j // 5),
    "blocks 8": (Blocks(8), lambda h, i, j: i // 8 == j // 8),
    "block local": (BlockLocal(5, 2, 1), lambda h, i, j: -1 <= i // 5 - j // 5 <= 2),
    "block causal": (BlockCausal(6), lambda h, i, j: j // 6 <= i // 6),
    "sink band": (SinkBand(4, 1, 2), lambda h, i, j: j // 4 < 1 or i // 4 - j // 4 < 2),
    "sink band 0": (SinkBand(4, 0, 1), lambda h, i, j: i // 4 - j // 4 < 1),
    "shards": (StridedBlocks(16, 1, 2, heads=2), sharded(16, 1, 2, 0, 1, 9)),
    "shards dense": (StridedBlocks(16, 1, 3, 1, 2, 1, heads=3), sharded(16, 1, 3, 1, 2, 2)),
    "shards kv": (
        StridedBlocks(16, 1, 2, heads=4, kv_heads=2), lambda h, i, j: sharded(16, 1, 2, 0, 1, 9)(h // 2, i, j)
    ),
    "shards official": (StridedBlocks(16, 1, 6, step="official", heads=2), sharded(16, 1, 6, 0, 3, 9)),
    "shards homo": (StridedBlocks(16, 1, 2, offset=1, homo=True), lambda h, i, j: sharded(16, 1, 2, 1, 1, 9)(0, i, j)),
    "shards all": (StridedBlocks(16, 0, 1, homo=True), lambda h, i, j: j <= i),
    "core context": (CoreContext(4, 8, cores=9), core_context(4, 8, 9)),
    "core context uneven": (CoreContext(3, 7, cores=12), core_context(3, 7, 12)),
    "core tokens": (CoreContext(4, 6, "tokens"), core_context(4, 6, 0)),
    "core cores": (CoreContext(4, 6, "cores"), core_context(4, 6, 999)),
    "windows": (Window(G2, (2, 7)), on_axes(G2, lambda a, x, y: x // (2, 7)[a] == y // (2, 7)[a])),
    "windows shifted": (
        Window(G2, 3, (1, 2)), on_axes(G2, lambda a, x, y: (x + (1, 2)[a]) // 3 == (y + (1, 2)[a]) // 3)
    ),
    "windows 3": (Window(G3, 2), on_axes(G3, lambda a, x, y: x // 2 == y // 2)),
    "grid window": (GridWindow((6, 8), (3, 2)), on_axes((6, 8), lambda a, x, y: x % (2, 4)[a] == y % (2, 4)[a])),
    "axial 0": (Axial(G2, 0), on_axes(G2, lambda a, x, y: a == 0 or x == y)),
    "axial -1": (Axial(G3, -1), on_axes(G3, lambda a, x, y: a == 2 or x == y)),
    "halo": (Halo(G2, 2, 1), on_axes(G2, lambda a, x, y: x // 2 * 2 - 1 <= y < x // 2 * 2 + 3)),
    "halo 0": (Halo(G2, (3, 2), 0), on_axes(G2, lambda a, x, y: x // (3, 2)[a] == y // (3, 2)[a])),
    "near": (Neighborhood(G2, 3), on_axes(G2, lambda a, x, y: y in neighbours(G2[a], 3, 1, 1, False, x))),
    "near even": (
        Neighborhood(G2, (4, 2), 1, (2, 1)),
        on_axes(G2, lambda a, x, y: y in neighbours(G2[a], (4, 2)[a], (2, 1)[a], 1, False, x)),
    ),
    "near dilated": (
        Neighborhood((9, 7), (3, 2), (2, 3), (1, 2)),
        on_axes((9, 7), lambda a, x, y: y in neighbours((9, 7)[a], (3, 2)[a], (1, 2)[a], (2, 3)[a], False, x)),
    ),
    "near causal": (
        Neighborhood(G3, (2, 3, 4), (1, 1, 1), (2, 1, 3), (True, False, True)),
        on_axes(
            G3, lambda a, x, y: y in neighbours(G3[a], (2, 3, 4)[a], (2, 1, 3)[a], 1, (True, False, True)[a], x)
        ),
    ),
    "near all causal": (
        Neighborhood(G2, 3, 1, 2, True), on_axes(G2, lambda a, x, y: y in neighbours(G2[a], 3, 2, 1, True, x))
    ),
    "near line": (Neighborhood(70, 9, 3, 4), lambda h, i, j: j in neighbours(70, 9, 4, 3, False, i)),
    "block grid": (
        BlockGrid((6, 8), (3, 4), (3, 2), 2),
        lambda h, i, j: on_axes(
            (6, 8), lambda a, x, y: x // (3, 4)[a] == y // (3, 4)[a] if h == 0 else x % (2, 4)[a] == y % (2, 4)[a]
        )(h, i, j),
    ),
    "and": (Causal() & SlidingWindow(9), lambda h, i, j: 0 <= i - j < 9),
    "or": (Causal() | Prefix(14), lambda h, i, j: j <= i or j < 14),
    "not": (~SlidingWindow(5), lambda h, i, j: abs(i - j) >= 5),
    "minus": (Causal() - SlidingWindow(5), lambda h, i, j: i - j >= 5),
    "nested": (~(Causal() | Prefix(4)) | SlidingWindow(2), lambda h, i, j: not (j <= i or j < 4) or abs(i - j) < 2),
    "per head": (
        PerHead([Causal(), SlidingWindow(4), Causal() & ~Prefix(2)]),
        lambda h, i, j: [j <= i, abs(i - j) < 4, 2 <= j <= i][h],
    ),
    "per head inside": (
        Causal() & PerHead([SlidingWindow(4), Full()]) | Sinks(1), lambda h, i, j: j <= i and (h == 1 or i - j < 4 or j < 1)
    ),
    "on": (
        Neighborhood(G2, 3).on(prefix=5),
        lambda h, i, j: i < 5 or j < 5 or on_axes(G2, lambda a, x, y: y in neighbours(G2[a], 3, 1, 1, False, x))(
            h, i - 5, j - 5
        ),
    ),
    "on a line": (Causal().on(prefix=3), lambda h, i, j: i < 3 or j < 3 or j <= i),
    "on twice": (
        Blocks(4).on(prefix=3).on(prefix=6), lambda h, i, j: i < 9 or j < 9 or (i - 9) // 4 == (j - 9) // 4
    ),
    "on heads": (
        PerHead([Window(G2, 2), Axial(G2, 1)]).on(prefix=2) & Causal(),
        lambda h, i, j: j <= i and (
            i < 2 or j < 2
            or on_axes(G2, (lambda a, x, y: x // 2 == y // 2) if h == 0 else (lambda a, x, y: a == 1 or x == y))(
                h, i - 2, j - 2
            )
        ),
    ),
}  # fmt: skip
SIZES = [(42, 42, 0), (20, 37, 17), (1, 40, 39), (42, 9, 0), (7, 30, 0)]


def sizes(pattern, table=SIZES):
    """Those sizes that the pattern has positions for."""
    return [(n, m, o) for n, m, o in table if pattern.tokens is None or max(n + o, m) <= pattern.tokens]
