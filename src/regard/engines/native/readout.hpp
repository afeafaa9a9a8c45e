// numbers about the weights, read tile by tile from queries, keys and what the forward pass kept of each row
#pragma once

#include "block_sparse.hpp"

namespace {

// scores into final weights, in place; lanes without a row have stat so that they become 0
template <int NORMAL>
static void settle_weights(float* s, const Place& at, const uint64_t* allowed, float c, float parameter,
                           const float* stat) {
  const V times = set1(c), offset = set1(parameter);
  for (int v = 0; v < at.vectors; v++) {
    const V row = load(stat + v * W);
    for (int k = 0; k < at.keys; k++) {
      V x = load(s + k * TILE + v * W);
      x = NORMAL == SOFTMAX ? exp2v<5>(fma(x, times, row)) : phi<NORMAL>(x, offset) * row;
      store(s + k * TILE + v * W, visible(allowed, k, v, x));
    }
  }
}

template <class Op, class In>
struct Readout {
  typedef typename In::T T;
  const Reading& r;
  const Problem& p;
  Side<Op, In> keys;
  float *lanes, *wide, *s, *stat, *rows_acc, *best;
  int32_t* best_at;
  Extras extras;
  long b = -1, g = -1;

  explicit Readout(const Reading& reading) : r(reading), p(reading.problem) {
    keys.width = (int)p.d;
    keys.count = p.m;
    keys.stride = p.ks[2];
  }

  void carve(Arena& arena) {
    keys.carve(arena);
    lanes = arena.take<float>(p.d * TILE);
    wide = arena.take<float>(p.d * TILE);
    s = arena.take<float>(TILE * TILE);
    stat = arena.take<float>(TILE);
    extras.carve(arena, p, false);
    rows_acc = arena.take<float>(TILE);
    best = arena.take<float>(r.what == TOP_K ? TILE * r.top : 1);
    best_at = arena.take<int32_t>(r.what == TOP_K ? TILE * r.top : 1);
  }

  void open(long batch, long group) {
    if (batch == b && group == g) return;
    b = batch;
    g = group;
    keys.open(p.k, b * p.ks[0] + g * p.ks[1]);
  }

  void settle_tile(const Place& at, const uint64_t* allowed) {
    switch (p.normaliser) {
      case SOFTMAX: settle_weights<SOFTMAX>(s, at, allowed, 1.f, 0, stat); break;
      case SIGMOID: settle_weights<SIGMOID>(s, at, allowed, 1.f, p.parameter, stat); break;
      case SOFTPLUS: settle_weights<SOFTPLUS>(s, at, allowed, 1.f, 0, stat); break;
      case EXPONENTIAL: settle_weights<EXPONENTIAL>(s, at, allowed, 1.f, 0, stat); break;
      case RELU: settle_weights<RELU>(s, at, allowed, 1.f, 0, stat); break;
      case RELU_OVER_N: settle_weights<RELU_OVER_N>(s, at, allowed, 1.f, 0, stat); break;
      default: settle_weights<LINEAR>(s, at, allowed, 1.f, 0, stat);
    }
  }

  // the place `to` among the heads read; query block qb of head h
  void run(long to, long h, long qb) {
    if (r.what == ROWS && r.row_start[qb] == r.row_start[qb + 1]) return;
    const long i0 = qb * TILE, out_head = b * r.head_count + to;
    const int rows = (int)least(TILE, p.n - i0), vectors = (rows + W - 1) / W;
    const Listed listed(p, b, h);
    const T* q = (const T*)p.q + b * p.qs[0] + h * p.qs[1] + i0 * p.qs[2];
    const float* kept = p.lse ? p.lse + (b * p.heads + h) * p.n + i0 : nullptr;
    lay_lanes<Op, In>(q, p.qs[2], rows, (int)p.d, lanes, lane_scale<Op>(p), wide);
    for (int i = 0; i < TILE; i++) {
      rows_acc[i] = 0.f;
      if (p.normaliser == SOFTMAX)
        stat[i] = i < rows && kept[i] > -INFINITY ? -kept[i] * LOG2E : HIDDEN_SCORE;
      else
        stat[i] = i < rows ? (kept ? 1.f / kept[i] : 1.f) : 0.f;
    }
    if (r.what == TOP_K)
      for (long x = 0; x < TILE * r.top; x++) {
        best[x] = -INFINITY;
        best_at[x] = -1;
      }
    extras.open(p, Place{b, h, i0, 0, rows, 0, vectors});
    for (long x = listed.crow[qb]; x < listed.crow[qb + 1]; x++) {
      const long kb = listed.col[x], t = listed.tile[x];
      if (r.what == SINK_MASS && kb * TILE >= r.first) break;
      const int count = (int)least(TILE, p.m - kb * TILE);
      const uint64_t* allowed = t ? p.bits_t + (t - 1) * TILE : nullptr;
      const Place at{b, h, i0, kb * TILE, rows, count, vectors};
      keys.prepare(kb, count);
      scores<Op, ZERO>(count, vectors, keys.rows(kb), keys.row_bytes(), lanes, p.d / Op::depth, s, nullptr, allowed);
      if (is_plain(p)) {
        settle_weights<SOFTMAX>(s, at, allowed, score_scale<Op>(p), 0, stat);
        for (int k = 0; r.what == TOP_K && k < count; k++) extras.seen[k] = allowed ? allowed[k] : ALL;
      } else {
        extras.add(p, at, s, allowed, score_scale<Op>(p), unit_of(p));
        settle_tile(at, extras.seen);
      }
      read(at, out_head, qb, kb);
    }
    if (r.what == ENTROPY || r.what == SINK_MASS)
      memcpy(r.out + out_head * p.n + i0, rows_acc, rows * sizeof(float));
    if (r.what == TOP_K)
      for (int i = 0; i < rows; i++)
        for (long x = 0; x < r.top; x++) {
          const long place = (out_head * p.n + i0 + i) * r.top + x;
          r.index[place] = best_at[i * r.top + x];
          r.out[place] = best_at[i * r.top + x] < 0 ? 0.f : best[i * r.top + x];
        }
  }

  void read(const Place& at, long out_head, long qb, long kb) {
    const long query_blocks = (p.n + TILE - 1) / TILE, key_blocks = (p.m + TILE - 1) / TILE;
    switch (r.what) {
      case ROWS:
        for (long x = r.row_start[qb]; x < r.row_start[qb + 1]; x++) {
          float* to = r.out + (out_head * r.row_count + r.row_to[x]) * p.m + at.j;
          for (int k = 0; k < at.keys; k++) to[k] = s[k * TILE + r.row[x]];
        }
        break;
      case HEADS: {
        const int64_t strides[4] = {0, 0, p.m, 1};
        add_table(r.out + out_head * p.n * p.m, strides, at, s);
        break;
      }
      case COLUMN_SUM:
        for (int k = 0; k < at.keys; k++) {
          V sum = zero();
          for (int v = 0; v < at.vectors; v++) sum = sum + load(s + k * TILE + v * W);
          r.out[out_head * p.m + at.j + k] += total(sum);
        }
        break;
      case ENTROPY:
        for (int v = 0; v < at.vectors; v++) {
          V sum = load(rows_acc + v * W);
          for (int k = 0; k < at.keys; k++) {
            V w = load(s + k * TILE + v * W);
            sum = sum - w * log_positive(w);
          }
          store(rows_acc + v * W, sum);
        }
        break;
      case SINK_MASS:
        for (int v = 0; v < at.vectors; v++) {
          V sum = load(rows_acc + v * W);
          for (int k = 0; k < at.keys && at.j + k < r.first; k++) sum = sum + load(s + k * TILE + v * W);
          store(rows_acc + v * W, sum);
        }
        break;
      case BLOCK_MAX:
      case BLOCK_SUM: {
        V many = zero();
        for (int k = 0; k < at.keys; k++)
          for (int v = 0; v < at.vectors; v++) {
            V w = load(s + k * TILE + v * W);
            many = r.what == BLOCK_MAX ? vmax(many, w) : many + w;
          }
        float one[W], high = 0.f;
        store(one, many);
        for (int i = 0; i < W; i++) high = one[i] > high ? one[i] : high;
        r.out[(out_head * query_blocks + qb) * key_blocks + kb] = r.what == BLOCK_MAX ? high : total(many);
        break;
      }
      case TOP_K: top(at);
    }
  }

  // natural logarithm; of 0 some finite number
  static INLINE_MEMBER V log_positive(V x) {
    // 2^e m, m in [sqrt(1/2), sqrt(2)), then the series of the inverse hyperbolic tangent
    float in[W], power[W];
    store(in, x);
    for (int i = 0; i < W; i++) {
      uint32_t bits;
      memcpy(&bits, in + i, 4);
      const int32_t e = (int32_t)(bits - 0x3f3504f3u) >> 23;
      bits -= (uint32_t)e << 23;
      memcpy(in + i, &bits, 4);
      power[i] = (float)e;
    }
    const V m = load(in), one = set1(1.f), z = (m - one) * reciprocal(m + one), q = z * z;
    V y = fma(set1(1.f / 9), q, set1(1.f / 7));
    y = fma(y, q, set1(1.f / 5));
    y = fma(y, q, set1(1.f / 3));
    y = fma(y, q, one);
    return fma(load(power), set1(LN2), (z + z) * y);
  }

  // the largest weights of each row, in order; of equal ones the first key
  void top(const Place& at) {
    const long n = r.top;
    for (int k = 0; k < at.keys; k++) {
      for (int i = 0; i < at.rows; i++) {
        const float w = s[k * TILE + i];
        float* row = best + i * n;
        if (!(extras.seen[k] >> i & 1) || !(w > row[n - 1])) continue;
        long x = n - 1;
        for (; x > 0 && row[x - 1] < w; x--) {
          row[x] = row[x - 1];
          best_at[i * n + x] = best_at[i * n + x - 1];
        }
        row[x] = w;
        best_at[i * n + x] = (int32_t)(at.j + k);
      }
    }
  }
};

template <class Op, class In>
static int readout(const Reading& r) {
  const Problem& p = r.problem;
  const long tiles = (p.n + TILE - 1) / TILE, tasks = p.batch * r.head_count * tiles;
  // sums over queries are taken in order
  const long chunk = r.what == COLUMN_SUM || p.threads == 1 ? tiles : (tiles + 7) / 8;
  long next = 0;
  int failed = 0;
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    Readout<Op, In> task(r);
    if (!own.fill([&](Arena& arena) { task.carve(arena); })) {
      __atomic_store_n(&failed, NO_MEMORY, __ATOMIC_RELAXED);
    } else {
      for (;;) {
        const long from = __atomic_fetch_add(&next, chunk, __ATOMIC_RELAXED);
        if (from >= tasks) break;
        for (long x = from; x < least(from + chunk, tasks); x++) {
          const long to = x / tiles % r.head_count, h = r.heads[to];
          task.open(x / tiles / r.head_count, h * p.groups / p.heads);
          task.run(to, h, x % tiles);
        }
      }
      if (task.extras.strange) __atomic_store_n(&failed, NOT_A_NUMBER, __ATOMIC_RELAXED);
    }
  }
  return failed;
}

}  // namespace
