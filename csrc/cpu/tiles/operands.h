// The tensors of a convolution as tile kernels take them: checked, and reduced to pointers, shapes and padded vectors.
#pragma once

#include "../memory.h"
#include "lanes.h"
#include "plan.h"

namespace resfuse::cpu {

using Pair = std::vector<int64_t>;

inline ConvAxis conv_axis(const Tensor& x, const Tensor& weight, int64_t axis, const Pair& stride, const Pair& padding,
                          const Pair& dilation) {
  const auto i = static_cast<size_t>(axis);
  ConvAxis a{x.size(2 + axis), 0, weight.size(2 + axis), stride.at(i), padding.at(i), dilation.at(i)};
  STD_TORCH_CHECK(a.stride > 0 && a.dilation > 0 && a.padding >= 0, "resfuse: no such convolution");
  STD_TORCH_CHECK(a.kernel > 0 && a.in + 2 * a.padding > a.dilation * (a.kernel - 1),
                  "resfuse: the kernel is larger than its padded input");
  a.out = (a.in + 2 * a.padding - a.dilation * (a.kernel - 1) - 1) / a.stride + 1;
  return a;
}

inline ConvShape conv_shape(const Tensor& x, const Tensor& weight, const Pair& stride, const Pair& padding,
                            const Pair& dilation, int64_t groups) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4 && weight.size(0) > 0 && weight.size(1) > 0,
                  "resfuse: x and weight must be 4D and not empty");
  STD_TORCH_CHECK(groups > 0 && x.size(1) % groups == 0 && x.size(1) / groups == weight.size(1),
                  "resfuse: weight must be (K, C / groups, kH, kW) with x's C");
  STD_TORCH_CHECK(weight.size(0) % groups == 0, "resfuse: groups must divide weight's K");
  STD_TORCH_CHECK(x.numel() > 0 && geometry_of(x).channels_last, "resfuse: x must be channels_last and not empty");
  STD_TORCH_CHECK(weight.device() == x.device(), "resfuse: weight must be on x's device");
  return {x.size(0),
          x.size(1),
          weight.size(0),
          conv_axis(x, weight, 0, stride, padding, dilation),
          conv_axis(x, weight, 1, stride, padding, dilation),
          groups};
}

// A 1x1 convolution of x.
inline ConvShape pointwise_shape(const Tensor& x, int64_t out_channels, const Pair& stride) {
  STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0 && geometry_of(x).channels_last, "resfuse: x must be channels_last");
  STD_TORCH_CHECK(tiles_support(x.scalar_type()), "resfuse: this machine has no tile kernels for x's dtype");
  const auto axis = [&](int64_t i) {
    const int64_t step = stride.at(static_cast<size_t>(i));
    STD_TORCH_CHECK(step > 0, "resfuse: no such convolution");
    return ConvAxis{x.size(2 + i), ceil_div(x.size(2 + i), step), 1, step, 0, 1};
  };
  return {x.size(0), x.size(1), out_channels, axis(0), axis(1)};
}

// An uninitialised channels_last activation beside x.
inline Tensor new_image(const Tensor& x, int64_t channels, int64_t height, int64_t width) {
  Tensor out = torch::stable::empty({x.size(0), channels, height, width}, x.scalar_type(), std::nullopt, x.device(),
                                    std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
  advise_huge_pages(out.mutable_data_ptr(), static_cast<size_t>(out.numel()) * out.element_size());
  return out;
}

// Check that `image` is channels_last of this size, in x's dtype.
inline void check_image(const Tensor& image, const Tensor& x, int64_t channels, int64_t height, int64_t width,
                        const char* name) {
  STD_TORCH_CHECK(image.dim() == 4 && image.size(0) == x.size(0) && image.size(1) == channels &&
                      image.size(2) == height && image.size(3) == width && image.scalar_type() == x.scalar_type() &&
                      image.device() == x.device() && geometry_of(image).channels_last,
                  "resfuse: ", name, " has the wrong shape, dtype or layout");
}

// Zero-padded copies of per-channel vectors, which kernels read in whole vectors. Null stays null.
class PaddedVectors {
 public:
  // `count` values at `from`, padded to whole panels
  const float* add(const float* from, int64_t count) {
    if (from == nullptr) return nullptr;
    float* to = fresh(count);
    std::copy_n(from, count, to);
    return to;
  }
  // zeros
  float* fresh(int64_t count) {
    // beyond whole panels, what a vector reads that begins at any channel
    pieces_.emplace_back(static_cast<size_t>(round_up(count, 32) + 32), 0.0f);
    return pieces_.back().data();
  }

 private:
  std::vector<std::vector<float>> pieces_;
};

// What a reader computes while loading x: (x - mean)*scale + bias, as x*scale + shift. affine is (2, C): bias, scale.
struct Prologue {
  const float* scale = nullptr;
  const float* shift = nullptr;
  const float* mean = nullptr;

  Prologue() = default;
  Prologue(const OptionalTensor& affine, const OptionalTensor& center, const Tensor& x, PaddedVectors& vectors) {
    if (!affine.has_value()) return;
    const int64_t channels = x.size(1);
    STD_TORCH_CHECK(affine->dim() == 2 && affine->size(0) == 2 && affine->size(1) == channels &&
                        affine->is_contiguous() && affine->scalar_type() == ScalarType::Float,
                    "resfuse: affine must be float32 (2, C)");
    const float* bias = static_cast<const float*>(affine->const_data_ptr());
    STD_TORCH_CHECK(center.has_value(), "resfuse: affine needs a mean");
    mean = vectors.add(vector_pointer<float>(center, x, "mean"), channels);
    scale = vectors.add(bias + channels, channels);
    float* shifts = vectors.fresh(channels);
    for (int64_t c = 0; c < channels; ++c) shifts[c] = bias[c] - mean[c] * scale[c];
    shift = shifts;
  }
};

// Strides of a weight (K, C / groups, kH, kW).
struct WeightLayout {
  int64_t strides[4];
  int64_t at(int64_t kernel, int64_t kernel_width) const {
    return kernel / kernel_width * strides[2] + kernel % kernel_width * strides[3];
  }
};

inline WeightLayout weight_layout(const Tensor& weight) {
  return {{weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)}};
}

#if RESFUSE_HAS_TILES
namespace RESFUSE_ISA {

// Call f with values of the activation's and the weight's storage types: float beside either, or both bfloat16.
template <class F>
void with_tile_types(const Tensor& x, const Tensor& weight, const F& f) {
  const bool wide = weight.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(wide || weight.scalar_type() == x.scalar_type(), "resfuse: weight must be float32 or in x's dtype");
  if (x.scalar_type() == ScalarType::Float) return f(float{}, float{});
#ifndef RESFUSE_AVX2
  if (multiplies_bfloat16()) return wide ? f(BFloat16{}, float{}) : f(BFloat16{}, BFloat16{});
#endif
  wide ? f(WideBFloat16{}, float{}) : f(WideBFloat16{}, WideBFloat16{});
}

// Call f with a value of the storage type of what is multiplied as it is.
template <class F>
void with_multiplied_type(ScalarType dtype, const F& f) {
#ifndef RESFUSE_AVX2
  if (dtype == ScalarType::BFloat16) return f(BFloat16{});
#endif
  STD_TORCH_CHECK(dtype == ScalarType::Float, "resfuse: no products of this dtype");
  f(float{});
}

}  // namespace RESFUSE_ISA
#endif

}  // namespace resfuse::cpu
