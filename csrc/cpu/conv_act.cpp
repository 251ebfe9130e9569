// conv_act on the CPU by tiles: out = act(conv(act((x - mean)*scale_x + bias_x), weight*scale) + shift + r).
//
// A convolution whose batch normalisation is folded into its weight, with its residual and activation: one pass over x
// and out, and no other activation. It is inference, and the forward pass of train-time folding.
#include "tiles/epilogue.h"

namespace resfuse::cpu {

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

template <class T, class W>
void conv_act_tiles(const ConvShape& shape, const Activation<T>& source, const W* weight, const WeightLayout& layout,
                    const float* lane_scale, const ResidualAct<T>& epilogue) {
  const Plan plan(shape, false, sizeof(T), kTilePixels, kPatchBytes);
  const int64_t step = pixel_units<T>(shape.in_channels), units = ceil_div(shape.in_channels, kUnit<T>);
  const Taps taps(plan, shape.width.kernel, units, step);
  const unit_t<T>* packed = pack_weight<T>(plan, taps, weight, layout, shape.width.kernel, false, lane_scale);
  const auto fill = [&](const Tile& tile, unit_t<T>* patch) {
    fill_patch<T>(plan, tile, source, 0, shape.in_channels, reinterpret_cast<T*>(patch), step * kUnit<T>);
  };
  const Slabs512 slabs(plan.tiles(), ceil_div(shape.out_channels, kPanel));
  run_tiles<T>(
      plan, taps, packed, plan.patch_pixels() * step, slabs, fill,
      [&](const Tile& tile, Prefetcher& to) { prefetch_tile(plan, tile, source, to); }, epilogue);
}

RESFUSE_TILES_END
#endif

Tensor conv_act(const Tensor& x, const OptionalTensor& affine, const OptionalTensor& mean, bool relu_x,
                const Tensor& weight, const OptionalTensor& scale, const Tensor& shift, const OptionalTensor& residual,
                const OptionalTensor& residual_affine, const OptionalTensor& residual_mean, bool relu, Pair stride,
                Pair padding, Pair dilation) {
  STD_TORCH_CHECK(tiles_support(x.scalar_type()), "resfuse: this machine has no tile kernels for x's dtype");
  const ConvShape shape = conv_shape(x, weight, stride, padding, dilation);
  PaddedVectors vectors;
  const Prologue prologue(affine, mean, x, vectors);
  Tensor out = new_image(x, shape.out_channels, shape.height.out, shape.width.out);
  if (residual.has_value()) check_like(*residual, out, "residual");
  const Prologue raw(residual.has_value() ? residual_affine : OptionalTensor(), residual_mean, out, vectors);
  const float* shifts = vectors.add(vector_pointer<float>(shift, out, "shift"), shape.out_channels);
  const float* scales = vectors.add(vector_pointer<float>(scale, out, "scale"), shape.out_channels);
#if RESFUSE_HAS_TILES
  with_tile_types(x, weight, [&](auto tag, auto weight_tag) {
    using T = decltype(tag);
    const Activation<T> source{input_pointer<T>(x), shape.in_channels, prologue.scale, prologue.shift, relu_x};
    const ResidualAct<T> epilogue{
        output_pointer<T>(out), shape.out_channels, shifts, input_pointer<T>(residual), raw.scale, raw.shift, relu};
    conv_act_tiles<T>(shape, source, input_pointer<decltype(weight_tag)>(weight), weight_layout(weight), scales,
                      epilogue);
  });
#endif
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(resfuse, CPU, m) { m.impl("conv_act", TORCH_BOX(&conv_act)); }

}  // namespace resfuse::cpu
