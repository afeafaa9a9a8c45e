// the scan of linear attention over chunks of 64 steps; compiled once per instruction set, REGARD_SCAN names the table
//
// The table of a chunk is kept transposed, rows = keys and lanes = queries, so that the decay is applied by vectors and
// every product reads the table by broadcast, whichever way round. Only the queries and dO are turned. All sums are
// float32; log-decays are cumulated in double and kept as two floats, whose differences keep their digits.
#ifdef _OPENMP
#include <omp.h>
#endif

#include "scan_parts.hpp"

#include "delta.hpp"

namespace {

thread_local Arena scratch;

template <class Op, class In>
struct ScanForward {
  typedef typename In::T T;
  const ScanProblem& p;
  Weights weights;
  Read<In> q, k, v;
  Sums<In> out;
  float *lanes, *table, *kept, *added;

  explicit ScanForward(const ScanProblem& problem) : p(problem), weights(problem) {}

  void carve(Arena& arena) {
    weights.carve(arena);
    q.carve(arena);
    k.carve(arena);
    v.carve(arena);
    out.carve(arena, p.e);
    lanes = arena.take<float>(p.d * TILE);
    table = arena.take<float>(TILE * TILE);
    kept = arena.take<float>(TILE * PACKED);
    added = arena.take<float>(p.d * p.e);
  }

  void run(long b, long g) {
    const int d = (int)p.d, e = (int)p.e;
    const long share = p.heads / p.groups, size = p.d * p.e;
    float* s = p.s + (b * p.groups + g) * size;
    bool empty = !p.s0;
    if (p.s0) memcpy(s, p.s0 + (b * p.groups + g) * size, size * 4);
    weights.forget();
    for (long at = 0; at < p.n; at += TILE) {
      const int rows = (int)least(TILE, p.n - at), vectors = (rows + W - 1) / W;
      // a decay has as many heads as there are states
      weights.make(b, g, at, rows);
      const T* from_k = (const T*)p.k + b * p.ks[0] + g * p.ks[1] + at * p.ks[2];
      const T* from_v = (const T*)p.v + b * p.vs[0] + g * p.vs[1] + at * p.vs[2];
      k.open(from_k, p.ks[2], rows, d);
      v.open(from_v, p.vs[2], rows, e);
      const long next = least(TILE, p.n - at - rows);
      ahead(from_k + rows * p.ks[2], p.ks[2] * sizeof(T), next, d * sizeof(T));
      ahead(from_v + rows * p.vs[2], p.vs[2] * sizeof(T), next, e * sizeof(T));
      for (long h = g * share; h < (g + 1) * share; h++) {
        const T* from = (const T*)p.q + b * p.qs[0] + h * p.qs[1] + at * p.qs[2];
        q.open(from, p.qs[2], rows, d);
        ahead(from + rows * p.qs[2], p.qs[2] * sizeof(T), next, d * sizeof(T));
        turn_rows<Op, In>(from, p.qs[2], q, rows, d, lanes);
        multiply<Op, In>(from_k, p.ks[2], k, rows, vectors, d, lanes, table, weights.queries);
        weigh(table, rows, weights, p.scale);
        float* o = out.open(p.out, ((b * p.heads + h) * p.n + at) * p.e, e);
        if (empty) {
          product<Fma, 4, TILE * 4, ZERO>(rows, e / W, (const char*)table, 0, v.at, v.stride, o, e, nullptr,
                                          band(weights.keys, rows));
        } else {
          float times[TILE];
          for (int i = 0; i < rows; i++) times[i] = weights.head[i] * p.scale;
          product<Fma, 0, 4, ZERO>(rows, e / W, q.bytes(), q.stride * 4, s, e, o, e, nullptr, Whole{d});
          scale_rows(o, rows, e, e, times);
          product<Fma, 4, TILE * 4, LOAD>(rows, e / W, (const char*)table, 0, v.at, v.stride, o, e, nullptr,
                                          band(weights.keys, rows));
        }
        out.close(rows);
      }
      const char* left = pack(k.at, k.stride, rows, d, weights.tail, kept);
      product<Fma, 4, PACKED * 4, ZERO>(d, e / W, left, 0, v.at, v.stride, added, e, nullptr, Whole{rows});
      add(s, empty ? 0 : weights.over, s, added, size);
      empty = false;
    }
  }
};

template <class Op, class In>
struct ScanBackward {
  typedef typename In::T T;
  const ScanProblem& p;
  Weights weights;
  Read<In> q, k, v, dout;
  Sums<In> dq, dk, dv;
  float *q_lanes, *do_lanes, *table, *pulled, *kept, *turned, *added, *states;

  explicit ScanBackward(const ScanProblem& problem) : p(problem), weights(problem) {}

  void carve(Arena& arena) {
    weights.carve(arena);
    q.carve(arena);
    k.carve(arena);
    v.carve(arena);
    dout.carve(arena);
    dq.carve(arena, p.d);
    dk.carve(arena, p.d);
    dv.carve(arena, p.e);
    q_lanes = arena.take<float>(p.d * TILE);
    do_lanes = arena.take<float>(p.e * TILE);
    table = arena.take<float>(TILE * TILE);
    pulled = arena.take<float>(TILE * TILE);
    kept = arena.take<float>(TILE * PACKED);
    turned = arena.take<float>(p.d * p.e);
    added = arena.take<float>(p.d * p.e);
    states = arena.take<float>(((p.n + TILE - 1) / TILE + 1) * (size_t)(p.d * p.e));
  }

  const T* keys(long b, long g, long at) const { return (const T*)p.k + b * p.ks[0] + g * p.ks[1] + at * p.ks[2]; }
  const T* values(long b, long g, long at) const { return (const T*)p.v + b * p.vs[0] + g * p.vs[1] + at * p.vs[2]; }

  // the state before each chunk and after the last, turned: (E, D)
  void replay(long b, long g) {
    const int d = (int)p.d, e = (int)p.e;
    const long size = p.d * p.e;
    if (p.s0)
      turn(p.s0 + (b * p.groups + g) * size, d, e, states);
    else
      memset(states, 0, size * 4);
    weights.forget();
    float* s = states;
    for (long at = 0; at < p.n; at += TILE, s += size) {
      const int rows = (int)least(TILE, p.n - at);
      if (at + rows == p.n && !p.dg) break;
      weights.make(b, g, at, rows);
      const T* from_k = keys(b, g, at);
      const T* from_v = values(b, g, at);
      k.open(from_k, p.ks[2], rows, d);
      v.open(from_v, p.vs[2], rows, e);
      const char* left = pack(v.at, v.stride, rows, e, weights.tail, kept);
      const long next = least(TILE, p.n - at - rows);
      ahead(from_k + rows * p.ks[2], p.ks[2] * sizeof(T), next, d * sizeof(T));
      ahead(from_v + rows * p.vs[2], p.vs[2] * sizeof(T), next, e * sizeof(T));
      product<Fma, 4, PACKED * 4, ZERO>(e, d / W, left, 0, k.at, k.stride, s + size, d, nullptr, Whole{rows});
      add(s + size, weights.over, s, s + size, size);
    }
  }

  void run(long b, long g) {
    const int d = (int)p.d, e = (int)p.e;
    const long share = p.heads / p.groups, size = p.d * p.e, chunks = (p.n + TILE - 1) / TILE;
    replay(b, g);
    weights.forget();
    float* r = p.ds0 + (b * p.groups + g) * size;
    memcpy(r, p.ds + (b * p.groups + g) * size, size * 4);
    double later = 0;
    for (long c = chunks - 1; c >= 0; c--) {
      const long at = c * TILE;
      const int rows = (int)least(TILE, p.n - at), vectors = (rows + W - 1) / W;
      const float* s = states + c * size;
      weights.make(b, g, at, rows);
      turn(r, d, e, turned);
      if (p.dg && c == chunks - 1)
        for (long x = 0; x < size; x++) later += (double)turned[x] * s[size + x];
      const T *from_k = keys(b, g, at), *from_v = values(b, g, at);
      k.open(from_k, p.ks[2], rows, d);
      v.open(from_v, p.vs[2], rows, e);
      if (c) {
        ahead(from_k - TILE * p.ks[2], p.ks[2] * sizeof(T), TILE, d * sizeof(T));
        ahead(from_v - TILE * p.vs[2], p.vs[2] * sizeof(T), TILE, e * sizeof(T));
        ahead(s - size, d * 4L, e, d * 4L);
      }
      float* to_k = dk.open(p.dk, ((b * p.groups + g) * p.n + at) * p.d, d);
      float* to_v = dv.open(p.dv, ((b * p.groups + g) * p.n + at) * p.e, e);
      product<Fma, 0, 4, ZERO>(rows, e / W, k.bytes(), k.stride * 4, r, e, to_v, e, nullptr, Whole{d});
      product<Fma, 0, 4, ZERO>(rows, d / W, v.bytes(), v.stride * 4, turned, d, to_k, d, nullptr, Whole{e});
      scale_rows(to_v, rows, e, e, weights.tail);
      scale_rows(to_k, rows, d, d, weights.tail);
      float times[TILE];
      for (int i = 0; i < rows; i++) times[i] = weights.head[i] * p.scale;
      for (long h = g * share; h < (g + 1) * share; h++) {
        const T* from = (const T*)p.q + b * p.qs[0] + h * p.qs[1] + at * p.qs[2];
        const T* from_out = (const T*)p.dout + b * p.dos[0] + h * p.dos[1] + at * p.dos[2];
        q.open(from, p.qs[2], rows, d);
        dout.open(from_out, p.dos[2], rows, e);
        if (c) {
          ahead(from - TILE * p.qs[2], p.qs[2] * sizeof(T), TILE, d * sizeof(T));
          ahead(from_out - TILE * p.dos[2], p.dos[2] * sizeof(T), TILE, e * sizeof(T));
        }
        turn_rows<Op, In>(from, p.qs[2], q, rows, d, q_lanes);
        turn_rows<Op, In>(from_out, p.dos[2], dout, rows, e, do_lanes);
        multiply<Op, In>(from_k, p.ks[2], k, rows, vectors, d, q_lanes, table, weights.queries);
        weigh(table, rows, weights, p.scale);
        product<Fma, TILE * 4, 4, LOAD>(rows, e / W, (const char*)table, 0, dout.at, dout.stride, to_v, e, nullptr,
                                        band(weights.queries, rows));
        multiply<Op, In>(from_v, p.vs[2], v, rows, vectors, e, do_lanes, pulled, weights.queries);
        weigh(pulled, rows, weights, p.scale);
        product<Fma, TILE * 4, 4, LOAD>(rows, d / W, (const char*)pulled, 0, q.at, q.stride, to_k, d, nullptr,
                                        band(weights.queries, rows));
        float* to_q = dq.open(p.dq, ((b * p.heads + h) * p.n + at) * p.d, d);
        product<Fma, 0, 4, ZERO>(rows, d / W, dout.bytes(), dout.stride * 4, s, d, to_q, d, nullptr, Whole{e});
        scale_rows(to_q, rows, d, d, times);
        product<Fma, 4, TILE * 4, LOAD>(rows, d / W, (const char*)pulled, 0, k.at, k.stride, to_q, d, nullptr,
                                        band(weights.keys, rows));
        const char* read = pack(q.at, q.stride, rows, d, times, kept);
        product<Fma, 4, PACKED * 4, ZERO>(d, e / W, read, 0, dout.at, dout.stride, added, e, nullptr, Whole{rows});
        add(r, h == g * share ? weights.over : 1, r, added, size);
        if (p.dg) decay_gradient(b, h, at, rows, to_q, to_k, &later);
        dq.close(rows);
      }
      dk.close(rows);
      dv.close(rows);
    }
  }

  // dg_t = sum over s >= t of the document of q_s . dq_s - k_s . dk_s, and what the final state says
  void decay_gradient(long b, long h, long at, int rows, const float* to_q, const float* to_k, double* later) {
    const int d = (int)p.d;
    float* dg = p.dg + (b * p.heads + h) * p.n + at;
    const int64_t* segment = p.segment ? p.segment + b * p.segment_stride + at : nullptr;
    for (int i = rows - 1; i >= 0; i--) {
      V sum = zero();
      for (int x = 0; x < d; x += W) {
        sum = fma(load(q.at + i * q.stride + x), load(to_q + i * d + x), sum);
        sum = fma(-load(k.at + i * k.stride + x), load(to_k + i * d + x), sum);
      }
      *later += total(sum);
      dg[i] = (float)*later;
      if (segment && segment[i] != (at + i ? segment[i - 1] : 0)) dg[i] = 0, *later = 0;
    }
  }
};

template <class Task>
static int each_head(const ScanProblem& p) {
  const long tasks = p.batch * p.groups;
  long next = 0;
  int failed = 0;
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    Task task(p);
    if (!scratch.fill([&](Arena& arena) { task.carve(arena); })) {
      __atomic_store_n(&failed, NO_MEMORY, __ATOMIC_RELAXED);
    } else {
      for (;;) {
        const long x = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        if (x >= tasks) break;
        task.run(x / p.groups, x % p.groups);
      }
    }
  }
  return failed;
}

#if defined(__AVX512BF16__)
typedef Dot HalfOp;
#else
typedef Fma HalfOp;
#endif

int run_forward(const ScanProblem& p) {
  if (p.dtype == FLOAT32) return each_head<ScanForward<Fma, Float32>>(p);
  if (p.dtype == BFLOAT16) return each_head<ScanForward<HalfOp, Bfloat16>>(p);
  return each_head<ScanForward<Fma, Float16>>(p);
}

int run_backward(const ScanProblem& p) {
  if (p.dtype == FLOAT32) return each_head<ScanBackward<Fma, Float32>>(p);
  if (p.dtype == BFLOAT16) return each_head<ScanBackward<HalfOp, Bfloat16>>(p);
  return each_head<ScanBackward<Fma, Float16>>(p);
}

}  // namespace

const ScanKernels REGARD_SCAN = {run_forward, run_backward, each_head<DeltaForward>, each_head<DeltaBackward>};
