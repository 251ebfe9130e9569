// Symmetric products by tiles, p^T q where only what is on or above the diagonal is computed: a^T a, or a^T diag(v) a.
#pragma once

#include "weight_gradient.h"

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

namespace resfuse::cpu::RESFUSE_ISA {

// The sums of all slabs, added in double and rounded into the first slab's place.
inline void merge_slabs(const WeightSums& sums, float* totals) {
  constexpr int64_t kPiece = 512;
  const int64_t size = sums.size();
  parallel_tasks(ceil_div(size, kPiece), size * sums.slabs, [&](int64_t task) {
    const int64_t begin = task * kPiece, count = std::min(kPiece, size - begin);
    double total[kPiece] = {};
    for (int64_t slab = 0; slab < sums.slabs; ++slab) {
      const float* from = totals + slab * size + begin;
      for (int64_t i = 0; i < count; ++i) total[i] += from[i];
    }
    for (int64_t i = 0; i < count; ++i) totals[begin + i] = static_cast<float>(total[i]);
  });
}

// f(row, c, sum) for c >= row, of the pixels that a 1x1 convolution of this shape reads; rows in parallel.
// `column_sums`, if any, receives the sums of p's channels before f is called.
template <class T, class P, class Q, class F>
void symmetric_product(const ConvShape& shape, const P& p, const Q& q, const F& f,
                       std::vector<double>* column_sums = nullptr) {
  const Plan plan(shape, false, sizeof(operand_t<T>), kWeightPixels, kWeightPatchBytes);
  const WeightSums sums(plan, 1, true, true);
  const int64_t channels = shape.in_channels;
  float* totals = workspace<float>(Slot::kSums, sums.slabs * sums.size());
  SlabSums columns(column_sums == nullptr ? 0 : sums.slabs, channels, 1);
  sum_weight_gradient<T>(plan, p, q, 1, sums, totals, column_sums == nullptr ? nullptr : &columns);
  if (column_sums != nullptr) {
    column_sums->assign(static_cast<size_t>(channels), 0.0);
    for (int64_t slab = 0; slab < sums.slabs; ++slab)
      for (int64_t c = 0; c < channels; ++c) (*column_sums)[static_cast<size_t>(c)] += columns.at(slab, 0)[c];
  }
  merge_slabs(sums, totals);
  parallel_tasks(channels, channels * channels, [&](int64_t row) {
    for (int64_t strip = row / kPanel; strip < sums.strips.count(); ++strip) {
      const float* block = totals + sums.at(0, strip, row / kWeightChannels) + row % kWeightChannels * kPanel;
      for (int64_t c = std::max(row, strip * kPanel); c < std::min(channels, (strip + 1) * kPanel); ++c)
        f(row, c, block[c % kPanel]);
    }
  });
}

}  // namespace resfuse::cpu::RESFUSE_ISA

RESFUSE_TILES_END
#endif
