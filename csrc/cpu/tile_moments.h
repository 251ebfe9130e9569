// The moments of one tile: deviations from a center near its mean, and their squares, in one pass.
//
// The center is the mean of the tile's first eighth. That is near enough for any data: if a fraction p of the values
// has a mean that is d away from the mean of all, their variance is at least p / (1 - p) * d^2, so d is at most sqrt(7)
// standard deviations, and m2 = sum d^2 - (sum d)^2 / n loses at most three bits.
#pragma once

#include <cmath>

#include "channel_moments.h"
#include "lane_pairs.h"
#include "walk.h"

namespace resfuse::cpu {

constexpr int64_t kAheadBytes = 16384;

// Rows are added four at a time: a lane's accumulator is read, written and rounded once for four values.
template <class T>
RESFUSE_CLONES void sum_lanes(const T* x, int64_t rows, int64_t width, acc_t<T>* sums) {
  for_row_groups(rows, [&](auto group, int64_t row) RESFUSE_INLINE_LAMBDA {
    const T* at = x + row * width;
    RESFUSE_INDEPENDENT
    for (int64_t j = 0; j < width; ++j) {
      acc_t<T> sum = 0;
      for (int k = 0; k < decltype(group)::value; ++k) sum += load(at[k * width + j]);
      sums[j] += sum;
    }
  });
}

// Lanes [begin, width) of rows that are `width` long. Rows that lie kAheadBytes further are requested for L2: one
// core's own prefetchers leave a third of the bandwidth of DRAM unused here.
template <class T>
RESFUSE_CLONES void deviation_lanes(const T* x, int64_t rows, int64_t width, int64_t begin, const acc_t<T>* center,
                                    acc_t<T>* first, acc_t<T>* second) {
  for_row_groups(rows, [&](auto group, int64_t row) RESFUSE_INLINE_LAMBDA {
    const T* at = x + row * width;
    const char* ahead = reinterpret_cast<const char*>(at) + kAheadBytes;
    const int64_t bytes = begin > 0 ? 0 : decltype(group)::value * width * static_cast<int64_t>(sizeof(T));
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(ahead + line, 0, 2);
    RESFUSE_INDEPENDENT
    for (int64_t j = begin; j < width; ++j) {
      acc_t<T> s1, s2;
      for (int k = 0; k < decltype(group)::value; ++k) {
        const acc_t<T> d = load(at[k * width + j]) - center[j];
        s1 = k == 0 ? d : s1 + d;
        s2 = k == 0 ? d * d : s2 + d * d;
      }
      first[j] += s1;
      second[j] += s2;
    }
  });
}

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

// The same sums on AVX-512, where lines are requested one by one beside them: a core waits once about a dozen are on
// their way, and a row has many more.
template <int kRows, class T>
RESFUSE_LANES void add_rows(const T* x, int64_t width, int64_t whole, const float* center, float* first,
                            float* second) {
  for (int64_t j = 0; j < whole; j += kPair) {
    const LanePair middle = load_pair(center + j);
    Lanes sums[2][2];
    for (int k = 0; k < kRows; ++k) {
      const T* at = x + k * width + j;
      for (int64_t line = 0; line < kPair * static_cast<int64_t>(sizeof(T)); line += 64)
        _mm_prefetch(reinterpret_cast<const char*>(at) + kAheadBytes + line, _MM_HINT_T0);
      const LanePair value = load_pair(at);
      const Lanes d[2] = {value.first - middle.first, value.second - middle.second};
      for (int i = 0; i < 2; ++i) {
        sums[0][i] = k == 0 ? d[i] : sums[0][i] + d[i];
        sums[1][i] = k == 0 ? d[i] * d[i] : sums[1][i] + d[i] * d[i];
      }
    }
    for (int i = 0; i < 2; ++i) {
      float *to_first = first + j + i * kLanes, *to_second = second + j + i * kLanes;
      _mm512_storeu_ps(to_first, _mm512_loadu_ps(to_first) + sums[0][i]);
      _mm512_storeu_ps(to_second, _mm512_loadu_ps(to_second) + sums[1][i]);
    }
  }
}

// deviation_lanes for whole pairs of vectors; returns how many lanes those are.
template <class T>
__attribute__((noinline)) int64_t deviation_pairs(const T* x, int64_t rows, int64_t width, float* center, float* first,
                                                  float* second) {
  const int64_t whole = width / kPair * kPair;
  float* const vectors[3] = {center, first, second};
  if constexpr (std::is_same_v<T, BFloat16>)
    for (float* lanes : vectors) split_lanes<false>(lanes, whole);
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) add_rows<4>(x + row * width, width, whole, center, first, second);
  for (; row < rows; ++row) add_rows<1>(x + row * width, width, whole, center, first, second);
  if constexpr (std::is_same_v<T, BFloat16>)
    for (float* lanes : vectors) split_lanes<true>(lanes, whole);
  return whole;
}

RESFUSE_TILES_END
#endif

// Add the deviations of a tile's rows and their squares to `first` and `second`.
template <class T>
void add_deviations(const T* x, int64_t rows, int64_t width, acc_t<T>* center, acc_t<T>* first, acc_t<T>* second) {
  int64_t done = 0;
#if RESFUSE_HAS_TILES
  if constexpr (!std::is_same_v<T, double>)
    if (has_avx512()) done = deviation_pairs(x, rows, width, center, first, second);
#endif
  if (done < width) deviation_lanes<T>(x, rows, width, done, center, first, second);
}

// A center with 12 significant bits: subtracting it from a 16-bit float is exact, so rounding has no bias. 0 stands in
// for Inf and NaN, which then reach the sums as they are.
inline float coarse(double value) {
  const float center = float_from_bits(bits_from_float(static_cast<float>(value)) & 0xfffff000u);
  return std::isfinite(value) ? center : 0.0f;
}

// The centers of all lanes, from the sums over a sample, which may lie where the centers go.
template <class A, class S>
RESFUSE_CLONES void centers_of(const S* sums, double sample, int64_t channels, int64_t repeat, A* centers) {
  const double share = 1 / sample;
  RESFUSE_INDEPENDENT
  for (int64_t c = 0; c < channels; ++c) centers[c] = coarse(static_cast<double>(sums[c]) * share);
  for (int64_t r = 1; r < repeat; ++r) std::copy_n(centers, channels, centers + r * channels);
}

// Merge a tile whose deviations from its centers have the sums `first` and `second`:
//     mean = center + first / n, m2 = second - first^2 / n
template <class A, class S>
RESFUSE_CLONES void merge_deviations(ChannelMoments& total, int64_t channels, double count, const A* center,
                                     const S* first, const S* second) {
  const double share = count / (total.count + count), before = total.count, part = 1 / count;
  double *total_mean = total.mean, *total_m2 = total.m2;
  RESFUSE_INDEPENDENT
  for (int64_t c = 0; c < channels; ++c) {
    const double sum = static_cast<double>(first[c]), offset = sum * part;
    merge_moments<double>(total_mean + c, total_m2 + c, before, share, center[c] + offset,
                          static_cast<double>(second[c]) - sum * offset);
  }
  total.count += count;
}

// Scratch for one tile after the other: lanes, and, where a channel has several, their sums.
template <class A>
struct TileScratch {
  TileScratch(int64_t repeat, int64_t channels) : lanes(3 * repeat * channels), sums(repeat == 1 ? 0 : 2 * channels) {}
  Scratch<A> lanes;
  Scratch<double> sums;
};

// Merge a tile into `total`: its sums of deviations give its mean and m2.
template <class T>
void merge_tile(const T* x, int64_t pixels, int64_t channels, int64_t repeat, TileScratch<acc_t<T>>& scratch,
                ChannelMoments& total) {
  using A = acc_t<T>;
  const int64_t width = repeat * channels, sample = ceil_div(pixels, 8);
  const double count = static_cast<double>(pixels), sampled = static_cast<double>(sample);
  A *center = scratch.lanes.get(), *first = center + width, *second = first + width;
  double *first_sum = scratch.sums.get(), *second_sum = first_sum + channels;
  std::fill_n(center, 3 * width, A(0));
  for_each_row_block(0, sample, channels, repeat,
                     [&](int64_t offset, int64_t rows, int64_t w) { sum_lanes<T>(x + offset, rows, w, center); });
  if (repeat == 1) {
    centers_of(center, sampled, channels, repeat, center);
  } else {
    std::fill_n(first_sum, 2 * channels, 0.0);
    add_lanes(center, repeat, channels, first_sum);
    centers_of(first_sum, sampled, channels, repeat, center);
    std::fill_n(first_sum, channels, 0.0);
  }
  for_each_row_block(0, pixels, channels, repeat, [&](int64_t offset, int64_t rows, int64_t w) {
    add_deviations<T>(x + offset, rows, w, center, first, second);
  });
  if (repeat == 1) return merge_deviations(total, channels, count, center, first, second);
  add_lanes(first, repeat, channels, first_sum);
  add_lanes(second, repeat, channels, second_sum);
  merge_deviations(total, channels, count, center, first_sum, second_sum);
}

// mean and biased variance of an activation that `prepare(offset, elements)` has finished writing, tile by tile.
template <class T, class F>
void moments_of(const Geometry& g, const T* x, acc_t<T>* mean, acc_t<T>* var, const F& prepare,
                int64_t tile_bytes = kTileBytes) {
  const Slabs slabs(g, sizeof(T), tile_bytes);
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
    TileScratch<acc_t<T>> scratch(repeat, channels);
    for (int64_t tile = begin; tile < end; tile += slabs.tile) {
      const int64_t pixels = std::min(slabs.tile, end - tile), offset = origin + tile * channels;
      prepare(offset, pixels, task % planes);
      merge_tile<T>(x + offset, pixels, channels, repeat, scratch, total);
    }
    if (task % planes == 0) counts[slab] = total.count;
  });

  ChannelMoments total{counts[0], means.get(), m2s.get()};
  for (int64_t slab = 1; slab < slabs.count; ++slab) {
    const int64_t at = slab * g.channels;
    merge_channels(total, g.channels, counts[slab], means.get() + at, m2s.get() + at);
  }
  for (int64_t c = 0; c < g.channels; ++c) {
    mean[c] = static_cast<acc_t<T>>(means[c]);
    var[c] = static_cast<acc_t<T>>(m2s[c] / total.count);
  }
}

}  // namespace resfuse::cpu
