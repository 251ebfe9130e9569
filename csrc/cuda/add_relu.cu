// add_relu on CUDA: out = max(x + residual, 0), and its backward grad = grad_out where out > 0.
//
// Memory-bound and blind to layout: both arguments share one dense memory order, so both operators map two flat arrays
// to a third. Bytes per element: two reads and a write, forward and backward. The mask is the sign of the output, which
// is kept anyway.
// Grid: threads stride over vectors of 16 bytes, kUnroll of each argument in flight; the first threads take the
// elements behind the last whole vector. Limits: an argument that is not aligned to 16 bytes makes a vector one
// element.
// registers: flat_map_kernel <= 64
#include "launch.cuh"

namespace resfuse::cuda {

constexpr int kUnroll = 2;

struct AddReLU {
  template <class T>
  static __device__ void apply(T x, T residual, T* out) {
    store(out, clamp_below(load(x) + load(residual), acc_t<T>(0)));
  }
};

struct AddReLUBackward {
  template <class T>
  static __device__ void apply(T grad_out, T out, T* grad) {
    store(grad, relu_gradient(load(grad_out), load(out)));
  }
};

template <class Op, class T, int kWidth>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    flat_map_kernel(const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ out, int64_t size) {
  using V = Vector<T, kWidth>;
  static_assert(sizeof(V) <= kVectorBytes && kWidth <= kThreads, "one access, and one block covers the tail");
  const V* va = reinterpret_cast<const V*>(a);
  const V* vb = reinterpret_cast<const V*>(b);
  V* vout = reinterpret_cast<V*>(out);
  const int64_t vectors = size / kWidth;
  const int64_t threads = int64_t{gridDim.x} * kThreads;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;

#pragma unroll 1  // nvcc would unroll again: no more loads in flight, but more registers
  for (int64_t first = thread; first < vectors; first += kUnroll * threads) {
    V pa[kUnroll], pb[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = first + u * threads;
      if (i < vectors) pa[u] = va[i], pb[u] = vb[i];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = first + u * threads;
      V result;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) Op::apply(pa[u].values[k], pb[u].values[k], &result.values[k]);
      if (i < vectors) vout[i] = result;
    }
  }
  const int64_t tail = vectors * kWidth + thread;
  if (tail < size) Op::apply(a[tail], b[tail], out + tail);
}

template <class Op>
Tensor flat_map(const char* name, const Tensor& a, const Tensor& b) {
  Tensor out = torch::stable::empty_like(a);
  const int64_t size = a.numel();
  if (size == 0) return out;
  dispatch_dtype(a.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    constexpr int kWidth = kVectorBytes / sizeof(T);
    const T *pa = input_pointer<T>(a), *pb = input_pointer<T>(b);
    T* po = output_pointer<T>(out);
    if (is_aligned({pa, pb, po}))
      launch(name, flat_map_kernel<Op, T, kWidth>, grid_size((size + kWidth - 1) / kWidth, a), 0, a, pa, pb, po, size);
    else
      launch(name, flat_map_kernel<Op, T, 1>, grid_size(size, a), 0, a, pa, pb, po, size);
  });
  return out;
}

Tensor add_relu(const Tensor& x, const Tensor& residual) {
  check_flat(x, residual, "residual");
  return flat_map<AddReLU>("add_relu", x, residual);
}

Tensor add_relu_backward(const Tensor& grad_out, const Tensor& out) {
  check_flat(out, grad_out, "grad_out");
  return flat_map<AddReLUBackward>("add_relu_backward", grad_out, out);
}

STABLE_TORCH_LIBRARY_IMPL(resfuse, CUDA, m) {
  m.impl("add_relu", TORCH_BOX(&add_relu));
  m.impl("add_relu_backward", TORCH_BOX(&add_relu_backward));
}

}  // namespace resfuse::cuda
