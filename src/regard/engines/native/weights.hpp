// tiles of scores into tiles of weights and back: lanes are queries, so nothing is ever reduced across lanes
#pragma once

#include "operands.hpp"

namespace {

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
constexpr float HIDDEN_SCORE = -1e30f;
constexpr float NO_TOP = -1e20f;
// a sum and an output may lag behind the maximum by so many powers of two before they are rescaled
constexpr float LAG = 8.f;

INLINE V visible(const uint64_t* allowed, int key, int v, V x) {
  return allowed ? keep(mask_of(allowed[key], v), x) : x;
}

// the streaming softmax of one tile; top and sum (TILE) are carried, alpha (TILE) is what to multiply the output by.
// returns whether alpha is anything but 1
template <class Op, bool DROP>
static bool soften(const float* s, float* w, int keys, int vectors, const uint64_t* allowed, const uint64_t* kept,
                   float c, float rest, float* top, float* sum, float* alpha) {
  bool moved = false;
  const V hidden = set1(HIDDEN_SCORE), times = set1(c);
  for (int v = 0; v < vectors; v++) {
    const float* sv = s + v * W;
    V best[4] = {hidden, hidden, hidden, hidden};
    int k = 0;
    if (allowed) {
      for (; k + 2 <= keys; k += 2) {
        best[0] = vmax(best[0], select(mask_of(allowed[k], v), load(sv + k * TILE), hidden));
        best[1] = vmax(best[1], select(mask_of(allowed[k + 1], v), load(sv + (k + 1) * TILE), hidden));
      }
      for (; k < keys; k++) best[0] = vmax(best[0], select(mask_of(allowed[k], v), load(sv + k * TILE), hidden));
    } else {
      for (; k + 4 <= keys; k += 4) {
        best[0] = vmax(best[0], load(sv + k * TILE));
        best[1] = vmax(best[1], load(sv + (k + 1) * TILE));
        best[2] = vmax(best[2], load(sv + (k + 2) * TILE));
        best[3] = vmax(best[3], load(sv + (k + 3) * TILE));
      }
      for (; k < keys; k++) best[0] = vmax(best[0], load(sv + k * TILE));
    }
    V highest = vmax(vmax(best[0], best[1]), vmax(best[2], best[3]));
    if (Op::pairs) highest = select(above(highest, set1(-1e29f)), highest * times, hidden);
    V old = load(top + v * W), total = load(sum + v * W);
    Mask up = above(highest, old + set1(LAG));
    if (any(up)) {
      moved = true;
      V now = select(up, highest, old);
      V a = exp2v<5>(old - now);
      store(alpha + v * W, a);
      store(top + v * W, now);
      total = total * a;
      old = now;
    } else {
      store(alpha + v * W, set1(1.f));
    }
    V more = zero(), scaled = set1(rest);
    float* wv = w;
    for (k = 0; k + 2 <= keys; k += 2) {
      V x = load(sv + k * TILE), y = load(sv + (k + 1) * TILE);
      x = exp2v<Op::degree>(Op::pairs ? fma(x, times, -old) : x - old);
      y = exp2v<Op::degree>(Op::pairs ? fma(y, times, -old) : y - old);
      x = visible(allowed, k, v, x);
      y = visible(allowed, k + 1, v, y);
      total = total + x;
      more = more + y;
      if (DROP) {
        x = keep(mask_of(kept[k], v), x) * scaled;
        y = keep(mask_of(kept[k + 1], v), y) * scaled;
      }
      store_two<Op>(wv, k, v, x, y);
    }
    if (k < keys) {
      V x = load(sv + k * TILE);
      x = visible(allowed, k, v, exp2v<Op::degree>(Op::pairs ? fma(x, times, -old) : x - old));
      total = total + x;
      if (DROP) x = keep(mask_of(kept[k], v), x) * scaled;
      if (Op::pairs)
        store_two<Op>(wv, k, v, x, zero());
      else
        store(wv + k * TILE + v * W, x);
    }
    store(sum + v * W, total + more);
  }
  return moved;
}

// ln(1 + y) for 0 <= y <= 1
INLINE V log1p_unit(V y) {
  V z = y * reciprocal(y + set1(2.f)), q = z * z;
  V p = fma(set1(1.f / 13), q, set1(1.f / 11));
  p = fma(p, q, set1(1.f / 9));
  p = fma(p, q, set1(1.f / 7));
  p = fma(p, q, set1(1.f / 5));
  p = fma(p, q, set1(1.f / 3));
  p = fma(p, q, set1(1.f));
  return (z + z) * p;
}

INLINE V sigmoid(V s) { return reciprocal(set1(1.f) + exp2v<5>(vmin(s * set1(-LOG2E), set1(126.f)))); }

// phi(s): the weight before anything of the row is divided out. s in natural units, of EXPONENTIAL in powers of two
template <int NORMAL>
INLINE V phi(V s, V parameter) {
  if (NORMAL == SIGMOID) return sigmoid(s + parameter);
  if (NORMAL == SOFTPLUS) {
    V small = exp2v<5>(vabs(s) * set1(-LOG2E));
    return vmax(s, zero()) + log1p_unit(small);
  }
  if (NORMAL == EXPONENTIAL) return exp2v<5>(s);
  if (NORMAL == RELU || NORMAL == RELU_OVER_N) return vmax(s, zero());
  return s;
}

// phi'(s), given phi(s)
template <int NORMAL>
INLINE V slope(V s, V weight) {
  if (NORMAL == SIGMOID) return weight * (set1(1.f) - weight);
  if (NORMAL == SOFTPLUS) return sigmoid(s);
  if (NORMAL == EXPONENTIAL) return weight;
  if (NORMAL == RELU || NORMAL == RELU_OVER_N) return keep(above(s, zero()), set1(1.f));
  return set1(1.f);
}

// weights of the normalisers without a maximum; sum (TILE) counts keys for RELU_OVER_N
template <class Op, int NORMAL, bool DROP>
static void weigh(const float* s, float* w, int keys, int vectors, const uint64_t* allowed, const uint64_t* kept,
                  float parameter, float rest, float* sum) {
  const V offset = set1(parameter), one = set1(1.f), scaled = set1(rest);
  for (int v = 0; v < vectors; v++) {
    V total = load(sum + v * W);
    for (int k = 0; k < keys; k += 2) {
      V pair[2] = {zero(), zero()};
      for (int i = 0; i < 2 && k + i < keys; i++) {
        Mask seen = mask_of(allowed[k + i], v);
        V x = keep(seen, phi<NORMAL>(load(s + (k + i) * TILE + v * W), offset));
        total = total + (NORMAL == RELU_OVER_N ? keep(seen, one) : x);
        pair[i] = DROP ? keep(mask_of(kept[k + i], v), x) * scaled : x;
      }
      if (Op::pairs || k + 1 < keys)
        store_two<Op>(w, k, v, pair[0], pair[1]);
      else
        store(w + k * TILE + v * W, pair[0]);
    }
    store(sum + v * W, total);
  }
}

// backward: scores into the weights that met the values (w, natural) and d weight / d score (g, float).
// stat (TILE): of SOFTMAX minus the log-sum-exp in powers of two (already inside s if `shifted`), else 1 / denominator
template <class Op, int NORMAL, bool DROP, bool SHIFTED>
static void unweigh(const float* s, float* w, float* g, int keys, int vectors, const uint64_t* allowed,
                    const uint64_t* kept, float c, float parameter, float rest, const float* stat) {
  // exactly one float tile is both
  constexpr bool same = NORMAL == SOFTMAX && !DROP && !Op::pairs;
  const V times = set1(c), offset = set1(parameter), scaled = set1(rest);
  for (int v = 0; v < vectors; v++) {
    V row = load(stat + v * W);
#pragma GCC unroll 2
    for (int k = 0; k < keys; k++) {
      V x = load(s + k * TILE + v * W), weight, slant;
      if (NORMAL == SOFTMAX) {
        weight = slant = visible(allowed, k, v, exp2v<Op::degree>(SHIFTED ? x : fma(x, times, row)));
      } else {
        Mask seen = mask_of(allowed[k], v);
        V bare = phi<NORMAL>(x, offset);
        weight = keep(seen, bare * row);
        slant = keep(seen, slope<NORMAL>(x, bare) * row);
      }
      if (DROP) weight = keep(mask_of(kept[k], v), weight) * scaled;
      if (!same) store_row<Op>(w, k, v, weight);
      store(g + k * TILE + v * W, slant);
    }
  }
}

// dS = g (dP - delta), delta already inside dP without dropout; natural rows to ds, and for pairs of keys to dsp.
// WIDE: float copies stay in dp for the gradients of biases
template <class Op, bool DROP, bool WIDE>
static void slant(const float* g, float* dp, float* ds, float* dsp, int keys, int vectors, const uint64_t* allowed,
                  const uint64_t* kept, float rest, const float* delta) {
  const V scaled = set1(rest);
  for (int v = 0; v < vectors; v++) {
    V less = DROP ? load(delta + v * W) : zero();
    for (int k = 0; k < keys; k += 2) {
      V pair[2] = {zero(), zero()};
      int here = keys - k < 2 ? 1 : 2;
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++) {
        if (i == here) break;
        V x = load(dp + (k + i) * TILE + v * W);
        if (DROP) x = keep(mask_of(kept[k + i], v), x) * scaled - less;
        x = visible(allowed, k + i, v, load(g + (k + i) * TILE + v * W) * x);
        pair[i] = x;
        if (Op::pairs) store_row<Op>(ds, k + i, v, x);
        if (WIDE || !Op::pairs) store(dp + (k + i) * TILE + v * W, x);
      }
      if (Op::pairs) store_two<Op>(dsp, k, v, pair[0], pair[1]);
    }
  }
}

}  // namespace
