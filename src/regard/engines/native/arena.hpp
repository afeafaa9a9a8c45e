// scratch memory: one growing block per thread, kept between calls, because fresh pages cost more than the kernels
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

#define HIDDEN __attribute__((visibility("hidden")))

// fill what is handed out with NaN, so that a kernel that reads what it never wrote is found by the tests
extern HIDDEN int regard_poisoned;

namespace {

class Arena {
 public:
  ~Arena() { release(); }

  // `carve(arena)` takes what it needs; it is run twice, first to count. false: no memory
  template <class Carve>
  bool fill(Carve carve) {
    counting_ = true;
    used_ = 0;
    carve(*this);
    counting_ = false;
    if (used_ > capacity_) {
      size_t bytes = (used_ + 4095) & ~(size_t)4095;
      release();
      base_ = (char*)aligned_alloc(4096, bytes);
      if (!base_) return false;
      capacity_ = bytes;
    }
    ASAN_POISON_MEMORY_REGION(base_, capacity_);
    used_ = 0;
    carve(*this);
    return true;
  }

  template <class T>
  T* take(size_t count) {
    size_t bytes = count * sizeof(T);
    char* p = base_ + used_;
    // the gap is a red zone for the address sanitiser, and keeps tiles off the same cache sets
    used_ += ((bytes + 63) & ~(size_t)63) + 64;
    if (counting_) return nullptr;
    ASAN_UNPOISON_MEMORY_REGION(p, bytes);
    if (regard_poisoned) memset(p, 0xff, bytes);
    return (T*)p;
  }

 private:
  void release() {
    ASAN_UNPOISON_MEMORY_REGION(base_, capacity_);
    free(base_);
    base_ = nullptr;
    capacity_ = 0;
  }
  char* base_ = nullptr;
  size_t capacity_ = 0, used_ = 0;
  bool counting_ = false;
};

}  // namespace
