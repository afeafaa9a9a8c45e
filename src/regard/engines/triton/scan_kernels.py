"""Kernels of the scan over chunks, the same three primitives as `scan_chunks`; `scan.py` launches them.

Each serves both directions: what flows back is a scan from the end to the start. A program owns a tile of one result
and adds up in a fixed order. Cumulated log-decays come as a float32 and its remainder, so that their differences keep
their digits; documents as numbers that do not fall. Strides and sizes travel as tuples, what is absent is None.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def chunk_states(
    x, y, states, c, c_low, segment, x_at, y_at, c_at, sizes, scale, REVERSED: tl.constexpr, X: tl.constexpr,
    Y: tl.constexpr, X_LANES: tl.constexpr, Y_LANES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """What each chunk adds to the state: (weights x)' y, in tiles of (X, Y).

    Forward x, y are keys and values, left over at the end of the chunk; REVERSED queries and gradients of outputs, as
    they reach back before it, over all heads that share the state.
    """
    n, chunks, heads, share = sizes
    tiles_y: tl.constexpr = (Y + Y_LANES - 1) // Y_LANES
    tiles: tl.constexpr = (X + X_LANES - 1) // X_LANES * tiles_y
    program = tl.program_id(0)
    tile, chunk, slab = program % tiles, program // tiles % chunks, program // tiles // chunks
    b, h = slab // heads, slab % heads
    at_x, at_y = tile // tiles_y * X_LANES, tile % tiles_y * Y_LANES
    r = tl.arange(0, CHUNK)
    weights = _row_weights(c, c_low, segment, c_at, chunks, b, h, chunk, r, not REVERSED, CHUNK) * scale
    total = tl.zeros((X_LANES, Y_LANES), tl.float32)
    for head in range(h * share, h * share + share):
        left = _read(x, x_at, b, head, chunk * CHUNK + r, n, at_x, X, X_LANES)
        right = _read(y, y_at, b, head, chunk * CHUNK + r, n, at_y, Y, Y_LANES)
        # a hidden step is to add 0 whatever it holds
        left = tl.where(weights[:, None] == 0.0, 0.0, left.to(tl.float32) * weights[:, None]).to(x.dtype.element_ty)
        right = tl.where(weights[:, None] == 0.0, 0.0, right).to(y.dtype.element_ty)
        total += _product(tl.trans(left), right, right.dtype)
    lane_x, lane_y = at_x + tl.arange(0, X_LANES), at_y + tl.arange(0, Y_LANES)
    place = states + tl.cast(slab * chunks + chunk, tl.int64) * (X * Y) + (lane_x[:, None] * Y + lane_y[None, :])
    tl.store(place, total, mask=(lane_x < X)[:, None] & (lane_y < Y)[None, :])


@triton.jit
def prefix_states(
    states, start, last, left, left_at, sizes, REVERSED: tl.constexpr, SIZE: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """What the chunks add becomes the state before each (REVERSED: its gradient after each); last: behind them all.

    left: how much of the state a chunk leaves. In float64, since the rounding would add up over many chunks; the time
    goes into reading and writing.
    """
    _, chunks, heads, _ = sizes
    tiles: tl.constexpr = (SIZE + LANES - 1) // LANES
    program = tl.program_id(0)
    slab = program // tiles
    b, h = slab // heads, slab % heads
    lane = program % tiles * LANES + tl.arange(0, LANES)
    real = lane < SIZE
    state = tl.zeros((LANES,), tl.float64)
    if start is not None:
        state += tl.load(start + tl.cast(slab, tl.int64) * SIZE + lane, mask=real, other=0.0).to(tl.float64)
    for step in range(0, chunks):
        chunk = chunks - 1 - step if REVERSED else step
        place = states + tl.cast(slab * chunks + chunk, tl.int64) * SIZE + lane
        added = tl.load(place, mask=real, other=0.0).to(tl.float64)
        tl.store(place, state.to(tl.float32), mask=real)
        if left is not None:
            kept = tl.load(left + tl.cast(b, tl.int64) * left_at[0] + h * left_at[1] + chunk)
            # nothing of an earlier document is left, not even infinity
            state = tl.where(kept == 0.0, 0.0, state * kept)
        state += added
    tl.store(last + tl.cast(slab, tl.int64) * SIZE + lane, state.to(tl.float32), mask=real)


@triton.jit
def chunk_outputs(
    x, y, z, states, out, c, c_low, segment, x_at, y_at, z_at, states_at, c_at, sizes, near, far,
    REVERSED: tl.constexpr, X: tl.constexpr, Z: tl.constexpr, X_LANES: tl.constexpr, Z_LANES: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """near ((x y') * pairs) z + far weights (x state), in tiles of (CHUNK, Z).

    Forward: rows look back, pairs weigh exp(c_row - c_column), and y, z have a head for `share` of x. REVERSED: rows
    are keys that later queries look at, pairs weigh exp(c_column - c_row), and y, z have `share` heads for one of x.
    """
    n, chunks, heads, share = sizes
    tiles: tl.constexpr = (Z + Z_LANES - 1) // Z_LANES
    program = tl.program_id(0)
    at_z, chunk, slab = program % tiles * Z_LANES, program // tiles % chunks, program // tiles // chunks
    b, h = slab // heads, slab % heads
    r = tl.arange(0, CHUNK)
    first = chunk * CHUNK
    pairs = _pair_weights(c, c_low, segment, c_at, chunks, b, h, chunk, r, REVERSED, CHUNK)
    head, stop, state_slab = h // share, h // share + 1, b * (heads // share) + h // share
    if REVERSED:
        head, stop, state_slab = h * share, h * share + share, slab
    result = tl.zeros((CHUNK, Z_LANES), tl.float32)
    for other in range(head, stop):
        table = tl.zeros((CHUNK, CHUNK), tl.float32)
        for at_x in range(0, X, X_LANES):
            rows = _read(x, x_at, b, h, first + r, n, at_x, X, X_LANES)
            columns = _read(y, y_at, b, other, first + r, n, at_x, X, X_LANES)
            table += tl.dot(rows, tl.trans(columns), input_precision="ieee")
        values = _read(z, z_at, b, other, first + r, n, at_z, Z, Z_LANES)
        result += _product(table * pairs, values, values.dtype)
    reached = tl.zeros((CHUNK, Z_LANES), tl.float32)
    origin = states + tl.cast(state_slab * chunks + chunk, tl.int64) * (X * Z)
    lane_z = at_z + tl.arange(0, Z_LANES)
    for at_x in range(0, X, X_LANES):
        rows = _read(x, x_at, b, h, first + r, n, at_x, X, X_LANES)
        lane_x = at_x + tl.arange(0, X_LANES)
        place = origin + (lane_x[:, None] * states_at[0] + lane_z[None, :] * states_at[1])
        state = tl.load(place, mask=(lane_x < X)[:, None] & (lane_z < Z)[None, :], other=0.0)
        reached += _product(rows, state, rows.dtype)
    weights = _row_weights(c, c_low, segment, c_at, chunks, b, h, chunk, r, REVERSED, CHUNK)
    reached = tl.where(weights[:, None] == 0.0, 0.0, reached * weights[:, None])
    place = out + tl.cast(slab, tl.int64) * n * Z + (tl.cast(first + r, tl.int64)[:, None] * Z + lane_z[None, :])
    result = result * near + reached * far
    tl.store(place, result.to(out.dtype.element_ty), mask=(first + r < n)[:, None] & (lane_z < Z)[None, :])


@triton.jit
def _read(x, at, b, h, i, n, first, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """Rows i of (B, H, N, WIDTH), the columns from `first` on: (len(i), LANES), 0 where there is nothing."""
    lane = first + tl.arange(0, LANES)
    base = x + tl.cast(b, tl.int64) * at[0] + tl.cast(h, tl.int64) * at[1]
    place = base + ((tl.cast(i, tl.int64) * at[2])[:, None] + lane[None, :])
    return tl.load(place, mask=(i < n)[:, None] & (lane < WIDTH)[None, :], other=0.0)


@triton.jit
def _row_weights(c, c_low, segment, c_at, chunks, b, h, chunk, r, END: tl.constexpr, CHUNK: tl.constexpr):
    """How much of each step is left at the END of its chunk, or how much of the state before the chunk at each step."""
    weights = tl.full(r.shape, 1.0, tl.float32)
    if c is not None:
        at = tl.cast(b, tl.int64) * c_at[0] + tl.cast(h, tl.int64) * c_at[1] + chunk * CHUNK
        gap, gap_low = tl.load(c + at + r), tl.load(c_low + at + r)
        if END:
            gap = tl.load(c + at + CHUNK - 1) - gap
            gap_low = tl.load(c_low + at + CHUNK - 1) - gap_low
        weights = tl.exp(gap + gap_low)
    if segment is not None:
        at = segment + tl.cast(b, tl.int64) * chunks * CHUNK + chunk * CHUNK
        # the initial state belongs to document 0
        edge = tl.load(at + CHUNK - 1) if END else tl.load(at - 1, mask=chunk > 0, other=0)
        weights = tl.where(tl.load(at + r) == edge, weights, 0.0)
    return weights


@triton.jit
def _pair_weights(c, c_low, segment, c_at, chunks, b, h, chunk, r, REVERSED: tl.constexpr, CHUNK: tl.constexpr):
    """What is left of the earlier step of a pair at the later one; 0 for pairs that may not meet."""
    meet = (r[:, None] <= r[None, :]) if REVERSED else (r[:, None] >= r[None, :])
    if segment is not None:
        here = tl.load(segment + tl.cast(b, tl.int64) * chunks * CHUNK + chunk * CHUNK + r)
        meet = meet & (here[:, None] == here[None, :])
    weights = tl.full((CHUNK, CHUNK), 1.0, tl.float32)
    if c is not None:
        at = tl.cast(b, tl.int64) * c_at[0] + tl.cast(h, tl.int64) * c_at[1] + chunk * CHUNK + r
        high, low = tl.load(c + at), tl.load(c_low + at)
        gap = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
        weights = tl.exp(tl.minimum(-gap if REVERSED else gap, 0.0))
    return tl.where(meet, weights, 0.0)


@triton.jit
def _product(a, b, kind: tl.constexpr):
    """a @ b in the dtype of the inputs. Sums would not fit into a float16; TF32 has as many digits."""
    if kind == tl.float16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32")
    return tl.dot(a.to(kind), b.to(kind), input_precision="ieee")
