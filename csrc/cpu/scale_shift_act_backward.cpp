// The backward of scale_shift_act on the CPU, in two passes: sums over the activation, then the gradient of x.
//
// dz is grad_out where the unit was active. Without a residual, or with a raw one, the mask is recomputed from the sign
// of the pre-activation; with an identity residual it is the sign of the kept output.
//   reduce: sum dz, sum dz*(x - mean), sum dz*(r - mean_r); an identity residual's gradient dz is written on the way.
//   apply:  grad_x = dz*scale + grad_mean/M + 2*grad_var/M*(x - mean), the last two where scale came from x's moments,
//           and a raw residual's gradient likewise in the same pass.
// Deviations from the mean are summed, not raw values: dscale - mean*dshift would cancel where |mean| >> std.
#include "rounding.h"
#include "walk.h"

namespace resfuse::cpu {

// Where dz comes from: given, masked by the recomputed pre-activation, or masked by the kept output.
enum class Mask { kNone, kRecompute, kOutput };

// x (or a raw residual) with the vectors that normalised it: z = x*scale + shift.
template <class A>
struct Normalized {
  const A* scale;
  const A* shift;
  const A* mean;
  RESFUSE_INLINE A z(A x, int64_t j) const { return x * scale[j] + shift[j]; }
};

// lanes: scale, shift, mean of x, then of the raw residual
template <class T, Mask kMask, bool kRaw>
RESFUSE_CLONES void reduce_loop(const T* grad_out, const T* x, const T* other, T* dz_out, int64_t rows, int64_t width,
                                const acc_t<T>* const* lanes, acc_t<T>* const* sums) {
  using A = acc_t<T>;
  const Normalized<A> a{lanes[0], lanes[1], lanes[2]}, b{lanes[3], lanes[4], lanes[5]};
  A *sum = sums[0], *sum_x = sums[1], *sum_r = sums[2];
  for_row_groups<kMask == Mask::kOutput ? 1 : 4>(rows, [&](auto group, int64_t row) RESFUSE_INLINE_LAMBDA {
    RESFUSE_INDEPENDENT
    for (int64_t j = 0; j < width; ++j) {
      A s = 0, sx = 0, sr = 0;
      for (int k = 0; k < decltype(group)::value; ++k) {
        const int64_t i = (row + k) * width + j;
        const A value = load(x[i]), value_r = kRaw ? load(other[i]) : A(0);
        A dz = load(grad_out[i]);
        if constexpr (kMask == Mask::kRecompute && !kRaw) dz = relu_gradient(dz, a.z(value, j));
        if constexpr (kMask == Mask::kRecompute && kRaw) dz = relu_gradient(dz, a.z(value, j) + b.z(value_r, j));
        if constexpr (kMask == Mask::kOutput) {
          dz = relu_gradient(dz, load(other[i]));
          store(dz_out + i, dz);
        }
        s += dz;
        sx += dz * (value - a.mean[j]);
        if constexpr (kRaw) sr += dz * (value_r - b.mean[j]);
      }
      sum[j] += s;
      sum_x[j] += sx;
      if constexpr (kRaw) sum_r[j] += sr;
    }
  });
}

// lanes: scale, shift, mean, constant, slope of x, then of the raw residual
template <class T, Mask kMask, bool kRaw, bool kMoments>
void apply_loop(const T* grad_out, const T* x, const T* residual, T* grad_x, T* grad_residual, int64_t rows,
                int64_t width, const acc_t<T>* const* lanes) {
  const Normalized<acc_t<T>> a{lanes[0], lanes[1], lanes[2]}, b{lanes[5], lanes[6], lanes[7]};
  const acc_t<T>*constant = lanes[3], *slope = lanes[4];
  const acc_t<T>*constant_r = lanes[8], *slope_r = lanes[9];
  const auto gradients = [=](int64_t i, int64_t j) RESFUSE_INLINE_LAMBDA {
    const acc_t<T> value = load(x[i]), value_r = kRaw ? load(residual[i]) : acc_t<T>(0);
    acc_t<T> dz = load(grad_out[i]);
    if constexpr (kMask == Mask::kRecompute && !kRaw) dz = relu_gradient(dz, a.z(value, j));
    if constexpr (kMask == Mask::kRecompute && kRaw) dz = relu_gradient(dz, a.z(value, j) + b.z(value_r, j));
    std::array<acc_t<T>, kRaw ? 2 : 1> grads;
    grads[0] = dz * a.scale[j];
    if constexpr (kMoments) grads[0] += constant[j] + slope[j] * (value - a.mean[j]);
    if constexpr (kRaw) grads[1] = dz * b.scale[j];
    if constexpr (kRaw && kMoments) grads[1] += constant_r[j] + slope_r[j] * (value_r - b.mean[j]);
    return grads;
  };
  if constexpr (kRaw) {
    store_rows(std::array<T*, 2>{grad_x, grad_residual}, rows, width, gradients);
  } else {
    store_rows(std::array<T*, 1>{grad_x}, rows, width, gradients);
  }
}

// Call f with compile-time values of a mask and a flag.
template <class F>
void dispatch_mask(Mask mask, bool raw, const F& f) {
  auto with_raw = [&](auto m) { raw ? f(m, std::true_type{}) : f(m, std::false_type{}); };
  if (mask == Mask::kNone) return with_raw(std::integral_constant<Mask, Mask::kNone>{});
  if (mask == Mask::kRecompute) return with_raw(std::integral_constant<Mask, Mask::kRecompute>{});
  f(std::integral_constant<Mask, Mask::kOutput>{}, std::false_type{});
}

// Returns sums (2 or 3, C) and dz; dz is empty unless an identity residual needs it.
std::tuple<Tensor, Tensor> scale_shift_act_backward_reduce(
    const Tensor& grad_out, const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& mean,
    const OptionalTensor& raw_residual, const OptionalTensor& residual_scale, const OptionalTensor& residual_shift,
    const OptionalTensor& residual_mean, const OptionalTensor& out, bool relu) {
  const Geometry g = geometry_of(x);
  const bool raw = raw_residual.has_value();
  const Mask mask = !relu ? Mask::kNone : out.has_value() ? Mask::kOutput : Mask::kRecompute;
  STD_TORCH_CHECK(!raw || mask != Mask::kOutput,
                  "resfuse: the mask of a raw residual is recomputed, not read from out");
  check_like(grad_out, x, "grad_out");
  if (raw) check_like(*raw_residual, x, "raw_residual");
  check_raw_branch(raw_residual, residual_scale, residual_shift, residual_mean);
  if (out.has_value()) check_like(*out, x, "out");
  Tensor sums = new_vector(x, raw ? 3 : 2, g.channels, accumulate_dtype(x));
  Tensor dz = mask == Mask::kOutput ? new_activation(x) : torch::stable::new_empty(x, {0});
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const std::array<const A*, 6> vectors = {
        vector_pointer<A>(scale, x, "scale"),
        vector_pointer<A>(shift, x, "shift"),
        vector_pointer<A>(mean, x, "mean"),
        vector_pointer<A>(residual_scale, x, "residual_scale"),
        vector_pointer<A>(residual_shift, x, "residual_shift"),
        vector_pointer<A>(residual_mean, x, "residual_mean"),
    };
    const T *pg = input_pointer<T>(grad_out), *px = input_pointer<T>(x);
    const T* po = raw ? input_pointer<T>(raw_residual) : mask == Mask::kOutput ? input_pointer<T>(out) : px;
    T* pz = output_pointer<T>(mask == Mask::kOutput ? dz : sums);  // not written unless the mask is kOutput
    A* totals = output_pointer<A>(sums);
    dispatch_mask(mask, raw, [&](auto m, auto r) {
      constexpr int kSums = decltype(r)::value ? 3 : 2;
      reduce_blocks<A, 6, kSums>(g, sizeof(T), vectors, totals,
                                 [&](int64_t i, int64_t rows, int64_t width, const auto& lanes, const auto& s) {
                                   A* const pointers[3] = {s[0], s[1], s[kSums - 1]};
                                   reduce_loop<T, decltype(m)::value, decltype(r)::value>(
                                       pg + i, px + i, po + i, pz + i, rows, width, lanes.data(), pointers);
                                 });
    });
  });
  return {sums, dz};
}

// Write the gradients of x and of the raw residual to grad_x and grad_residual, which may be x and raw_residual.
void write_gradients(const Tensor& grad_x, const Tensor& grad_residual, const Tensor& grad_out, const Tensor& x,
                     const Tensor& scale, const Tensor& shift, const Tensor& mean, const OptionalTensor& grad_mean,
                     const OptionalTensor& grad_var, const OptionalTensor& raw_residual,
                     const OptionalTensor& residual_scale, const OptionalTensor& residual_shift,
                     const OptionalTensor& residual_mean, const OptionalTensor& residual_grad_mean,
                     const OptionalTensor& residual_grad_var, bool relu) {
  const Geometry g = geometry_of(x);
  const bool raw = raw_residual.has_value(), moments = grad_mean.has_value() || residual_grad_mean.has_value();
  check_like(grad_out, x, "grad_out");
  if (raw) check_like(*raw_residual, x, "raw_residual");
  check_raw_branch(raw_residual, residual_scale, residual_shift, residual_mean);
  if (g.numel() == 0) return;
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    Scratch<A> terms(4 * g.channels);
    A* term = terms.get();
    moment_terms<A>(grad_mean, grad_var, x, term, term + g.channels);
    moment_terms<A>(residual_grad_mean, residual_grad_var, x, term + 2 * g.channels, term + 3 * g.channels);
    const std::array<const A*, 10> vectors = {
        vector_pointer<A>(scale, x, "scale"),
        vector_pointer<A>(shift, x, "shift"),
        vector_pointer<A>(mean, x, "mean"),
        term,
        term + g.channels,
        vector_pointer<A>(residual_scale, x, "residual_scale"),
        vector_pointer<A>(residual_shift, x, "residual_shift"),
        vector_pointer<A>(residual_mean, x, "residual_mean"),
        term + 2 * g.channels,
        term + 3 * g.channels,
    };
    const T *pg = input_pointer<T>(grad_out), *px = input_pointer<T>(x),
            *pr = raw ? input_pointer<T>(raw_residual) : px;
    T *ox = output_pointer<T>(grad_x), *or_ = raw ? output_pointer<T>(grad_residual) : ox;
    auto go = [&](auto m, auto r, auto with_moments) {
      for_each_block<A, 10>(g, vectors, [&](int64_t i, int64_t rows, int64_t width, const auto& lanes) {
        apply_loop<T, decltype(m)::value, decltype(r)::value, decltype(with_moments)::value>(
            pg + i, px + i, pr + i, ox + i, or_ + i, rows, width, lanes.data());
      });
    };
    dispatch_mask(relu ? Mask::kRecompute : Mask::kNone, raw,
                  [&](auto m, auto r) { moments ? go(m, r, std::true_type{}) : go(m, r, std::false_type{}); });
  });
}

// Returns grad_x and the gradient of the raw residual, empty where there is none.
std::tuple<Tensor, Tensor> scale_shift_act_backward_apply(
    const Tensor& grad_out, const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& mean,
    const OptionalTensor& grad_mean, const OptionalTensor& grad_var, const OptionalTensor& raw_residual,
    const OptionalTensor& residual_scale, const OptionalTensor& residual_shift, const OptionalTensor& residual_mean,
    const OptionalTensor& residual_grad_mean, const OptionalTensor& residual_grad_var, bool relu) {
  Tensor grad_x = new_activation(x);
  Tensor grad_residual = raw_residual.has_value() ? new_activation(x) : torch::stable::new_empty(x, {0});
  write_gradients(grad_x, grad_residual, grad_out, x, scale, shift, mean, grad_mean, grad_var, raw_residual,
                  residual_scale, residual_shift, residual_mean, residual_grad_mean, residual_grad_var, relu);
  return {grad_x, grad_residual};
}

// The same in place: a convolution's output that nobody reads again becomes its own gradient.
void scale_shift_act_backward_apply_(const Tensor& grad_out, const Tensor& x, const Tensor& scale, const Tensor& shift,
                                     const Tensor& mean, const OptionalTensor& grad_mean,
                                     const OptionalTensor& grad_var, const OptionalTensor& raw_residual,
                                     const OptionalTensor& residual_scale, const OptionalTensor& residual_shift,
                                     const OptionalTensor& residual_mean, const OptionalTensor& residual_grad_mean,
                                     const OptionalTensor& residual_grad_var, bool relu) {
  write_gradients(x, raw_residual.value_or(x), grad_out, x, scale, shift, mean, grad_mean, grad_var, raw_residual,
                  residual_scale, residual_shift, residual_mean, residual_grad_mean, residual_grad_var, relu);
}

STABLE_TORCH_LIBRARY_IMPL(resfuse, CPU, m) {
  m.impl("scale_shift_act_backward_reduce", TORCH_BOX(&scale_shift_act_backward_reduce));
  m.impl("scale_shift_act_backward_apply", TORCH_BOX(&scale_shift_act_backward_apply));
  m.impl("scale_shift_act_backward_apply_", TORCH_BOX(&scale_shift_act_backward_apply_));
}

}  // namespace resfuse::cpu
