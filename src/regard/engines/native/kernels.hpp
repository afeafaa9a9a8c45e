// the functions that exist once per instruction set
#pragma once

#include "abi.hpp"

struct Kernels {
  int (*forward)(const Problem&);
  int (*backward)(const Problem&);
  int (*readout)(const Reading&);
  double (*rate)(int dtype, double budget);
};

extern __attribute__((visibility("hidden"))) const Kernels regard_portable;
extern __attribute__((visibility("hidden"))) const Kernels regard_avx2;
extern __attribute__((visibility("hidden"))) const Kernels regard_avx512;
extern __attribute__((visibility("hidden"))) const Kernels regard_avx512bf16;
