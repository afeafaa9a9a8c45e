// products of small matrices: C[i][j] (+)= sum_k A[i][k] B[k][j], A read by broadcast, B by vectors
//
// the unit of A and B is 32 bits: one float (Fma), or two bfloat16 that are neighbours along k (Dot)
#pragma once

#include "vec.hpp"

namespace {

struct Fma {
  static constexpr bool pairs = false;
  static constexpr int depth = 1;    // values in a unit
  static constexpr int degree = 5;   // of the exponential
  typedef V Wide;
  static INLINE_MEMBER V wide(const float* p) { return load(p); }
  static INLINE_MEMBER V broadcast(const char* p) {
    float x;
    memcpy(&x, p, 4);
    return set1(x);
  }
  static INLINE_MEMBER V multiply(V c, V a, V b) { return fma(a, b, c); }
};

#if defined(__AVX512BF16__)
struct Dot {
  static constexpr bool pairs = true;
  static constexpr int depth = 2;
  // the weights are rounded to eight bits anyway
  static constexpr int degree = 3;
  typedef __m512i Wide;
  static INLINE_MEMBER __m512i wide(const float* p) { return _mm512_loadu_si512(p); }
  static INLINE_MEMBER __m512i broadcast(const char* p) {
    int32_t x;
    memcpy(&x, p, 4);
    return _mm512_set1_epi32(x);
  }
  static INLINE_MEMBER V multiply(V c, __m512i a, __m512i b) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
};
#endif

// what C starts from
enum Start { ZERO, LOAD, ROW };

// the width of a register block decides its height: enough accumulators to hide the latency, few enough to stay in
// registers
template <int NV>
struct Rows {
  static constexpr int value = BLOCK == 4 ? (NV == 4 ? 6 : NV == 3 ? 8 : NV == 2 ? 12 : 16) : (NV == 2 ? 6 : 12);
};

// AR, AK: bytes between rows and between units of A; AR = 0: given at run time
template <class Op, int R, int NV, int AR, int AK, Start START>
INLINE void block(const char* a, long ar, const float* b, long br, long depth, float* c, long cr, const float* row) {
  if (AR) ar = AR;
  V acc[R][NV];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++)
      acc[r][v] = START == ZERO ? zero() : START == LOAD ? load(c + r * cr + v * W) : load(row + v * W);
#pragma GCC unroll 2
  for (long k = 0; k < depth; k++) {
    typename Op::Wide wide[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) wide[v] = Op::wide(b + k * br + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      typename Op::Wide x = Op::broadcast(a + r * ar + k * AK);
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) acc[r][v] = Op::multiply(acc[r][v], x, wide[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) store(c + r * cr + v * W, acc[r][v]);
}

// the whole depth for every block of rows
struct Whole {
  long units;
  INLINE_MEMBER void operator()(int, int, long* from, long* to) const {
    *from = 0;
    *to = units;
  }
};

// only the units between the first and the last bit that any row of the block has
template <int DEPTH>
struct Banded {
  const uint64_t* bits;  // per row of A, over the depth
  int limit;             // values of the depth that exist
  INLINE_MEMBER void operator()(int i, int rows, long* from, long* to) const {
    uint64_t seen = 0;
    for (int r = 0; r < rows; r++) seen |= bits[i + r];
    if (limit < 64) seen &= ((uint64_t)1 << limit) - 1;
    if (!seen) {
      *from = *to = 0;
      return;
    }
    *from = __builtin_ctzll(seen) / DEPTH;
    *to = (63 - __builtin_clzll(seen)) / DEPTH + 1;
  }
};

template <class Op, int R, int NV, int AR, int AK, Start START, class Range>
INLINE int strip(int i, int rows, const char* a, long ar, const float* b, long br, float* c, long cr, const float* row,
                 const Range& range) {
  for (; i + R <= rows; i += R) {
    long from, to;
    range(i, R, &from, &to);
    if (START == LOAD && from == to) continue;
    block<Op, R, NV, AR, AK, START>(a + i * (AR ? AR : ar) + from * AK, ar, b + from * br, br, to - from, c + i * cr,
                                    cr, row);
  }
  return i;
}

template <class Op, int NV, int AR, int AK, Start START, class Range>
INLINE void columns(int rows, const char* a, long ar, const float* b, long br, float* c, long cr, const float* row,
                    const Range& range) {
  constexpr int R = Rows<NV>::value;
  int i = strip<Op, R, NV, AR, AK, START>(0, rows, a, ar, b, br, c, cr, row, range);
  if (R > 8) i = strip<Op, (R > 8 ? 8 : 1), NV, AR, AK, START>(i, rows, a, ar, b, br, c, cr, row, range);
  if (R > 4) i = strip<Op, (R > 4 ? 4 : 1), NV, AR, AK, START>(i, rows, a, ar, b, br, c, cr, row, range);
  i = strip<Op, 2, NV, AR, AK, START>(i, rows, a, ar, b, br, c, cr, row, range);
  strip<Op, 1, NV, AR, AK, START>(i, rows, a, ar, b, br, c, cr, row, range);
}

// C (rows x vectors of W) (+)= A B
template <class Op, int AR, int AK, Start START, class Range>
static void product(int rows, int vectors, const char* a, long ar, const float* b, long br, float* c, long cr,
                    const float* row, const Range& range) {
  int v = 0;
  for (; v + BLOCK <= vectors; v += BLOCK)
    columns<Op, BLOCK, AR, AK, START>(rows, a, ar, b + v * W, br, c + v * W, cr, row + v * W, range);
#if defined(__AVX512F__)
  switch (vectors - v) {
    case 3: columns<Op, 3, AR, AK, START>(rows, a, ar, b + v * W, br, c + v * W, cr, row + v * W, range); break;
    case 2: columns<Op, 2, AR, AK, START>(rows, a, ar, b + v * W, br, c + v * W, cr, row + v * W, range); break;
    case 1: columns<Op, 1, AR, AK, START>(rows, a, ar, b + v * W, br, c + v * W, cr, row + v * W, range);
  }
#else
  if (v < vectors) columns<Op, 1, AR, AK, START>(rows, a, ar, b + v * W, br, c + v * W, cr, row + v * W, range);
#endif
}

// a strip of R rows of C over the vectors [from, to)
template <class Op, int R, Start START>
INLINE void span(int from, int to, const char* a, long ar, const float* b, long depth, float* c, const float* row) {
  int v = from;
  for (; v + BLOCK <= to; v += BLOCK)
    block<Op, R, BLOCK, 0, 4, START>(a, ar, b + v * W, TILE, depth, c + v * W, TILE, row + v * W);
#if defined(__AVX512F__)
  switch (to - v) {
    case 3: block<Op, R, 3, 0, 4, START>(a, ar, b + v * W, TILE, depth, c + v * W, TILE, row + v * W); break;
    case 2: block<Op, R, 2, 0, 4, START>(a, ar, b + v * W, TILE, depth, c + v * W, TILE, row + v * W); break;
    case 1: block<Op, R, 1, 0, 4, START>(a, ar, b + v * W, TILE, depth, c + v * W, TILE, row + v * W);
  }
#else
  if (v < to) block<Op, R, 1, 0, 4, START>(a, ar, b + v * W, TILE, depth, c + v * W, TILE, row + v * W);
#endif
}

// a tile of scores, rows = keys, lanes = queries; of a partial tile only the blocks in which some pair is allowed
template <class Op, Start START>
static void scores(int rows, int vectors, const char* a, long ar, const float* b, long depth, float* c,
                   const float* row, const uint64_t* allowed) {
  for (int i = 0; i < rows;) {
    int left = rows - i, r = left >= 6 ? 6 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    int from = 0, to = vectors;
    if (allowed) {
      uint64_t seen = 0;
      for (int x = 0; x < r; x++) seen |= allowed[i + x];
      from = seen ? __builtin_ctzll(seen) / W : 0;
      int last = seen ? (63 - __builtin_clzll(seen)) / W + 1 : 0;
      to = last < vectors ? last : vectors;
    }
    if (from < to) {
      const char* ai = a + i * ar;
      float* ci = c + i * TILE;
      switch (r) {
        case 6: span<Op, 6, START>(from, to, ai, ar, b, depth, ci, row); break;
        case 4: span<Op, 4, START>(from, to, ai, ar, b, depth, ci, row); break;
        case 2: span<Op, 2, START>(from, to, ai, ar, b, depth, ci, row); break;
        default: span<Op, 1, START>(from, to, ai, ar, b, depth, ci, row);
      }
    }
    i += r;
  }
}

}  // namespace
