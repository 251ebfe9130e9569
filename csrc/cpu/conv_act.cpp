// conv_act on the CPU by tiles: out = act(conv(act((x - mean)*scale_x + bias_x), weight*scale) + shift + r), where r is
// absent, a residual, a raw residual normalised, or a 1x1 convolution of another activation: a branch.
//
// A convolution whose batch normalisation is folded into its weight, with its residual and activation: one pass over x
// and out, and no other activation. It is inference, and the forward pass of train-time folding. A branch is more
// columns of the same product: [a | branch] [weight | branch_weight]^T. The moments of out are summed on the way.
#include "tiles/convolution.h"
#include "tiles/epilogue.h"

namespace resfuse::cpu::RESFUSE_ISA {

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

// A second activation, read as it is, and its weight (K, C) beside the first's.
template <class T, class W>
struct Branch {
  ConvShape shape;
  Activation<T> source;
  WeightView<W> weight;

  bool unit_stride() const { return shape.height.stride == 1 && shape.width.stride == 1; }
};

// A 1x1 convolution and its branch as one product over two patches.
template <class T, class W>
struct JoinedProduct {
  const ConvShape& shape;
  const Branch<T, W>& branch;
  const Plan plan, second;
  const int64_t step, second_step, second_begin;  // units between pixels of either patch; where the second patch begins
  const TileSlabs slabs;

  JoinedProduct(const ConvShape& first, const Branch<T, W>& other)
      : shape(first),
        branch(other),
        plan(shape, false, sizeof(operand_t<T>), kTilePixels, kPatchBytes, branch.unit_stride()),
        second(plan.beside({branch.shape, false, sizeof(operand_t<T>), kTilePixels, kPatchBytes})),
        step(pixel_units<T>(shape.in_channels)),
        second_step(pixel_units<T>(branch.shape.in_channels)),
        second_begin(plan.patch_pixels() * step),
        slabs(plan.tiles(), ceil_div(shape.out_channels, kPanel)) {}

  template <class E>
  void run(const Activation<T>& source, const W* weight, const WeightLayout& layout, const E& epilogue,
           const float* lane_scale) const {
    Taps taps(plan, 1, kUnit<T>, step);
    const int64_t appended = taps.append(second_begin, ceil_div(branch.shape.in_channels, kUnit<T>), second_step);
    unit_t<T>* packed = pack_weight<T>(plan, taps, weight, layout, 1, false, lane_scale);
    pack_appended<T>(branch.weight, taps, appended, packed);
    const auto fill = [&](const Tile& tile, unit_t<T>* patch) {
      fill_patch(plan, tile, source, 0, shape.in_channels, patch_pixels<T>(patch, step));
      fill_patch(second, tile, branch.source, 0, branch.shape.in_channels,
                 patch_pixels<T>(patch + second_begin, second_step));
    };
    const auto ahead = [&](const Tile& tile, Prefetcher& to) {
      prefetch_tile(plan, tile, source, to);
      prefetch_tile(second, tile, branch.source, to);
    };
    run_tiles<T>(plan, taps, packed, second_begin + second.patch_pixels() * second_step, slabs, fill, ahead, epilogue);
  }
};

RESFUSE_TILES_END
#endif

// The convolution that a branch is, checked to add up with the first.
static ConvShape branch_shape(const ConvShape& first, const Tensor& branch, const OptionalTensor& weight,
                              const Pair& stride, ScalarType dtype) {
  STD_TORCH_CHECK(weight.has_value() && weight->is_contiguous() && weight->scalar_type() == dtype,
                  "resfuse: branch_weight must be contiguous and in weight's dtype");
  const ConvShape shape = conv_shape(branch, *weight, stride, {0, 0}, {1, 1}, 1);
  STD_TORCH_CHECK(shape.pointwise() && first.pointwise() && first.groups == 1 && first.height.stride == 1 &&
                      first.width.stride == 1 && shape.images == first.images &&
                      shape.out_channels == first.out_channels && shape.height.out == first.height.out &&
                      shape.width.out == first.width.out,
                  "resfuse: a branch must be a 1x1 convolution with the output of another, dense and of stride 1");
  return shape;
}

std::tuple<Tensor, Tensor, Tensor> conv_act(const Tensor& x, const OptionalTensor& affine, const OptionalTensor& mean,
                                            bool relu_x, const Tensor& weight, const OptionalTensor& scale,
                                            const Tensor& shift, const OptionalTensor& residual,
                                            const OptionalTensor& residual_affine, const OptionalTensor& residual_mean,
                                            const OptionalTensor& branch, const OptionalTensor& branch_weight,
                                            Pair branch_stride, bool relu, Pair stride, Pair padding, Pair dilation,
                                            int64_t groups, bool moments) {
  STD_TORCH_CHECK(tiles_support(x.scalar_type()), "resfuse: this machine has no tile kernels for x's dtype");
  const ConvShape shape = conv_shape(x, weight, stride, padding, dilation, groups);
  PaddedVectors vectors;
  const Prologue prologue(affine, mean, x, vectors);
  ConvShape second{};
  if (branch.has_value()) {
    STD_TORCH_CHECK(branch->scalar_type() == x.scalar_type(), "resfuse: branch must be in x's dtype");
    second = branch_shape(shape, *branch, branch_weight, branch_stride, weight.scalar_type());
  }
  Tensor out = new_image(x, shape.out_channels, shape.height.out, shape.width.out);
  if (residual.has_value()) check_like(*residual, out, "residual");
  const Prologue raw(residual.has_value() ? residual_affine : OptionalTensor(), residual_mean, out, vectors);
  const float* shifts = vectors.add(vector_pointer<float>(shift, out, "shift"), shape.out_channels);
  const float* scales = vectors.add(vector_pointer<float>(scale, out, "scale"), shape.out_channels);
  const int64_t size = moments ? shape.out_channels : 0;
  Tensor out_mean = new_vector(x, 1, size, ScalarType::Float), out_var = new_vector(x, 1, size, ScalarType::Float);
#if RESFUSE_HAS_TILES
  with_tile_types(x, weight, [&](auto tag, auto weight_tag) {
    using T = decltype(tag);
    using W = decltype(weight_tag);
    const Activation<T> source{input_pointer<T>(x), shape.in_channels, prologue.scale, prologue.shift, relu_x};
    const Branch<T, W> other{
        second,
        {input_pointer<T>(branch), second.in_channels, nullptr, nullptr, false},
        {input_pointer<W>(branch_weight), second.out_channels, second.in_channels, second.in_channels, 1, nullptr}};
    const auto run = [&](const auto& product, const Plan& plan, const TileSlabs& slabs) {
      OutputMoments found(plan, slabs, moments);
      const ResidualAct<T> epilogue{output_pointer<T>(out),
                                    shape.out_channels,
                                    shifts,
                                    input_pointer<T>(residual),
                                    raw.scale,
                                    raw.shift,
                                    relu,
                                    found};
      product.run(source, input_pointer<W>(weight), weight_layout(weight), epilogue, scales);
      if (moments) found.write(output_pointer<float>(out_mean), output_pointer<float>(out_var));
    };
    if (branch.has_value()) {
      const JoinedProduct<T, W> product(shape, other);
      return run(product, product.plan, product.slabs);
    }
    const Convolution<T, W> product(shape, false);
    run(product, product.plan(), product.slabs());
  });
#endif
  return {out, out_mean, out_var};
}

STABLE_TORCH_LIBRARY_IMPL(resfuse, CPU, m) {
  if (!isa_runs()) return;
  m.impl("conv_act", TORCH_BOX(&conv_act));
}

}  // namespace resfuse::cpu::RESFUSE_ISA
