// the C interface: which kernels run, and who may load this
#include <string.h>

#include "arena.hpp"
#include "kernels.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

HIDDEN int regard_poisoned = 0;

static bool supported(int isa) {
  switch (isa) {
    case PORTABLE: return true;
#if defined(REGARD_X86)
    case AVX2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case AVX512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case AVX512BF16: return supported(AVX512) && __builtin_cpu_supports("avx512bf16");
#endif
  }
  return false;
}

static int best_isa() {
  static const int best = [] {
#if defined(REGARD_X86)
    __builtin_cpu_init();
#endif
    int found = PORTABLE;
    for (int isa = PORTABLE; isa < ISAS; isa++)
      if (supported(isa)) found = isa;
    return found;
  }();
  return best;
}

// isa < 0: the best; null if this processor cannot
static const Kernels* kernels(int isa) {
  int best = best_isa();
  if (isa < 0) isa = best;
  if (isa > best || !supported(isa)) return nullptr;
  switch (isa) {
#if defined(REGARD_X86)
    case AVX2: return &regard_avx2;
    case AVX512: return &regard_avx512;
    case AVX512BF16: return &regard_avx512bf16;
#endif
    default: return &regard_portable;
  }
}

EXPORT int regard_abi() { return REGARD_ABI * 65536 + (int)sizeof(Reading); }

// bit i: this processor runs instruction set i
EXPORT int regard_isas() {
  int bits = 0;
  for (int isa = PORTABLE; isa < ISAS; isa++) bits |= (kernels(isa) != nullptr) << isa;
  return bits;
}

EXPORT void regard_poison(int on) { regard_poisoned = on; }

EXPORT int regard_forward(const Problem* p) {
  const Kernels* k = kernels(p->isa);
  return k ? k->forward(*p) : NO_ISA;
}

EXPORT int regard_backward(const Problem* p) {
  const Kernels* k = kernels(p->isa);
  return k ? k->backward(*p) : NO_ISA;
}

EXPORT int regard_readout(const Reading* r) {
  const Kernels* k = kernels(r->problem.isa);
  return k ? k->readout(*r) : NO_ISA;
}

// operations a second of one thread on registers alone; 0 if this processor cannot
EXPORT double regard_fma_rate(int isa, int dtype, double budget) {
  const Kernels* k = kernels(isa);
  return k ? k->rate(dtype, budget) : 0;
}
