// Operands of a weight gradient in bfloat16: neighbouring pixels as pairs, which AVX512_BF16 multiplies and adds.
#pragma once

#include "epilogue.h"

#if RESFUSE_HAS_TILES && !defined(RESFUSE_AVX2)
RESFUSE_TILES_BEGIN

namespace resfuse::cpu::RESFUSE_ISA {

// Neighbours `distance` apart as pairs: to[i] = (pixel[i*step], pixel[i*step + distance]), zero past the end of the
// row.
inline void pair_row(const BFloat16* pixels, int64_t columns, int64_t pixel_step, int64_t step, int64_t distance,
                     int64_t count, int64_t channels, const Pixels<uint32_t>& to) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = i * step, second = first + distance;
    const BFloat16 *low = pixels + first * pixel_step, *high = pixels + second * pixel_step;
    for (int64_t c = 0; c < channels; c += kLanes) {
      const Halves next = second < columns ? raw(high + c, kAllLanes) : Halves{};
      store_units(to.at(i, c), pair_halves(raw(low + c, kAllLanes), next));
    }
  }
}

// The same straight from a source: pixels 2*i and 2*i + 1 of a row.
template <bool kComputed, class S>
void pair_pixels(std::bool_constant<kComputed>, const S& source, int64_t pixel, int64_t step, int64_t columns,
                 int64_t begin, int64_t end, const Pixels<uint32_t>& to) {
  const int64_t whole = begin + (end - begin) / kLanes * kLanes;
  const auto pair = [&](int64_t i, int64_t c, LaneMask mask) RESFUSE_INLINE_LAMBDA {
    const Halves first = source.template get<kComputed>(pixel + i * step, c, mask);
    const bool alone = i + 1 == columns;
    const Halves second = alone ? Halves{} : source.template get<kComputed>(pixel + (i + 1) * step, c, mask);
    store_units(to.at(i / 2, c - begin), pair_halves(first, second));
  };
  for (int64_t i = 0; i < columns; i += 2) {
    for (int64_t c = begin; c < whole; c += kLanes) pair(i, c, kAllLanes);
    if (whole < end) pair(i, whole, lane_mask(whole, end));
  }
}

// Add the columns of one tile's p to a slab's sums.
inline void add_columns(const Pixels<uint32_t>& p, int64_t steps, int64_t channels, double* to) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    DoubleLanes total;
    for (int64_t begin = 0; begin < steps; begin += kFloatRows) {
      Lanes first = zero_lanes(), second = first;
      for (int64_t i = begin; i < std::min(steps, begin + kFloatRows); ++i) {
        const UnitLanes pair = load_units(p.at(i, c));
        first += first_of_pairs(pair);
        second += second_of_pairs(pair);
      }
      total.add(first);
      total.add(second);
    }
    alignas(64) double values[kLanes];
    total.store(values);
    for (int64_t j = 0; j < std::min(kLanes, channels - c); ++j) to[c + j] += values[j];
  }
}

}  // namespace resfuse::cpu::RESFUSE_ISA

RESFUSE_TILES_END
#endif
