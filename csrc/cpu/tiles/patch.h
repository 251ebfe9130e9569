// Sources: what a tile reads, computed while it is loaded. Nothing computed here is ever stored as a tensor.
//
//   Activation:        act(x*scale + shift), or x as it is
//   OutputGradient:    dY = dz*scale + grad_mean/M + 2*grad_var/M * (y - mean): the gradient of a convolution's output,
//                      through what normalised it and through its moments
//   MaskedGradient:    dz, by the sign of a kept output
//   ShiftedActivation: act(...) - pivot
// Channels beyond C, up to a whole vector, are zero.
#pragma once

#include "pack.h"
#include "plan.h"
#include "prefetch.h"

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

namespace resfuse::cpu::RESFUSE_ISA {

// Units between the pixels of a patch: an odd number of cache lines, so that pixels do not compete for the same sets.
template <class T>
int64_t pixel_units(int64_t channels) {
  const int64_t bytes = round_up(channels, kLanes) * static_cast<int64_t>(sizeof(operand_t<T>));
  return (ceil_div(bytes, 64) | 1) * 16;
}

// Where pixels lie, `pixel_step` apart; their channels are vectors of kLanes, `vector_step` apart: side by side, or
// each with all its pixels.
template <class O>
struct Pixels {
  O* data;
  int64_t pixel_step, vector_step;

  Pixels(O* first, int64_t pixels_apart, int64_t vectors_apart = kLanes)
      : data(first), pixel_step(pixels_apart), vector_step(vectors_apart) {}
  RESFUSE_LANES O* at(int64_t pixel, int64_t c) const {
    return data + pixel * pixel_step + c / kLanes * vector_step + c % kLanes;
  }
  Pixels from(int64_t pixel) const { return {at(pixel, 0), pixel_step, vector_step}; }

  // `count` pixels of `channels`
  void clear(int64_t count, int64_t channels) const {
    const int64_t runs = vector_step == kLanes ? 1 : ceil_div(channels, kLanes);
    for (int64_t i = 0; i < runs; ++i)
      std::memset(static_cast<void*>(data + i * vector_step), 0, static_cast<size_t>(count * pixel_step) * sizeof(O));
  }
};

// Pixels of a patch as they are multiplied by a forward product, `step` units apart.
template <class T>
Pixels<operand_t<T>> patch_pixels(unit_t<T>* patch, int64_t step) {
  return {reinterpret_cast<operand_t<T>*>(patch), step * kUnit<T>};
}

// A storage type whose values are floats from the load on, where T's are multiplied in pairs.
template <class T>
using wide_t = std::conditional_t<kUnit<T> == 1, T, WideBFloat16>;
template <class T>
const wide_t<T>* as_wide(const T* values) {
  return reinterpret_cast<const wide_t<T>*>(values);
}

// A vector of values as they lie in a patch: floats, or the halves that are multiplied in pairs.
RESFUSE_LANES Lanes rounded(Lanes value, float) { return value; }
RESFUSE_LANES Lanes rounded(Lanes value, WideBFloat16) { return value; }
RESFUSE_LANES Halves rounded(Lanes value, BFloat16) { return round_halves(value, BFloat16{}); }
RESFUSE_LANES Lanes raw(const float* from, LaneMask mask) { return load_lanes(from, mask); }
RESFUSE_LANES Lanes raw(const WideBFloat16* from, LaneMask mask) { return load_lanes(from, mask); }
RESFUSE_LANES Halves raw(const BFloat16* from, LaneMask mask) { return load_halves(from, mask); }
RESFUSE_LANES Lanes widened(Lanes value) { return value; }
RESFUSE_LANES Lanes widened(Halves value) { return widen_halves(value); }
RESFUSE_LANES void store_rounded(float* to, Lanes value) { store_lanes(to, value); }
RESFUSE_LANES void store_rounded(BFloat16* to, Halves value) { store_halves(to, value); }

// A source gives a vector of channels of a pixel, those outside the mask zero. kComputed: through the prologue, else as
// stored.
template <class T>
struct Activation {
  const T* x;
  int64_t channels;    // of x
  const float* scale;  // padded; null: x as it is
  const float* shift;
  bool relu;

  void prefetch(int64_t pixel, int64_t pixels, Prefetcher& to) const {
    to.add(x + pixel * channels, pixels * channels * static_cast<int64_t>(sizeof(T)));
  }
  bool computed() const { return scale != nullptr; }
  Activation<wide_t<T>> wide() const { return {as_wide(x), channels, scale, shift, relu}; }

  template <bool kComputed>
  RESFUSE_LANES auto get(int64_t pixel, int64_t c, LaneMask mask) const {
    const T* from = x + pixel * channels + c;
    if constexpr (!kComputed) {
      return raw(from, mask);
    } else {
      const Lanes scaled = load_lanes(from, mask) * load_lanes(scale + c);
      const Lanes z = scaled + load_lanes(shift + c);
      return rounded(relu ? relu_lanes(z) : z, T{});
    }
  }
};

template <class T>
struct OutputGradient {
  const T* grad;
  const T* y;  // null: grad is dY
  int64_t channels;
  const float* scale;  // padded, as all; grad*scale
  const float* shift;  // null: no mask; else grad counts where y*scale + shift > 0
  const float* mean;
  const float* constant;
  const float* slope;

  void prefetch(int64_t pixel, int64_t pixels, Prefetcher& to) const {
    const int64_t bytes = pixels * channels * static_cast<int64_t>(sizeof(T));
    to.add(grad + pixel * channels, bytes);
    if (y != nullptr) to.add(y + pixel * channels, bytes);
  }
  bool computed() const { return y != nullptr; }
  OutputGradient<wide_t<T>> wide() const {
    return {as_wide(grad), as_wide(y), channels, scale, shift, mean, constant, slope};
  }

  template <bool kComputed>
  RESFUSE_LANES auto get(int64_t pixel, int64_t c, LaneMask mask) const {
    const int64_t at = pixel * channels + c;
    if constexpr (!kComputed) {
      return raw(grad + at, mask);
    } else {
      const Lanes value = load_lanes(y + at, mask), a = load_lanes(scale + c);
      Lanes dz = load_lanes(grad + at, mask);
      if (shift != nullptr) dz = relu_gradient_lanes(dz, value * a + load_lanes(shift + c));
      const Lanes deviation = value - load_lanes(mean + c);
      const Lanes through = multiply_add(load_lanes(slope + c), deviation, load_lanes(constant + c));
      const Lanes result = multiply_add(dz, a, through);
      return rounded(mask == kAllLanes ? result : keep_lanes(mask, result), T{});
    }
  }
};

// dz = grad where the kept output is active. Every value is asked for once, and written to `dz`.
template <class T>
struct MaskedGradient {
  const T* grad;
  const T* out;  // null: every value is active
  T* dz;
  int64_t channels;

  void prefetch(int64_t pixel, int64_t pixels, Prefetcher& to) const {
    const int64_t bytes = pixels * channels * static_cast<int64_t>(sizeof(T));
    to.add(grad + pixel * channels, bytes);
    if (out != nullptr) to.add(out + pixel * channels, bytes);
    to.add(dz + pixel * channels, bytes);
  }
  bool computed() const { return true; }

  template <bool kComputed>
  RESFUSE_LANES auto get(int64_t pixel, int64_t c, LaneMask mask) const {
    const int64_t at = pixel * channels + c;
    Lanes value = load_lanes(grad + at, mask);
    if (out != nullptr) value = relu_gradient_lanes(value, load_lanes(out + at, mask));
    store_lanes(dz + at, value, mask);
    return rounded(value, T{});
  }
};

// act(...) - pivot: a shifted input, for second moments that do not cancel. Lanes beyond C are zero.
template <class T>
struct ShiftedActivation {
  Activation<T> activation;
  const float* pivot;  // padded

  void prefetch(int64_t pixel, int64_t pixels, Prefetcher& to) const { activation.prefetch(pixel, pixels, to); }
  bool computed() const { return true; }

  template <bool kComputed>
  RESFUSE_LANES auto get(int64_t pixel, int64_t c, LaneMask mask) const {
    const Lanes value = activation.scale == nullptr ? widened(activation.template get<false>(pixel, c, mask))
                                                    : widened(activation.template get<true>(pixel, c, mask));
    return rounded(keep_lanes(mask, value - load_lanes(pivot + c)), T{});
  }
};

// `count` pixels from `pixel` on, `step` apart, of channels [begin, end).
template <bool kComputed, class O, class S>
void fill_pixels(const S& source, int64_t pixel, int64_t step, int64_t count, int64_t begin, int64_t end,
                 const Pixels<O>& to) {
  const int64_t whole = begin + (end - begin) / kLanes * kLanes;
  for (int64_t i = 0; i < count; ++i, pixel += step) {
    O* at = to.at(i, 0);
    for (int64_t c = begin; c < whole; c += kLanes, at += to.vector_step)
      store_rounded(at, source.template get<kComputed>(pixel, c, kAllLanes));
    if (whole < end) store_rounded(at, source.template get<kComputed>(pixel, whole, lane_mask(whole, end)));
  }
}

template <class O, class S>
void fill_row(const S& source, int64_t pixel, int64_t step, int64_t count, int64_t begin, int64_t end,
              const Pixels<O>& to) {
  if (source.computed()) return fill_pixels<true>(source, pixel, step, count, begin, end, to);
  fill_pixels<false>(source, pixel, step, count, begin, end, to);
}

// Rows of a patch: patch pixel (r, c) is to's r * columns + c; what lies outside the input is zero.
template <class O, class S>
void fill_patch(const Plan& plan, const Tile& tile, const S& source, int64_t begin, int64_t end, Pixels<O> to) {
  const AxisPlan &h = plan.height, &w = plan.width;
  const int64_t rows = h.patch(tile.rows), columns = w.patch(tile.columns);
  const int64_t first_row = tile.row * h.base_step + h.origin, first = tile.column * w.base_step + w.origin;
  const int64_t left = std::clamp<int64_t>(-first, 0, columns);
  const int64_t inside =
      std::clamp<int64_t>(ceil_div(w.in, w.in_step) - std::max<int64_t>(first, 0), 0, columns - left);
  for (int64_t r = 0; r < rows; ++r, to = to.from(columns)) {
    const int64_t row = (first_row + r) * h.in_step;
    if (row < 0 || row >= h.in) {
      to.clear(columns, end - begin);
      continue;
    }
    if (left > 0) to.clear(left, end - begin);
    const int64_t pixel = (tile.image * h.in + row) * w.in + (first + left) * w.in_step;
    fill_row(source, pixel, w.in_step, inside, begin, end, to.from(left));
    const int64_t right = columns - left - inside;
    if (right > 0) to.from(left + inside).clear(right, end - begin);
  }
}

// The input pixels that a tile reads, which lie together in memory.
template <class S>
void prefetch_tile(const Plan& plan, const Tile& tile, const S& source, Prefetcher& to) {
  const AxisPlan &h = plan.height, &w = plan.width;
  const int64_t begin = (tile.row * h.base_step + h.origin) * h.in_step;
  const int64_t first = std::max<int64_t>(begin, 0);
  const int64_t last = std::min(begin + h.patch(tile.rows) * h.in_step, h.in);
  if (h.base == 1 && plan.images == 1) {  // one long row
    source.prefetch(tile.column * w.in_step, tile.columns * w.in_step, to);
  } else if (first < last) {
    source.prefetch((tile.image * h.in + first) * w.in, (last - first) * w.in, to);
  }
}

}  // namespace resfuse::cpu::RESFUSE_ISA

RESFUSE_TILES_END
#endif
