// what the scan and the delta rule share: the weights of a chunk, tiles of inputs and outputs
#pragma once

#include <math.h>

#include "arena.hpp"
#include "operands.hpp"
#include "scan.hpp"

namespace {

// floats between the rows of a packed tile: a compile-time stride for products that read it by columns, and no multiple
// of a page, so that narrow tiles spread over the cache
constexpr int PACKED = WIDEST + 16;
constexpr int BLOCK_ROWS = Rows<1>::value;  // the most rows of a register block
constexpr double LOG2E_DOUBLE = 1.4426950408889634;

INLINE void ahead(const void* p, long row_bytes, long rows, long bytes) {
  for (long r = 0; r < rows; r++)
    for (long x = 0; x < bytes; x += 64) __builtin_prefetch((const char*)p + r * row_bytes + x, 0, 2);
}

// rows of floats times[i] * src, or exactly 0, PACKED apart: as they are, or in dst
static const char* pack(const float* src, long stride, int rows, int width, const float* times, float* dst) {
  bool same = stride == PACKED;
  for (int r = 0; r < rows && same; r++) same = times[r] == 1.f;
  if (same) return (const char*)src;
  for (int r = 0; r < rows; r++) {
    const V by = set1(times[r]);
    for (int x = 0; x < width; x += W)
      store(dst + r * PACKED + x, times[r] == 0 ? zero() : load(src + r * stride + x) * by);
  }
  return (const char*)dst;
}

// to = over s + added: a chunk is summed on its own first, and the factor has twice the digits, because its rounding is
// multiplied by the number of chunks
static void add(float* to, double over, const float* s, const float* added, long size) {
  const float high = (float)over;
  const V by = set1(high), rest = set1((float)(over - high));
  for (long x = 0; x < size; x += W) {
    V y = load(added + x);
    if (over != 0) y = fma(by, load(s + x), fma(rest, load(s + x), y));
    store(to + x, y);
  }
}

static void scale_rows(float* c, int rows, int width, long row, const float* times) {
  for (int r = 0; r < rows; r++) {
    if (times[r] == 1.f) continue;
    const V by = set1(times[r]);
    for (int x = 0; x < width; x += W) store(c + r * row + x, times[r] == 0 ? zero() : load(c + r * row + x) * by);
  }
}

// dst (columns, rows) = src (rows, columns) turned
static void turn(const float* src, int rows, int columns, float* dst) {
  for (int r = 0; r < rows; r += W)
    for (int x = 0; x < columns; x += W)
      transpose<false>((const char*)(src + r * columns + x), columns * 4L, dst + x * (long)rows + r, rows, zero());
}

// what decay and documents make of one chunk
struct Weights {
  const ScanProblem& p;
  float* table = nullptr;  // exp(c_i - c_j) by [key][query], of a decay only
  float head[TILE];        // what is left of the state before the chunk at each step
  float tail[TILE];        // what is left of each step at the end of the chunk
  double over;             // what is left of the state before the chunk at its end
  uint64_t queries[TILE];  // by key: the queries that see it
  uint64_t keys[TILE];     // by query: the keys that it sees
  long same = -1;          // rows for which all this was made, where it is the same for every chunk

  explicit Weights(const ScanProblem& problem) : p(problem) {}

  void carve(Arena& arena) { table = p.g ? arena.take<float>(TILE * TILE) : nullptr; }
  void forget() { same = -1; }

  void make(long b, long h, long at, int rows) {
    const bool steady = (!p.g || p.gs[2] == 0) && !p.segment;
    if (steady && same == rows) return;
    same = steady ? rows : -1;
    int first[TILE], last[TILE];
    documents(b, at, rows, first, last);
    for (int i = 0; i < TILE; i++) {
      queries[i] = i < rows ? span(i, last[i]) : 0;
      keys[i] = i < rows ? span(first[i] < 0 ? 0 : first[i], i) : 0;
      head[i] = i < rows && first[i] < 0;
      tail[i] = i < rows && last[i] == rows - 1;
    }
    over = first[rows - 1] < 0;
    if (p.g) decay(p.g + b * p.gs[0] + h * p.gs[1] + at * p.gs[2], rows);
  }

 private:
  static uint64_t span(int from, int to) { return (~(uint64_t)0 >> (63 - to)) & (~(uint64_t)0 << from); }

  // first step of each step's document in the chunk, -1 for one that began before; and the last
  void documents(long b, long at, int rows, int* first, int* last) const {
    const int64_t* segment = p.segment ? p.segment + b * p.segment_stride + at : nullptr;
    const int64_t before = !segment || at == 0 ? 0 : segment[-1];
    for (int i = 0; i < rows; i++) {
      if (i == 0)
        first[i] = segment && segment[0] != before ? 0 : -1;
      else
        first[i] = segment && segment[i] != segment[i - 1] ? i : first[i - 1];
    }
    for (int i = rows - 1; i >= 0; i--) last[i] = i < rows - 1 && first[i + 1] == first[i] ? last[i + 1] : i;
  }

  void decay(const float* g, int rows) {
    float high[TILE], low[TILE];
    double c = 0;
    for (int i = 0; i < TILE; i++) {
      if (i < rows) c += LOG2E_DOUBLE * g[i * p.gs[2]];
      high[i] = (float)c;
      low[i] = (float)(c - high[i]);
    }
    for (int i = 0; i < TILE; i += W) {
      V hi = load(high + i), lo = load(low + i);
      store(head + i, load(head + i) * exp2v<5>(hi + lo));
      store(tail + i, load(tail + i) * exp2v<5>((set1(high[rows - 1]) - hi) + (set1(low[rows - 1]) - lo)));
    }
    over *= exp2(c);
    for (int j = 0; j < rows; j++) {
      const V hj = set1(high[j]), lj = set1(low[j]);
      for (int v = j / W; v < LANES; v++) {
        V t = (load(high + v * W) - hj) + (load(low + v * W) - lj);
        store(table + j * TILE + v * W, keep(mask_of(queries[j], v), exp2v<5>(t)));
      }
    }
  }
};

// products of a tile with its weights, zeros where a query does not see the key; lanes so far before the key that no
// block of rows reads them are left as they are
static void weigh(float* tile, int rows, const Weights& w, float scale) {
  const V by = set1(scale);
  for (int j = 0; j < rows; j++)
    for (int v = j < BLOCK_ROWS ? 0 : (j - BLOCK_ROWS + 1) / W; v < LANES; v++) {
      float* at = tile + j * TILE + v * W;
      Mask seen = mask_of(w.queries[j], v);
      V x = w.table ? load(at) * (load(w.table + j * TILE + v * W) * by) : load(at) * by;
      store(at, keep(seen, x));
    }
}

// a tile of an input as rows of floats: in place, or converted
template <class In>
struct Read {
  typedef typename In::T T;
  float* copy = nullptr;
  const float* at = nullptr;
  long stride = 0;
  void carve(Arena& arena) { copy = In::plain ? nullptr : arena.take<float>(TILE * PACKED); }
  void open(const T* src, long src_stride, int rows, int width) {
    if (In::plain) {
      at = (const float*)src;
      stride = src_stride;
      return;
    }
    for (int r = 0; r < rows; r++)
      for (int x = 0; x < width; x += W) store(copy + r * PACKED + x, In::get(src + r * src_stride + x));
    at = copy;
    stride = PACKED;
  }
  const char* bytes() const { return (const char*)at; }
};

// a tile of an output as sums: in place, or converted when it is done
template <class In>
struct Sums {
  typedef typename In::T T;
  float* copy = nullptr;
  T* to = nullptr;
  int width = 0;
  void carve(Arena& arena, long w) { copy = In::plain ? nullptr : arena.take<float>(TILE * w); }
  float* open(void* base, long offset, int w) {
    to = (T*)base + offset;
    width = w;
    return In::plain ? (float*)to : copy;
  }
  void close(int rows) {
    if (In::plain) return;
    for (long x = 0; x < (long)rows * width; x += W) In::put(to + x, load(copy + x));
  }
};

// queries or dO turned into the lanes: as they are where pairs of them are multiplied, which rounds nothing
template <class Op, class In>
static void turn_rows(const typename In::T* src, long stride, const Read<In>& read, int rows, int width, float* lanes) {
  if (Op::pairs)
    lay_lanes<Op, In>(src, stride, rows, width, lanes, 1.f, nullptr);
  else
    lay_lanes<Fma, Float32>(read.at, read.stride, rows, width, lanes, 1.f, nullptr);
}

// keys' (or values') products with the rows in the lanes
template <class Op, class In>
static void multiply(const typename In::T* src, long stride, const Read<In>& read, int rows, int vectors, int width,
                     const float* lanes, float* table, const uint64_t* seen) {
  const char* a = Op::pairs ? (const char*)src : read.bytes();
  const long row = Op::pairs ? stride * (long)sizeof(typename In::T) : read.stride * 4;
  scores<Op, ZERO>(rows, vectors, a, row, lanes, width / Op::depth, table, nullptr, seen);
}

INLINE const Banded<1> band(const uint64_t* bits, int rows) { return Banded<1>{bits, rows}; }

}  // namespace
