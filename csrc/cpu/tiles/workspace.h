// Scratch memory that threads keep: a fresh large array would cost a page fault per 4 KiB at every call.
//
// It lies in huge pages where there are any: a tile kernel walks many rows at once, more than there are entries for
// small pages in the translation cache.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "../memory.h"

namespace resfuse::cpu {

constexpr int64_t kHugePage = int64_t{1} << 21;

enum class Slot { kWeights, kSums, kTile, kArena };  // what one thread may hold at the same time

inline int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

// `bytes` of uninitialised memory on the boundary of a huge page, valid until this thread asks for the same slot again.
inline void* workspace_bytes(Slot slot, int64_t bytes) {
  struct Free {
    void operator()(void* data) const { std::free(data); }
  };
  struct Block {
    std::unique_ptr<void, Free> data;
    int64_t bytes = 0;
  };
  static thread_local Block blocks[4];
  Block& block = blocks[static_cast<int>(slot)];
  if (block.bytes < bytes) {
    block.bytes = 0;
    block.data.reset();
    const int64_t size = round_up(bytes, kHugePage);
    block.data.reset(std::aligned_alloc(kHugePage, static_cast<size_t>(size)));
    if (!block.data) throw std::bad_alloc();
    advise_huge_pages(block.data.get(), static_cast<size_t>(size));
    block.bytes = size;
  }
  return block.data.get();
}

template <class V>
V* workspace(Slot slot, int64_t size) {
  return static_cast<V*>(workspace_bytes(slot, size * static_cast<int64_t>(sizeof(V))));
}

// Hands out pieces of one workspace, each on a cache line boundary.
class Carver {
 public:
  explicit Carver(char* begin) : at_(begin) {}
  template <class V>
  V* take(int64_t size) {
    V* piece = reinterpret_cast<V*>(at_);
    at_ += bytes_of<V>(size);
    return piece;
  }
  template <class V>
  static int64_t bytes_of(int64_t size) {
    return round_up(size * static_cast<int64_t>(sizeof(V)), 64);
  }

 private:
  char* at_;
};

}  // namespace resfuse::cpu
