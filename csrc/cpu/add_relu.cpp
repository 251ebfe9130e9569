// add_relu on the CPU: out = max(x + residual, 0), and its backward grad = grad_out where out > 0.
//
// Memory-bound and blind to layout: x and residual share one dense memory order, so both are flat arrays. Bytes per
// element: forward two reads and a write, backward the same. The mask is the sign of the output, which is kept anyway.
#include "memory.h"
#include "rounding.h"
#include "walk.h"

namespace resfuse::cpu {

template <class T>
void add_relu_loop(const T* x, const T* residual, T* out, int64_t size) {
  store_rows(out, 1, size, [=](int64_t i, int64_t) RESFUSE_INLINE_LAMBDA {
    return clamp_below(load(x[i]) + load(residual[i]), acc_t<T>(0));
  });
}

template <class T>
void add_relu_backward_loop(const T* grad_out, const T* out, T* grad, int64_t size) {
  store_rows(grad, 1, size,
             [=](int64_t i, int64_t) RESFUSE_INLINE_LAMBDA { return relu_gradient(load(grad_out[i]), load(out[i])); });
}

template <class T, class F>
void for_each_chunk(int64_t size, const F& f) {
  parallel_tasks(ceil_div(size, kTaskElements), size, [&](int64_t task) {
    const int64_t begin = task * kTaskElements;
    f(begin, std::min(kTaskElements, size - begin));
  });
}

Tensor add_relu(const Tensor& x, const Tensor& residual) {
  check_flat(x, residual, "residual");
  Tensor out = new_activation(x);
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T *px = input_pointer<T>(x), *pr = input_pointer<T>(residual);
    T* po = output_pointer<T>(out);
    for_each_chunk<T>(x.numel(), [&](int64_t i, int64_t size) { add_relu_loop<T>(px + i, pr + i, po + i, size); });
  });
  return out;
}

Tensor add_relu_backward(const Tensor& grad_out, const Tensor& out) {
  check_flat(out, grad_out, "grad_out");
  Tensor grad = new_activation(out);
  dispatch_dtype(out.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T *pg = input_pointer<T>(grad_out), *po = input_pointer<T>(out);
    T* px = output_pointer<T>(grad);
    for_each_chunk<T>(out.numel(),
                      [&](int64_t i, int64_t size) { add_relu_backward_loop<T>(pg + i, po + i, px + i, size); });
  });
  return grad;
}

STABLE_TORCH_LIBRARY_IMPL(resfuse, CPU, m) {
  m.impl("add_relu", TORCH_BOX(&add_relu));
  m.impl("add_relu_backward", TORCH_BOX(&add_relu_backward));
}

}  // namespace resfuse::cpu
