// The moments of one tile: two reads, the second from L2, around a mean that the first one found.
#pragma once

#include "walk.h"

namespace resfuse::cpu {

// Rows are added four at a time, so that a lane's accumulator is read and written once for four values.
template <class T>
RESFUSE_CLONES void sum_lanes(const T* x, int64_t rows, int64_t width, acc_t<T>* sums) {
  for_row_groups(rows, [&](auto group, int64_t row) RESFUSE_INLINE_LAMBDA {
    const T* at = x + row * width;
    RESFUSE_INDEPENDENT
    for (int64_t j = 0; j < width; ++j) {
      acc_t<T> sum = sums[j];
      for (int k = 0; k < decltype(group)::value; ++k) sum += load(at[k * width + j]);
      sums[j] = sum;
    }
  });
}

template <class T>
RESFUSE_CLONES void deviation_lanes(const T* x, int64_t rows, int64_t width, const acc_t<T>* center,
                                    acc_t<T>* squares) {
  for_row_groups(rows, [&](auto group, int64_t row) RESFUSE_INLINE_LAMBDA {
    const T* at = x + row * width;
    RESFUSE_INDEPENDENT
    for (int64_t j = 0; j < width; ++j) {
      acc_t<T> sum = squares[j];
      for (int k = 0; k < decltype(group)::value; ++k) {
        const acc_t<T> d = load(at[k * width + j]) - center[j];
        sum += d * d;
      }
      squares[j] = sum;
    }
  });
}

// Running moments of `channels` channels, all with the same count.
struct ChannelMoments {
  double count = 0;
  double* mean;
  double* m2;
};

template <class A>
RESFUSE_CLONES void merge_channels(ChannelMoments& total, int64_t channels, double count, const A* mean, const A* m2) {
  const double share = count / (total.count + count), before = total.count;
  double *total_mean = total.mean, *total_m2 = total.m2;
  RESFUSE_INDEPENDENT
  for (int64_t c = 0; c < channels; ++c)
    merge_moments<double>(total_mean + c, total_m2 + c, before, share, mean[c], m2[c]);
  total.count += count;
}

// Merge a tile into `total`. `lanes` is scratch of 2 * repeat * channels values.
template <class T>
void merge_tile(const T* x, int64_t pixels, int64_t channels, int64_t repeat, acc_t<T>* lanes, ChannelMoments& total) {
  using A = acc_t<T>;
  const int64_t width = repeat * channels;
  A *center = lanes, *squares = lanes + width;
  std::fill_n(lanes, 2 * width, A(0));
  for_each_row_block(0, pixels, channels, repeat,
                     [&](int64_t offset, int64_t rows, int64_t w) { sum_lanes<T>(x + offset, rows, w, center); });
  fold_lanes(center, width, channels);
  const A n = static_cast<A>(pixels);
  for (int64_t c = 0; c < channels; ++c) center[c] /= n;
  for (int64_t j = channels; j < width; ++j) center[j] = center[j - channels];

  for_each_row_block(0, pixels, channels, repeat, [&](int64_t offset, int64_t rows, int64_t w) {
    deviation_lanes<T>(x + offset, rows, w, center, squares);
  });
  fold_lanes(squares, width, channels);
  merge_channels<A>(total, channels, n, center, squares);
}

// mean and biased variance of an activation that `prepare(offset, elements)` has finished writing, tile by tile.
template <class T, class F>
void moments_of(const Geometry& g, const T* x, acc_t<T>* mean, acc_t<T>* var, const F& prepare) {
  const Slabs slabs(g, sizeof(T));
  const int64_t channels = g.channels_last ? g.channels : 1;
  const int64_t planes = g.channels_last ? 1 : g.channels;
  const int64_t repeat = g.channels_last ? pixels_per_row(g.channels) : std::min(g.pixels, kPlaneLanes);
  Scratch<double> means(slabs.count * g.channels), m2s(slabs.count * g.channels), counts(slabs.count);

  parallel_tasks(slabs.count * planes, g.numel(), [&](int64_t task) {
    const int64_t slab = task / planes, at = slab * g.channels + task % planes;
    const int64_t begin = g.channels_last ? slab * slabs.pixels : 0;
    const int64_t end = g.channels_last ? std::min(begin + slabs.pixels, g.rows()) : g.pixels;
    const int64_t origin = g.channels_last ? 0 : task * g.pixels;
    ChannelMoments total{0, means.get() + at, m2s.get() + at};
    std::fill_n(total.mean, channels, 0.0);
    std::fill_n(total.m2, channels, 0.0);
    Scratch<acc_t<T>> lanes(2 * repeat * channels);
    for (int64_t tile = begin; tile < end; tile += slabs.tile) {
      const int64_t pixels = std::min(slabs.tile, end - tile), offset = origin + tile * channels;
      prepare(offset, pixels, task % planes);
      merge_tile<T>(x + offset, pixels, channels, repeat, lanes.get(), total);
    }
    if (task % planes == 0) counts[slab] = total.count;
  });

  ChannelMoments total{counts[0], means.get(), m2s.get()};
  for (int64_t slab = 1; slab < slabs.count; ++slab) {
    const int64_t at = slab * g.channels;
    merge_channels<double>(total, g.channels, counts[slab], means.get() + at, m2s.get() + at);
  }
  for (int64_t c = 0; c < g.channels; ++c) {
    mean[c] = static_cast<acc_t<T>>(means[c]);
    var[c] = static_cast<acc_t<T>>(m2s[c] / total.count);
  }
}

}  // namespace resfuse::cpu
