// attention over the blocks of a layout, forward and backward
//
// A tile of scores is kept transposed, rows = keys and lanes = queries: maxima, sums and masks are vertical, every
// product reads its first factor by broadcast, and the only tensors that are turned are a tile of queries and of dO.
#pragma once

#include <math.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "extras.hpp"

namespace {

thread_local Arena own, shared;

INLINE int team_size() {
#ifdef _OPENMP
  return omp_get_num_threads();
#else
  return 1;
#endif
}

INLINE bool is_plain(const Problem& p) {
  return p.normaliser == SOFTMAX && !p.bias && !p.indexed_count && p.dropout <= 0;
}

// what a score is multiplied by: powers of two where an exponential follows
INLINE float unit_of(const Problem& p) { return p.normaliser == SOFTMAX || p.normaliser == EXPONENTIAL ? LOG2E : 1.f; }

template <class Op>
INLINE float lane_scale(const Problem& p) {
  return Op::pairs ? p.scale : p.scale * unit_of(p);
}

template <class Op>
INLINE float score_scale(const Problem& p) {
  return Op::pairs ? fabsf(p.scale) * unit_of(p) : 1.f;
}

// what to multiply the output of a softmax row by, and its log-sum-exp; top and sum in powers of two
static float settle_row(const Problem& p, long b, long h, long i, float top, float sum, float* lse) {
  float times = 1.f;
  if (p.sinks) {
    const float sink = LOG2E * p.sinks[b * p.sink_strides[0] + h * p.sink_strides[1] + i * p.sink_strides[2]];
    // in the units of the larger of the two, so that neither overflows
    const float high = sink > top ? sink : top;
    times = exp2f(top - high);
    sum = sum * times + exp2f(sink - high);
    top = high;
  }
  *lse = sum > 0 ? (top + log2f(sum)) * LN2 : -INFINITY;
  return sum > 0 ? times / sum : 0.f;
}

template <class Op, class In>
struct Forward {
  typedef typename In::T T;
  const Problem& p;
  Side<Op, In> keys, values;
  float *lanes, *wide, *s, *w, *o, *top, *sum, *alpha;
  uint64_t* kept;
  Extras extras;
  long b = -1, g = -1;

  explicit Forward(const Problem& problem) : p(problem) {
    keys.width = (int)p.d;
    values.width = (int)p.e;
    keys.count = values.count = p.m;
    keys.stride = p.ks[2];
    values.stride = p.vs[2];
    values.by_columns = true;
  }

  void carve(Arena& arena) {
    keys.carve(arena);
    values.carve(arena);
    lanes = arena.take<float>(p.d * TILE);
    wide = arena.take<float>(p.d * TILE);
    s = arena.take<float>(TILE * TILE);
    w = Op::pairs ? arena.take<float>(TILE * TILE / 2) : s;
    o = arena.take<float>(TILE * p.e);
    top = arena.take<float>(TILE);
    sum = arena.take<float>(TILE);
    alpha = arena.take<float>(TILE);
    kept = p.dropout > 0 ? arena.take<uint64_t>(TILE) : nullptr;
    if (!is_plain(p)) extras.carve(arena, p, false);
  }

  void open(long batch, long group) {
    if (batch == b && group == g) return;
    b = batch;
    g = group;
    keys.open(p.k, b * p.ks[0] + g * p.ks[1]);
    values.open(p.v, b * p.vs[0] + g * p.vs[1]);
  }

  bool weigh_tile(const Place& at, const uint64_t* allowed) {
    float c = score_scale<Op>(p);
    if (is_plain(p)) return soften<Op, false>(s, w, at.keys, at.vectors, allowed, nullptr, c, 1.f, top, sum, alpha);
    extras.add(p, at, s, allowed, c, unit_of(p));
    if (p.dropout <= 0) return weigh_with<false>(at, 1.f);
    draw(p, at, kept);
    return weigh_with<true>(at, (float)(1 / (1 - p.dropout)));
  }

  template <bool DROP>
  bool weigh_with(const Place& at, float rest) {
    switch (p.normaliser) {
      case SOFTMAX: return soften<Op, DROP>(s, w, at.keys, at.vectors, extras.pairs(), kept, 1.f, rest, top, sum, alpha);
      case SIGMOID: weigh<Op, SIGMOID, DROP>(s, w, at.keys, at.vectors, extras.seen, kept, p.parameter, rest, sum); break;
      case SOFTPLUS: weigh<Op, SOFTPLUS, DROP>(s, w, at.keys, at.vectors, extras.seen, kept, 0, rest, sum); break;
      case EXPONENTIAL: weigh<Op, EXPONENTIAL, DROP>(s, w, at.keys, at.vectors, extras.seen, kept, 0, rest, sum); break;
      case RELU: weigh<Op, RELU, DROP>(s, w, at.keys, at.vectors, extras.seen, kept, 0, rest, sum); break;
      case RELU_OVER_N: weigh<Op, RELU_OVER_N, DROP>(s, w, at.keys, at.vectors, extras.seen, kept, 0, rest, sum); break;
      default: weigh<Op, LINEAR, DROP>(s, w, at.keys, at.vectors, extras.seen, kept, 0, rest, sum);
    }
    return false;
  }

  // one tile of queries against its tiles of keys
  void run(long h, long qb) {
    const long i0 = qb * TILE;
    const int rows = (int)least(TILE, p.n - i0), vectors = (rows + W - 1) / W;
    const Listed listed(p, b, h);
    const long first = listed.crow[qb], last = listed.crow[qb + 1];
    const T* q = (const T*)p.q + b * p.qs[0] + h * p.qs[1] + i0 * p.qs[2];
    lay_lanes<Op, In>(q, p.qs[2], rows, (int)p.d, lanes, lane_scale<Op>(p), wide);
    if (i0 + TILE < p.n) fetch(q + TILE * p.qs[2], p.qs[2] * sizeof(T), (int)least(TILE, p.n - i0 - TILE), p.d * sizeof(T));
    for (int i = 0; i < TILE; i++) {
      top[i] = NO_TOP;
      sum[i] = 0.f;
    }
    const bool plain = is_plain(p);
    if (!plain) extras.open(p, Place{b, h, i0, 0, rows, 0, vectors});
    for (long x = first; x < last; x++) {
      const long kb = listed.col[x];
      const int count = (int)least(TILE, p.m - kb * TILE);
      const long t = listed.tile[x];
      const uint64_t* allowed = t ? p.bits_t + (t - 1) * TILE : nullptr;
      const Place at{b, h, i0, kb * TILE, rows, count, vectors};
      if (!plain && x + 1 < last) Extras::fetch_ahead(p, at, listed.col[x + 1] * TILE);
      keys.prepare(kb, count);
      values.prepare(kb, count);
      scores<Op, ZERO>(count, vectors, keys.rows(kb), keys.row_bytes(), lanes, p.d / Op::depth, s, nullptr, allowed);
      bool moved = weigh_tile(at, allowed);
      if (x == first) {
        values_into<ZERO>(rows, count, kb, t);
      } else {
        if (moved)
          for (int i = 0; i < rows; i++)
            for (int e = 0; e < p.e; e += W) store(o + i * p.e + e, load(o + i * p.e + e) * set1(alpha[i]));
        values_into<LOAD>(rows, count, kb, t);
      }
    }
    finish(h, i0, rows, first == last);
  }

  template <Start START>
  void values_into(int rows, int count, long kb, long t) {
    const int vectors = (int)p.e / W;
    const char* a = (const char*)w;
    const float* v = values.columns(kb);
    const long stride = values.columns_stride();
    if (t)
      product<Op, 4, TILE * 4, START>(rows, vectors, a, 0, v, stride, o, p.e, nullptr,
                                      Banded<Op::depth>{p.bits + (t - 1) * TILE, count});
    else
      product<Op, 4, TILE * 4, START>(rows, vectors, a, 0, v, stride, o, p.e, nullptr,
                                      Whole{(count + Op::depth - 1) / Op::depth});
  }

  void finish(long h, long i0, int rows, bool empty) {
    T* out = (T*)p.out + b * p.os[0] + h * p.os[1] + i0 * p.os[2];
    float* stat = p.lse ? p.lse + (b * p.heads + h) * p.n + i0 : nullptr;
    for (int i = 0; i < rows; i++) {
      float times = 1.f, said = 0.f;
      if (p.normaliser == SOFTMAX) {
        times = settle_row(p, b, h, i0 + i, top[i], sum[i], &said);
      } else if (p.normaliser == SOFTPLUS || p.normaliser == EXPONENTIAL || p.normaliser == RELU) {
        said = (sum[i] == 0 ? 1.f : sum[i]) + p.parameter;
        times = 1.f / said;
      } else if (p.normaliser == RELU_OVER_N) {
        said = sum[i] > 1 ? sum[i] : 1.f;
        times = 1.f / said;
      }
      for (int e = 0; e < p.e; e += W)
        In::put(out + i * p.os[2] + e, empty ? zero() : load(o + i * p.e + e) * set1(times));
      if (stat) stat[i] = said;
    }
  }
};

template <class Op, class In>
static int forward(const Problem& p) {
  const long tiles = (p.n + TILE - 1) / TILE, tasks = p.batch * p.heads * tiles;
  // whole heads while there are many, so that what is packed of a head is packed once
  const long chunk = p.batch * p.heads >= 4 * p.threads || p.threads == 1 ? tiles : (tiles + 7) / 8;
  long next = 0;
  int failed = 0;
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    Forward<Op, In> task(p);
    if (!own.fill([&](Arena& arena) { task.carve(arena); })) {
      __atomic_store_n(&failed, NO_MEMORY, __ATOMIC_RELAXED);
    } else {
      for (;;) {
        long from = __atomic_fetch_add(&next, chunk, __ATOMIC_RELAXED);
        if (from >= tasks) break;
        for (long x = from; x < least(from + chunk, tasks); x++) {
          long h = x / tiles % p.heads;
          task.open(x / tiles / p.heads, h * p.groups / p.heads);
          task.run(h, x % tiles);
        }
      }
      if (task.extras.strange) __atomic_store_n(&failed, NOT_A_NUMBER, __ATOMIC_RELAXED);
    }
  }
  return failed;
}

// waits until as many visits of a block of keys are done as come before this one: sums are always in the same order
struct Turns {
  int32_t* done = nullptr;  // per block of keys; null: one thread has the head for itself
  INLINE_MEMBER void wait(long kb, int32_t visit) const {
    if (!done) return;
    for (int spin = 0; __atomic_load_n(done + kb, __ATOMIC_ACQUIRE) != visit; spin++) {
#if defined(__x86_64__) || defined(__i386__)
      __builtin_ia32_pause();
#endif
      if (spin > 4096) sched_yield();
    }
  }
  INLINE_MEMBER void pass(long kb, int32_t visit) const {
    if (done) __atomic_store_n(done + kb, visit + 1, __ATOMIC_RELEASE);
  }
};

// what the threads that work on one head of keys have in common
struct Head {
  float *dk, *dv;   // (m, d), (m, e), sums
  int32_t* visits;  // per query head and listed block: how many visits of its block of keys come before
  Turns turns;
};

template <class Op, class In>
struct Backward {
  typedef typename In::T T;
  const Problem& p;
  Side<Op, In> keys, values;
  float *q_lanes, *do_lanes, *wide, *q_columns, *do_columns, *s, *dp, *w, *ds, *dsp, *dq, *stat, *less;
  uint64_t* kept;
  Extras extras;
  long b = -1, g = -1;

  explicit Backward(const Problem& problem) : p(problem) {
    keys.width = (int)p.d;
    values.width = (int)p.e;
    keys.count = values.count = p.m;
    keys.stride = p.ks[2];
    values.stride = p.vs[2];
    keys.by_columns = true;
  }

  void carve(Arena& arena) {
    const bool plain = is_plain(p), copies = Op::pairs || !In::plain;
    keys.carve(arena);
    values.carve(arena);
    q_lanes = arena.take<float>(p.d * TILE);
    do_lanes = arena.take<float>(p.e * TILE);
    wide = arena.take<float>((p.d > p.e ? p.d : p.e) * TILE);
    q_columns = copies ? arena.take<float>(p.d * TILE / Op::depth) : nullptr;
    do_columns = copies ? arena.take<float>(p.e * TILE / Op::depth) : nullptr;
    s = arena.take<float>(TILE * TILE);
    dp = arena.take<float>(TILE * TILE);
    w = Op::pairs || !plain ? arena.take<float>(TILE * TILE) : s;
    ds = Op::pairs ? arena.take<float>(TILE * TILE / 2) : dp;
    dsp = Op::pairs ? arena.take<float>(TILE * TILE / 2) : dp;
    dq = arena.take<float>(TILE * p.d);
    stat = arena.take<float>(TILE);
    less = arena.take<float>(TILE);
    kept = p.dropout > 0 ? arena.take<uint64_t>(TILE) : nullptr;
    if (!plain) extras.carve(arena, p, true);
  }

  void open(long batch, long group) {
    if (batch == b && group == g) return;
    b = batch;
    g = group;
    keys.open(p.k, b * p.ks[0] + g * p.ks[1]);
    values.open(p.v, b * p.vs[0] + g * p.vs[1]);
  }

  // the statistic of each row, and what is subtracted from each dP
  void statistics(long h, long i0, int rows, const T* d_out) {
    const bool centred = p.normaliser == SOFTMAX || (p.normaliser >= SOFTPLUS && p.normaliser <= RELU);
    const T* out = (const T*)p.out + b * p.os[0] + h * p.os[1] + i0 * p.os[2];
    const long at = (b * p.heads + h) * p.n + i0;
    for (int i = 0; i < TILE; i++) stat[i] = less[i] = 0.f;
    for (int i = 0; i < rows; i++) {
      V sum = zero();
      if (centred)
        for (int e = 0; e < p.e; e += W) sum = fma(In::get(out + i * p.os[2] + e), In::get(d_out + i * p.dos[2] + e), sum);
      less[i] = total(sum) - (p.dlse ? p.dlse[at + i] : 0.f);
      if (p.normaliser == SOFTMAX) {
        // a row without keys: every weight underflows to 0
        bool some = p.lse[at + i] > -INFINITY;
        stat[i] = some ? -p.lse[at + i] * LOG2E : HIDDEN_SCORE;
        if (!some) less[i] = 0.f;
      } else {
        stat[i] = p.lse ? 1.f / p.lse[at + i] : 1.f;
      }
      if (p.delta) p.delta[at + i] = less[i];
    }
  }

  void unweigh_tile(const Place& at, const uint64_t* allowed) {
    const float c = score_scale<Op>(p);
    if (is_plain(p)) {
      unweigh<Op, SOFTMAX, false, !Op::pairs>(s, w, s, at.keys, at.vectors, allowed, nullptr, c, 0, 1.f, stat);
      return;
    }
    extras.add(p, at, s, allowed, c, unit_of(p));
    if (p.dropout > 0) {
      draw(p, at, kept);
      unweigh_with<true>(at, (float)(1 / (1 - p.dropout)));
    } else {
      unweigh_with<false>(at, 1.f);
    }
  }

  template <bool DROP>
  void unweigh_with(const Place& at, float rest) {
    const int n = at.keys, vs = at.vectors;
    switch (p.normaliser) {
      case SOFTMAX: unweigh<Op, SOFTMAX, DROP, false>(s, w, s, n, vs, extras.pairs(), kept, 1.f, 0, rest, stat); break;
      case SIGMOID: unweigh<Op, SIGMOID, DROP, false>(s, w, s, n, vs, extras.seen, kept, 1.f, p.parameter, rest, stat); break;
      case SOFTPLUS: unweigh<Op, SOFTPLUS, DROP, false>(s, w, s, n, vs, extras.seen, kept, 1.f, 0, rest, stat); break;
      case EXPONENTIAL: unweigh<Op, EXPONENTIAL, DROP, false>(s, w, s, n, vs, extras.seen, kept, 1.f, 0, rest, stat); break;
      case RELU: unweigh<Op, RELU, DROP, false>(s, w, s, n, vs, extras.seen, kept, 1.f, 0, rest, stat); break;
      case RELU_OVER_N: unweigh<Op, RELU_OVER_N, DROP, false>(s, w, s, n, vs, extras.seen, kept, 1.f, 0, rest, stat); break;
      default: unweigh<Op, LINEAR, DROP, false>(s, w, s, n, vs, extras.seen, kept, 1.f, 0, rest, stat);
    }
  }

  void slant_tile(const Place& at, const uint64_t* allowed) {
    const int n = at.keys, vs = at.vectors;
    if (is_plain(p)) {
      slant<Op, false, false>(s, dp, ds, dsp, n, vs, allowed, nullptr, 1.f, less);
      return;
    }
    if (p.dropout > 0)
      slant<Op, true, true>(s, dp, ds, dsp, n, vs, extras.pairs(), kept, (float)(1 / (1 - p.dropout)), less);
    else
      slant<Op, false, true>(s, dp, ds, dsp, n, vs, extras.pairs(), kept, 1.f, less);
  }

  // C (keys x width) += tile' columns, the columns of the tile's queries
  void into_keys(const Place& at, const float* tile, const float* columns, long stride, int width, float* c, long t) {
    constexpr int row = Natural<Op>::row;
    if (t)
      product<Op, row, 4, LOAD>(at.keys, width / W, (const char*)tile, 0, columns, stride, c, width, nullptr,
                                Banded<Op::depth>{p.bits_t + (t - 1) * TILE, at.rows});
    else
      product<Op, row, 4, LOAD>(at.keys, width / W, (const char*)tile, 0, columns, stride, c, width, nullptr,
                                Whole{(at.rows + Op::depth - 1) / Op::depth});
  }

  template <Start START>
  void into_queries(const Place& at, long kb, long t) {
    const int vectors = (int)p.d / W;
    const float* k = keys.columns(kb);
    const long stride = keys.columns_stride();
    if (t)
      product<Op, 4, TILE * 4, START>(at.rows, vectors, (const char*)dsp, 0, k, stride, dq, p.d, nullptr,
                                      Banded<Op::depth>{p.bits + (t - 1) * TILE, at.keys});
    else
      product<Op, 4, TILE * 4, START>(at.rows, vectors, (const char*)dsp, 0, k, stride, dq, p.d, nullptr,
                                      Whole{(at.keys + Op::depth - 1) / Op::depth});
  }

  void run(long h, long qb, const Head& head, const int32_t* visits) {
    const long i0 = qb * TILE;
    const int rows = (int)least(TILE, p.n - i0), vectors = (rows + W - 1) / W;
    const Listed listed(p, b, h);
    const long first = listed.crow[qb], last = listed.crow[qb + 1];
    const T* q = (const T*)p.q + b * p.qs[0] + h * p.qs[1] + i0 * p.qs[2];
    const T* d_out = (const T*)p.dout + b * p.dos[0] + h * p.dos[1] + i0 * p.dos[2];
    const bool plain = is_plain(p);
    statistics(h, i0, rows, d_out);
    if (!plain) extras.open(p, Place{b, h, i0, 0, rows, 0, vectors});
    float minus[TILE];
    for (int i = 0; i < TILE; i++) minus[i] = p.dropout > 0 ? 0.f : -less[i];
    lay_lanes<Op, In>(q, p.qs[2], rows, (int)p.d, q_lanes, lane_scale<Op>(p), wide);
    lay_lanes<Op, In>(d_out, p.dos[2], rows, (int)p.e, do_lanes, 1.f, wide);
    const float *qc = (const float*)q, *dc = (const float*)d_out;
    long q_stride = p.qs[2], do_stride = p.dos[2];
    if (q_columns) {
      lay_columns<Op, In>(q, p.qs[2], rows, (int)p.d, q_columns);
      lay_columns<Op, In>(d_out, p.dos[2], rows, (int)p.e, do_columns);
      qc = q_columns;
      dc = do_columns;
      q_stride = p.d;
      do_stride = p.e;
    }
    if (i0 + TILE < p.n) {
      int ahead = (int)least(TILE, p.n - i0 - TILE);
      fetch(q + TILE * p.qs[2], p.qs[2] * sizeof(T), ahead, p.d * sizeof(T));
      fetch(d_out + TILE * p.dos[2], p.dos[2] * sizeof(T), ahead, p.e * sizeof(T));
    }
    for (long x = first; x < last; x++) {
      const long kb = listed.col[x];
      const int count = (int)least(TILE, p.m - kb * TILE);
      const long t = listed.tile[x];
      const uint64_t* allowed = t ? p.bits_t + (t - 1) * TILE : nullptr;
      const Place at{b, h, i0, kb * TILE, rows, count, vectors};
      if (!plain && x + 1 < last) Extras::fetch_ahead(p, at, listed.col[x + 1] * TILE);
      keys.prepare(kb, count);
      values.prepare(kb, count);
      const char* k_rows = keys.rows(kb);
      if (plain && !Op::pairs)
        scores<Op, ROW>(count, vectors, k_rows, keys.row_bytes(), q_lanes, p.d / Op::depth, s, stat, allowed);
      else
        scores<Op, ZERO>(count, vectors, k_rows, keys.row_bytes(), q_lanes, p.d / Op::depth, s, nullptr, allowed);
      unweigh_tile(at, allowed);
      scores<Op, ROW>(count, vectors, values.rows(kb), values.row_bytes(), do_lanes, p.e / Op::depth, dp, minus,
                      allowed);
      // the weights are w, except where one float tile serves as both
      const bool same = !Op::pairs && p.normaliser == SOFTMAX && p.dropout <= 0;
      const int32_t visit = visits ? visits[x] : 0;
      head.turns.wait(kb, visit);
      into_keys(at, same ? s : w, dc, do_stride, (int)p.e, head.dv + kb * TILE * p.e, t);
      slant_tile(at, allowed);
      into_keys(at, ds, qc, q_stride, (int)p.d, head.dk + kb * TILE * p.d, t);
      if (!plain) extras.spread(p, at, dp);
      head.turns.pass(kb, visit);
      if (x == first)
        into_queries<ZERO>(at, kb, t);
      else
        into_queries<LOAD>(at, kb, t);
    }
    if (!plain) extras.settle(p, Place{b, h, i0, 0, rows, 0, vectors});
    T* to = (T*)p.dq + ((b * p.heads + h) * p.n + i0) * p.d;
    for (long x = 0; x < rows * p.d; x += W) In::put(to + x, first == last ? zero() : load(dq + x) * set1(p.scale));
  }
};

// sums into gradients; rows [from, to) of one head
template <class In>
static void settle(const Problem& p, long b, long g, const Head& head, long from, long to) {
  typedef typename In::T T;
  T* dk = (T*)p.dk + (b * p.groups + g) * p.m * p.d;
  T* dv = (T*)p.dv + (b * p.groups + g) * p.m * p.e;
  for (long x = from * p.d; x < to * p.d; x += W) In::put(dk + x, load(head.dk + x) * set1(p.scale));
  if ((void*)head.dv == (void*)dv) return;
  for (long x = from * p.e; x < to * p.e; x += W) In::put(dv + x, load(head.dv + x));
}

// how many visits of its block of keys come before each listed block, over the query heads [h0, h1) in order
static void count_visits(const Problem& p, long b, long h0, long h1, int32_t* visits, int32_t* done) {
  const long tiles = (p.m + TILE - 1) / TILE, nq = (p.n + TILE - 1) / TILE;
  memset(done, 0, tiles * sizeof *done);
  for (long h = h0; h < h1; h++) {
    const Listed listed(p, b, h);
    for (long x = listed.crow[0]; x < listed.crow[nq]; x++) visits[(h - h0) * p.entries + x] = done[listed.col[x]]++;
  }
  memset(done, 0, tiles * sizeof *done);
}

template <class Op, class In>
static int backward(const Problem& p) {
  const long share = p.heads / p.groups, tiles = (p.n + TILE - 1) / TILE, heads = p.batch * p.groups;
  const bool direct = In::plain;  // sums are gradients already, but for the scale
  bool scattered = false;
  for (int t = 0; t < p.indexed_count; t++) scattered |= p.indexed[t].grad && !p.indexed[t].grad_strides[2];
  int threads = p.threads;
  // several threads on one head: where heads do not divide evenly, and where gradients of heads meet in one table
  bool together = threads > 1 && (p.one_by_one || (heads % threads && heads < 8 * threads));
  if (together && scattered) {
    together = false;
    if (p.one_by_one) threads = 1;
  }
  int failed = 0;
  long next = 0;
  Head common{};
  if (together) {
    bool got = shared.fill([&](Arena& arena) {
      common.dk = direct ? nullptr : arena.take<float>(p.m * p.d);
      common.dv = direct ? nullptr : arena.take<float>(p.m * p.e);
      common.visits = arena.take<int32_t>(share * p.entries);
      common.turns.done = arena.take<int32_t>((p.m + TILE - 1) / TILE);
    });
    if (!got) return NO_MEMORY;
  }
  const auto place = [&](Head& head, long b, long g) {
    if (!direct) return;
    head.dk = (float*)p.dk + (b * p.groups + g) * p.m * p.d;
    head.dv = (float*)p.dv + (b * p.groups + g) * p.m * p.e;
  };
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Backward<Op, In> task(p);
    Head head = common;
    bool got = own.fill([&](Arena& arena) {
      task.carve(arena);
      if (together || direct) return;
      head.dk = arena.take<float>(p.m * p.d);
      head.dv = arena.take<float>(p.m * p.e);
    });
    if (!got) __atomic_store_n(&failed, NO_MEMORY, __ATOMIC_RELAXED);
#pragma omp barrier
    if (!__atomic_load_n(&failed, __ATOMIC_RELAXED) && together) {
      for (long x = 0; x < heads; x++) {
        const long b = x / p.groups, g = x % p.groups;
        place(head, b, g);
#pragma omp single
        {
          memset(head.dk, 0, p.m * p.d * 4);
          memset(head.dv, 0, p.m * p.e * 4);
          count_visits(p, b, g * share, (g + 1) * share, head.visits, head.turns.done);
          next = 0;
        }
        task.open(b, g);
        // where query heads share a gradient, one is finished before the next is begun
        for (long part = 0; part < (p.one_by_one ? share : 1); part++) {
          const long end = p.one_by_one ? (part + 1) * tiles : share * tiles;
          for (;;) {
            long item = __atomic_load_n(&next, __ATOMIC_RELAXED);
            while (item < end && !__atomic_compare_exchange_n(&next, &item, item + 1, false, __ATOMIC_RELAXED,
                                                              __ATOMIC_RELAXED)) {
            }
            if (item >= end) break;
            task.run(g * share + item / tiles, item % tiles, head, head.visits + item / tiles * p.entries);
          }
#pragma omp barrier
        }
        const long parts = team_size();
#pragma omp for schedule(static)
        for (long part = 0; part < parts; part++)
          settle<In>(p, b, g, head, p.m * part / parts, p.m * (part + 1) / parts);
      }
    } else if (!__atomic_load_n(&failed, __ATOMIC_RELAXED)) {
      for (;;) {
        const long x = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        if (x >= heads) break;
        const long b = x / p.groups, g = x % p.groups;
        place(head, b, g);
        memset(head.dk, 0, p.m * p.d * 4);
        memset(head.dv, 0, p.m * p.e * 4);
        task.open(b, g);
        for (long h = g * share; h < (g + 1) * share; h++)
          for (long qb = 0; qb < tiles; qb++) task.run(h, qb, head, nullptr);
        settle<In>(p, b, g, head, 0, p.m);
      }
    }
  }
  return failed;
}

}  // namespace
