// The backward of train-time folding on the CPU by tiles, for out = act(a W'^T + shift + r) with W' = scale * W and
// a = act((x - mean)*scale_x + bias_x).
//
//   weight:  dz = grad_out where out is active (written: it is the residual's gradient), G = dz^T a, column sums of dz
//   input:   da = [dz | a | 1] [[W'], [-Q], [row]], one product over two patches and a constant; then through the
//            prologue, as in conv_stats_backward. A strided convolution gives nothing to pixels that it did not read.
// The C-length and C-by-C algebra between the two is resfuse/autograd_folding.py's.
#include "tiles/operands.h"
#include "tiles/weight_gradient.h"

namespace resfuse::cpu::RESFUSE_ISA {

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

// A constant as one unit of every pixel, and the vector beside it as so many rows of a weight. In bfloat16 a vector is
// the sum of two.
struct ConstantRow {
  std::vector<float> rows;

  ConstantRow(const float* vector, int64_t channels, const float*) : rows(vector, vector + channels) {}
  ConstantRow(const float* vector, int64_t channels, const uint32_t*) : rows(static_cast<size_t>(2 * channels)) {
    for (int64_t c = 0; c < channels; ++c) {
      const auto i = static_cast<size_t>(c);
      rows[i] = round_to<BFloat16>(vector[c]);
      rows[static_cast<size_t>(channels) + i] = vector[c] - rows[i];
    }
  }
  static void set(float* unit) { *unit = 1.0f; }
  static void set(uint32_t* unit) { *unit = 0x3f803f80u; }
};

template <class T>
void expand_input_tiles(const ConvShape& shape, const T* dz, const Activation<T>& source, const T* weight,
                        const float* correction, const float* row, InputGradient<T> epilogue, float* sums_out) {
  const Plan plan(shape, true, sizeof(operand_t<T>), kTilePixels, kPatchBytes);
  const Plan second = plan.beside({shape, false, sizeof(operand_t<T>), kTilePixels, kPatchBytes});
  const int64_t channels = shape.in_channels, pixels = plan.patch_pixels();
  const int64_t dz_step = pixel_units<T>(shape.out_channels), a_step = pixel_units<T>(channels);
  const int64_t a_begin = pixels * dz_step, constant_at = a_begin + pixels * a_step;
  Taps taps(plan, 1, kUnit<T>, dz_step);
  const int64_t a_weight = taps.append(a_begin, ceil_div(channels, kUnit<T>), a_step);
  const int64_t constant_weight = taps.append(constant_at, 1, 0);
  const ConstantRow constant(row, channels, static_cast<const unit_t<T>*>(nullptr));
  unit_t<T>* packed = pack_weight<T>(plan, taps, weight, WeightLayout{{channels, 1, 1, 1}}, 1, true);
  pack_appended<T>(WeightView<float>{correction, channels, channels, 1, channels, nullptr}, taps, a_weight, packed);
  pack_appended<T>(WeightView<float>{constant.rows.data(), channels, kUnit<T>, 1, channels, nullptr}, taps,
                   constant_weight, packed);
  const TileSlabs slabs(plan.tiles(), ceil_div(shape.in_channels, kPanel));
  SlabSums sums(sums_out == nullptr ? 0 : slabs.slabs, shape.in_channels, 2);
  epilogue.sums = &sums;
  const OutputGradient<T> grad{dz, nullptr, shape.out_channels, nullptr, nullptr, nullptr, nullptr, nullptr};
  const auto fill = [&](const Tile& tile, unit_t<T>* patch) {
    fill_patch(plan, tile, grad, 0, shape.out_channels, patch_pixels<T>(patch, dz_step));
    fill_patch(second, tile, source, 0, channels, patch_pixels<T>(patch + a_begin, a_step));
    ConstantRow::set(patch + constant_at);
  };
  const auto ahead = [&](const Tile& tile, Prefetcher& to) {
    prefetch_tile(plan, tile, grad, to);
    prefetch_tile(second, tile, source, to);
  };
  run_tiles<T>(plan, taps, packed, constant_at + 1, slabs, fill, ahead, epilogue);
  if (sums_out == nullptr) return;
  for (int64_t kind = 0; kind < 2; ++kind) sums.merge(kind, shape.in_channels, sums_out + kind * shape.in_channels);
}

RESFUSE_TILES_END
#endif

// `in_place`: dz is written over grad_out.
static std::tuple<Tensor, Tensor, Tensor> backward_weight(const Tensor& grad_out, const OptionalTensor& out,
                                                          const Tensor& x, const OptionalTensor& affine,
                                                          const OptionalTensor& mean, bool relu, bool in_place) {
  const ConvShape shape = pointwise_shape(x, grad_out.size(1), {1, 1});
  check_image(grad_out, x, shape.out_channels, x.size(2), x.size(3), "grad_out");
  if (out.has_value()) check_like(*out, grad_out, "out");
  PaddedVectors vectors;
  const Prologue prologue(affine, mean, x, vectors);
  Tensor dz = in_place ? grad_out : new_activation(grad_out),
         sums = new_vector(x, 1, shape.out_channels, ScalarType::Float);
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

std::tuple<Tensor, Tensor, Tensor> expand_bn_act_backward_weight(const Tensor& grad_out, const OptionalTensor& out,
                                                                 const Tensor& x, const OptionalTensor& affine,
                                                                 const OptionalTensor& mean, bool relu) {
  return backward_weight(grad_out, out, x, affine, mean, relu, false);
}

// grad_out becomes dz: its memory is mapped already, and its lines are in cache when they are written.
std::tuple<Tensor, Tensor> expand_bn_act_backward_weight_(const Tensor& grad_out, const OptionalTensor& out,
                                                          const Tensor& x, const OptionalTensor& affine,
                                                          const OptionalTensor& mean, bool relu) {
  const auto found = backward_weight(grad_out, out, x, affine, mean, relu, true);
  return {std::get<1>(found), std::get<2>(found)};
}

std::tuple<Tensor, Tensor> expand_bn_act_backward_input(const Tensor& dz, const Tensor& x, const OptionalTensor& affine,
                                                        const OptionalTensor& mean, bool relu, const Tensor& weight,
                                                        const Tensor& correction, const Tensor& row, Pair stride) {
  const ConvShape shape = pointwise_shape(x, dz.size(1), stride);
  check_image(dz, x, shape.out_channels, shape.height.out, shape.width.out, "dz");
  STD_TORCH_CHECK(weight.is_contiguous() && weight.numel() == shape.out_channels * shape.in_channels &&
                      weight.scalar_type() == x.scalar_type(),
                  "resfuse: weight must be (K, C) in x's dtype");
  STD_TORCH_CHECK(correction.is_contiguous() && correction.numel() == shape.in_channels * shape.in_channels &&
                      correction.scalar_type() == ScalarType::Float,
                  "resfuse: correction must be float32 (C, C)");
  PaddedVectors vectors;
  const Prologue prologue(affine, mean, x, vectors);
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
                                      through ? input_pointer<T>(x) : nullptr,
                                      prologue.scale,
                                      prologue.shift,
                                      prologue.mean,
                                      relu,
                                      nullptr};
      expand_input_tiles<T>(shape, input_pointer<T>(dz), source, input_pointer<T>(weight),
                            input_pointer<float>(correction), vector_pointer<float>(row, x, "row"), epilogue,
                            through ? output_pointer<float>(sums) : nullptr);
    }
  });
#endif
  return {grad_x, sums};
}

STABLE_TORCH_LIBRARY_IMPL(resfuse, CPU, m) {
  if (!isa_runs()) return;
  m.impl("expand_bn_act_backward_weight", TORCH_BOX(&expand_bn_act_backward_weight));
  m.impl("expand_bn_act_backward_weight_", TORCH_BOX(&expand_bn_act_backward_weight_));
  m.impl("expand_bn_act_backward_input", TORCH_BOX(&expand_bn_act_backward_input));
}

}  // namespace resfuse::cpu::RESFUSE_ISA
