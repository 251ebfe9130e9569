// The backward of train-time folding on the CPU by tiles, for out = act(a W'^T + shift + r) with W' = scale * W and
// a = act((x - mean)*scale_x + bias_x).
//
//   weight:  dz = grad_out where out is active (written: it is the residual's gradient), G = dz^T a, column sums of dz
//   input:   da = [dz | a] [[W'], [-Q]] + row, one product over two patches; then through the prologue, as in
//            conv_stats_backward
// The C-length and C-by-C algebra between the two is resfuse/autograd_conv.py's.
#include "tiles/operands.h"
#include "tiles/weight_gradient.h"

namespace resfuse::cpu {

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

// Panels of [W'; -Q]: for 32 input channels, the K units of W' and then the C units of Q.
template <class T>
unit_t<T>* pack_branches(const ConvShape& shape, const Taps& taps, const T* weight, const float* correction) {
  const int64_t channels = shape.in_channels, panels = ceil_div(channels, kPanel);
  unit_t<T>* packed = workspace<unit_t<T>>(Slot::kWeights, panels * taps.units * kPanel);
  parallel_tasks(panels, channels * (channels + shape.out_channels) * 4, [&](int64_t panel) {
    unit_t<T>* to = packed + panel * taps.units * kPanel;
    pack_panel<T>(WeightView<T>{weight, channels, shape.out_channels, 1, channels, nullptr}, panel, to);
    pack_panel<T>(WeightView<float>{correction, channels, channels, 1, channels, nullptr}, panel,
                  to + taps.phases[0].taps[0].steps * kPanel);
  });
  return packed;
}

template <class T>
void expand_input_tiles(const ConvShape& shape, const T* dz, const Activation<T>& source, const T* weight,
                        const float* correction, InputGradient<T> epilogue, float* sums_out) {
  Plan plan(shape, true, sizeof(T), kTilePixels, kPatchBytes);
  const int64_t dz_step = pixel_units<T>(shape.out_channels), a_step = pixel_units<T>(shape.in_channels);
  const int64_t dz_units = plan.patch_pixels() * dz_step, units = ceil_div(shape.in_channels, kUnit<T>);
  Taps taps(plan, 1, ceil_div(shape.out_channels, kUnit<T>), dz_step);
  taps.phases[0].taps.push_back({dz_units, units, a_step, a_step});
  taps.units += units;
  const unit_t<T>* packed = pack_branches(shape, taps, weight, correction);
  const Slabs512 slabs(plan.tiles(), ceil_div(shape.in_channels, kPanel));
  SlabSums sums(sums_out == nullptr ? 0 : slabs.slabs, shape.in_channels, 2);
  epilogue.sums = &sums;
  const OutputGradient<T> grad{dz, nullptr, shape.out_channels, nullptr, nullptr, nullptr, nullptr, nullptr};
  const auto fill = [&](const Tile& tile, unit_t<T>* patch) {
    T *first = reinterpret_cast<T*>(patch), *second = reinterpret_cast<T*>(patch + dz_units);
    fill_patch<T>(plan, tile, grad, 0, shape.out_channels, first, dz_step * kUnit<T>);
    fill_patch<T>(plan, tile, source, 0, shape.in_channels, second, a_step * kUnit<T>);
  };
  const auto ahead = [&](const Tile& tile, Prefetcher& to) {
    prefetch_tile(plan, tile, grad, to);
    prefetch_tile(plan, tile, source, to);
  };
  run_tiles<T>(plan, taps, packed, dz_units + plan.patch_pixels() * a_step, slabs, fill, ahead, epilogue);
  if (sums_out == nullptr) return;
  for (int64_t kind = 0; kind < 2; ++kind) sums.merge(kind, shape.in_channels, sums_out + kind * shape.in_channels);
}

RESFUSE_TILES_END
#endif

static ConvShape pointwise_shape(const Tensor& x, int64_t out_channels) {
  STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0 && geometry_of(x).channels_last, "resfuse: x must be channels_last");
  STD_TORCH_CHECK(tiles_support(x.scalar_type()), "resfuse: this machine has no tile kernels for x's dtype");
  const auto axis = [&](int64_t i) { return ConvAxis{x.size(i), x.size(i), 1, 1, 0, 1}; };
  return {x.size(0), x.size(1), out_channels, axis(2), axis(3)};
}

std::tuple<Tensor, Tensor, Tensor> expand_bn_act_backward_weight(const Tensor& grad_out, const OptionalTensor& out,
                                                                 const Tensor& x, const OptionalTensor& affine,
                                                                 const OptionalTensor& mean, bool relu) {
  const ConvShape shape = pointwise_shape(x, grad_out.size(1));
  check_image(grad_out, x, shape.out_channels, x.size(2), x.size(3), "grad_out");
  if (out.has_value()) check_like(*out, grad_out, "out");
  PaddedVectors vectors;
  const Prologue prologue(affine, mean, x, vectors);
  Tensor dz = new_activation(grad_out), sums = new_vector(x, 1, shape.out_channels, ScalarType::Float);
  Tensor product = torch::stable::new_empty(x, {shape.out_channels, shape.in_channels}, ScalarType::Float);
#if RESFUSE_HAS_TILES
  with_tile_types(x, product, [&](auto tag, auto) {
    using T = decltype(tag);
    const Activation<T> source{input_pointer<T>(x), shape.in_channels, prologue.scale, prologue.shift, relu};
    const MaskedGradient<T> grad{input_pointer<T>(grad_out), input_pointer<T>(out), output_pointer<T>(dz),
                                 shape.out_channels};
    weight_gradient_tiles<T>(shape, grad, source, WeightLayout{{shape.in_channels, 1, 1, 1}},
                             output_pointer<float>(product), output_pointer<float>(sums));
  });
#endif
  return {dz, product, sums};
}

std::tuple<Tensor, Tensor> expand_bn_act_backward_input(const Tensor& dz, const Tensor& x, const OptionalTensor& affine,
                                                        const OptionalTensor& mean, bool relu, const Tensor& weight,
                                                        const Tensor& correction, const Tensor& row) {
  const ConvShape shape = pointwise_shape(x, dz.size(1));
  check_image(dz, x, shape.out_channels, x.size(2), x.size(3), "dz");
  STD_TORCH_CHECK(weight.is_contiguous() && weight.numel() == shape.out_channels * shape.in_channels &&
                      weight.scalar_type() == x.scalar_type(),
                  "resfuse: weight must be (K, C) in x's dtype");
  STD_TORCH_CHECK(correction.is_contiguous() && correction.numel() == shape.in_channels * shape.in_channels &&
                      correction.scalar_type() == ScalarType::Float,
                  "resfuse: correction must be float32 (C, C)");
  PaddedVectors vectors;
  const Prologue prologue(affine, mean, x, vectors);
  const float* constant = vectors.add(vector_pointer<float>(row, x, "row"), shape.in_channels);
  const bool through = prologue.scale != nullptr;
  Tensor grad_x = new_activation(x);
  Tensor sums = through ? new_vector(x, 2, shape.in_channels, ScalarType::Float)
                        : torch::stable::new_empty(x, {0}, ScalarType::Float);
#if RESFUSE_HAS_TILES
  with_tile_types(x, weight, [&](auto tag, auto weight_tag) {
    using T = decltype(tag);
    if constexpr (std::is_same_v<T, decltype(weight_tag)>) {
      const Activation<T> source{input_pointer<T>(x), shape.in_channels, prologue.scale, prologue.shift, relu};
      const InputGradient<T> epilogue{output_pointer<T>(grad_x),
                                      shape.in_channels,
                                      nullptr,
                                      constant,
                                      through ? input_pointer<T>(x) : nullptr,
                                      prologue.scale,
                                      prologue.shift,
                                      prologue.mean,
                                      relu,
                                      nullptr};
      expand_input_tiles<T>(shape, input_pointer<T>(dz), source, input_pointer<T>(weight),
                            input_pointer<float>(correction), epilogue,
                            through ? output_pointer<float>(sums) : nullptr);
    }
  });
#endif
  return {grad_x, sums};
}

STABLE_TORCH_LIBRARY_IMPL(resfuse, CPU, m) {
  m.impl("expand_bn_act_backward_weight", TORCH_BOX(&expand_bn_act_backward_weight));
  m.impl("expand_bn_act_backward_input", TORCH_BOX(&expand_bn_act_backward_input));
}

}  // namespace resfuse::cpu
