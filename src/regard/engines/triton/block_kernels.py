"""Kernels of block-sparse attention over the tiles of a layout; `blocks.py` launches them and says what they take.

A program owns a block of queries of one head, or a block of keys of the heads that share it, and visits the tiles of
its row (or column) of the layout in order. Everything is written once, by its owner: no atomics, the same bits in
every run. Strides and sizes travel as tuples; what is absent is None, and its branch is not compiled.
"""

from __future__ import annotations

import triton
import triton.language as tl

# what becomes of a score (behind the sigmoid weights have no upper bound), and what a row is divided by
SOFTMAX, SIGMOID, SOFTPLUS, EXP, RELU, LINEAR = (tl.constexpr(i) for i in range(6))
NOTHING, SUM, COUNT = (tl.constexpr(i) for i in range(3))


@triton.jit
def forward(
    q, k, v, out, stat, bias, sinks, seed, crow, col, tile, bits, q_at, k_at, v_at, bias_at, sinks_at, layout_at,
    sizes, scale, number, dropout, KIND: tl.constexpr, DIVISOR: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDE: tl.constexpr,
    DEEP: tl.constexpr,
):  # fmt: skip
    """out and the statistic of one block of queries; ROWS, KEYS, WIDE, DEEP: powers of two that hold the sizes."""
    n, m, heads, share, q_offset = sizes
    block, b, h = _place(tl.cdiv(n, BLOCK_Q), heads)
    r, c = tl.arange(0, ROWS), tl.arange(0, KEYS)
    i = block * BLOCK_Q + r
    real = (r < BLOCK_Q) & (i < n)
    queries = _read(q, q_at, b, h, i, real, D, WIDE)
    result = tl.zeros((ROWS, DEEP), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    if sinks is not None:
        sink = sinks + _far(b, sinks_at[0]) + _far(h, sinks_at[1]) + _far(i, sinks_at[2])
        top = tl.load(sink, mask=real, other=float("-inf")).to(tl.float32)
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    first, start, stop = _line(crow, layout_at, b, h, block)
    for at in range(start, stop):
        t = tl.load(tile + first + at)
        j = tl.load(col + first + at) * BLOCK_K + c
        there = (c < BLOCK_K) & (j < m)
        keys = _read(k, k_at, b, h // share, j, there, D, WIDE)
        values = _read(v, v_at, b, h // share, j, there, E, DEEP)
        s = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        seen = _seen(bits, t, r, c, BLOCK_Q, BLOCK_K) & real[:, None] & there[None, :]
        if bias is not None:
            s, seen = _biased(s, seen, bias, bias_at, b, h, i[:, None], j[None, :])
        if KIND == SOFTMAX:
            s = tl.where(seen, s, float("-inf"))
            higher = tl.maximum(top, tl.max(s, 1))
            # a row that has seen nothing yet has no maximum: no -inf - -inf
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp(s - safe[:, None])
            shrunk = tl.exp(top - safe)
            total = total * shrunk + tl.sum(weights, 1)
            result = result * shrunk[:, None]
            top = higher
        else:
            weights, _ = _weigh(s, seen, 1.0, number, KIND)
            if DIVISOR == SUM:
                total += tl.sum(weights, 1)
            elif DIVISOR == COUNT:
                total += tl.sum(seen.to(tl.float32), 1)
        if dropout is not None:
            weights *= _kept(seed, dropout, b, h, q_offset + i[:, None], j[None, :])
        result += _mixed(weights, values, KIND)
    if KIND == SOFTMAX:
        result = result / tl.where(total == 0.0, 1.0, total)[:, None]
        total = tl.where(total == 0.0, float("-inf"), top + tl.log(tl.where(total == 0.0, 1.0, total)))
    elif DIVISOR == SUM:
        total = tl.where(total == 0.0, 1.0, total) + number
        result = result / total[:, None]
    elif DIVISOR == COUNT:
        total = tl.maximum(total, 1.0)
        result = result / total[:, None]
    slab = b * heads + h
    if stat is not None:
        tl.store(stat + _far(slab, n) + i, total, mask=real)
    _write(out + _far(slab, n) * E, result, i, real, E, DEEP)


@triton.jit
def backward_queries(
    q, k, v, dout, stat, delta, bias, seed, dq, drow, crow, col, tile, bits, q_at, k_at, v_at, dout_at, bias_at,
    layout_at, sizes, scale, number, dropout, KIND: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDE: tl.constexpr,
    DEEP: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries, and drow (B, H, N), the sums of the gradients of the scores over the keys."""
    n, m, heads, share, q_offset = sizes
    block, b, h = _place(tl.cdiv(n, BLOCK_Q), heads)
    r, c = tl.arange(0, ROWS), tl.arange(0, KEYS)
    i = block * BLOCK_Q + r
    real = (r < BLOCK_Q) & (i < n)
    slab = b * heads + h
    queries = _read(q, q_at, b, h, i, real, D, WIDE)
    given = _read(dout, dout_at, b, h, i, real, E, DEEP)
    row_stat, row_delta = _row_numbers(stat, delta, slab, n, i, real)
    result = tl.zeros((ROWS, WIDE), tl.float32)
    sums = tl.zeros((ROWS,), tl.float32)
    first, start, stop = _line(crow, layout_at, b, h, block)
    for at in range(start, stop):
        t = tl.load(tile + first + at)
        j = tl.load(col + first + at) * BLOCK_K + c
        there = (c < BLOCK_K) & (j < m)
        keys = _read(k, k_at, b, h // share, j, there, D, WIDE)
        values = _read(v, v_at, b, h // share, j, there, E, DEEP)
        s = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        dweights = tl.dot(given, tl.trans(values), input_precision="ieee")
        seen = _seen(bits, t, r, c, BLOCK_Q, BLOCK_K) & real[:, None] & there[None, :]
        _, ds = _pulled(
            s, seen, dweights, row_stat[:, None], row_delta[:, None], bias, bias_at, seed, dropout, number, b, h,
            i[:, None], j[None, :], q_offset, KIND,
        )  # fmt: skip
        result += tl.dot(ds.to(keys.dtype), keys, input_precision="ieee")
        sums += tl.sum(ds, 1)
    if drow is not None:
        tl.store(drow + _far(slab, n) + i, sums, mask=real)
    _write(dq + _far(slab, n) * D, result * scale, i, real, D, WIDE)


@triton.jit
def backward_keys(
    q, k, v, dout, stat, delta, bias, seed, dk, dv, dcol, crow, row, tile, bits, q_at, k_at, v_at, dout_at, bias_at,
    layout_at, sizes, scale, number, dropout, KIND: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDE: tl.constexpr,
    DEEP: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys over all heads that share it, and dcol (B, H, M), sums over the queries.

    crow, row, tile, bits: of the turned layout. Scores stand turned as well: a line for each key.
    """
    n, m, heads, share, q_offset = sizes
    block, b, g = _place(tl.cdiv(m, BLOCK_K), heads // share)
    r, c = tl.arange(0, ROWS), tl.arange(0, KEYS)
    j = block * BLOCK_K + c
    there = (c < BLOCK_K) & (j < m)
    keys = _read(k, k_at, b, g, j, there, D, WIDE)
    values = _read(v, v_at, b, g, j, there, E, DEEP)
    to_keys = tl.zeros((KEYS, WIDE), tl.float32)
    to_values = tl.zeros((KEYS, DEEP), tl.float32)
    for h in range(g * share, g * share + share):
        slab = b * heads + h
        sums = tl.zeros((KEYS,), tl.float32)
        first, start, stop = _line(crow, layout_at, b, h, block)
        for at in range(start, stop):
            t = tl.load(tile + first + at)
            i = tl.load(row + first + at) * BLOCK_Q + r
            real = (r < BLOCK_Q) & (i < n)
            queries = _read(q, q_at, b, h, i, real, D, WIDE)
            given = _read(dout, dout_at, b, h, i, real, E, DEEP)
            row_stat, row_delta = _row_numbers(stat, delta, slab, n, i, real)
            s = tl.dot(keys, tl.trans(queries), input_precision="ieee") * scale
            dweights = tl.dot(values, tl.trans(given), input_precision="ieee")
            seen = _seen(bits, t, c, r, BLOCK_K, BLOCK_Q) & there[:, None] & real[None, :]
            weights, ds = _pulled(
                s, seen, dweights, row_stat[None, :], row_delta[None, :], bias, bias_at, seed, dropout, number, b, h,
                i[None, :], j[:, None], q_offset, KIND,
            )  # fmt: skip
            to_values += _mixed(weights, given, KIND)
            to_keys += tl.dot(ds.to(queries.dtype), queries, input_precision="ieee")
            sums += tl.sum(ds, 1)
        if dcol is not None:
            tl.store(dcol + _far(slab, m) + j, sums, mask=there)
    slab = b * (heads // share) + g
    _write(dk + _far(slab, m) * D, to_keys * scale, j, there, D, WIDE)
    _write(dv + _far(slab, m) * E, to_values, j, there, E, DEEP)


@triton.jit
def backward_bias(
    q, k, v, dout, stat, delta, bias, seed, dbias, crow, col, tile, bits, q_at, k_at, v_at, dout_at, bias_at,
    layout_at, members, sizes, scale, number, dropout, KIND: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDE: tl.constexpr,
    DEEP: tl.constexpr,
):  # fmt: skip
    """One block of rows of dbias (B|1, H|1, N, M), float32 and 0 before, over all batch rows and heads that share it.

    members: how many batch rows and heads share a slab of the bias.
    """
    n, m, heads, share, q_offset = sizes
    block, bias_b, bias_h = _place(tl.cdiv(n, BLOCK_Q), heads // members[1])
    r, c = tl.arange(0, ROWS), tl.arange(0, KEYS)
    i = block * BLOCK_Q + r
    real = (r < BLOCK_Q) & (i < n)
    lines = dbias + _far(bias_b * (heads // members[1]) + bias_h, n) * m + i.to(tl.int64)[:, None] * m
    for member in range(0, members[0] * members[1]):
        b = bias_b * members[0] + member // members[1]
        h = bias_h * members[1] + member % members[1]
        queries = _read(q, q_at, b, h, i, real, D, WIDE)
        given = _read(dout, dout_at, b, h, i, real, E, DEEP)
        row_stat, row_delta = _row_numbers(stat, delta, b * heads + h, n, i, real)
        first, start, stop = _line(crow, layout_at, b, h, block)
        for at in range(start, stop):
            t = tl.load(tile + first + at)
            j = tl.load(col + first + at) * BLOCK_K + c
            there = (c < BLOCK_K) & (j < m)
            keys = _read(k, k_at, b, h // share, j, there, D, WIDE)
            values = _read(v, v_at, b, h // share, j, there, E, DEEP)
            s = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
            dweights = tl.dot(given, tl.trans(values), input_precision="ieee")
            valid = real[:, None] & there[None, :]
            seen = _seen(bits, t, r, c, BLOCK_Q, BLOCK_K) & valid
            _, ds = _pulled(
                s, seen, dweights, row_stat[:, None], row_delta[:, None], bias, bias_at, seed, dropout, number, b, h,
                i[:, None], j[None, :], q_offset, KIND,
            )  # fmt: skip
            place = lines + j[None, :]
            tl.store(place, tl.load(place, mask=valid, other=0.0) + ds, mask=valid)
            # the next member reads what other threads have written here
            tl.debug_barrier()


@triton.jit
def _place(blocks, heads):
    """(block, batch row, head) of a program."""
    program = tl.program_id(0)
    slab = program // blocks
    return program % blocks, slab // heads, slab % heads


@triton.jit
def _far(index, stride):
    """An offset that may be beyond 2^31."""
    return tl.cast(index, tl.int64) * stride


@triton.jit
def _read(x, at, b, h, i, real, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """Rows i of (B, H, N, WIDTH) as (len(i), LANES), 0 where there is nothing."""
    lane = tl.arange(0, LANES)
    place = x + _far(b, at[0]) + _far(h, at[1]) + (_far(i, at[2])[:, None] + lane[None, :])
    return tl.load(place, mask=real[:, None] & (lane < WIDTH)[None, :], other=0.0)


@triton.jit
def _write(x, values, i, real, WIDTH: tl.constexpr, LANES: tl.constexpr):
    lane = tl.arange(0, LANES)
    place = x + (_far(i, WIDTH)[:, None] + lane[None, :])
    tl.store(place, values.to(x.dtype.element_ty), mask=real[:, None] & (lane < WIDTH)[None, :])


@triton.jit
def _line(compressed, at, b, h, block):
    """(where the lists of this head begin, where the block's own entries start and stop in them)."""
    place = compressed + _far(b, at[0]) + _far(h, at[1]) + block
    return _far(b, at[2]) + _far(h, at[3]), tl.load(place), tl.load(place + 1)


@triton.jit
def _seen(bits, t, line, place, LINES: tl.constexpr, PLACES: tl.constexpr):
    """Bool (lines, places): the pairs of tile t that may meet; all of them for t = 0."""
    words: tl.constexpr = (PLACES + 63) // 64
    at = bits + (_far(t - 1, LINES) + line) * words
    held = tl.where(line < LINES, t, 0) > 0
    if words == 1:
        word = tl.load(at, mask=held, other=-1)[:, None]
    else:
        word = tl.load(at[:, None] + (place // 64)[None, :], mask=held[:, None] & (place < PLACES)[None, :], other=-1)
    return ((word >> (place % 64).to(tl.int64)[None, :]) & 1) != 0


@triton.jit
def _biased(s, seen, bias, at, b, h, i, j):
    """Scores with the bias, and the mask without what it hides by -inf."""
    place = bias + _far(b, at[0]) + _far(h, at[1]) + (_far(i, at[2]) + _far(j, at[3]))
    added = tl.load(place, mask=seen, other=0.0).to(tl.float32)
    hidden = added == float("-inf")
    return s + tl.where(hidden, 0.0, added), seen & (hidden == 0)


@triton.jit
def _weigh(s, seen, divisor, number, KIND: tl.constexpr):
    """(weights, their slopes); divisor: of the row, for softmax its log-sum-exp. number: the sigmoid's bias."""
    if KIND == SOFTMAX:
        weights = tl.exp(s - divisor)
        slope = weights
    elif KIND == SIGMOID:
        weights = tl.sigmoid(s + number)
        slope = weights * (1.0 - weights)
    elif KIND == SOFTPLUS:
        small = tl.exp(-tl.abs(s))
        weights = (tl.maximum(s, 0.0) + _log1p(small)) / divisor
        slope = tl.where(s >= 0.0, 1.0, small) / (1.0 + small) / divisor
    elif KIND == EXP:
        weights = tl.exp(s) / divisor
        slope = weights
    elif KIND == RELU:
        weights = tl.maximum(s, 0.0) / divisor
        slope = tl.where(s > 0.0, 1.0, 0.0) / divisor
    else:
        weights = s
        slope = tl.full(s.shape, 1.0, tl.float32)
    return tl.where(seen, weights, 0.0), tl.where(seen, slope, 0.0)


@triton.jit
def _log1p(x):
    # what the rounding of 1 + x took away is put back as a factor
    rounded = 1.0 + x
    return tl.where(rounded == 1.0, x, tl.log(rounded) * (x / tl.where(rounded == 1.0, 1.0, rounded - 1.0)))


@triton.jit
def _pulled(
    s, seen, dweights, row_stat, row_delta, bias, bias_at, seed, dropout, number, b, h, i, j, q_offset,
    KIND: tl.constexpr,
):  # fmt: skip
    """(weights as the values meet them, gradient of the scores) of a tile, whichever way it is turned."""
    if bias is not None:
        s, seen = _biased(s, seen, bias, bias_at, b, h, i, j)
    weights, slope = _weigh(s, seen, row_stat, number, KIND)
    if dropout is not None:
        kept = _kept(seed, dropout, b, h, q_offset + i, j)
        weights *= kept
        dweights *= kept
    return weights, slope * (dweights - row_delta)


@triton.jit
def _row_numbers(stat, delta, slab, n, i, real):
    """The statistic of each row, and what is taken from the gradients of its weights."""
    row_stat = tl.full(i.shape, 1.0, tl.float32)
    row_delta = tl.zeros(i.shape, tl.float32)
    if stat is not None:
        row_stat = tl.load(stat + _far(slab, n) + i, mask=real, other=1.0)
    if delta is not None:
        row_delta = tl.load(delta + _far(slab, n) + i, mask=real, other=0.0)
    return row_stat, row_delta


@triton.jit
def _kept(seed, dropout, b, h, i, j):
    """What dropout multiplies weights with. dropout: (the least random word that is kept, 1 / (1 - p))."""
    w0, w1, w2, w3 = tl.philox(tl.load(seed), b, h, i, j // 4)
    word = tl.where(j % 4 < 2, tl.where(j % 4 == 0, w0, w1), tl.where(j % 4 == 2, w2, w3))
    return tl.where(word.to(tl.int64) >= dropout[0], dropout[1], 0.0)


@triton.jit
def _mixed(weights, values, KIND: tl.constexpr):
    """weights @ values. Weights without an upper bound would not fit into a float16; TF32 has as many digits."""
    if values.dtype == tl.float16 and KIND > SIGMOID:
        return tl.dot(weights, values.to(tl.float32), input_precision="tf32")
    return tl.dot(weights.to(values.dtype), values, input_precision="ieee")
