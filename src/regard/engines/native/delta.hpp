// the delta rule over chunks of 64 steps
//
//   (I + L) U = beta (V - head K S)     L_ij = beta_i W_ij k_i . k_j, j < i     out = (Q K' * W) U + head Q S
//   S_next = over S + (tail K)' U
//
// The triangular system is solved by substitution, six rows at a time; tables stand as in the scan: rows = keys.
#pragma once

#include "scan_parts.hpp"

namespace {

constexpr int SOLVED = 6;

// -L, and what it is made of: products of keys with keys, times their weights
static void couple(const Read<Float32>& k, const float* lanes, int rows, int vectors, int d, const Weights& w,
                   const float* beta, float* table) {
  uint64_t later[TILE];
  for (int j = 0; j < TILE; j++) later[j] = w.queries[j] & ~((uint64_t)1 << j);
  scores<Fma, ZERO>(rows, vectors, k.bytes(), k.stride * 4, lanes, d, table, nullptr, later);
  for (int j = 0; j < rows; j++)
    for (int v = 0; v < LANES; v++) {
      float* at = table + j * TILE + v * W;
      V x = load(at) * -load(beta + v * W);
      if (w.table) x = x * load(w.table + j * TILE + v * W);
      store(at, keep(mask_of(later[j], v), x));
    }
}

// x <- (I + L)^-1 x, x (rows, width)
static void solve(const float* table, int rows, int width, float* x) {
  for (int a = 0; a < rows; a += SOLVED) {
    const int b = (int)least(a + SOLVED, rows);
    if (a)
      product<Fma, 4, TILE * 4, LOAD>(b - a, width / W, (const char*)(table + a), 0, x, width, x + a * width, width,
                                      nullptr, Whole{a});
    for (int i = a + 1; i < b; i++)
      for (int j = a; j < i; j++) {
        const V by = set1(table[j * TILE + i]);
        for (int e = 0; e < width; e += W)
          store(x + i * width + e, fma(by, load(x + j * width + e), load(x + i * width + e)));
      }
  }
}

// x <- (I + L)'^-1 x
static void solve_turned(const float* table, int rows, int width, float* x) {
  for (int b = rows; b > 0;) {
    const int a = b > SOLVED ? b - SOLVED : 0;
    if (b < rows)
      product<Fma, TILE * 4, 4, LOAD>(b - a, width / W, (const char*)(table + a * TILE + b), 0, x + b * width, width,
                                      x + a * width, width, nullptr, Whole{rows - b});
    for (int j = b - 2; j >= a; j--)
      for (int i = j + 1; i < b; i++) {
        const V by = set1(table[j * TILE + i]);
        for (int e = 0; e < width; e += W)
          store(x + j * width + e, fma(by, load(x + i * width + e), load(x + j * width + e)));
      }
    b = a;
  }
}

struct Delta {
  const ScanProblem& p;
  Weights weights;
  Read<Float32> q, k, v;
  float beta[TILE];
  float *k_lanes, *lanes, *coupled, *table, *kept, *added;

  explicit Delta(const ScanProblem& problem) : p(problem), weights(problem) {}

  void carve(Arena& arena) {
    weights.carve(arena);
    k_lanes = arena.take<float>(p.d * TILE);
    lanes = arena.take<float>((p.d > p.e ? p.d : p.e) * TILE);
    coupled = arena.take<float>(TILE * TILE);
    table = arena.take<float>(TILE * TILE);
    kept = arena.take<float>(TILE * PACKED);
    added = arena.take<float>(p.d * p.e);
  }

  void open(long b, long h, long at, int rows) {
    weights.make(b, h, at, rows);
    k.open((const float*)p.k + b * p.ks[0] + h * p.ks[1] + at * p.ks[2], p.ks[2], rows, (int)p.d);
    v.open((const float*)p.v + b * p.vs[0] + h * p.vs[1] + at * p.vs[2], p.vs[2], rows, (int)p.e);
    q.open((const float*)p.q + b * p.qs[0] + h * p.qs[1] + at * p.qs[2], p.qs[2], rows, (int)p.d);
    const float* from = p.beta + b * p.bs[0] + h * p.bs[1] + at * p.bs[2];
    for (int i = 0; i < TILE; i++) beta[i] = i < rows ? from[i * p.bs[2]] : 0;
  }

  // -L and the corrections U (rows, E), from the state s (D, E) before the chunk
  void correct(int rows, const float* s, bool empty, float* u) {
    const int d = (int)p.d, e = (int)p.e;
    lay_lanes<Fma, Float32>(k.at, k.stride, rows, d, k_lanes, 1.f, nullptr);
    couple(k, k_lanes, rows, (rows + W - 1) / W, d, weights, beta, coupled);
    if (!empty) product<Fma, 0, 4, ZERO>(rows, e / W, k.bytes(), k.stride * 4, s, e, u, e, nullptr, Whole{d});
    for (int i = 0; i < rows; i++) {
      const V by = set1(beta[i]), left = set1(-weights.head[i]);
      const bool fresh = empty || weights.head[i] == 0;
      for (int x = 0; x < e; x += W) {
        V y = load(v.at + i * v.stride + x);
        store(u + i * e + x, by * (fresh ? y : fma(left, load(u + i * e + x), y)));
      }
    }
    solve(coupled, rows, e, u);
  }

  // s (D, E) <- over s + (tail k)' u
  void advance(int rows, const float* u, bool empty, float* s) {
    const int d = (int)p.d, e = (int)p.e;
    const char* left = pack(k.at, k.stride, rows, d, weights.tail, kept);
    product<Fma, 4, PACKED * 4, ZERO>(d, e / W, left, 0, u, e, added, e, nullptr, Whole{rows});
    add(s, empty ? 0 : weights.over, s, added, p.d * p.e);
  }
};

struct DeltaForward : Delta {
  float* u;

  explicit DeltaForward(const ScanProblem& problem) : Delta(problem) {}

  void carve(Arena& arena) {
    Delta::carve(arena);
    u = arena.take<float>(TILE * p.e);
  }

  void run(long b, long h) {
    const int d = (int)p.d, e = (int)p.e;
    const long size = p.d * p.e;
    float* s = p.s + (b * p.heads + h) * size;
    bool empty = !p.s0;
    if (p.s0) memcpy(s, p.s0 + (b * p.heads + h) * size, size * 4);
    weights.forget();
    for (long at = 0; at < p.n; at += TILE) {
      const int rows = (int)least(TILE, p.n - at), vectors = (rows + W - 1) / W;
      open(b, h, at, rows);
      const long next = least(TILE, p.n - at - rows);
      ahead(k.at + rows * k.stride, k.stride * 4, next, d * 4L);
      ahead(v.at + rows * v.stride, v.stride * 4, next, e * 4L);
      ahead(q.at + rows * q.stride, q.stride * 4, next, d * 4L);
      correct(rows, s, empty, u);
      lay_lanes<Fma, Float32>(q.at, q.stride, rows, d, lanes, 1.f, nullptr);
      scores<Fma, ZERO>(rows, vectors, k.bytes(), k.stride * 4, lanes, d, table, nullptr, weights.queries);
      weigh(table, rows, weights, p.scale);
      float* o = (float*)p.out + ((b * p.heads + h) * p.n + at) * p.e;
      if (empty) {
        product<Fma, 4, TILE * 4, ZERO>(rows, e / W, (const char*)table, 0, u, e, o, e, nullptr,
                                        band(weights.keys, rows));
      } else {
        float times[TILE];
        for (int i = 0; i < rows; i++) times[i] = weights.head[i] * p.scale;
        product<Fma, 0, 4, ZERO>(rows, e / W, q.bytes(), q.stride * 4, s, e, o, e, nullptr, Whole{d});
        scale_rows(o, rows, e, e, times);
        product<Fma, 4, TILE * 4, LOAD>(rows, e / W, (const char*)table, 0, u, e, o, e, nullptr,
                                        band(weights.keys, rows));
      }
      advance(rows, u, empty, s);
      empty = false;
    }
  }
};

struct DeltaBackward : Delta {
  Read<Float32> dout;
  float *corrections, *states, *turned, *state, *pulled, *dx, *z;

  explicit DeltaBackward(const ScanProblem& problem) : Delta(problem) {}

  void carve(Arena& arena) {
    const size_t chunks = (p.n + TILE - 1) / TILE, size = p.d * p.e;
    Delta::carve(arena);
    corrections = arena.take<float>(chunks * TILE * p.e);
    states = arena.take<float>((chunks + 1) * size);
    turned = arena.take<float>(size);
    state = arena.take<float>(size);
    pulled = arena.take<float>(TILE * TILE);
    dx = arena.take<float>(TILE * p.e);
    z = arena.take<float>(TILE * p.d);
  }

  // the corrections of every chunk, and the state before each and after the last, turned: (E, D)
  void replay(long b, long h) {
    const long size = p.d * p.e;
    bool empty = !p.s0;
    if (p.s0)
      memcpy(state, p.s0 + (b * p.heads + h) * size, size * 4);
    else
      memset(state, 0, size * 4);
    float *s = states, *u = corrections;
    turn(state, (int)p.d, (int)p.e, s);
    for (long at = 0; at < p.n; at += TILE, u += TILE * p.e) {
      const int rows = (int)least(TILE, p.n - at);
      open(b, h, at, rows);
      correct(rows, state, empty, u);
      advance(rows, u, empty, state);
      s += size;
      turn(state, (int)p.d, (int)p.e, s);
      empty = false;
    }
  }

  void run(long b, long h) {
    const int d = (int)p.d, e = (int)p.e;
    const long size = p.d * p.e, chunks = (p.n + TILE - 1) / TILE, head = b * p.heads + h;
    weights.forget();
    replay(b, h);
    weights.forget();
    float* r = p.ds0 + head * size;
    memcpy(r, p.ds + head * size, size * 4);
    double later = 0;
    for (long c = chunks - 1; c >= 0; c--) {
      const long at = c * TILE;
      const int rows = (int)least(TILE, p.n - at), vectors = (rows + W - 1) / W;
      const float *s = states + c * size, *u = corrections + c * TILE * e;
      open(b, h, at, rows);
      dout.open((const float*)p.dout + b * p.dos[0] + h * p.dos[1] + at * p.dos[2], p.dos[2], rows, e);
      float* to_q = (float*)p.dq + (head * p.n + at) * d;
      float* to_k = (float*)p.dk + (head * p.n + at) * d;
      float* to_v = (float*)p.dv + (head * p.n + at) * e;
      turn(r, d, e, turned);
      if (p.dg && c == chunks - 1)
        for (long x = 0; x < size; x++) later += (double)turned[x] * s[size + x];
      float times[TILE];
      for (int i = 0; i < rows; i++) times[i] = weights.head[i] * p.scale;

      // through U: dx = (I + L)'^-1 dU
      lay_lanes<Fma, Float32>(k.at, k.stride, rows, d, k_lanes, 1.f, nullptr);
      couple(k, k_lanes, rows, vectors, d, weights, beta, coupled);
      lay_lanes<Fma, Float32>(q.at, q.stride, rows, d, lanes, 1.f, nullptr);
      scores<Fma, ZERO>(rows, vectors, k.bytes(), k.stride * 4, lanes, d, table, nullptr, weights.queries);
      weigh(table, rows, weights, p.scale);
      product<Fma, 0, 4, ZERO>(rows, e / W, k.bytes(), k.stride * 4, r, e, dx, e, nullptr, Whole{d});
      scale_rows(dx, rows, e, e, weights.tail);
      product<Fma, TILE * 4, 4, LOAD>(rows, e / W, (const char*)table, 0, dout.at, dout.stride, dx, e, nullptr,
                                      band(weights.queries, rows));
      solve_turned(coupled, rows, e, dx);

      // through the outputs
      lay_lanes<Fma, Float32>(dout.at, dout.stride, rows, e, lanes, 1.f, nullptr);
      scores<Fma, ZERO>(rows, vectors, (const char*)u, e * 4L, lanes, e, pulled, nullptr, weights.queries);
      weigh(pulled, rows, weights, p.scale);
      product<Fma, 0, 4, ZERO>(rows, d / W, dout.bytes(), dout.stride * 4, s, d, to_q, d, nullptr, Whole{e});
      scale_rows(to_q, rows, d, d, times);
      product<Fma, 4, TILE * 4, LOAD>(rows, d / W, (const char*)pulled, 0, k.at, k.stride, to_q, d, nullptr,
                                      band(weights.keys, rows));
      // keys as they are written
      product<Fma, 0, 4, ZERO>(rows, d / W, (const char*)u, e * 4L, turned, d, to_k, d, nullptr, Whole{e});
      scale_rows(to_k, rows, d, d, weights.tail);
      product<Fma, TILE * 4, 4, LOAD>(rows, d / W, (const char*)pulled, 0, q.at, q.stride, to_k, d, nullptr,
                                      band(weights.queries, rows));

      // through L: minus its gradient over beta, by [key][query], is u . dx times the weights
      lay_lanes<Fma, Float32>(dx, e, rows, e, lanes, 1.f, nullptr);
      scores<Fma, ZERO>(rows, vectors, (const char*)u, e * 4L, lanes, e, table, nullptr, weights.queries);
      weigh(table, rows, weights, -1.f);
      for (int j = 0; j < rows; j++) table[j * TILE + j] = 0;
      product<Fma, 0, 4, ZERO>(rows, d / W, (const char*)dx, e * 4L, s, d, z, d, nullptr, Whole{e});
      float minus[TILE];
      for (int i = 0; i < rows; i++) minus[i] = -weights.head[i];
      scale_rows(z, rows, d, d, minus);
      product<Fma, 4, TILE * 4, LOAD>(rows, d / W, (const char*)table, 0, k.at, k.stride, z, d, nullptr,
                                      band(weights.keys, rows));
      for (int j = 0; j < rows; j++)
        for (int x = j < BLOCK_ROWS ? 0 : (j - BLOCK_ROWS + 1) / W * W; x < TILE; x += W)
          store(table + j * TILE + x, load(table + j * TILE + x) * load(beta + x));
      product<Fma, TILE * 4, 4, LOAD>(rows, d / W, (const char*)table, 0, k.at, k.stride, to_k, d, nullptr,
                                      band(weights.queries, rows));

      // the state before the chunk
      const char* read = pack(q.at, q.stride, rows, d, times, kept);
      product<Fma, 4, PACKED * 4, ZERO>(d, e / W, read, 0, dout.at, dout.stride, added, e, nullptr, Whole{rows});
      for (int i = 0; i < rows; i++) minus[i] *= beta[i];
      const char* stale = pack(k.at, k.stride, rows, d, minus, kept);
      product<Fma, 4, PACKED * 4, LOAD>(d, e / W, stale, 0, dx, e, added, e, nullptr, Whole{rows});
      add(r, weights.over, r, added, size);
      finish(head * p.n + at, b, at, rows, to_q, to_k, to_v, &later);
    }
  }

  // z: the gradient of a key as it is read, over beta
  void finish(long row, long b, long at, int rows, const float* to_q, float* to_k, float* to_v, double* later) {
    const int d = (int)p.d, e = (int)p.e;
    const int64_t* segment = p.segment ? p.segment + b * p.segment_stride + at : nullptr;
    for (int i = rows - 1; i >= 0; i--) {
      const V by = set1(beta[i]);
      V fall = zero(), slope = zero();
      for (int x = 0; x < d; x += W) {
        V key = load(k.at + i * k.stride + x), read = load(z + i * d + x), written = load(to_k + i * d + x);
        slope = fma(read, key, slope);
        fall = fma(key, by * read - written, fall);
        fall = fma(load(q.at + i * q.stride + x), load(to_q + i * d + x), fall);
        store(to_k + i * d + x, fma(by, read, written));
      }
      for (int x = 0; x < e; x += W) {
        V y = load(dx + i * e + x);
        slope = fma(y, load(v.at + i * v.stride + x), slope);
        store(to_v + i * e + x, by * y);
      }
      p.dbeta[row + i] = total(slope);
      if (!p.dg) continue;
      *later += total(fall);
      p.dg[row + i] = (float)*later;
      if (segment && segment[i] != (at + i ? segment[i - 1] : 0)) p.dg[row + i] = 0, *later = 0;
    }
  }
};

}  // namespace
