// a graph over keys that is searched by inner product: what crosses the C interface, mirrored by IndexProblem of key_index.py
#pragma once

#include "abi.hpp"

#define REGARD_INDEX_ABI 1

// rows are contiguous; width is a multiple of 16; places in the graph that are not used hold -1, behind the used ones.
// keys (count, width). half (count): half the squared norm of each key. lists (queries, listed): the best keys of each
// query, best first. pivots (affected): keys whose forward links are made anew, from the lists of rows
// pivot_row[pivot_start[i] .. pivot_start[i + 1]). forward (count, spread), links (count, degree).
// search: query (rows, width) -> ids (rows, k), -1 where fewer were found, and scanned (rows)
struct IndexProblem {
  int64_t count, width, degree, spread, listed, affected, entry, rows, k, effort;
  const float *keys, *half;
  const int32_t *lists, *pivots, *pivot_row;
  const int64_t* pivot_start;
  int32_t *forward, *links;
  const float* query;
  int64_t *ids, *scanned;
  int32_t isa, threads;
};

struct IndexKernels {
  int (*project)(const IndexProblem&);
  int (*link)(const IndexProblem&);
  int (*search)(const IndexProblem&);
};

extern __attribute__((visibility("hidden"))) const IndexKernels regard_index_portable;
extern __attribute__((visibility("hidden"))) const IndexKernels regard_index_avx2;
extern __attribute__((visibility("hidden"))) const IndexKernels regard_index_avx512;
extern __attribute__((visibility("hidden"))) const IndexKernels regard_index_avx512bf16;
