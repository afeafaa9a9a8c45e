// what crosses the C interface; mirrored by the ctypes structures of abi.py, guarded by regard_abi()
#pragma once

#include <stdint.h>

#define REGARD_ABI 4
#define REGARD_INDEXED 4

enum Dtype { FLOAT32, BFLOAT16, FLOAT16 };
enum Isa { PORTABLE, AVX2, AVX512, AVX512BF16, ISAS };
enum Normal { SOFTMAX, SIGMOID, SOFTPLUS, EXPONENTIAL, RELU, RELU_OVER_N, LINEAR };
enum Error { OK, NO_MEMORY, NO_ISA, NOT_A_NUMBER };

// a table added to the scores at key_index[j] - query_index[i]; strides in elements, 0 on broadcast axes
struct Indexed {
  const float* table;
  float* grad;
  const int32_t* key;
  const int32_t* query;
  int64_t strides[3], grad_strides[3];
  int64_t size;
  int64_t low, high;  // of key_index
};

// strides in elements; the last axis of q, k, v, out and dout is contiguous, dq, dk, dv are contiguous
struct Problem {
  int64_t batch, heads, groups, n, m, d, e, q_offset;
  const void *q, *k, *v;
  void* out;
  float* lse;
  int64_t qs[3], ks[3], vs[3], os[3];
  const void* dout;
  const float* dlse;
  float* delta;
  void *dq, *dk, *dv;
  int64_t dos[3];
  const int32_t *crow, *col, *tile;
  const uint64_t *bits, *bits_t;
  int64_t layout_batch, layout_heads, entries;
  const void* bias;  // halves only in whole tables with contiguous rows
  float* dbias;
  int64_t bias_strides[4], dbias_strides[4];
  const float* sinks;
  int64_t sink_strides[3];
  struct Indexed indexed[REGARD_INDEXED];
  uint64_t seed;
  double dropout;
  float scale, parameter;
  int32_t dtype, bias_dtype, isa, threads, normaliser, indexed_count, one_by_one;
};

enum What { ROWS, HEADS, COLUMN_SUM, ENTROPY, SINK_MASS, BLOCK_MAX, BLOCK_SUM, TOP_K };

// what is read from the weights of `problem` (q, k, lse, layout, biases, normaliser); out starts as zeros
struct Reading {
  struct Problem problem;
  float* out;
  int64_t* index;
  const int32_t* heads;                      // which query heads, head_count of them
  const int32_t *row_start, *row, *row_to;   // ROWS: by query blocks, the row and its place in out
  int64_t head_count, row_count, top, first;
  int32_t what;
};
