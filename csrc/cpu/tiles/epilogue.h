// Epilogues: what happens to a panel of a tile while it is still in cache.
//
//   WithMoments:   y, and the mean and squared deviations of what was stored
//   InputGradient: grad_x = da; or, through the prologue, dz = da where act was active, grad_x = dz*scale, and the sums
//                  of dz and dz*(x - mean). A gradient that reaches x by another way is added.
//   ResidualAct:   act(value + shift + r), r absent, residual, or residual*scale_r + shift_r; and its moments
// A float sum runs over at most 32 pixels, then goes to double.
#pragma once

#include "../channel_moments.h"
#include "product.h"

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

namespace resfuse::cpu::RESFUSE_ISA {

constexpr int64_t kFloatRows = 32;

// Name `count` pixels of an activation, or of none.
template <class T>
void name_pixels(const T* image, int64_t channels, int64_t pixel, int64_t count, Prefetcher& to) {
  if (image != nullptr) to.add(image + pixel * channels, count * channels * static_cast<int64_t>(sizeof(T)));
}

// Ask for the lines of one panel of `count` pixels, `step` apart, of an activation that an epilogue will touch.
template <class T>
RESFUSE_LANES void prefetch_panel(const T* image, int64_t channels, int64_t pixel, int64_t count, int64_t step,
                                  int64_t panel) {
  if (image == nullptr) return;
  const char* at = reinterpret_cast<const char*>(image + pixel * channels + panel * kPanel);
  const int64_t stride = step * channels * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < count; ++i, at += stride) {
    _mm_prefetch(at, _MM_HINT_T0);
    if constexpr (kPanel * sizeof(T) > kLine) _mm_prefetch(at + kLine, _MM_HINT_T0);
  }
}

// Moments of a vector of channels of a tile, as stored in T, merged into a slab's that has `before` pixels already.
template <class T>
RESFUSE_LANES void merge_tile_lanes(const float* values, int64_t pixels, double before, double* mean, double* m2) {
  Lanes center = zero_lanes();
  const int64_t sample = (pixels + 7) / 8;
  for (int64_t i = 0; i < sample; ++i) center += load_lanes(values + i * kPanel);
  center = coarse_lanes(center / broadcast_lanes(static_cast<float>(sample)));
  DoubleLanes first, second;
  for (int64_t begin = 0; begin < pixels; begin += kFloatRows) {
    Lanes s1 = zero_lanes(), s2 = s1;
    for (int64_t i = begin; i < std::min(pixels, begin + kFloatRows); ++i) {
      const Lanes d = round_lanes<T>(load_lanes(values + i * kPanel)) - center;
      s1 += d;
      s2 = multiply_add(d, d, s2);
    }
    first.add(s1);
    second.add(s2);
  }
  alignas(64) double tile_mean[kLanes], tile_m2[kLanes];
  first.store(tile_mean);
  second.store(tile_m2);
  alignas(64) float centers[kLanes];
  store_lanes(centers, center);
  const double count = static_cast<double>(pixels), share = count / (before + count);
  for (int64_t j = 0; j < kLanes; ++j) {
    const double offset = tile_mean[j] / count;
    tile_m2[j] -= tile_mean[j] * offset;
    merge_moments<double>(mean + j, m2 + j, before, share, centers[j] + offset, tile_m2[j]);
  }
}

template <class T>
RESFUSE_LANES void store_panel(const float* values, int64_t pixels, int64_t channel, int64_t channels, T* to) {
  if (channel + kPanel <= channels) {
    for (int64_t i = 0; i < pixels; ++i, to += channels, values += kPanel) {
      store_lanes(to + channel, load_lanes(values));
      store_lanes(to + channel + kLanes, load_lanes(values + kLanes));
    }
    return;
  }
  const LaneMask low = lane_mask(channel, channels), high = lane_mask(channel + kLanes, channels);
  for (int64_t i = 0; i < pixels; ++i, to += channels, values += kPanel) {
    store_lanes(to + channel, load_lanes(values), low);
    if (high != 0) store_lanes(to + channel + kLanes, load_lanes(values + kLanes), high);
  }
}

// The moments of an output, summed while its panels are in cache. Not wanted, nothing is summed.
class OutputMoments {
 public:
  OutputMoments(const Plan& plan, const TileSlabs& slabs, bool wanted)
      : channels_(plan.out_channels), sums_(wanted ? slabs.slabs : 0, plan.out_channels, 2) {
    for (int64_t slab = 0; slab < slabs.slabs; ++slab) {
      const Tile tile = plan.tile(slabs.first_tile(slab));
      begin_.push_back((tile.image * plan.height.out + tile.row) * plan.width.out + tile.column);
    }
    begin_.push_back(plan.images * plan.height.out * plan.width.out);
  }
  bool wanted() const { return sums_.slabs() > 0; }

  // Values of a tile's panel, counted as they are stored in T; `pixel` is its first.
  template <class T>
  void add(int64_t slab, int64_t pixel, int64_t pixels, int64_t panel, const float* values) {
    const int64_t channel = panel * kPanel;
    const double before = static_cast<double>(pixel - begin_[static_cast<size_t>(slab)]);
    for (int64_t half = 0; half < kPanel && channel + half < channels_; half += kLanes)
      merge_tile_lanes<T>(values + half, pixels, before, sums_.at(slab, 0) + channel + half,
                          sums_.at(slab, 1) + channel + half);
  }

  // Slabs merged into mean and biased variance.
  void write(float* mean, float* var) {
    if (!wanted()) return;
    double *total_mean = sums_.at(0, 0), *total_m2 = sums_.at(0, 1);
    ChannelMoments total{static_cast<double>(begin_[1] - begin_[0]), total_mean, total_m2};
    for (int64_t slab = 1; slab < sums_.slabs(); ++slab) {
      const auto i = static_cast<size_t>(slab);
      merge_channels(total, channels_, static_cast<double>(begin_[i + 1] - begin_[i]), sums_.at(slab, 0),
                     sums_.at(slab, 1));
    }
    for (int64_t c = 0; c < channels_; ++c) {
      mean[c] = static_cast<float>(total_mean[c]);
      var[c] = static_cast<float>(total_m2[c] / total.count);
    }
  }

 private:
  int64_t channels_;
  SlabSums sums_;               // mean and m2
  std::vector<int64_t> begin_;  // first output pixel of each slab, and the end
};

template <class T>
struct WithMoments {
  T* y;
  int64_t channels;
  OutputMoments& moments;

  void prefetch(int64_t pixel, int64_t count, int64_t step, int64_t panel) const {
    prefetch_panel(y, channels, pixel, count, step, panel);
  }
  void touches(int64_t pixel, int64_t count, Prefetcher& to) const { name_pixels(y, channels, pixel, count, to); }

  void operator()(int64_t slab, int64_t pixel, int64_t pixels, int64_t panel, const float* values) const {
    store_panel(values, pixels, panel * kPanel, channels, y + pixel * channels);
    if (moments.wanted()) moments.add<T>(slab, pixel, pixels, panel, values);
  }
};

template <class T>
struct InputGradient {
  T* grad_x;
  int64_t channels;
  const T* other;  // a gradient to add, or null
  const T* x;      // with a prologue, else null; its vectors are padded
  const float* scale;
  const float* shift;
  const float* mean;
  bool relu;
  SlabSums* sums;  // sum dz, sum dz*(x - mean)

  void prefetch(int64_t pixel, int64_t count, int64_t step, int64_t panel) const {
    prefetch_panel(grad_x, channels, pixel, count, step, panel);
    prefetch_panel(other, channels, pixel, count, step, panel);
    prefetch_panel(x, channels, pixel, count, step, panel);
  }
  void touches(int64_t pixel, int64_t count, Prefetcher& to) const {
    name_pixels<T>(grad_x, channels, pixel, count, to);
    if (other != grad_x) name_pixels(other, channels, pixel, count, to);
    name_pixels(x, channels, pixel, count, to);
  }

  void operator()(int64_t slab, int64_t pixel, int64_t pixels, int64_t panel, const float* values) const {
    for (int64_t half = 0; half < kPanel; half += kLanes) {
      const int64_t channel = panel * kPanel + half;
      if (channel >= channels) return;
      with_mask(lane_mask(channel, channels), [&](auto mask) RESFUSE_INLINE_LAMBDA {
        if (x != nullptr) {
          through_prologue(slab, pixel, pixels, channel, mask, values + half);
        } else {
          plain(pixel, pixels, channel, mask, values + half);
        }
      });
    }
  }

 private:
  template <class M>
  RESFUSE_LANES void finish(Lanes value, int64_t at, M mask) const {
    if (other != nullptr) value += load_lanes(other + at, mask);
    store_lanes(grad_x + at, value, mask);
  }

  template <class M>
  RESFUSE_LANES void plain(int64_t pixel, int64_t pixels, int64_t channel, M mask, const float* values) const {
    for (int64_t i = 0; i < pixels; ++i, values += kPanel)
      finish(load_lanes(values), (pixel + i) * channels + channel, mask);
  }

  template <class M>
  RESFUSE_LANES void through_prologue(int64_t slab, int64_t pixel, int64_t pixels, int64_t channel, M mask,
                                      const float* values) const {
    const Lanes a = load_lanes(scale + channel), b = load_lanes(shift + channel), m = load_lanes(mean + channel);
    DoubleLanes first, second;
    for (int64_t begin = 0; begin < pixels; begin += kFloatRows) {
      Lanes s1 = zero_lanes(), s2 = s1;
      for (int64_t i = begin; i < std::min(pixels, begin + kFloatRows); ++i) {
        const int64_t at = (pixel + i) * channels + channel;
        const Lanes value = load_lanes(x + at, mask);
        Lanes dz = load_lanes(values + i * kPanel);
        if (relu) dz = relu_gradient_lanes(dz, value * a + b);
        finish(dz * a, at, mask);
        s1 += dz;
        s2 = multiply_add(dz, value - m, s2);
      }
      first.add(s1);
      second.add(s2);
    }
    alignas(64) double tile[2][kLanes];
    first.store(tile[0]);
    second.store(tile[1]);
    for (int kind = 0; kind < 2; ++kind)
      for (int64_t j = 0; j < kLanes; ++j) sums->at(slab, kind)[channel + j] += tile[kind][j];
  }
};

// out = act(value + shift + r)
template <class T>
struct ResidualAct {
  T* out;
  int64_t channels;
  const float* shift;           // padded, as the residual's vectors
  const T* residual;            // or null
  const float* residual_scale;  // null: the residual as it is
  const float* residual_shift;
  bool relu;
  OutputMoments& moments;

  void prefetch(int64_t pixel, int64_t count, int64_t step, int64_t panel) const {
    prefetch_panel(out, channels, pixel, count, step, panel);
    prefetch_panel(residual, channels, pixel, count, step, panel);
  }
  void touches(int64_t pixel, int64_t count, Prefetcher& to) const {
    name_pixels<T>(out, channels, pixel, count, to);
    name_pixels(residual, channels, pixel, count, to);
  }

  void operator()(int64_t slab, int64_t pixel, int64_t pixels, int64_t panel, float* values) const {
    for (int64_t half = 0; half < kPanel; half += kLanes) {
      const int64_t channel = panel * kPanel + half;
      if (channel >= channels) break;
      with_mask(lane_mask(channel, channels), [&](auto mask) RESFUSE_INLINE_LAMBDA {
        if (residual == nullptr) {
          write<false, false>(pixel, pixels, channel, mask, values + half);
        } else if (residual_scale == nullptr) {
          write<true, false>(pixel, pixels, channel, mask, values + half);
        } else {
          write<true, true>(pixel, pixels, channel, mask, values + half);
        }
      });
    }
    if (moments.wanted()) moments.add<T>(slab, pixel, pixels, panel, values);
  }

 private:
  template <bool kResidual, bool kRaw, class M>
  RESFUSE_LANES void write(int64_t pixel, int64_t pixels, int64_t channel, M mask, float* values) const {
    const Lanes constant = load_lanes(shift + channel);
    for (int64_t i = 0; i < pixels; ++i, values += kPanel) {
      const int64_t at = (pixel + i) * channels + channel;
      Lanes z = load_lanes(values) + constant;
      if constexpr (kResidual) {
        Lanes r = load_lanes(residual + at, mask);
        if constexpr (kRaw) r = r * load_lanes(residual_scale + channel) + load_lanes(residual_shift + channel);
        z += r;
      }
      const Lanes result = relu ? relu_lanes(z) : z;
      store_lanes(out + at, result, mask);
      if (moments.wanted()) store_lanes(values, result);
    }
  }
};

}  // namespace resfuse::cpu::RESFUSE_ISA

RESFUSE_TILES_END
#endif
