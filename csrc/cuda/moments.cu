// moments on CUDA: per-channel mean and biased variance over N, H and W, and their backward.
//
// Forward reads x once: one read per element. Backward reads x and writes
//     grad_x = grad_mean / M + 2 * grad_var / M * (x - mean),  M = N * H * W.
// Grid: tiles of channels by slabs of pixels (walk.cuh), then one merge of the slabs (reduce.cuh).
// registers: map_kernel <= 80
// registers: reduce_kernel <= 80
// registers: merge_kernel <= 128
#include <limits>

#include "launch.cuh"

namespace resfuse::cuda {

// coefficients: pivot
template <class T>
struct MomentsOf : Operator<T, 1, 0, 1, 1> {
  using A = acc_t<T>;
  using Reduction = Moments<A>;
  int64_t channels, channel_stride;

  __device__ A vector(int, int64_t c) const { return pivot_of(load(this->in[0][c * channel_stride])); }
  template <class C, class I>
  __device__ void apply(const C& c, const I& in, int j, T*, A* terms) const {
    terms[0] = in.get(0, j) - c[0];
  }
};

// coefficients: mean, constant, slope
template <class T>
struct MomentsBackward : Operator<T, 1, 1, 3> {
  using A = acc_t<T>;
  const A *mean, *grad_mean, *grad_var;
  A count;

  __device__ A vector(int k, int64_t c) const {
    return k == 0 ? mean[c] : k == 1 ? grad_mean[c] / count : 2 * grad_var[c] / count;
  }
  template <class C, class I>
  __device__ void apply(const C& c, const I& in, int j, T* out, A*) const {
    store(out, c[1] + c[2] * (in.get(0, j) - c[0]));
  }
};

std::tuple<Tensor, Tensor> moments(const Tensor& x) {
  const Geometry g = geometry_of(x);
  Tensor mean = new_vector(x, 1, g.channels, accumulate_dtype(x));
  Tensor var = new_vector(x, 1, g.channels, accumulate_dtype(x));
  if (g.numel() == 0) {
    // the mean of nothing, as torch.var_mean
    torch::stable::fill_(mean, std::numeric_limits<double>::quiet_NaN());
    torch::stable::fill_(var, std::numeric_limits<double>::quiet_NaN());
    return {mean, var};
  }
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const MomentsOf<T> op{{{input_pointer<T>(x)}, {}}, g.channels, channel_stride(g)};
    const Outputs<A, 2> out{{output_pointer<A>(mean), output_pointer<A>(var)}};
    dispatch_width<T>(g, {op.in[0]}, [&](auto width) { reduce<width()>("moments", op, g, x, out); });
  });
  return {mean, var};
}

Tensor moments_backward(const Tensor& grad_mean, const Tensor& grad_var, const Tensor& x, const Tensor& mean) {
  const Geometry g = geometry_of(x);
  Tensor grad = torch::stable::empty_like(x);
  if (g.numel() == 0) return grad;
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const MomentsBackward<T> op{{{input_pointer<T>(x)}, {output_pointer<T>(grad)}},
                                vector_pointer<A>(mean, x, "mean"),
                                vector_pointer<A>(grad_mean, x, "grad_mean"),
                                vector_pointer<A>(grad_var, x, "grad_var"),
                                static_cast<A>(g.rows())};
    dispatch_width<T>(g, {op.in[0], op.out[0]}, [&](auto width) { map<width()>("moments_backward", op, g, x); });
  });
  return grad;
}

STABLE_TORCH_LIBRARY_IMPL(resfuse, CUDA, m) {
  m.impl("moments", TORCH_BOX(&moments));
  m.impl("moments_backward", TORCH_BOX(&moments_backward));
}

}  // namespace resfuse::cuda
