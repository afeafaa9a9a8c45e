// vectors of W floats, and the few integer and 16-bit operations that the kernels need, per instruction set
//
// every kernel file includes this into its own anonymous namespace: nothing here may become a weak symbol that the
// linker shares between instruction sets
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline, unused))
#define INLINE_MEMBER inline __attribute__((always_inline, unused))

namespace {

typedef uint16_t Half;  // the bits of a bfloat16 or a float16

#if defined(__AVX512F__)

constexpr int W = 16;
constexpr int BLOCK = 4;  // vectors in a register block
typedef __m512 V;
typedef __mmask16 Mask;

INLINE V zero() { return _mm512_setzero_ps(); }
INLINE V set1(float x) { return _mm512_set1_ps(x); }
INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, V x) { _mm512_storeu_ps(p, x); }
INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
INLINE V vmax(V a, V b) { return _mm512_max_ps(a, b); }
INLINE V vmin(V a, V b) { return _mm512_min_ps(a, b); }
INLINE V vabs(V a) { return _mm512_abs_ps(a); }
INLINE Mask above(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
INLINE V select(Mask m, V a, V b) { return _mm512_mask_blend_ps(m, b, a); }
INLINE V keep(Mask m, V a) { return _mm512_maskz_mov_ps(m, a); }
INLINE bool any(Mask m) { return m != 0; }
INLINE Mask mask_of(uint64_t bits, int v) { return (Mask)(bits >> (16 * v)); }
INLINE uint64_t bits_of(Mask m) { return (uint64_t)(uint16_t)m; }
INLINE float total(V x) { return _mm512_reduce_add_ps(x); }
INLINE V reciprocal(V x) {
  V r = _mm512_rcp14_ps(x);
  return r * _mm512_fnmadd_ps(x, r, _mm512_set1_ps(2.f));
}
INLINE V load_bf16(const Half* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
INLINE V load_f16(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
INLINE void store_f16(Half* p, V x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, 0)); }
INLINE void store_bf16(Half* p, V x) {
  __m512i i = _mm512_castps_si512(x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(i, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(i, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  r = _mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(r));
}
// 16-bit neighbours of two rows as pairs: lane j = (low[j], high[j])
INLINE void store_pairs(uint32_t* p, const Half* low, const Half* high) {
  __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)low));
  __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)high));
  _mm512_storeu_si512(p, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
}
INLINE V gather(const float* base, const int32_t* index) {
  return _mm512_i32gather_ps(_mm512_loadu_si512(index), base, 4);
}
// lane i = the end[-i] of its run of 8 lanes
INLINE V backwards(const float* const* end) {
  const __m256i order = _mm256_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  __m256 a = _mm256_permutevar8x32_ps(_mm256_loadu_ps(end[0] - 7), order);
  __m256 b = _mm256_permutevar8x32_ps(_mm256_loadu_ps(end[1] - 7), order);
  return _mm512_insertf32x8(_mm512_castps256_ps512(a), b, 1);
}
// 2^t, t below -126 gives 0. DEGREE 5: relative error 7.5e-8; 3: 7.5e-5
template <int DEGREE>
INLINE V exp2v(V t) {
  V f = _mm512_reduce_ps(t, 0x09);
  V p;
  if (DEGREE == 3) {
    p = fma(set1(7.802452308e-02f), f, set1(2.260671548e-01f));
    p = fma(p, f, set1(6.958335407e-01f));
    p = fma(p, f, set1(9.999252186e-01f));
  } else {
    p = fma(set1(1.877571068e-03f), f, set1(8.989355275e-03f));
    p = fma(p, f, set1(5.582630346e-02f));
    p = fma(p, f, set1(2.401536230e-01f));
    p = fma(p, f, set1(6.931530723e-01f));
    p = fma(p, f, set1(9.999999251e-01f));
  }
  return _mm512_scalef_ps(p, t);
}
// dst[j][i] = src[i][j], W x W; without SCALED any 32 bits pass unchanged
template <bool SCALED>
INLINE void transpose(const char* src, long row_bytes, float* dst, long dst_row, V scale) {
  __m512 r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) {
    r[i] = _mm512_loadu_ps(src + i * row_bytes);
    if (SCALED) r[i] *= scale;
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]);
    __m512d c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
    r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    store(dst + i * dst_row, _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
    store(dst + (i + 8) * dst_row, _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd));
    store(dst + (i + 4) * dst_row, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88));
    store(dst + (i + 12) * dst_row, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd));
  }
}

// lane i = the sum of all lanes of x[i]
INLINE V sums(const V* x) {
  V two[8], four[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) two[i] = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]) + _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    __m512d a = _mm512_castps_pd(two[2 * i]), b = _mm512_castps_pd(two[2 * i + 1]);
    four[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)) + _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  }
  V low = _mm512_shuffle_f32x4(four[0], four[1], 0x88) + _mm512_shuffle_f32x4(four[0], four[1], 0xdd);
  V high = _mm512_shuffle_f32x4(four[2], four[3], 0x88) + _mm512_shuffle_f32x4(four[2], four[3], 0xdd);
  return _mm512_shuffle_f32x4(low, high, 0x88) + _mm512_shuffle_f32x4(low, high, 0xdd);
}

#elif defined(__AVX2__)

constexpr int W = 8;
constexpr int BLOCK = 2;
typedef __m256 V;
typedef __m256 Mask;

INLINE V zero() { return _mm256_setzero_ps(); }
INLINE V set1(float x) { return _mm256_set1_ps(x); }
INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
INLINE void store(float* p, V x) { _mm256_storeu_ps(p, x); }
INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
INLINE V vmax(V a, V b) { return _mm256_max_ps(a, b); }
INLINE V vmin(V a, V b) { return _mm256_min_ps(a, b); }
INLINE V vabs(V a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), a); }
INLINE Mask above(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
INLINE V select(Mask m, V a, V b) { return _mm256_blendv_ps(b, a, m); }
INLINE V keep(Mask m, V a) { return _mm256_and_ps(m, a); }
INLINE bool any(Mask m) { return _mm256_movemask_ps(m) != 0; }
INLINE Mask mask_of(uint64_t bits, int v) {
  __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  __m256i b = _mm256_and_si256(_mm256_set1_epi32((int)((bits >> (8 * v)) & 0xff)), lanes);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(b, lanes));
}
INLINE uint64_t bits_of(Mask m) { return (uint64_t)(uint32_t)_mm256_movemask_ps(m); }
INLINE float total(V x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
INLINE V reciprocal(V x) {
  V r = _mm256_rcp_ps(x);
  return r * _mm256_fnmadd_ps(x, r, _mm256_set1_ps(2.f));
}
INLINE V load_bf16(const Half* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
INLINE V load_f16(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INLINE void store_f16(Half* p, V x) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, 0)); }
INLINE void store_bf16(Half* p, V x) {
  __m256i i = _mm256_castps_si256(x);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(i, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(i, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
  r = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(r));
}
INLINE void store_pairs(uint32_t* p, const Half* low, const Half* high) {
  __m256i a = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)low));
  __m256i b = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)high));
  _mm256_storeu_si256((__m256i*)p, _mm256_or_si256(a, _mm256_slli_epi32(b, 16)));
}
INLINE V gather(const float* base, const int32_t* index) {
  return _mm256_i32gather_ps(base, _mm256_loadu_si256((const __m256i*)index), 4);
}
INLINE V backwards(const float* const* end) {
  return _mm256_permutevar8x32_ps(_mm256_loadu_ps(end[0] - 7), _mm256_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0));
}
template <int DEGREE>
INLINE V exp2v(V t) {
  V live = _mm256_cmp_ps(t, set1(-126.f), _CMP_GE_OQ);
  t = vmin(vmax(t, set1(-126.f)), set1(127.49f));
  V z = t + set1(12582912.f);
  V f = t - (z - set1(12582912.f));
  V p;
  if (DEGREE == 3) {
    p = fma(set1(5.517166937e-02f), f, set1(2.426111222e-01f));
    p = fma(p, f, set1(6.932609854e-01f));
    p = fma(p, f, set1(9.999280736e-01f));
  } else {
    p = fma(set1(1.327654124e-03f), f, set1(9.675541009e-03f));
    p = fma(p, f, set1(5.550713060e-02f));
    p = fma(p, f, set1(2.402211973e-01f));
    p = fma(p, f, set1(6.931469672e-01f));
    p = fma(p, f, set1(1.000000072e+00f));
  }
  __m256i e = _mm256_slli_epi32(_mm256_castps_si256(z), 23);
  return _mm256_and_ps(live, _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), e)));
}
template <bool SCALED>
INLINE void transpose(const char* src, long row_bytes, float* dst, long dst_row, V scale) {
  __m256 r[8], t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    r[i] = _mm256_loadu_ps((const float*)(src + i * row_bytes));
    if (SCALED) r[i] *= scale;
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    store(dst + i * dst_row, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    store(dst + (i + 4) * dst_row, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}

INLINE V sums(const V* x) {
  V two[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) two[i] = _mm256_hadd_ps(x[2 * i], x[2 * i + 1]);
  V low = _mm256_hadd_ps(two[0], two[1]), high = _mm256_hadd_ps(two[2], two[3]);
  return _mm256_permute2f128_ps(low, high, 0x20) + _mm256_permute2f128_ps(low, high, 0x31);
}

#else

constexpr int W = 4;
constexpr int BLOCK = 2;
typedef float V __attribute__((vector_size(16)));
typedef int32_t Mask __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));

INLINE V set1(float x) { return V{x, x, x, x}; }
INLINE V zero() { return set1(0.f); }
INLINE V load(const float* p) {
  V x;
  memcpy(&x, p, sizeof x);
  return x;
}
INLINE void store(float* p, V x) { memcpy(p, &x, sizeof x); }
INLINE V fma(V a, V b, V c) { return a * b + c; }
INLINE V select(Mask m, V a, V b) { return (V)((m & (Mask)a) | (~m & (Mask)b)); }
INLINE V keep(Mask m, V a) { return (V)(m & (Mask)a); }
INLINE V vmax(V a, V b) { return select(a > b, a, b); }
INLINE V vmin(V a, V b) { return select(a < b, a, b); }
INLINE V vabs(V a) { return vmax(a, -a); }
INLINE Mask above(V a, V b) { return a > b; }
INLINE uint64_t bits_of(Mask m) { return (m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8); }
INLINE bool any(Mask m) { return bits_of(m) != 0; }
INLINE Mask mask_of(uint64_t bits, int v) {
  int32_t b = (int32_t)((bits >> (4 * v)) & 15);
  return (Mask{b, b, b, b} & Mask{1, 2, 4, 8}) != Mask{0, 0, 0, 0};
}
INLINE float total(V x) { return (x[0] + x[2]) + (x[1] + x[3]); }
INLINE V sums(const V* x) { return V{total(x[0]), total(x[1]), total(x[2]), total(x[3])}; }
INLINE V reciprocal(V x) { return set1(1.f) / x; }
INLINE float to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
INLINE float from_f16(Half h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return to_float(sign | 0x7f800000 | ((rest & 0x3ff) << 13));
  // a multiplication moves the exponent and makes subnormals normal
  return to_float(sign | to_bits(to_float(rest << 13) * 5.192296858534828e33f));
}
INLINE Half to_f16(float x) {
  uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return (Half)(sign | 0x7e00);
  if (rest >= 0x477ff000) return (Half)(sign | 0x7c00);
  if (rest < 0x38800000) {
    // the sum's last bit is 2^-24: the addition rounds as a subnormal half does
    return (Half)(sign | (to_bits(to_float(rest) + 0.5f) - 0x3f000000));
  }
  rest += 0xfff + ((rest >> 13) & 1);
  return (Half)(sign | ((rest - 0x38000000) >> 13));
}
INLINE V load_bf16(const Half* p) {
  return V{to_float((uint32_t)p[0] << 16), to_float((uint32_t)p[1] << 16), to_float((uint32_t)p[2] << 16),
           to_float((uint32_t)p[3] << 16)};
}
INLINE V load_f16(const Half* p) { return V{from_f16(p[0]), from_f16(p[1]), from_f16(p[2]), from_f16(p[3])}; }
INLINE void store_f16(Half* p, V x) {
  for (int i = 0; i < 4; i++) p[i] = to_f16(x[i]);
}
INLINE void store_bf16(Half* p, V x) {
  for (int i = 0; i < 4; i++) {
    uint32_t b = to_bits(x[i]);
    p[i] = x[i] != x[i] ? 0x7fc0 : (Half)((b + 0x7fff + ((b >> 16) & 1)) >> 16);
  }
}
INLINE V gather(const float* base, const int32_t* i) { return V{base[i[0]], base[i[1]], base[i[2]], base[i[3]]}; }
INLINE V backwards(const float* const* end) { return V{end[0][0], end[0][-1], end[0][-2], end[0][-3]}; }
template <int DEGREE>
INLINE V exp2v(V t) {
  Mask live = t >= set1(-126.f);
  t = vmin(vmax(t, set1(-126.f)), set1(127.49f));
  V z = t + set1(12582912.f);
  V f = t - (z - set1(12582912.f));
  V p = fma(set1(1.327654124e-03f), f, set1(9.675541009e-03f));
  p = fma(p, f, set1(5.550713060e-02f));
  p = fma(p, f, set1(2.402211973e-01f));
  p = fma(p, f, set1(6.931469672e-01f));
  p = fma(p, f, set1(1.000000072e+00f));
  return keep(live, (V)((Bits)p + ((Bits)z << 23)));
}
template <bool SCALED>
INLINE void transpose(const char* src, long row_bytes, float* dst, long dst_row, V scale) {
  for (int i = 0; i < W; i++) {
    V x;
    memcpy(&x, src + i * row_bytes, sizeof x);
    if (SCALED) x *= scale;
    for (int j = 0; j < W; j++) dst[j * dst_row + i] = x[j];
  }
}

#endif

constexpr int TILE = 64;
constexpr int LANES = TILE / W;  // vectors in a row of a tile

}  // namespace
