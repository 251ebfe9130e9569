// Prefetching: while one tile is multiplied, the memory of the next one is fetched, so that it lies in L2.
//
// A tile kernel computes and reads by turns; without this a processor waits for memory while it fills a patch or
// finishes a panel, and memory waits while it multiplies. Register tiles ask for a line every few of their steps: only
// so many may be on their way at a time, and a processor that has asked for more stands still.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "isa.h"

#if RESFUSE_HAS_TILES
#include <immintrin.h>
#endif

namespace resfuse::cpu {

constexpr int64_t kLine = 64;
constexpr int64_t kCacheBytes = 1 << 20;  // of a tile and what is asked for beside it: they stay in L2

// What one register tile asks for: `bytes` more of some memory with each of its steps.
struct Ahead {
  const char* at;
  int64_t bytes;
};

class Prefetcher {
 public:
  // Memory that the next tile will touch.
  void add(const void* begin, int64_t bytes) {
    if (begin == nullptr || bytes <= 0) return;
    ranges_[static_cast<size_t>(count_++)] = {static_cast<const char*>(begin), bytes};
    bytes_ += bytes;
  }

  // Spread what was added over this many steps, no faster than a line a step, as far as it fits beside `used` bytes.
  void spread(int64_t steps, int64_t used) {
    room_ = std::max<int64_t>(kCacheBytes - used, 0);
    const int64_t least = (std::min(bytes_, room_) + steps - 1) / std::max<int64_t>(steps, 1);
    each_ = std::min(least, kLine);
  }

  // The share of a register tile of `steps` steps.
  Ahead take(int64_t steps) {
    if (at_ == count_ || room_ <= 0) return {reinterpret_cast<const char*>(this), 0};
    Range& range = ranges_[static_cast<size_t>(at_)];
    const int64_t each = std::min(each_, (range.left + steps - 1) / std::max<int64_t>(steps, 1));
    const Ahead found{range.at, each};
    range.at += each * steps;
    range.left -= each * steps;
    room_ -= each * steps;
    if (range.left <= 0) ++at_;
    return found;
  }

 private:
  struct Range {
    const char* at;
    int64_t left;
  };

  std::array<Range, 8> ranges_{};
  int64_t count_ = 0, at_ = 0, bytes_ = 0, each_ = 0, room_ = 0;
};

}  // namespace resfuse::cpu
