// scale_shift_act on the CPU: out = act(x*scale + shift + r), r absent, residual, or residual*scale_r + shift_r.
//
// One read of each operand and one write. Bytes per element: 2 or 3 times the element size. The second form also gives
// the moments of the result, taken tile by tile from the values just written, while they are in L2.
#include <limits>

#include "rounding.h"
#include "tile_moments.h"

namespace resfuse::cpu {

enum class Residual { kNone, kIdentity, kRaw };

// lanes: scale, shift, residual_scale, residual_shift
template <class T, Residual kResidual>
void scale_shift_act_loop(const T* x, const T* residual, T* out, int64_t rows, int64_t width, const acc_t<T>* scale,
                          const acc_t<T>* shift, const acc_t<T>* residual_scale, const acc_t<T>* residual_shift,
                          acc_t<T> floor) {
  store_rows(out, rows, width, [=](int64_t i, int64_t j) RESFUSE_INLINE_LAMBDA {
    acc_t<T> z = load(x[i]) * scale[j] + shift[j];
    if constexpr (kResidual == Residual::kIdentity) z += load(residual[i]);
    if constexpr (kResidual == Residual::kRaw) z += load(residual[i]) * residual_scale[j] + residual_shift[j];
    return clamp_below(z, floor);
  });
}

// The operands of one call, checked once; `block` runs the loop on a block.
template <class T, Residual kResidual>
struct Pass {
  using A = acc_t<T>;
  const T* x;
  const T* residual;
  T* out;
  A floor;

  template <class L>
  void block(int64_t i, int64_t rows, int64_t width, const L& lanes) const {
    const T* r = kResidual == Residual::kNone ? x : residual;
    scale_shift_act_loop<T, kResidual>(x + i, r + i, out + i, rows, width, lanes[0], lanes[1], lanes[2], lanes[3],
                                       floor);
  }
};

// The pass with moments of its result: each tile is written, then read back from L2.
template <class T, Residual kResidual>
void pass_with_moments(const Geometry& g, const std::array<const acc_t<T>*, 4>& vectors, const Pass<T, kResidual>& pass,
                       acc_t<T>* mean, acc_t<T>* var) {
  const int64_t repeat = g.channels_last ? pixels_per_row(g.channels) : std::min(g.pixels, kPlaneLanes);
  const int64_t channels = g.channels_last ? g.channels : 1;
  const LaneVectors<acc_t<T>, 4> shared(vectors, g.channels, g.channels_last ? repeat : 1);
  moments_of<T>(g, pass.out, mean, var, [&](int64_t offset, int64_t pixels, int64_t c) {
    const PlaneLanes<acc_t<T>, 4> plane(vectors, c, g.channels_last ? 0 : repeat);
    const auto& lanes = g.channels_last ? shared.pointers() : plane.pointers;
    for_each_row_block(offset, pixels, channels, repeat,
                       [&](int64_t i, int64_t rows, int64_t width) { pass.block(i, rows, width, lanes); });
  });
}

// Write act(...) to `out`, which may be x itself.
template <bool kMoments>
void run(const Tensor& x, const Tensor& out, const Tensor& scale, const Tensor& shift, const OptionalTensor& residual,
         const OptionalTensor& residual_scale, const OptionalTensor& residual_shift, bool relu, Tensor* mean,
         Tensor* var) {
  const Geometry g = geometry_of(x);
  if (residual.has_value()) check_like(*residual, x, "residual");
  STD_TORCH_CHECK(
      residual_scale.has_value() == residual_shift.has_value() && (residual.has_value() || !residual_scale.has_value()),
      "resfuse: residual_scale and residual_shift come together, with a residual");
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const std::array<const A*, 4> vectors = {vector_pointer<A>(scale, x, "scale"), vector_pointer<A>(shift, x, "shift"),
                                             vector_pointer<A>(residual_scale, x, "residual_scale"),
                                             vector_pointer<A>(residual_shift, x, "residual_shift")};
    const A floor = relu ? A(0) : -std::numeric_limits<A>::infinity();
    auto go = [&](auto kind) {
      const Pass<T, decltype(kind)::value> pass{input_pointer<T>(x), input_pointer<T>(residual), output_pointer<T>(out),
                                                floor};
      if constexpr (kMoments) {
        pass_with_moments<T>(g, vectors, pass, output_pointer<A>(*mean), output_pointer<A>(*var));
      } else {
        for_each_block<A, 4>(g, vectors, [&](int64_t i, int64_t rows, int64_t width, const auto& lanes) {
          pass.block(i, rows, width, lanes);
        });
      }
    };
    if (g.numel() == 0) return;
    if (!residual.has_value()) return go(std::integral_constant<Residual, Residual::kNone>{});
    if (!residual_scale.has_value()) return go(std::integral_constant<Residual, Residual::kIdentity>{});
    go(std::integral_constant<Residual, Residual::kRaw>{});
  });
}

Tensor scale_shift_act(const Tensor& x, const Tensor& scale, const Tensor& shift, const OptionalTensor& residual,
                       const OptionalTensor& residual_scale, const OptionalTensor& residual_shift, bool relu) {
  Tensor out = new_activation(x);
  run<false>(x, out, scale, shift, residual, residual_scale, residual_shift, relu, nullptr, nullptr);
  return out;
}

void scale_shift_act_(const Tensor& x, const Tensor& scale, const Tensor& shift, const OptionalTensor& residual,
                      const OptionalTensor& residual_scale, const OptionalTensor& residual_shift, bool relu) {
  run<false>(x, x, scale, shift, residual, residual_scale, residual_shift, relu, nullptr, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> scale_shift_act_moments(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                                           const OptionalTensor& residual,
                                                           const OptionalTensor& residual_scale,
                                                           const OptionalTensor& residual_shift, bool relu) {
  STD_TORCH_CHECK(x.numel() > 0, "resfuse: an empty activation has no moments");
  Tensor out = new_activation(x), mean = new_vector(x, 1, x.size(1), accumulate_dtype(x)),
         var = new_vector(x, 1, x.size(1), accumulate_dtype(x));
  run<true>(x, out, scale, shift, residual, residual_scale, residual_shift, relu, &mean, &var);
  return {out, mean, var};
}

STABLE_TORCH_LIBRARY_IMPL(resfuse, CPU, m) {
  m.impl("scale_shift_act", TORCH_BOX(&scale_shift_act));
  m.impl("scale_shift_act_", TORCH_BOX(&scale_shift_act_));
  m.impl("scale_shift_act_moments", TORCH_BOX(&scale_shift_act_moments));
}

}  // namespace resfuse::cpu
