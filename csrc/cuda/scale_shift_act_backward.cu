// The backward of scale_shift_act on CUDA, in two passes: sums over the activation, then the gradient of x.
//
//   reduce: sum dz, sum dz*(x - mean), sum dz*(r - mean_r); an identity residual's gradient dz is written on the way.
//   apply:  grad_x = dz*scale + grad_mean/M + 2*grad_var/M*(x - mean), the last two where scale came from x's moments,
//           and a raw residual's gradient likewise in the same pass.
// Accesses per element: reduce reads two or three and writes none or one; apply reads two or three, writes one or two.
// Grid: tiles of channels by slabs of pixels (walk.cuh); after reduce, one merge of the slabs (reduce.cuh).
// registers: map_kernel <= 128
// registers: reduce_kernel <= 128
// registers: merge_kernel <= 128
#include "gradient.cuh"

namespace resfuse::cuda {

// Returns sums (2 or 3, C) and dz; dz is empty unless an identity residual needs it.
std::tuple<Tensor, Tensor> scale_shift_act_backward_reduce(
    const Tensor& grad_out, const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& mean,
    const OptionalTensor& raw_residual, const OptionalTensor& residual_scale, const OptionalTensor& residual_shift,
    const OptionalTensor& residual_mean, const OptionalTensor& out, bool relu) {
  const Geometry g = geometry_of(x);
  const bool raw = raw_residual.has_value(), masked = relu && out.has_value();
  STD_TORCH_CHECK(!raw || !masked, "resfuse: the mask of a raw residual is recomputed, not read from out");
  check_like(grad_out, x, "grad_out");
  if (raw) check_like(*raw_residual, x, "raw_residual");
  if (out.has_value()) check_like(*out, x, "out");
  Tensor sums = new_vector(x, raw ? 3 : 2, g.channels, accumulate_dtype(x));
  Tensor dz = masked ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const Branch<A> branch = branch_of<A>(x, scale, shift, mean),
                    other = raw_branch_of<A>(x, raw_residual, residual_scale, residual_shift, residual_mean);
    if (g.numel() == 0) {
      torch::stable::zero_(sums);
      return;
    }
    const T *pg = input_pointer<T>(grad_out), *px = input_pointer<T>(x), *pr = input_pointer<T>(raw_residual),
            *po = masked ? input_pointer<T>(out) : nullptr;
    T* pz = masked ? output_pointer<T>(dz) : nullptr;
    A* totals = output_pointer<A>(sums);
    auto go = [&](const auto& op, const auto& outputs) {
      dispatch_width<T>(g, {pg, px, pr, po, pz},
                        [&](auto width) { reduce<width()>("scale_shift_act_backward_reduce", op, g, x, outputs); });
    };
    const int64_t C = g.channels;
    if (raw)
      go(GradientSums<T, Kind::kRaw>{{{pg, px, pr}, {}}, branch, other, relu, C},
         Outputs<A, 3>{{totals, totals + C, totals + 2 * C}});
    else if (masked)
      go(GradientSums<T, Kind::kOutput>{{{pg, px, po}, {pz}}, branch, other, relu, C},
         Outputs<A, 2>{{totals, totals + C}});
    else
      go(GradientSums<T, Kind::kPlain>{{{pg, px}, {}}, branch, other, relu, C}, Outputs<A, 2>{{totals, totals + C}});
  });
  return {sums, dz};
}

// Write the gradients of x and of the raw residual to grad_x and grad_residual, which may be x and raw_residual.
void write_gradients(const char* name, const Tensor& grad_x, const Tensor& grad_residual, const Tensor& grad_out,
                     const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& mean,
                     const OptionalTensor& grad_mean, const OptionalTensor& grad_var,
                     const OptionalTensor& raw_residual, const OptionalTensor& residual_scale,
                     const OptionalTensor& residual_shift, const OptionalTensor& residual_mean,
                     const OptionalTensor& residual_grad_mean, const OptionalTensor& residual_grad_var, bool relu) {
  const Geometry g = geometry_of(x);
  const bool raw = raw_residual.has_value(), moments = grad_mean.has_value() || residual_grad_mean.has_value();
  check_like(grad_out, x, "grad_out");
  if (raw) check_like(*raw_residual, x, "raw_residual");
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const Branch<A> branch = branch_of<A>(x, scale, shift, mean, grad_mean, grad_var),
                    other = raw_branch_of<A>(x, raw_residual, residual_scale, residual_shift, residual_mean,
                                             residual_grad_mean, residual_grad_var);
    if (g.numel() == 0) return;
    const T *pg = input_pointer<T>(grad_out), *px = input_pointer<T>(x), *pr = input_pointer<T>(raw_residual);
    T *ox = output_pointer<T>(grad_x), *or_ = raw ? output_pointer<T>(grad_residual) : nullptr;
    const A count = static_cast<A>(g.rows());
    auto go = [&](const auto& op) {
      dispatch_width<T>(g, {pg, px, pr, ox, or_}, [&](auto width) { map<width()>(name, op, g, x); });
    };
    if (raw)
      go(Gradient<T, Kind::kRaw>{{{pg, px, pr}, {ox, or_}}, branch, other, relu, moments, count});
    else
      go(Gradient<T, Kind::kPlain>{{{pg, px}, {ox}}, branch, other, relu, moments, count});
  });
}

// Returns grad_x and the gradient of the raw residual, empty where there is none.
std::tuple<Tensor, Tensor> scale_shift_act_backward_apply(
    const Tensor& grad_out, const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& mean,
    const OptionalTensor& grad_mean, const OptionalTensor& grad_var, const OptionalTensor& raw_residual,
    const OptionalTensor& residual_scale, const OptionalTensor& residual_shift, const OptionalTensor& residual_mean,
    const OptionalTensor& residual_grad_mean, const OptionalTensor& residual_grad_var, bool relu) {
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_residual = raw_residual.has_value() ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  write_gradients("scale_shift_act_backward_apply", grad_x, grad_residual, grad_out, x, scale, shift, mean, grad_mean,
                  grad_var, raw_residual, residual_scale, residual_shift, residual_mean, residual_grad_mean,
                  residual_grad_var, relu);
  return {grad_x, grad_residual};
}

// The same in place: a convolution's output that nobody reads again becomes its own gradient.
void scale_shift_act_backward_apply_(const Tensor& grad_out, const Tensor& x, const Tensor& scale, const Tensor& shift,
                                     const Tensor& mean, const OptionalTensor& grad_mean,
                                     const OptionalTensor& grad_var, const OptionalTensor& raw_residual,
                                     const OptionalTensor& residual_scale, const OptionalTensor& residual_shift,
                                     const OptionalTensor& residual_mean, const OptionalTensor& residual_grad_mean,
                                     const OptionalTensor& residual_grad_var, bool relu) {
  write_gradients("scale_shift_act_backward_apply_", x, raw_residual.value_or(x), grad_out, x, scale, shift, mean,
                  grad_mean, grad_var, raw_residual, residual_scale, residual_shift, residual_mean, residual_grad_mean,
                  residual_grad_var, relu);
}

STABLE_TORCH_LIBRARY_IMPL(resfuse, CUDA, m) {
  m.impl("scale_shift_act_backward_reduce", TORCH_BOX(&scale_shift_act_backward_reduce));
  m.impl("scale_shift_act_backward_apply", TORCH_BOX(&scale_shift_act_backward_apply));
  m.impl("scale_shift_act_backward_apply_", TORCH_BOX(&scale_shift_act_backward_apply_));
}

}  // namespace resfuse::cuda
