// Output activations and scratch vectors of the CPU kernels.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>

#include "../checks.h"

namespace resfuse::cpu {

// A fresh large tensor is unmapped memory, and its first touch costs one page fault per 4 KiB: more time than the
// arithmetic of a memory-bound pass. Where the kernel grants huge pages on request, ask for them: a fault per 2 MiB.
inline void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHugePage - 1);
  // The advice is a hint: where it is refused, the pages are small and the result is the same.
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// An uninitialised activation with x's shape, strides and dtype.
inline Tensor new_activation(const Tensor& x) {
  Tensor out = torch::stable::empty_like(x);
  advise_huge_pages(out.mutable_data_ptr(), static_cast<size_t>(out.numel()) * out.element_size());
  return out;
}

// An uninitialised array that frees itself; unlike std::vector it does not write before its first use. It begins a
// cache line: a vector that lies in two lines takes two loads.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t size)
      : data_(static_cast<A*>(::operator new(static_cast<size_t>(size) * sizeof(A), kAlignment))) {}
  A* get() { return data_.get(); }
  A& operator[](int64_t i) { return data_.get()[i]; }

 private:
  static_assert(std::is_trivial_v<A>);
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(A* data) const { ::operator delete(data, kAlignment); }
  };

  std::unique_ptr<A, Free> data_;
};

}  // namespace resfuse::cpu
