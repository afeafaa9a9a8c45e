// what is added to a tile of scores, and its gradients; dropout
#pragma once

#include "arena.hpp"
#include "weights.hpp"

namespace {

constexpr uint64_t ALL = ~(uint64_t)0;

// the place of a tile in the table of scores
struct Place {
  long b, h, i, j;  // batch, query head, first row, first key
  int rows, keys, vectors;
};

// where a place lies in a table
template <class T>
INLINE const T* corner_of(const void* table, const int64_t* strides, const Place& at) {
  return (const T*)table + at.b * strides[0] + at.h * strides[1] + at.i * strides[2] + at.j * strides[3];
}

// a tile of a table with contiguous rows into [key][lane]; lanes without a row are 0
template <class In>
static void read_rows(const void* table, const int64_t* strides, const Place& at, float* tile) {
  typedef typename In::T T;
  const T* from = corner_of<T>(table, strides, at);
  for (int i = 0; i < at.rows; i += W)
    for (int k = 0; k < at.keys; k += W) {
      const T* corner_at = from + i * strides[2] + k;
      const bool whole = i + W <= at.rows && k + W <= at.keys;
      if (In::plain && whole) {
        transpose<false>((const char*)corner_at, strides[2] * 4, tile + k * TILE + i, TILE, zero());
        continue;
      }
      float corner[W * W] = {}, turned[W * W];
      for (int x = 0; x < W && i + x < at.rows; x++) {
        T row[W] = {};
        memcpy(row, corner_at + x * strides[2], sizeof(T) * least(W, at.keys - k));
        store(corner + x * W, In::get(row));
      }
      transpose<false>((const char*)corner, W * 4, turned, W, zero());
      for (int x = 0; x < W && k + x < at.keys; x++) memcpy(tile + (k + x) * TILE + i, turned + x * W, W * 4);
    }
}

static void read_table(const Problem& p, const Place& at, float* tile) {
  const int64_t* strides = p.bias_strides;
  if (p.bias_dtype == BFLOAT16) return read_rows<Bfloat16>(p.bias, strides, at, tile);
  if (p.bias_dtype == FLOAT16) return read_rows<Float16>(p.bias, strides, at, tile);
  if (strides[3] == 1) return read_rows<Float32>(p.bias, strides, at, tile);
  const float* from = corner_of<float>(p.bias, strides, at);
  for (int k = 0; k < at.keys; k++)
    for (int i = 0; i < at.vectors * W; i++)
      tile[k * TILE + i] = i < at.rows ? from[i * strides[2] + k * strides[3]] : 0.f;
}

// table += tile; sums over an axis with stride 0
static void add_table(float* table, const int64_t* strides, const Place& at, const float* tile) {
  float* to = table + at.b * strides[0] + at.h * strides[1] + at.i * strides[2] + at.j * strides[3];
  if (!strides[2]) {
    for (int k = 0; k < at.keys; k++) {
      float sum = 0.f;
      for (int i = 0; i < at.rows; i++) sum += tile[k * TILE + i];
      to[k * strides[3]] += sum;
    }
  } else if (!strides[3]) {
    for (int i = 0; i < at.rows; i++) {
      float sum = 0.f;
      for (int k = 0; k < at.keys; k++) sum += tile[k * TILE + i];
      to[i * strides[2]] += sum;
    }
  } else {
    for (int i = 0; i < at.rows; i += W)
      for (int k = 0; k < at.keys; k += W) {
        if (strides[3] == 1 && i + W <= at.rows && k + W <= at.keys) {
          float turned[W * W];
          transpose<false>((const char*)(tile + k * TILE + i), TILE * 4, turned, W, zero());
          for (int x = 0; x < W; x++) {
            float* row = to + (i + x) * strides[2] + k;
            store(row, load(row) + load(turned + x * W));
          }
          continue;
        }
        for (int x = i; x < i + W && x < at.rows; x++)
          for (int y = k; y < k + W && y < at.keys; y++) to[x * strides[2] + y * strides[3]] += tile[y * TILE + x];
      }
  }
}

// lanes of a run read neighbouring places of a table: no wider than a vector, and where grids are laid out in tiles of
// 8 x 8, no wider than their rows
constexpr int RUN = W < 8 ? W : 8;
// tables with few places for keys are turned, once per tile of queries: one row of lanes per place
constexpr int PLACES = 128;

// one table as the lanes of one tile of queries read it; places of pairs that may not meet are moved inside
struct Lookup {
  int32_t query[TILE], offset[TILE], last;
  const float* table;
  float* grad;
  long low, grad_row;
  bool few, runs;
  float *turned, *sums;  // (PLACES, TILE)
  uint8_t* ready;        // per place: 1 = turned, 2 = has sums

  void carve(Arena& arena, const Indexed& x, bool backward) {
    few = x.high - x.low < PLACES;
    turned = few ? arena.take<float>(PLACES * TILE) : nullptr;
    sums = few && backward ? arena.take<float>(PLACES * TILE) : nullptr;
    ready = few ? arena.take<uint8_t>(PLACES) : nullptr;
  }

  void open(const Indexed& x, const Place& at) {
    last = (int32_t)x.size - 1;
    low = x.low;
    grad_row = x.grad_strides[2];
    table = x.table + at.b * x.strides[0] + at.h * x.strides[1] + at.i * x.strides[2];
    grad = x.grad ? x.grad + at.b * x.grad_strides[0] + at.h * x.grad_strides[1] + at.i * grad_row : nullptr;
    runs = !x.strides[2];
    for (int i = 0; i < TILE; i++) {
      // lanes without a row go on as the last one would
      query[i] = i < at.rows ? x.query[at.i + i] : query[at.rows - 1] + i - at.rows + 1;
      offset[i] = i < at.rows ? (int32_t)(i * x.strides[2]) : 0;
      runs &= i % RUN == 0 || query[i] == query[i - 1] + 1;
    }
    if (few) memset(ready, 0, PLACES);
  }

  INLINE_MEMBER int32_t place(int32_t key, int i) const {
    int32_t x = key - query[i];
    x = x < 0 ? 0 : x;
    return x > last ? last : x;
  }

  // whether every lane's place is inside
  INLINE_MEMBER bool inside(int32_t key, int lanes) const {
    bool in = true;
    for (int i = 0; i < lanes; i += RUN) in &= key - query[i] <= last && key - query[i] >= RUN - 1;
    return in;
  }

  const float* row(int32_t key) {
    const long at = key - low;
    float* to = turned + at * TILE;
    if (!(ready[at] & 1)) {
      ready[at] |= 1;
      for (int i = 0; i < TILE; i++) to[i] = table[place(key, i) + offset[i]];
    }
    return to;
  }

  // s += unit table
  INLINE_MEMBER void add(int32_t key, int vectors, V unit, float* s) {
    if (few) {
      const float* from = row(key);
      for (int v = 0; v < vectors; v++) store(s + v * W, fma(load(from + v * W), unit, load(s + v * W)));
    } else if (runs && inside(key, vectors * W)) {
      for (int v = 0; v < vectors; v++) {
        const float* ends[W / RUN];
        for (int x = 0; x < W / RUN; x++) ends[x] = table + key - query[v * W + x * RUN];
        store(s + v * W, fma(backwards(ends), unit, load(s + v * W)));
      }
    } else {
      int32_t index[TILE];
      for (int i = 0; i < TILE; i++) index[i] = place(key, i) + offset[i];
      for (int v = 0; v < vectors; v++) store(s + v * W, fma(gather(table, index + v * W), unit, load(s + v * W)));
    }
  }

  // grad += ds, which is 0 in lanes that have no row or may not meet the key
  INLINE_MEMBER void spread(int32_t key, const Place& at, const float* ds) {
    if (!grad) return;
    if (few) {
      const long x = key - low;
      float* to = sums + x * TILE;
      const bool first = !(ready[x] & 2);
      ready[x] |= 2;
      for (int v = 0; v < at.vectors; v++)
        store(to + v * W, first ? load(ds + v * W) : load(ds + v * W) + load(to + v * W));
    } else if (runs && inside(key, at.vectors * W)) {
      for (int i = 0; i < at.vectors * W; i += RUN) {
        float* to = grad + key - query[i];
#pragma GCC ivdep
        for (int y = 0; y < RUN; y++) to[-y] += ds[i + y];
      }
    } else {
      for (int i = 0; i < at.rows; i++) grad[place(key, i) + i * grad_row] += ds[i];
    }
  }

  // what was summed by places into the gradient
  void settle(const Place& at) {
    if (!grad || !few) return;
    for (int x = 0; x < PLACES; x++)
      if (ready[x] & 2)
        for (int i = 0; i < at.rows; i++) grad[place((int32_t)(low + x), i) + i * grad_row] += sums[x * TILE + i];
  }
};

// all that is added to the scores of a tile of queries
struct Extras {
  Lookup tables[REGARD_INDEXED];
  float* spare;
  uint64_t* seen;  // per key of the tile: which lanes may meet it, and are not hidden by a bias of -inf
  bool hides;      // whether there is a lane that may not
  bool strange = false;  // whether a bias was NaN so far

  void carve(Arena& arena, const Problem& p, bool backward) {
    for (int t = 0; t < p.indexed_count; t++) tables[t].carve(arena, p.indexed[t], backward);
    spare = p.bias ? arena.take<float>(TILE * TILE) : nullptr;
    seen = arena.take<uint64_t>(TILE);
  }

  void open(const Problem& p, const Place& at) {
    for (int t = 0; t < p.indexed_count; t++) tables[t].open(p.indexed[t], at);
  }

  // s = c s + unit (bias + indexed), in place
  void add(const Problem& p, const Place& at, float* s, const uint64_t* allowed, float c, float unit) {
    const V times = set1(c), units = set1(unit), lowest = set1(-3e38f);
    for (int k = 0; k < at.keys; k++) seen[k] = allowed ? allowed[k] : ALL;
    hides = allowed;
    if (p.bias && !p.bias_strides[2]) {
      const float* from = corner_of<float>(p.bias, p.bias_strides, at);
      for (int k = 0; k < at.keys; k++) {
        const float x = from[k * p.bias_strides[3]];
        if (!(x > -3e38f)) seen[k] = 0, hides = true, strange |= x != x;
        const V more = set1(x * unit);
        for (int v = 0; v < at.vectors; v++)
          store(s + k * TILE + v * W, fma(load(s + k * TILE + v * W), times, more));
      }
    } else if (p.bias) {
      read_table(p, at, spare);
      uint64_t common = ALL;
      for (int k = 0; k < at.keys; k++) {
        uint64_t bits = at.vectors * W < 64 ? ALL << at.vectors * W : 0;
        for (int v = 0; v < at.vectors; v++) {
          V x = load(spare + k * TILE + v * W);
          bits |= bits_of(above(x, lowest)) << (v * W);
          store(s + k * TILE + v * W, fma(x, units, load(s + k * TILE + v * W) * times));
        }
        seen[k] &= bits;
        common &= bits;
      }
      if (common != ALL) {
        hides = true;
        for (int x = 0; x < at.keys * TILE; x++) strange |= x % TILE < at.rows && spare[x] != spare[x];
      }
    } else if (c != 1.f) {
      for (int k = 0; k < at.keys; k++)
        for (int v = 0; v < at.vectors; v++) store(s + k * TILE + v * W, load(s + k * TILE + v * W) * times);
    }
    for (int t = 0; t < p.indexed_count; t++)
      for (int k = 0; k < at.keys; k++)
        if (seen[k]) tables[t].add(p.indexed[t].key[at.j + k], at.vectors, units, s + k * TILE);
  }

  // gradients of what was added; ds is 0 where pairs may not meet
  void spread(const Problem& p, const Place& at, const float* ds) {
    if (p.dbias) add_table(p.dbias, p.dbias_strides, at, ds);
    for (int t = 0; t < p.indexed_count; t++)
      for (int k = 0; k < at.keys; k++)
        if (seen[k]) tables[t].spread(p.indexed[t].key[at.j + k], at, ds + k * TILE);
  }

  // the pairs of the tile that may meet; null where all may
  INLINE_MEMBER const uint64_t* pairs() const { return hides ? seen : nullptr; }

  void settle(const Problem& p, const Place& at) {
    for (int t = 0; t < p.indexed_count; t++) tables[t].settle(at);
  }

  // the next tile of a bias comes into the cache while this one is worked on
  static INLINE_MEMBER void fetch_ahead(const Problem& p, const Place& at, long next) {
    if (!p.bias || p.bias_strides[3] != 1 || !p.bias_strides[2]) return;
    const long keys = least(TILE, p.m - next);
    const Place there{at.b, at.h, at.i, next, at.rows, at.keys, at.vectors};
    if (p.bias_dtype == FLOAT32)
      fetch(corner_of<float>(p.bias, p.bias_strides, there), p.bias_strides[2] * 4, at.rows, keys * 4);
    else
      fetch(corner_of<Half>(p.bias, p.bias_strides, there), p.bias_strides[2] * 2, at.rows, keys * 2);
  }
};

// how many rows have their random words in registers at once
constexpr int DRAWN = 32;

// Philox4x32-10: key seed, counter (b, h, i, j div 4); of the four words of its output, word j mod 4 decides on key j.
// Tiles begin at multiples of 4 keys. Words are the low halves of 64 bits: a product reads no more, and needs no widening
static void draw(const Problem& p, const Place& at, uint64_t* kept) {
  const uint32_t threshold = (uint32_t)(p.dropout * 4294967296.0);
  uint64_t c[4][DRAWN];
  for (int k = 0; k < at.keys; k += 4) {
    for (int word = 0; word < 4; word++) kept[k + word] = 0;
    for (int first = 0; first < TILE; first += DRAWN) {
      for (int i = 0; i < DRAWN; i++) {
        c[0][i] = (uint32_t)at.b;
        c[1][i] = (uint32_t)at.h;
        c[2][i] = (uint32_t)(p.q_offset + at.i + first + i);
        c[3][i] = (uint32_t)((at.j + k) / 4);
      }
      uint64_t key0 = (uint32_t)p.seed, key1 = (uint64_t)p.seed >> 32;
#pragma GCC unroll 10
      for (int round = 0; round < 10; round++) {
        for (int i = 0; i < DRAWN; i++) {
          const uint64_t x = 0xD2511F53ull * (uint32_t)c[0][i], y = 0xCD9E8D57ull * (uint32_t)c[2][i];
          c[0][i] = (y >> 32) ^ c[1][i] ^ key0;
          c[2][i] = (x >> 32) ^ c[3][i] ^ key1;
          c[1][i] = y;
          c[3][i] = x;
        }
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
      }
      for (int word = 0; word < 4; word++) {
        // numbers first: compilers turn comparisons into bits one lane after the other
        float stays[DRAWN];
        for (int i = 0; i < DRAWN; i++) stays[i] = (uint32_t)c[word][i] >= threshold ? 1.f : 0.f;
        for (int i = 0; i < DRAWN; i += W) kept[k + word] |= bits_of(above(load(stays + i), zero())) << (first + i);
      }
    }
  }
}

}  // namespace
