// second_moments on the CPU by tiles: the mean and covariance of a = act((x - mean)*scale + bias) over all pixels, or
// over those that a strided 1x1 convolution reads.
//
// The product a^T a is that of a weight's gradient, with both operands shifted by a pivot near the mean: an uncentred
// sum in float would lose (mean/std)^2 digits. Only blocks on and above the diagonal are computed.
#include <cmath>

#include "tiles/symmetric.h"

namespace resfuse::cpu::RESFUSE_ISA {

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

constexpr int64_t kPivotPixels = 64;

// The input pixel that output pixel `index` reads.
static int64_t pixel_read(const ConvShape& shape, int64_t index) {
  const ConvAxis &h = shape.height, &w = shape.width;
  const int64_t column = index % w.out, row = index / w.out % h.out, image = index / (w.out * h.out);
  return (image * h.in + row * h.stride) * w.in + column * w.stride;
}

// `mean` as a multiple of the last bit that a bfloat16 has at `largest`. Deviations are rounded to bfloat16, and those
// of bfloat16 values from any other number would be rounded alike, all up or all down.
static float coarse_pivot(float mean, float largest) {
  const float bit = float_from_bits(bits_from_float(largest) & 0x7f800000u) / 128;
  return bit > 0 && std::isfinite(bit) ? std::nearbyint(mean / bit) * bit : mean;
}

// The mean of a over pixels spread evenly: near enough to all of them wherever they are alike.
template <class T>
void find_pivot(const ConvShape& shape, const Activation<T>& source, int64_t pixels, float* pivot) {
  const int64_t count = std::min(pixels, kPivotPixels);
  for (int64_t c = 0; c < source.channels; c += kLanes) {
    Lanes sum = zero_lanes(), largest = sum;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t pixel = pixel_read(shape, i * pixels / count);
      const LaneMask mask = lane_mask(c, source.channels);
      const Lanes a = source.scale == nullptr ? widened(source.template get<false>(pixel, c, mask))
                                              : widened(source.template get<true>(pixel, c, mask));
      sum += a;
      largest = max_of(max_of(a, zero_lanes() - a), largest);
    }
    store_lanes(pivot + c, round_lanes<T>(sum / broadcast_lanes(static_cast<float>(count))));
    if constexpr (kUnit<T> == 2) {
      alignas(64) float most[kLanes];
      store_lanes(most, largest);
      for (int64_t j = 0; j < kLanes; ++j) pivot[c + j] = coarse_pivot(pivot[c + j], most[j]);
    }
  }
}

template <class T>
void second_moments_tiles(const ConvShape& shape, const Activation<T>& source, float* pivot, float* mean,
                          float* covariance) {
  const int64_t channels = shape.in_channels, pixels = shape.images * shape.height.out * shape.width.out;
  const auto count = static_cast<double>(pixels);
  find_pivot(shape, source, pixels, pivot);
  const ShiftedActivation<T> shifted{source, pivot};
  std::vector<double> offset;  // of the mean from the pivot, times count
  symmetric_product<T>(
      shape, shifted, shifted,
      [&](int64_t row, int64_t c, double sum) {
        const double product = offset[static_cast<size_t>(row)] / count * (offset[static_cast<size_t>(c)] / count);
        covariance[row * channels + c] = covariance[c * channels + row] = static_cast<float>(sum / count - product);
      },
      &offset);
  for (int64_t c = 0; c < channels; ++c)
    mean[c] = static_cast<float>(pivot[c] + offset[static_cast<size_t>(c)] / count);
}

RESFUSE_TILES_END
#endif

std::tuple<Tensor, Tensor> second_moments(const Tensor& x, const OptionalTensor& affine, const OptionalTensor& mean,
                                          bool relu, Pair stride) {
  const ConvShape shape = pointwise_shape(x, x.size(1), stride);
  PaddedVectors vectors;
  const Prologue prologue(affine, mean, x, vectors);
  Tensor means = new_vector(x, 1, shape.in_channels, ScalarType::Float);
  Tensor covariance = torch::stable::new_empty(x, {shape.in_channels, shape.in_channels}, ScalarType::Float);
#if RESFUSE_HAS_TILES
  with_tile_types(x, means, [&](auto tag, auto) {
    using T = decltype(tag);
    const Activation<T> source{input_pointer<T>(x), shape.in_channels, prologue.scale, prologue.shift, relu};
    second_moments_tiles<T>(shape, source, vectors.fresh(shape.in_channels), output_pointer<float>(means),
                            output_pointer<float>(covariance));
  });
#endif
  return {means, covariance};
}

STABLE_TORCH_LIBRARY_IMPL(resfuse, CPU, m) {
  if (!isa_runs()) return;
  m.impl("second_moments", TORCH_BOX(&second_moments));
}

}  // namespace resfuse::cpu::RESFUSE_ISA
