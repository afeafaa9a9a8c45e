// tensors as the products read them: rows by broadcast in place, columns by vectors, queries transposed into the lanes
#pragma once

#include "abi.hpp"
#include "arena.hpp"
#include "gemm.hpp"

namespace {

struct Float32 {
  typedef float T;
  static constexpr bool plain = true;
  static INLINE_MEMBER V get(const T* p) { return load(p); }
  static INLINE_MEMBER void put(T* p, V x) { store(p, x); }
};
struct Bfloat16 {
  typedef Half T;
  static constexpr bool plain = false;
  static INLINE_MEMBER V get(const T* p) { return load_bf16(p); }
  static INLINE_MEMBER void put(T* p, V x) { store_bf16(p, x); }
};
struct Float16 {
  typedef Half T;
  static constexpr bool plain = false;
  static INLINE_MEMBER V get(const T* p) { return load_f16(p); }
  static INLINE_MEMBER void put(T* p, V x) { store_f16(p, x); }
};

constexpr int WIDEST = 256;
const Half no_values[WIDEST] = {};

INLINE long least(long a, long b) { return a < b ? a : b; }

// into the cache
INLINE void fetch(const void* p, long row_bytes, int rows, long bytes) {
  for (int r = 0; r < rows; r++)
    for (long x = 0; x < bytes; x += 64) __builtin_prefetch((const char*)p + r * row_bytes + x, 0, 3);
}

// rows [0, rows) as columns of a product: floats, or pairs of neighbouring rows
template <class Op, class In>
static void lay_columns(const typename In::T* src, long stride, int rows, int width, float* dst) {
#if defined(__AVX512BF16__)
  if (Op::pairs) {
    for (int r = 0; r < rows; r += 2) {
      const Half* low = (const Half*)src + r * stride;
      const Half* high = r + 1 < rows ? low + stride : no_values;
      for (int x = 0; x < width; x += W) store_pairs((uint32_t*)dst + (r / 2) * width + x, low + x, high + x);
    }
    return;
  }
#endif
  for (int r = 0; r < rows; r++)
    for (int x = 0; x < width; x += W) store(dst + r * width + x, In::get(src + r * stride + x));
}

// rows [0, rows) into the lanes of dst (units, TILE); the lanes up to the next vector are 0
template <class Op, class In>
static void lay_lanes(const typename In::T* src, long stride, int rows, int width, float* dst, float scale,
                      float* wide) {
  const char* from = (const char*)src;
  long row_bytes = stride * (long)sizeof(typename In::T);
  int units = width / Op::depth;
  if (!Op::pairs && !In::plain) {
    lay_columns<Fma, In>(src, stride, rows, width, wide);
    from = (const char*)wide;
    row_bytes = width * 4;
  }
  for (int r = 0; r < rows; r += W)
    for (int x = 0; x < units; x += W) {
      const char* at = from + r * row_bytes + x * 4;
      long step = row_bytes;
      float corner[W * W];
      if (r + W > rows || x + W > units) {
        memset(corner, 0, sizeof corner);
        for (int i = 0; i < W && r + i < rows; i++)
          memcpy(corner + i * W, at + i * row_bytes, 4 * least(W, units - x));
        at = (const char*)corner;
        step = W * 4;
      }
      if (Op::pairs)
        transpose<false>(at, step, dst + x * TILE + r, TILE, zero());
      else
        transpose<true>(at, step, dst + x * TILE + r, TILE, set1(scale));
    }
  if (Op::pairs && scale < 0) {
    uint32_t* bits = (uint32_t*)dst;
    for (int x = 0; x < units * TILE; x++) bits[x] ^= 0x80008000u;
  }
}

// the keys or the values of one head
template <class Op, class In>
struct Side {
  typedef typename In::T T;
  static constexpr bool copied = !Op::pairs && !In::plain;  // rows are read from a copy, too
  const T* base = nullptr;
  long stride = 0;
  int width = 0;
  long count = 0;
  bool by_columns = false;
  float* packed = nullptr;
  uint8_t* ready = nullptr;

  bool packs() const { return copied || (Op::pairs && by_columns); }

  void carve(Arena& arena) {
    long tiles = (count + TILE - 1) / TILE;
    packed = packs() ? arena.take<float>(tiles * (TILE / Op::depth) * (size_t)width) : nullptr;
    ready = packs() ? arena.take<uint8_t>(tiles) : nullptr;
  }
  void open(const void* p, long offset) {
    base = (const T*)p + offset;
    if (ready) memset(ready, 0, (count + TILE - 1) / TILE);
  }
  // a head may use few of its keys: each tile is packed when it is first met
  INLINE_MEMBER void prepare(long kb, int rows) {
    if (!packs() || ready[kb]) return;
    ready[kb] = 1;
    lay_columns<Op, In>(base + kb * TILE * stride, stride, rows, width, tile(kb));
  }
  INLINE_MEMBER const char* rows(long kb) const {
    return copied ? (const char*)tile(kb) : (const char*)(base + kb * TILE * stride);
  }
  INLINE_MEMBER long row_bytes() const { return copied ? width * 4L : stride * (long)sizeof(T); }
  INLINE_MEMBER const float* columns(long kb) const {
    return packs() ? tile(kb) : (const float*)(base + kb * TILE * stride);
  }
  INLINE_MEMBER long columns_stride() const { return packs() ? width : stride; }
  INLINE_MEMBER float* tile(long kb) const { return packed + kb * (TILE / Op::depth) * (long)width; }
};

// where the blocks of a row of query blocks are listed
struct Listed {
  const int32_t *crow, *col, *tile;
  Listed(const Problem& p, long b, long h) {
    long nq = (p.n + TILE - 1) / TILE;
    long at = (p.layout_batch > 1 ? b : 0) * p.layout_heads + (p.layout_heads > 1 ? h : 0);
    crow = p.crow + at * (nq + 1);
    col = p.col + at * p.entries;
    tile = p.tile + at * p.entries;
  }
};

#if defined(__AVX512BF16__)
INLINE __m512i interleave(V low, V high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}
INLINE void store_natural(Half* p, V x) {
  __m256bh y = _mm512_cvtneps_pbh(x);
  memcpy(p, &y, 32);
}
#endif

// two neighbouring rows of weights as the transposed operand: [key][lane], or [pair of keys][lane]
template <class Op>
INLINE void store_two(float* tile, int key, int v, V first, V second) {
#if defined(__AVX512BF16__)
  if (Op::pairs) {
    _mm512_storeu_si512(tile + key / 2 * TILE + v * W, interleave(first, second));
    return;
  }
#endif
  store(tile + key * TILE + v * W, first);
  store(tile + (key + 1) * TILE + v * W, second);
}

// one row of weights as the natural operand: [key][lane], or [key][pair of lanes]
template <class Op>
INLINE void store_row(float* tile, int key, int v, V x) {
#if defined(__AVX512BF16__)
  if (Op::pairs) {
    store_natural((Half*)tile + key * TILE + v * W, x);
    return;
  }
#endif
  store(tile + key * TILE + v * W, x);
}

template <class Op>
struct Natural {
  static constexpr int row = Op::pairs ? TILE * 2 : TILE * 4;
};

}  // namespace
