// the C interface of the scan: which instruction set runs
#include "scan.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int regard_isas();

static const ScanKernels* kernels(int isa) {
  static const int found = regard_isas();
  for (int best = ISAS - 1; isa < 0 && best >= 0; best--)
    if (found >> best & 1) isa = best;
  if (isa >= ISAS || !(found >> isa & 1)) return nullptr;
  switch (isa) {
#if defined(REGARD_X86)
    case AVX2: return &regard_scan_avx2;
    case AVX512: return &regard_scan_avx512;
    case AVX512BF16: return &regard_scan_avx512bf16;
#endif
    default: return &regard_scan_portable;
  }
}

EXPORT int regard_scan_abi() { return REGARD_SCAN_ABI * 65536 + (int)sizeof(ScanProblem); }

EXPORT int regard_scan_forward(const ScanProblem* p) {
  const ScanKernels* k = kernels(p->isa);
  return k ? k->forward(*p) : NO_ISA;
}

EXPORT int regard_scan_backward(const ScanProblem* p) {
  const ScanKernels* k = kernels(p->isa);
  return k ? k->backward(*p) : NO_ISA;
}

EXPORT int regard_delta_forward(const ScanProblem* p) {
  const ScanKernels* k = kernels(p->isa);
  return k ? k->delta_forward(*p) : NO_ISA;
}

EXPORT int regard_delta_backward(const ScanProblem* p) {
  const ScanKernels* k = kernels(p->isa);
  return k ? k->delta_backward(*p) : NO_ISA;
}
