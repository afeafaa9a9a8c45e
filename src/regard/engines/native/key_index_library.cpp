// the C interface of the key index: which instruction set runs
#include "key_index.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int regard_isas();

static const IndexKernels* kernels(int isa) {
  static const int found = regard_isas();
  for (int best = ISAS - 1; isa < 0 && best >= 0; best--)
    if (found >> best & 1) isa = best;
  if (isa >= ISAS || !(found >> isa & 1)) return nullptr;
  switch (isa) {
#if defined(REGARD_X86)
    case AVX2: return &regard_index_avx2;
    case AVX512: return &regard_index_avx512;
    case AVX512BF16: return &regard_index_avx512bf16;
#endif
    default: return &regard_index_portable;
  }
}

EXPORT int regard_index_abi() { return REGARD_INDEX_ABI * 65536 + (int)sizeof(IndexProblem); }

EXPORT int regard_index_project(const IndexProblem* p) {
  const IndexKernels* k = kernels(p->isa);
  return k ? k->project(*p) : NO_ISA;
}

EXPORT int regard_index_link(const IndexProblem* p) {
  const IndexKernels* k = kernels(p->isa);
  return k ? k->link(*p) : NO_ISA;
}

EXPORT int regard_index_search(const IndexProblem* p) {
  const IndexKernels* k = kernels(p->isa);
  return k ? k->search(*p) : NO_ISA;
}
