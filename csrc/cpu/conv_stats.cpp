// conv_stats on the CPU by tiles: y = conv(act((x - mean)*scale + bias)) and the moments of y, for channels_last.
//
// The prologue runs while a patch is loaded, the moments are summed while a panel of y is in cache: x is read once, y
// written once, and nothing else passes through memory.
#include "tiles/epilogue.h"
#include "tiles/operands.h"

namespace resfuse::cpu {

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

template <class T, class W>
void conv_stats_tiles(const ConvShape& shape, const Activation<T>& source, const W* weight, const WeightLayout& layout,
                      T* y, float* mean, float* var) {
  const Plan plan(shape, false, sizeof(T), kTilePixels, kPatchBytes);
  const int64_t step = pixel_units<T>(shape.in_channels);
  const Taps taps(plan, shape.width.kernel, kUnit<T>, step);
  const unit_t<T>* packed = pack_weight<T>(plan, taps, weight, layout, shape.width.kernel, false);
  const Slabs512 slabs(plan.tiles(), ceil_div(shape.out_channels, kPanel));
  OutputMoments moments(plan, slabs, mean != nullptr);
  const WithMoments<T> epilogue{y, shape.out_channels, moments};
  const auto fill = [&](const Tile& tile, unit_t<T>* patch) {
    fill_patch<T>(plan, tile, source, 0, shape.in_channels, reinterpret_cast<T*>(patch), step * kUnit<T>);
  };
  run_tiles<T>(
      plan, taps, packed, plan.patch_pixels() * step, slabs, fill,
      [&](const Tile& tile, Prefetcher& to) { prefetch_tile(plan, tile, source, to); }, epilogue);
  moments.write(mean, var);
}

RESFUSE_TILES_END
#endif

std::tuple<Tensor, Tensor, Tensor> conv_stats(const Tensor& x, const OptionalTensor& affine, const OptionalTensor& mean,
                                              const Tensor& weight, bool relu, Pair stride, Pair padding, Pair dilation,
                                              int64_t groups, bool moments) {
  STD_TORCH_CHECK(tiles_support(x.scalar_type()), "resfuse: this machine has no tile kernels for x's dtype");
  const ConvShape shape = conv_shape(x, weight, stride, padding, dilation, groups);
  PaddedVectors vectors;
  const Prologue prologue(affine, mean, x, vectors);
  Tensor y = new_image(x, shape.out_channels, shape.height.out, shape.width.out);
  const int64_t size = moments ? shape.out_channels : 0;
  Tensor y_mean = new_vector(x, 1, size, ScalarType::Float), y_var = new_vector(x, 1, size, ScalarType::Float);
#if RESFUSE_HAS_TILES
  with_tile_types(x, weight, [&](auto tag, auto weight_tag) {
    using T = decltype(tag);
    const Activation<T> source{input_pointer<T>(x), shape.in_channels, prologue.scale, prologue.shift, relu};
    conv_stats_tiles<T>(shape, source, input_pointer<decltype(weight_tag)>(weight), weight_layout(weight),
                        output_pointer<T>(y), moments ? output_pointer<float>(y_mean) : nullptr,
                        moments ? output_pointer<float>(y_var) : nullptr);
  });
#endif
  return {y, y_mean, y_var};
}

// Whether this machine runs tile kernels on activations like this one.
bool tile_kernels(const Tensor& like) { return tiles_support(like.scalar_type()); }

STABLE_TORCH_LIBRARY_IMPL(resfuse, CPU, m) {
  m.impl("conv_stats", TORCH_BOX(&conv_stats));
  m.impl("tile_kernels", TORCH_BOX(&tile_kernels));
}

}  // namespace resfuse::cpu
