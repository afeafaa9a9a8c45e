// few queries against many keys: memory is the limit, so keys and values are read once, in place, for all the query
// heads that share them; lanes are the head width for the scores, and keys for the weights
#pragma once

#include <type_traits>

#include "block_sparse.hpp"

namespace {

// rows that one reading of the keys serves; with more, tiles with queries in the lanes are faster
constexpr int FEW = 8;
// blocks of keys in a piece: fixed, so that sums do not depend on the number of threads
constexpr long PIECE = 16;
// bytes of keys and values that stay near while as many are fetched
constexpr long NEAR = 32768;

// query heads that are read together, and their rows
INLINE long together(const Problem& p) { return p.layout_heads == 1 ? p.heads / p.groups : 1; }

INLINE bool is_decoding(const Problem& p) { return is_plain(p) && p.n * together(p) <= FEW; }

template <class In>
struct Decode {
  typedef typename In::T T;
  const Problem& p;
  const long share;
  float *q, *w;

  explicit Decode(const Problem& problem) : p(problem), share(together(problem)) {}

  void carve(Arena& arena) {
    q = arena.take<float>(FEW * p.d);
    w = arena.take<float>(FEW * TILE);
  }

  // rows (share heads x n) of listed blocks [from, to) of head h0 into part: rows x (top, sum), then rows x e
  void run(long b, long h0, long from, long to, float* part) {
    const long rows = share * p.n, g = h0 * p.groups / p.heads;
    const Listed listed(p, b, h0);
    const T* k = (const T*)p.k + b * p.ks[0] + g * p.ks[1];
    const T* v = (const T*)p.v + b * p.vs[0] + g * p.vs[1];
    float *tops = part, *totals = part + rows, *o = part + 2 * rows;
    for (long r = 0; r < rows; r++) {
      const T* row = (const T*)p.q + b * p.qs[0] + (h0 + r / p.n) * p.qs[1] + r % p.n * p.qs[2];
      for (long x = 0; x < p.d; x += W) store(q + r * p.d + x, In::get(row + x) * set1(p.scale * LOG2E));
      tops[r] = NO_TOP;
      totals[r] = 0.f;
    }
    memset(o, 0, rows * p.e * sizeof(float));
    const int step = (p.d + p.e) * (long)sizeof(T) * TILE > NEAR ? TILE / 2 : TILE;
    for (long x = from; x < to; x++) {
      const long kb = listed.col[x], t = listed.tile[x];
      const int whole = (int)least(TILE, p.m - kb * TILE);
      for (int at = 0; at < whole; at += step) {
        const int count = (int)least(step, whole - at);
        const uint64_t valid = count < TILE ? ((uint64_t)1 << count) - 1 : ~(uint64_t)0;
        const T* kt = k + (kb * TILE + at) * p.ks[2];
        const T* vt = v + (kb * TILE + at) * p.vs[2];
        // the values come into the cache while the keys are read, and then the next keys while the values are; a
        // prefetch past the end is harmless
        const T* next = at + step < whole ? kt + step * p.ks[2]
                                          : k + (x + 1 < to ? listed.col[x + 1] : kb) * TILE * p.ks[2];
        const T* ahead = vt;
        by_rows(rows, [&](auto together, long r) {
          score<together>(kt, count, q + r * p.d, w + r * TILE, ahead);
          ahead = nullptr;
        });
        float less[FEW];
        for (long r = 0; r < rows; r++) {
          const uint64_t bits = t ? p.bits[(t - 1) * TILE + r % p.n] >> at & valid : valid;
          less[r] = weigh_row(w + r * TILE, bits, tops + r, totals + r);
        }
        by_rows(rows, [&](auto together, long r) {
          add<together>(vt, count, w + r * TILE, less + r, o + r * p.e, next);
          next = nullptr;
        });
      }
    }
  }

  // rows that meet a key in registers at once: by fours, twos and ones
  template <class Each>
  INLINE_MEMBER static void by_rows(long rows, Each each) {
    long r = 0;
    for (; r + 4 <= rows; r += 4) each(std::integral_constant<int, 4>(), r);
    for (; r + 2 <= rows; r += 2) each(std::integral_constant<int, 2>(), r);
    for (; r < rows; r++) each(std::integral_constant<int, 1>(), r);
  }

  // w[row][key] = k[key] . row, of ROWS rows
  template <int ROWS>
  INLINE_MEMBER void score(const T* k, int count, const float* row, float* to, const T* ahead) const {
    constexpr int KEYS = W / ROWS;
    int j = 0;
    for (; j + KEYS <= count; j += KEYS) {
      if (ahead)
        for (int i = 0; i < KEYS; i++) fetch(ahead + (j + i) * p.vs[2], 0, 1, p.e * sizeof(T));
      V acc[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) acc[i] = zero();
      for (long x = 0; x < p.d; x += W) {
        V y[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) y[r] = load(row + r * p.d + x);
#pragma GCC unroll 16
        for (int i = 0; i < KEYS; i++) {
          const V key = In::get(k + (j + i) * p.ks[2] + x);
#pragma GCC unroll 4
          for (int r = 0; r < ROWS; r++) acc[r * KEYS + i] = fma(key, y[r], acc[r * KEYS + i]);
        }
      }
      if (ROWS == 1) {
        store(to + j, sums(acc));
      } else {
        float found[W];
        store(found, sums(acc));
        for (int r = 0; r < ROWS; r++) memcpy(to + r * TILE + j, found + r * KEYS, KEYS * sizeof(float));
      }
    }
    for (; j < count; j++)
      for (int r = 0; r < ROWS; r++) {
        V acc = zero();
        for (long x = 0; x < p.d; x += W) acc = fma(In::get(k + j * p.ks[2] + x), load(row + r * p.d + x), acc);
        to[r * TILE + j] = total(acc);
      }
  }

  // scores of a tile into weights; returns what the output so far must be multiplied by
  INLINE_MEMBER float weigh_row(float* s, uint64_t bits, float* top, float* sum) const {
    V best = set1(HIDDEN_SCORE);
    for (int v = 0; v < LANES; v++) best = vmax(best, select(mask_of(bits, v), load(s + v * W), set1(HIDDEN_SCORE)));
    float lanes[W], high = HIDDEN_SCORE, a = 1.f;
    store(lanes, best);
    for (int i = 0; i < W; i++) high = lanes[i] > high ? lanes[i] : high;
    if (high > *top + LAG) {
      a = *top == NO_TOP ? 0.f : exp2f(*top - high);
      *top = high;
    }
    V shift = set1(*top), more = zero();
    for (int v = 0; v < LANES; v++) {
      V x = keep(mask_of(bits, v), exp2v<5>(load(s + v * W) - shift));
      more = more + x;
      store(s + v * W, x);
    }
    *sum = *sum * a + total(more);
    return a;
  }

  // o = less o + w v, of ROWS rows
  template <int ROWS>
  INLINE_MEMBER void add(const T* v, int count, const float* weights, const float* less, float* o,
                         const T* ahead) const {
    for (long e = 0; e < p.e; e += 4 * W) {
      // the first block of columns fetches whole rows
      const T* rows = e ? nullptr : ahead;
      const int vectors = (int)least(4, (p.e - e) / W);
      if (vectors == 4)
        add_block<ROWS, 4>(v + e, count, weights, less, o + e, rows);
      else
        for (int x = 0; x < vectors; x++)
          add_block<ROWS, 1>(v + e + x * W, count, weights, less, o + e + x * W, x ? nullptr : rows);
    }
  }

  template <int ROWS, int NV>
  INLINE_MEMBER void add_block(const T* v, int count, const float* weights, const float* less, float* o,
                               const T* ahead) const {
    // one row alone has two sums, so that additions do not wait for each other
    constexpr int SUMS = ROWS == 1 ? 2 : 1;
    V acc[SUMS][ROWS][NV];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
      for (int x = 0; x < NV; x++) {
        acc[0][r][x] = load(o + r * p.e + x * W) * set1(less[r]);
        if (SUMS == 2) acc[SUMS - 1][r][x] = zero();
      }
    int j = 0;
    for (; j + SUMS <= count; j += SUMS) {
      if (ahead)
        for (int y = 0; y < SUMS; y++) fetch(ahead + (j + y) * p.ks[2], 0, 1, p.d * sizeof(T));
#pragma GCC unroll 2
      for (int y = 0; y < SUMS; y++)
#pragma GCC unroll 4
        for (int x = 0; x < NV; x++) {
          const V value = In::get(v + (j + y) * p.vs[2] + x * W);
#pragma GCC unroll 4
          for (int r = 0; r < ROWS; r++) acc[y][r][x] = fma(value, set1(weights[r * TILE + j + y]), acc[y][r][x]);
        }
    }
    for (; j < count; j++)
#pragma GCC unroll 4
      for (int x = 0; x < NV; x++) {
        const V value = In::get(v + j * p.vs[2] + x * W);
        for (int r = 0; r < ROWS; r++) acc[0][r][x] = fma(value, set1(weights[r * TILE + j]), acc[0][r][x]);
      }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
      for (int x = 0; x < NV; x++) store(o + r * p.e + x * W, SUMS == 2 ? acc[0][r][x] + acc[SUMS - 1][r][x] : acc[0][r][x]);
  }

  // the pieces of one set of rows into the result
  void finish(long b, long h0, const float* parts, long count, long size) const {
    const long rows = share * p.n;
    float o[WIDEST];
    for (long r = 0; r < rows; r++) {
      const long h = h0 + r / p.n, i = r % p.n;
      float top = NO_TOP, sum = 0.f, said;
      for (long x = 0; x < count; x++) top = parts[x * size + r] > top ? parts[x * size + r] : top;
      for (long e = 0; e < p.e; e += W) store(o + e, zero());
      for (long x = 0; x < count; x++) {
        const float* part = parts + x * size;
        if (part[rows + r] == 0) continue;
        const float a = exp2f(part[r] - top);
        sum += part[rows + r] * a;
        for (long e = 0; e < p.e; e += W) store(o + e, fma(load(part + 2 * rows + r * p.e + e), set1(a), load(o + e)));
      }
      const float times = settle_row(p, b, h, i, top, sum, &said);
      T* out = (T*)p.out + b * p.os[0] + h * p.os[1] + i * p.os[2];
      for (long e = 0; e < p.e; e += W) In::put(out + e, load(o + e) * set1(times));
      p.lse[(b * p.heads + h) * p.n + i] = said;
    }
  }
};

template <class In>
static int decode(const Problem& p) {
  const long share = together(p), sets = p.batch * p.heads / share, rows = share * p.n, size = rows * (2 + p.e);
  const long pieces = (p.entries + PIECE - 1) / PIECE > 0 ? (p.entries + PIECE - 1) / PIECE : 1;
  float* parts = nullptr;
  if (!shared.fill([&](Arena& arena) { parts = arena.take<float>(sets * pieces * size); })) return NO_MEMORY;
  int failed = 0;
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    Decode<In> task(p);
    const bool got = own.fill([&](Arena& arena) { task.carve(arena); });
    if (!got) __atomic_store_n(&failed, NO_MEMORY, __ATOMIC_RELAXED);
#pragma omp for schedule(dynamic)
    for (long x = 0; x < sets * pieces; x++) {
      if (!got) continue;
      const long b = x / pieces * share / p.heads, h = x / pieces * share % p.heads;
      const Listed listed(p, b, h);
      const long from = listed.crow[0] + x % pieces * PIECE;
      task.run(b, h, least(from, listed.crow[1]), least(from + PIECE, listed.crow[1]), parts + x * size);
    }
#pragma omp for schedule(static)
    for (long x = 0; x < sets; x++)
      if (got) task.finish(x * share / p.heads, x * share % p.heads, parts + x * pieces * size, pieces, size);
  }
  return failed;
}

}  // namespace
