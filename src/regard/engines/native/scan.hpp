// the scan of linear attention: what crosses the C interface, mirrored by ScanProblem of scan.py
#pragma once

#include "abi.hpp"

#define REGARD_SCAN_ABI 2

// strides in elements; the last axis of q, k, v, dout is contiguous, everything else is contiguous.
// d and e are multiples of 16. g: log-decay, null for none; a step stride of 0 says that it is steady.
// segment: document of each step, from 0; the initial state belongs to document 0.
// beta: of the delta rule only, which has float32 inputs and as many groups as heads
struct ScanProblem {
  int64_t batch, heads, groups, n, d, e;
  const void *q, *k, *v;
  void* out;
  int64_t qs[3], ks[3], vs[3];
  const float* g;
  int64_t gs[3];
  const int64_t* segment;
  int64_t segment_stride;
  const float* s0;
  float* s;
  const void* dout;
  int64_t dos[3];
  const float* ds;
  void *dq, *dk, *dv;
  float *dg, *ds0;
  const float* beta;
  int64_t bs[3];
  float* dbeta;
  float scale;
  int32_t dtype, isa, threads;
};

struct ScanKernels {
  int (*forward)(const ScanProblem&);
  int (*backward)(const ScanProblem&);
  int (*delta_forward)(const ScanProblem&);
  int (*delta_backward)(const ScanProblem&);
};

extern __attribute__((visibility("hidden"))) const ScanKernels regard_scan_portable;
extern __attribute__((visibility("hidden"))) const ScanKernels regard_scan_avx2;
extern __attribute__((visibility("hidden"))) const ScanKernels regard_scan_avx512;
extern __attribute__((visibility("hidden"))) const ScanKernels regard_scan_avx512bf16;
