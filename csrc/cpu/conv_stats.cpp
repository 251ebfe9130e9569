// conv_stats on the CPU by tiles: y = conv(act((x - mean)*scale + bias)) and the moments of y, for channels_last.
//
// The prologue runs while a patch is loaded, the moments are summed while a panel of y is in cache: x is read once, y
// written once, and nothing else passes through memory.
#include "tiles/convolution.h"
#include "tiles/epilogue.h"
#include "tiles/row_taps.h"

namespace resfuse::cpu::RESFUSE_ISA {

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

template <class T, class W, class S>
void conv_stats_tiles(const ConvShape& shape, const S& source, const W* weight, const WeightLayout& layout, T* y,
                      float* mean, float* var, int64_t pixels = kTilePixels) {
  const Convolution<T, W> product(shape, false, pixels);
  OutputMoments moments(product.plan(), product.slabs(), mean != nullptr);
  product.run(source, weight, layout, WithMoments<T>{y, shape.out_channels, moments});
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
    using W = decltype(weight_tag);
    float *to_mean = moments ? output_pointer<float>(y_mean) : nullptr,
          *to_var = moments ? output_pointer<float>(y_var) : nullptr;
    if (prologue.scale == nullptr && joins_row_taps(shape)) {
      RowTapsWeight<W> rows(shape);
      rows.read(input_pointer<W>(weight), weight_layout(weight));
      return conv_stats_tiles<T>(row_taps_shape(shape), RowTaps<T>::of(input_pointer<T>(x), shape), rows.get(),
                                 rows.layout(), output_pointer<T>(y), to_mean, to_var, kRowTapsPixels);
    }
    const Activation<T> source{input_pointer<T>(x), shape.in_channels, prologue.scale, prologue.shift, relu};
    conv_stats_tiles<T>(shape, source, input_pointer<W>(weight), weight_layout(weight), output_pointer<T>(y), to_mean,
                        to_var);
  });
#endif
  return {y, y_mean, y_var};
}

// The bytes of a value as tile kernels multiply it, for activations like this one, and the lanes of a vector; zeros
// where there are no such kernels.
std::tuple<int64_t, int64_t> tile_kernels(const Tensor& like) {
#if RESFUSE_HAS_TILES
  if (tiles_support(like.scalar_type()))
    return {tiles_multiply(like.scalar_type()) ? static_cast<int64_t>(like.element_size()) : 4, kLanes};
#endif
  (void)like;
  return {0, 0};
}

STABLE_TORCH_LIBRARY_IMPL(resfuse, CPU, m) {
  if (!isa_runs()) return;
  m.impl("conv_stats", TORCH_BOX(&conv_stats));
  m.impl("tile_kernels", TORCH_BOX(&tile_kernels));
}

}  // namespace resfuse::cpu::RESFUSE_ISA
