// The backward of scale_shift_relu_maxpool on CUDA, in two passes over x, as for scale_shift_act.
//
// Both first gather dz, the sum of grad_out over the windows that selected a pixel: a pixel looks at the windows that
// cover it, in order, so no two threads meet. dz is masked by the recomputed pre-activation.
//   reduce: sum dz, sum dz*(x - mean).
//   apply:  grad_x = dz*scale + grad_mean/M + 2*grad_var/M*(x - mean), the last two where scale came from x's moments.
// Both read x once, and the pooled grad_out and arg-max once from memory, again from cache where windows overlap.
// Grid: tiles of channels by slabs of x's pixels (walk.cuh); after reduce, one merge of the slabs (reduce.cuh).
// Limits: in contiguous memory a vector is one element.
// registers: map_kernel <= 80
// registers: reduce_kernel <= 80
// registers: merge_kernel <= 128
#include "gradient.cuh"
#include "pool.cuh"

namespace resfuse::cuda {

template <class T>
struct PooledGradients {
  const T* grad_out;
  const uint8_t* indices;
  PoolWindows windows;
};

// What the operators of gradient.cuh read: dz in place of grad_out, and x.
template <class T, int kWidth>
struct GatheredInputs {
  acc_t<T> dz[kWidth];
  Vector<T, kWidth> x;

  template <class Op>
  __device__ __forceinline__ void fetch(const Op& op, int64_t column, int64_t step, int64_t index) {
    x = load_vector<T, kWidth>(op.in[1], index);
    const PoolWindows& w = op.pooled.windows;
    const Quotient image = divide(step, w.pixels), pixel = divide(image.remainder, w.horizontal.size);
    const int y = static_cast<int>(pixel.quotient), at = static_cast<int>(pixel.remainder);
    const int64_t origin = w.image(image.quotient, column, w.pooled_pixels);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) dz[j] = 0;
    const int bottom = w.vertical.end_covering(y), left = w.horizontal.first_covering(at),
              right = w.horizontal.end_covering(at);
#pragma unroll 1
    for (int v = w.vertical.first_covering(y); v < bottom; ++v)
#pragma unroll 2  // loads in flight
      for (int h = left; h < right; ++h) {
        const int number = (y - w.vertical.origin(v)) * w.horizontal.kernel + (at - w.horizontal.origin(h));
        add(op, origin + (int64_t{v} * w.width + h) * w.pitch, number);
      }
  }
  // the gradient of a window, in those lanes that selected its pixel of this number
  template <class Op>
  __device__ __forceinline__ void add(const Op& op, int64_t index, int number) {
    const Vector<T, kWidth> grads = load_vector<T, kWidth>(op.pooled.grad_out, index);
    const Vector<uint8_t, kWidth> selected = load_vector<uint8_t, kWidth>(op.pooled.indices, index);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) dz[j] += selected.values[j] == number ? load(grads.values[j]) : acc_t<T>(0);
  }
  __device__ __forceinline__ acc_t<T> get(int i, int j) const { return i == 0 ? dz[j] : load(x.values[j]); }
};

// An operator of gradient.cuh behind a pool.
template <class T, class Base>
struct Pooled : Base {
  static constexpr int kUnroll = 1;  // the windows that cover a pixel are loads enough
  template <int kWidth>
  using Operands = GatheredInputs<T, kWidth>;
  PooledGradients<T> pooled;
};

Tensor scale_shift_relu_maxpool_backward_reduce(const Tensor& grad_out, const Tensor& indices, const Tensor& x,
                                                const Tensor& scale, const Tensor& shift, const Tensor& mean,
                                                const Pair& kernel_size, const Pair& stride, const Pair& padding) {
  const Geometry g = pooled_geometry(x);
  const Windows windows = windows_of(x, kernel_size, stride, padding);
  check_pooled(grad_out, x, g, windows, x.scalar_type(), "grad_out");
  check_pooled(indices, x, g, windows, ScalarType::Byte, "indices");
  Tensor sums = new_vector(x, 2, g.channels, accumulate_dtype(x));
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const Branch<A> branch = branch_of<A>(x, scale, shift, mean);
    if (g.numel() == 0) {
      torch::stable::zero_(sums);
      return;
    }
    const T *pg = input_pointer<T>(grad_out), *px = input_pointer<T>(x);
    const uint8_t* pi = input_pointer<uint8_t>(indices);
    const Outputs<A, 2> totals{{output_pointer<A>(sums), output_pointer<A>(sums) + g.channels}};
    dispatch_pool_width<T>(g, {pg, pi, px}, [&](auto width) {
      using Op = Pooled<T, GradientSums<T, Kind::kPlain>>;
      const PoolWindows device(windows, g, walk_of<Op>(g, width(), x));
      const Op op{{{{pg, px}, {}}, branch, {}, true, g.channels}, {pg, pi, device}};
      reduce<width()>("scale_shift_relu_maxpool_backward_reduce", op, g, x, totals);
    });
  });
  return sums;
}

// Write the gradient of x to grad_x, which may be x.
void write_pooled_gradient(const char* name, const Tensor& grad_x, const Tensor& grad_out, const Tensor& indices,
                           const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& mean,
                           const OptionalTensor& grad_mean, const OptionalTensor& grad_var, const Windows& windows) {
  const Geometry g = pooled_geometry(x);
  check_pooled(grad_out, x, g, windows, x.scalar_type(), "grad_out");
  check_pooled(indices, x, g, windows, ScalarType::Byte, "indices");
  if (g.numel() == 0) return;
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const Branch<A> branch = branch_of<A>(x, scale, shift, mean, grad_mean, grad_var);
    const T *pg = input_pointer<T>(grad_out), *px = input_pointer<T>(x);
    const uint8_t* pi = input_pointer<uint8_t>(indices);
    T* po = output_pointer<T>(grad_x);
    dispatch_pool_width<T>(g, {pg, pi, px, po}, [&](auto width) {
      using Op = Pooled<T, Gradient<T, Kind::kPlain>>;
      const PoolWindows device(windows, g, walk_of<Op>(g, width(), x));
      const Op op{{{{pg, px}, {po}}, branch, {}, true, grad_mean.has_value(), static_cast<A>(g.rows())},
                  {pg, pi, device}};
      map<width()>(name, op, g, x);
    });
  });
}

Tensor scale_shift_relu_maxpool_backward_apply(const Tensor& grad_out, const Tensor& indices, const Tensor& x,
                                               const Tensor& scale, const Tensor& shift, const Tensor& mean,
                                               const OptionalTensor& grad_mean, const OptionalTensor& grad_var,
                                               const Pair& kernel_size, const Pair& stride, const Pair& padding) {
  Tensor grad_x = torch::stable::empty_like(x);
  write_pooled_gradient("scale_shift_relu_maxpool_backward_apply", grad_x, grad_out, indices, x, scale, shift, mean,
                        grad_mean, grad_var, windows_of(x, kernel_size, stride, padding));
  return grad_x;
}

// The same in place: a convolution's output that nobody reads again becomes its own gradient.
void scale_shift_relu_maxpool_backward_apply_(const Tensor& grad_out, const Tensor& indices, const Tensor& x,
                                              const Tensor& scale, const Tensor& shift, const Tensor& mean,
                                              const OptionalTensor& grad_mean, const OptionalTensor& grad_var,
                                              const Pair& kernel_size, const Pair& stride, const Pair& padding) {
  write_pooled_gradient("scale_shift_relu_maxpool_backward_apply_", x, grad_out, indices, x, scale, shift, mean,
                        grad_mean, grad_var, windows_of(x, kernel_size, stride, padding));
}

STABLE_TORCH_LIBRARY_IMPL(resfuse, CUDA, m) {
  m.impl("scale_shift_relu_maxpool_backward_reduce", TORCH_BOX(&scale_shift_relu_maxpool_backward_reduce));
  m.impl("scale_shift_relu_maxpool_backward_apply", TORCH_BOX(&scale_shift_relu_maxpool_backward_apply));
  m.impl("scale_shift_relu_maxpool_backward_apply_", TORCH_BOX(&scale_shift_relu_maxpool_backward_apply_));
}

}  // namespace resfuse::cuda
