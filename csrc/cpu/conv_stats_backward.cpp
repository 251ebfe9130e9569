// The backward of conv_stats on the CPU by tiles: two products whose operands are computed while they are loaded.
//
//   dY = grad_y*y_scale + grad_mean/M + 2*grad_var/M * (y - y_mean)  never stored; grad_y masked where a ReLU follows
//   grad_weight = wgrad(dY, a), a = act((x - mean)*scale + bias)     a never stored
//   da = dgrad(dY, weight);  dz = da where act was active;  grad_x = dz*scale + other
//   sums: dz and dz*(x - mean), the gradients of bias and scale
#include "tiles/convolution.h"
#include "tiles/row_taps.h"
#include "tiles/winograd_gradient.h"

namespace resfuse::cpu::RESFUSE_ISA {

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

template <class T, class W>
void input_gradient_tiles(const ConvShape& shape, const OutputGradient<T>& grad, const W* weight,
                          const WeightLayout& layout, InputGradient<T> epilogue, float* sums_out) {
  const Convolution<T, W> product(shape, true);
  SlabSums sums(sums_out == nullptr ? 0 : product.slabs().slabs, shape.in_channels, 2);
  epilogue.sums = &sums;
  product.run(grad, weight, layout, epilogue);
  if (sums_out == nullptr) return;
  for (int64_t kind = 0; kind < 2; ++kind) sums.merge(kind, shape.in_channels, sums_out + kind * shape.in_channels);
}

template <class T, class W>
void gradient_of_weight(const ConvShape& shape, const OutputGradient<T>& grad, const Activation<T>& source,
                        const WeightLayout& layout, W* grad_weight) {
  if (winograd_pays<T, W>(shape))
    return winograd_weight_gradient<unit_t<T>>(shape, grad.wide(), source.wide(), layout, grad_weight);
  weight_gradient_tiles<T>(shape, grad, source, layout, grad_weight);
}

RESFUSE_TILES_END
#endif

// The vectors of what read y: its normalisation, if grad_y has not been through it, and the gradients of y's moments.
struct OutputVectors {
  const float *scale = nullptr, *shift = nullptr, *mean = nullptr;
  float *constant = nullptr, *slope = nullptr;

  OutputVectors(const OptionalTensor& y, const OptionalTensor& affine, const OptionalTensor& y_mean,
                const OptionalTensor& grad_mean, const OptionalTensor& grad_var, const Tensor& grad_y,
                PaddedVectors& vectors) {
    if (!y.has_value()) return;
    const int64_t channels = grad_y.size(1);
    const auto count = static_cast<float>(grad_y.numel() / channels);
    const Prologue reader(affine, y_mean, grad_y, vectors);
    STD_TORCH_CHECK(y_mean.has_value(), "resfuse: y needs its mean");
    mean = vectors.add(vector_pointer<float>(y_mean, grad_y, "y_mean"), channels);
    shift = reader.shift;
    scale = reader.scale;
    if (scale == nullptr) {
      float* ones = vectors.fresh(channels);
      std::fill_n(ones, channels, 1.0f);
      scale = ones;
    }
    constant = vectors.fresh(channels);
    slope = vectors.fresh(channels);
    const float *gm = vector_pointer<float>(grad_mean, grad_y, "grad_mean"),
                *gv = vector_pointer<float>(grad_var, grad_y, "grad_var");
    for (int64_t c = 0; c < channels; ++c) {
      constant[c] = gm == nullptr ? 0.0f : gm[c] / count;
      slope[c] = gv == nullptr ? 0.0f : 2 * gv[c] / count;
    }
  }
};

// `in_place`: grad_x is written over other.
static std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const OptionalTensor& y,
                                                   const OptionalTensor& y_affine, const OptionalTensor& y_mean,
                                                   const OptionalTensor& grad_mean, const OptionalTensor& grad_var,
                                                   bool y_relu, const Tensor& x, const OptionalTensor& affine,
                                                   const OptionalTensor& mean, const Tensor& weight, bool relu,
                                                   const Pair& stride, const Pair& padding, const Pair& dilation,
                                                   int64_t groups, const OptionalTensor& other, bool need_x,
                                                   bool need_weight, bool in_place) {
  STD_TORCH_CHECK(tiles_support(x.scalar_type()), "resfuse: this machine has no tile kernels for x's dtype");
  const ConvShape shape = conv_shape(x, weight, stride, padding, dilation, groups);
  check_image(grad_y, x, shape.out_channels, shape.height.out, shape.width.out, "grad_y");
  if (y.has_value()) check_like(*y, grad_y, "y");
  if (other.has_value()) check_like(*other, x, "other");
  PaddedVectors vectors;
  const Prologue prologue(affine, mean, x, vectors);
  const OutputVectors reader(y, y_affine, y_mean, grad_mean, grad_var, grad_y, vectors);
  const bool through = prologue.scale != nullptr;
  Tensor grad_x = in_place ? *other : need_x ? new_activation(x) : torch::stable::new_empty(x, {0});
  Tensor grad_weight = need_weight ? torch::stable::empty_like(weight) : torch::stable::new_empty(weight, {0});
  Tensor sums = need_x && through ? new_vector(x, 2, shape.in_channels, ScalarType::Float)
                                  : torch::stable::new_empty(x, {0}, ScalarType::Float);
#if RESFUSE_HAS_TILES
  with_tile_types(x, weight, [&](auto tag, auto weight_tag) {
    using T = decltype(tag);
    using W = decltype(weight_tag);
    const Activation<T> source{input_pointer<T>(x), shape.in_channels, prologue.scale, prologue.shift, relu};
    const OutputGradient<T> grad{
        input_pointer<T>(grad_y),        input_pointer<T>(y), shape.out_channels, reader.scale,
        y_relu ? reader.shift : nullptr, reader.mean,         reader.constant,    reader.slope};
    if (need_weight && !through && joins_row_taps(shape)) {
      RowTapsWeight<W> rows(shape);
      const auto pixels = RowTaps<T>::of(input_pointer<T>(x), shape);
      weight_gradient_tiles<T>(row_taps_shape(shape), grad, pixels, rows.layout(), rows.get());
      rows.write(output_pointer<W>(grad_weight), weight_layout(grad_weight));
    } else if (need_weight) {
      gradient_of_weight<T>(shape, grad, source, weight_layout(grad_weight), output_pointer<W>(grad_weight));
    }
    if (!need_x) return;
    const InputGradient<T> epilogue{output_pointer<T>(grad_x),
                                    shape.in_channels,
                                    input_pointer<T>(other),
                                    through ? input_pointer<T>(x) : nullptr,
                                    prologue.scale,
                                    prologue.shift,
                                    prologue.mean,
                                    relu,
                                    nullptr};
    input_gradient_tiles<T>(shape, grad, input_pointer<W>(weight), weight_layout(weight), epilogue,
                            through ? output_pointer<float>(sums) : nullptr);
  });
#endif
  return {grad_x, grad_weight, sums};
}

std::tuple<Tensor, Tensor, Tensor> conv_stats_backward(const Tensor& grad_y, const OptionalTensor& y,
                                                       const OptionalTensor& y_affine, const OptionalTensor& y_mean,
                                                       const OptionalTensor& grad_mean, const OptionalTensor& grad_var,
                                                       bool y_relu, const Tensor& x, const OptionalTensor& affine,
                                                       const OptionalTensor& mean, const Tensor& weight, bool relu,
                                                       Pair stride, Pair padding, Pair dilation, int64_t groups,
                                                       const OptionalTensor& other, bool need_x, bool need_weight) {
  return backward(grad_y, y, y_affine, y_mean, grad_mean, grad_var, y_relu, x, affine, mean, weight, relu, stride,
                  padding, dilation, groups, other, need_x, need_weight, false);
}

// `other` becomes grad_x: its memory is mapped already, and in cache.
std::tuple<Tensor, Tensor> conv_stats_backward_(const Tensor& grad_y, const OptionalTensor& y,
                                                const OptionalTensor& y_affine, const OptionalTensor& y_mean,
                                                const OptionalTensor& grad_mean, const OptionalTensor& grad_var,
                                                bool y_relu, const Tensor& x, const OptionalTensor& affine,
                                                const OptionalTensor& mean, const Tensor& weight, bool relu,
                                                Pair stride, Pair padding, Pair dilation, int64_t groups,
                                                const Tensor& other, bool need_weight) {
  const auto found = backward(grad_y, y, y_affine, y_mean, grad_mean, grad_var, y_relu, x, affine, mean, weight, relu,
                              stride, padding, dilation, groups, other, true, need_weight, true);
  return {std::get<1>(found), std::get<2>(found)};
}

STABLE_TORCH_LIBRARY_IMPL(resfuse, CPU, m) {
  if (!isa_runs()) return;
  m.impl("conv_stats_backward", TORCH_BOX(&conv_stats_backward));
  m.impl("conv_stats_backward_", TORCH_BOX(&conv_stats_backward_));
}

}  // namespace resfuse::cpu::RESFUSE_ISA
