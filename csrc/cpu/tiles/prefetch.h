// Prefetching: while one tile is multiplied, the memory of the next one is fetched into L2.
//
// A tile kernel computes and reads by turns; without this a processor waits for memory while it fills a patch, and
// memory waits while it multiplies. Lines are requested a few at a time, between register tiles, where asks_ahead().
#pragma once

#include <array>
#include <cstdint>

#include "isa.h"

#if RESFUSE_HAS_TILES
#include <immintrin.h>
#endif

namespace resfuse::cpu {

constexpr int64_t kLine = 64;

class Prefetcher {
 public:
  // Memory that the next tile will read.
  void add(const void* begin, int64_t bytes) {
    if (begin == nullptr || bytes <= 0) return;
    ranges_[static_cast<size_t>(count_++)] = {static_cast<const char*>(begin), ceil_lines(bytes)};
    lines_ += ceil_lines(bytes);
  }

  // Spread what was added over this many calls of step.
  void spread(int64_t calls) { per_call_ = calls > 0 && asks_ahead() ? (lines_ + calls - 1) / calls : 0; }

  void clear() { count_ = at_ = lines_ = per_call_ = 0; }

  void step() {
    for (int64_t left = per_call_; left > 0 && at_ < count_;) {
      Range& range = ranges_[static_cast<size_t>(at_)];
      const int64_t now = left < range.lines ? left : range.lines;
#if RESFUSE_HAS_TILES
      for (int64_t i = 0; i < now; ++i) _mm_prefetch(range.at + i * kLine, _MM_HINT_T1);
#endif
      range.at += now * kLine;
      range.lines -= now;
      left -= now;
      if (range.lines == 0) ++at_;
    }
  }

 private:
  struct Range {
    const char* at;
    int64_t lines;
  };
  static int64_t ceil_lines(int64_t bytes) { return (bytes + kLine - 1) / kLine; }

  std::array<Range, 6> ranges_{};
  int64_t count_ = 0, at_ = 0, lines_ = 0, per_call_ = 0;
};

}  // namespace resfuse::cpu
