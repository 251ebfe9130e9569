// pack_weight on the CPU: a convolution's weight as the panels that tile kernels multiply, for plans that keep it.
//
// The result is one row of the weight's dtype: strips of a panel or half of one, for each its taps in order, for each
// tap its units of input channels. Channels that do not exist are zero.
#include "tiles/operands.h"
#include "tiles/product.h"

namespace resfuse::cpu::RESFUSE_ISA {

Tensor pack_weight_rows(const Tensor& weight, int64_t groups) {
  STD_TORCH_CHECK(tiles_multiply(weight.scalar_type()), "resfuse: this machine does not multiply weight's dtype");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.numel() > 0, "resfuse: weight must be 4D and not empty");
  STD_TORCH_CHECK(groups > 0 && weight.size(0) % groups == 0, "resfuse: groups must divide weight's K");
  Tensor packed = weight;
#if RESFUSE_HAS_TILES
  const auto axis = [&](int64_t i) { return ConvAxis{weight.size(i), 1, weight.size(i), 1, 0, 1}; };
  const ConvShape shape{1, weight.size(1) * groups, weight.size(0), axis(2), axis(3), groups};
  with_multiplied_type(weight.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const Plan plan(shape, false, sizeof(T), 1, 1 << 20);
    const Taps taps(plan, shape.width.kernel, kUnit<T>, pixel_units<T>(shape.in_channels));
    const int64_t size = taps.windows.strips() * taps.units * taps.windows.lanes * kUnit<T>;
    packed = torch::stable::new_empty(weight, {size});
    advise_huge_pages(packed.mutable_data_ptr(), static_cast<size_t>(size) * sizeof(T));
    pack_weight_into<T>(plan, taps, input_pointer<T>(weight), weight_layout(weight), shape.width.kernel, false, nullptr,
                        reinterpret_cast<unit_t<T>*>(output_pointer<T>(packed)));
  });
#endif
  return packed;
}

STABLE_TORCH_LIBRARY_IMPL(resfuse, CPU, m) {
  if (!isa_runs()) return;
  m.impl("pack_weight", TORCH_BOX(&pack_weight_rows));
}

}  // namespace resfuse::cpu::RESFUSE_ISA
