// compiled once per instruction set, with REGARD_KERNELS naming the table
#include "kernels.hpp"

#include <sched.h>

#include "decode.hpp"
#include "rate.hpp"
#include "readout.hpp"

namespace {

#if defined(__AVX512BF16__)
typedef Dot HalfOp;
#else
typedef Fma HalfOp;
#endif

int run_forward(const Problem& p) {
  if (is_decoding(p)) {
    if (p.dtype == FLOAT32) return decode<Float32>(p);
    return p.dtype == BFLOAT16 ? decode<Bfloat16>(p) : decode<Float16>(p);
  }
  if (p.dtype == FLOAT32) return forward<Fma, Float32>(p);
  if (p.dtype == BFLOAT16) return forward<HalfOp, Bfloat16>(p);
  return forward<Fma, Float16>(p);
}

int run_backward(const Problem& p) {
  if (p.dtype == FLOAT32) return backward<Fma, Float32>(p);
  if (p.dtype == BFLOAT16) return backward<HalfOp, Bfloat16>(p);
  return backward<Fma, Float16>(p);
}

int run_readout(const Reading& r) {
  if (r.problem.dtype == FLOAT32) return readout<Fma, Float32>(r);
  if (r.problem.dtype == BFLOAT16) return readout<HalfOp, Bfloat16>(r);
  return readout<Fma, Float16>(r);
}

double run_rate(int dtype, double budget) { return dtype == BFLOAT16 ? rate<HalfOp>(budget) : rate<Fma>(budget); }

}  // namespace

const Kernels REGARD_KERNELS = {run_forward, run_backward, run_readout, run_rate};
