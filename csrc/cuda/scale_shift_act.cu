// scale_shift_act on CUDA: out = act(x*scale + shift + r), r absent, residual, or residual*scale_r + shift_r.
//
// One read of each operand and one write: two or three accesses per element. The second form also gives the moments of
// the result, of the values that were just rounded and stored, without reading them again.
// Grid: tiles of channels by slabs of pixels (walk.cuh); with moments, then one merge of the slabs (reduce.cuh).
// registers: map_kernel <= 80
// registers: reduce_kernel <= 128
// registers: merge_kernel <= 128
#include <limits>

#include "launch.cuh"

namespace resfuse::cuda {

enum class Residual { kNone, kIdentity, kRaw };

// coefficients: scale, shift, residual_scale and residual_shift of a raw residual, and with moments a pivot
template <class T, Residual kResidual, bool kMoments>
struct ScaleShiftAct
    : Operator<T, kResidual == Residual::kNone ? 1 : 2, 1, (kResidual == Residual::kRaw ? 4 : 2) + kMoments, kMoments> {
  using A = acc_t<T>;
  using Reduction = Moments<A>;
  const A *scale, *shift, *residual_scale, *residual_shift;
  A floor;
  int64_t channels, channel_stride;

  __device__ A affine(int k, int64_t c) const {
    return k == 0 ? scale[c] : k == 1 ? shift[c] : k == 2 ? residual_scale[c] : residual_shift[c];
  }
  __device__ A vector(int k, int64_t c) const {
    if (!kMoments || k < ScaleShiftAct::kVectors - 1) return affine(k, c);
    const int64_t first = c * channel_stride;
    const A residual = kResidual == Residual::kNone ? A(0) : load(this->in[ScaleShiftAct::kInputs - 1][first]);
    return pivot_of(round_to<T>(act(load(this->in[0][first]), residual, [&](int i) { return affine(i, c); })));
  }
  template <class C>
  __device__ A act(A x, A residual, const C& c) const {
    A z = x * c(0) + c(1);
    if constexpr (kResidual == Residual::kIdentity) z += residual;
    if constexpr (kResidual == Residual::kRaw) z += residual * c(2) + c(3);
    return clamp_below(z, floor);
  }
  template <class C, class I>
  __device__ void apply(const C& c, const I& in, int j, T* out, A* terms) const {
    store(out, act(in.get(0, j), in.get(ScaleShiftAct::kInputs - 1, j), [&](int k) { return c[k]; }));
    if constexpr (kMoments) terms[0] = load(*out) - c[ScaleShiftAct::kVectors - 1];
  }
};

// Write act(...) to `out`, which may be x itself.
template <bool kMoments>
void run_scale_shift_act(const char* name, const Tensor& x, const Tensor& out, const Tensor& scale, const Tensor& shift,
                         const OptionalTensor& residual, const OptionalTensor& residual_scale,
                         const OptionalTensor& residual_shift, bool relu, const Tensor* mean, const Tensor* var) {
  const Geometry g = geometry_of(x);
  if (residual.has_value()) check_like(*residual, x, "residual");
  STD_TORCH_CHECK(
      residual_scale.has_value() == residual_shift.has_value() && (residual.has_value() || !residual_scale.has_value()),
      "resfuse: residual_scale and residual_shift come together, with a residual");
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const T *px = input_pointer<T>(x), *pr = input_pointer<T>(residual);
    T* po = output_pointer<T>(out);
    const A *s = vector_pointer<A>(scale, x, "scale"), *t = vector_pointer<A>(shift, x, "shift"),
            *sr = vector_pointer<A>(residual_scale, x, "residual_scale"),
            *tr = vector_pointer<A>(residual_shift, x, "residual_shift");
    if (g.numel() == 0) return;
    const A floor = relu ? A(0) : -std::numeric_limits<A>::infinity();
    auto go = [&](const auto& op) {
      dispatch_width<T>(g, {px, pr, po}, [&](auto width) {
        if constexpr (kMoments) {
          const Outputs<A, 2> moments{{output_pointer<A>(*mean), output_pointer<A>(*var)}};
          reduce<width()>(name, op, g, x, moments);
        } else {
          map<width()>(name, op, g, x);
        }
      });
    };
    if (pr == nullptr)
      go(ScaleShiftAct<T, Residual::kNone, kMoments>{{{px}, {po}}, s, t, sr, tr, floor, g.channels, channel_stride(g)});
    else if (sr == nullptr)
      go(ScaleShiftAct<T, Residual::kIdentity, kMoments>{
          {{px, pr}, {po}}, s, t, sr, tr, floor, g.channels, channel_stride(g)});
    else
      go(ScaleShiftAct<T, Residual::kRaw, kMoments>{
          {{px, pr}, {po}}, s, t, sr, tr, floor, g.channels, channel_stride(g)});
  });
}

Tensor scale_shift_act(const Tensor& x, const Tensor& scale, const Tensor& shift, const OptionalTensor& residual,
                       const OptionalTensor& residual_scale, const OptionalTensor& residual_shift, bool relu) {
  Tensor out = torch::stable::empty_like(x);
  run_scale_shift_act<false>("scale_shift_act", x, out, scale, shift, residual, residual_scale, residual_shift, relu,
                             nullptr, nullptr);
  return out;
}

void scale_shift_act_(const Tensor& x, const Tensor& scale, const Tensor& shift, const OptionalTensor& residual,
                      const OptionalTensor& residual_scale, const OptionalTensor& residual_shift, bool relu) {
  run_scale_shift_act<false>("scale_shift_act_", x, x, scale, shift, residual, residual_scale, residual_shift, relu,
                             nullptr, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> scale_shift_act_moments(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                                           const OptionalTensor& residual,
                                                           const OptionalTensor& residual_scale,
                                                           const OptionalTensor& residual_shift, bool relu) {
  STD_TORCH_CHECK(x.numel() > 0, "resfuse: an empty activation has no moments");
  Tensor out = torch::stable::empty_like(x), mean = new_vector(x, 1, x.size(1), accumulate_dtype(x)),
         var = new_vector(x, 1, x.size(1), accumulate_dtype(x));
  run_scale_shift_act<true>("scale_shift_act_moments", x, out, scale, shift, residual, residual_scale, residual_shift,
                            relu, &mean, &var);
  return {out, mean, var};
}

STABLE_TORCH_LIBRARY_IMPL(resfuse, CUDA, m) {
  m.impl("scale_shift_act", TORCH_BOX(&scale_shift_act));
  m.impl("scale_shift_act_", TORCH_BOX(&scale_shift_act_));
  m.impl("scale_shift_act_moments", TORCH_BOX(&scale_shift_act_moments));
}

}  // namespace resfuse::cuda
