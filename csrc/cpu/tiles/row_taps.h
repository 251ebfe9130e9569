// Convolutions of few channels, as of images: the taps of a kernel's row are read as one pixel.
//
// In channels_last memory the kW neighbours that a row of the kernel meets are kW*C values side by side. So a
// convolution of C channels with a (kH, kW) kernel is one of kW*C channels with a (kH, 1) kernel, whose pixels overlap:
// three channels would leave most of a vector empty, twenty-one do not.
#pragma once

#include "operands.h"
#include "patch.h"

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

namespace resfuse::cpu::RESFUSE_ISA {

constexpr int64_t kFewChannels = 8;      // fewer than these; backends.py serves such a convolution
constexpr int64_t kRowTapsPixels = 448;  // of a tile: taller ones fill fewer rows twice

// Whether a convolution is computed this way.
inline bool joins_row_taps(const ConvShape& shape) {
  const ConvAxis &h = shape.height, &w = shape.width;
  return shape.in_channels < kFewChannels && shape.groups == 1 && w.dilation == 1 && w.kernel > 1 && h.kernel > 1;
}

inline ConvShape row_taps_shape(const ConvShape& shape) {
  const int64_t columns = shape.width.out;
  return {shape.images,
          shape.in_channels * shape.width.kernel,
          shape.out_channels,
          shape.height,
          {columns, columns, 1, 1, 0, 1}};
}

// A source: pixel (row, column) is what the kernel's row meets for output column `column`, zero outside the input.
template <class T>
struct RowTaps {
  const T* x;
  int64_t row_values;  // W*C
  int64_t columns;     // of the output
  int64_t step;        // values between pixels
  int64_t before;      // values of padding before a row

  static RowTaps of(const T* x, const ConvShape& shape) {
    const ConvAxis& w = shape.width;
    return {x, w.in * shape.in_channels, w.out, w.stride * shape.in_channels, w.padding * shape.in_channels};
  }

  void prefetch(int64_t pixel, int64_t pixels, Prefetcher& to) const {
    to.add(x + pixel / columns * row_values, pixels / columns * row_values * static_cast<int64_t>(sizeof(T)));
  }
  bool computed() const { return false; }
  RowTaps<wide_t<T>> wide() const { return {as_wide(x), row_values, columns, step, before}; }

  template <bool kComputed>
  RESFUSE_LANES auto get(int64_t pixel, int64_t c, LaneMask mask) const {
    return of_row(x + pixel / columns * row_values, pixel % columns * step - before + c, mask);
  }
  // a vector from value `at` of a row on
  RESFUSE_LANES auto of_row(const T* row, int64_t at, LaneMask mask) const {
    if (at >= 0 && at + kLanes <= row_values) return raw(row + at, mask);
    const int64_t first = std::min(std::max<int64_t>(-at, 0), kLanes), last = std::max(row_values - at, first);
    return raw(row + at, static_cast<LaneMask>(mask & lane_mask(0, first, last)));
  }
};

// Some lanes of a vector that lies in memory as a whole.
RESFUSE_LANES Lanes some_lanes(const float* from, LaneMask mask) { return load_lanes(from, mask); }
RESFUSE_LANES Lanes some_lanes(const WideBFloat16* from, LaneMask mask) {
  return keep_lanes(mask, load_lanes(from, kAllLanes));
}
RESFUSE_LANES Halves some_lanes(const BFloat16* from, LaneMask mask) { return load_halves(from, mask); }

// patch.h's, for pixels of one row
template <class O, class T>
void fill_row(const RowTaps<T>& source, int64_t pixel, int64_t step, int64_t count, int64_t begin, int64_t end,
              const Pixels<O>& to) {
  const T* row = source.x + pixel / source.columns * source.row_values;
  const int64_t whole = begin + (end - begin) / kLanes * kLanes, read = round_up(end - begin, kLanes) + begin;
  const LaneMask rest = lane_mask(whole, end);
  int64_t first = pixel % source.columns * source.step - source.before;
  for (int64_t i = 0; i < count; ++i, first += step * source.step) {
    O* at = to.at(i, 0);
    if (first + begin >= 0 && first + read <= source.row_values) {
      for (int64_t c = begin; c < whole; c += kLanes, at += to.vector_step)
        store_rounded(at, raw(row + first + c, kAllLanes));
      if (whole < end) store_rounded(at, some_lanes(row + first + whole, rest));
    } else {
      for (int64_t c = begin; c < end; c += kLanes, at += to.vector_step)
        store_rounded(at, source.of_row(row, first + c, lane_mask(c, end)));
    }
  }
}

// A weight with the taps of a row side by side, as it is multiplied: (K, kH, kW*C).
template <class W>
class RowTapsWeight {
 public:
  explicit RowTapsWeight(const ConvShape& shape)
      : taps_{shape.out_channels, shape.height.kernel, shape.width.kernel, shape.in_channels},
        values_(taps_[0] * taps_[1] * taps_[2] * taps_[3]) {}
  W* get() { return values_.get(); }
  WeightLayout layout() const {
    const int64_t row = taps_[2] * taps_[3];
    return {{taps_[1] * row, 1, row, row}};
  }

  void read(const W* weight, const WeightLayout& from) {
    for_each([&](W& value, int64_t k, int64_t h, int64_t w, int64_t c) { value = weight[offset(from, k, h, w, c)]; });
  }
  void write(W* weight, const WeightLayout& to) {
    for_each([&](W& value, int64_t k, int64_t h, int64_t w, int64_t c) { weight[offset(to, k, h, w, c)] = value; });
  }

 private:
  static int64_t offset(const WeightLayout& at, int64_t k, int64_t h, int64_t w, int64_t c) {
    return k * at.strides[0] + c * at.strides[1] + h * at.strides[2] + w * at.strides[3];
  }
  template <class F>
  void for_each(const F& f) {
    W* value = values_.get();
    for (int64_t k = 0; k < taps_[0]; ++k)
      for (int64_t h = 0; h < taps_[1]; ++h)
        for (int64_t w = 0; w < taps_[2]; ++w)
          for (int64_t c = 0; c < taps_[3]; ++c) f(*value++, k, h, w, c);
  }

  int64_t taps_[4];
  Scratch<W> values_;
};

}  // namespace resfuse::cpu::RESFUSE_ISA

RESFUSE_TILES_END
#endif
