// Moments of many channels side by side, and their merging, in double.
#pragma once

#include <cstdint>

#include "../math.h"
#include "simd.h"

namespace resfuse::cpu {

// Running moments of `channels` channels, all with the same count.
struct ChannelMoments {
  double count = 0;
  double* mean;
  double* m2;
};

RESFUSE_CLONES inline void merge_channels(ChannelMoments& total, int64_t channels, double count, const double* mean,
                                          const double* m2) {
  const double share = count / (total.count + count), before = total.count;
  double *total_mean = total.mean, *total_m2 = total.m2;
  RESFUSE_INDEPENDENT
  for (int64_t c = 0; c < channels; ++c)
    merge_moments<double>(total_mean + c, total_m2 + c, before, share, mean[c], m2[c]);
  total.count += count;
}

}  // namespace resfuse::cpu
