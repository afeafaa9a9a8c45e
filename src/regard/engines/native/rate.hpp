// how fast this processor multiplies and adds when nothing but registers is in the way
#pragma once

#include <time.h>

#include "gemm.hpp"

namespace {

INLINE double seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return now.tv_sec + now.tv_nsec * 1e-9;
}

template <class Op>
static __attribute__((noinline)) float multiply_add(typename Op::Wide a, typename Op::Wide b, long rounds) {
  // not the same sum many times: the compiler would keep one of them
  V acc[BLOCK * 6];
#pragma GCC unroll 24
  for (int i = 0; i < BLOCK * 6; i++) acc[i] = set1((float)i);
  for (long round = 0; round < rounds; round++) {
#pragma GCC unroll 24
    for (int i = 0; i < BLOCK * 6; i++) acc[i] = Op::multiply(acc[i], a, b);
  }
  V sum = zero();
#pragma GCC unroll 24
  for (int i = 0; i < BLOCK * 6; i++) sum = sum + acc[i];
  return total(sum);
}

// floating point operations a second of one thread, the best of rounds that take about `budget` seconds
template <class Op>
static double rate(double budget) {
  // not known to the compiler, so that nothing is computed beforehand
  volatile float small = 1e-30f;
  float start[W];
  for (int i = 0; i < W; i++) start[i] = small;
  const typename Op::Wide a = Op::wide(start), b = Op::broadcast((const char*)start);
  double best = 0;
  for (const double begun = seconds(); seconds() - begun < budget;) {
    // about 2 ms: the clock of a virtual machine is coarse
    const long rounds = 1 << 20;
    const double from = seconds();
    small = multiply_add<Op>(a, b, rounds);
    const double now = 2.0 * Op::depth * W * BLOCK * 6 * rounds / (seconds() - from);
    best = now > best ? now : best;
  }
  return best;
}

}  // namespace
