// The operators of scale_shift_act's backward: sums over the activation, then the gradient of x.
//
// dz is grad_out where the unit was active. Without a residual, or with a raw one, the mask is recomputed from the sign
// of the pre-activation; with an identity residual it is the sign of the kept output.
// Deviations from the mean are summed, not raw values: dscale - mean*dshift would cancel where |mean| >> std.
#pragma once

#include "launch.cuh"

namespace resfuse::cuda {

enum class Kind { kPlain, kRaw, kOutput };  // nothing more than x, a raw residual, or the kept output

// x, or a raw residual, with the vectors that normalised it and, where the normalisation had its moments from it, the
// gradients of these.
template <class A>
struct Branch {
  const A *scale, *shift, *mean;
  const A *grad_mean = nullptr, *grad_var = nullptr;
};

template <class A>
Branch<A> branch_of(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift,
                    const OptionalTensor& mean, const OptionalTensor& grad_mean = {},
                    const OptionalTensor& grad_var = {}) {
  return {vector_pointer<A>(scale, x, "scale"), vector_pointer<A>(shift, x, "shift"),
          vector_pointer<A>(mean, x, "mean"), vector_pointer<A>(grad_mean, x, "grad_mean"),
          vector_pointer<A>(grad_var, x, "grad_var")};
}

template <class A>
Branch<A> raw_branch_of(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& scale,
                        const OptionalTensor& shift, const OptionalTensor& mean, const OptionalTensor& grad_mean = {},
                        const OptionalTensor& grad_var = {}) {
  check_raw_branch(residual, scale, shift, mean);
  return branch_of<A>(x, scale, shift, mean, grad_mean, grad_var);
}

// What the operators read, beside the branches: inputs are grad_out, x and, if there is one, the other activation.
template <class T, Kind kKind, int kOut, int kTerms, int kPerBranch>
using GradientOperator =
    Operator<T, kKind == Kind::kPlain ? 2 : 3, kOut, kKind == Kind::kRaw ? 2 * kPerBranch : kPerBranch, kTerms>;

// sum dz, sum dz*(x - mean), sum dz*(r - mean_r); with a kept output, dz is written.
// coefficients: scale, shift, mean, then those of the raw residual
template <class T, Kind kKind>
struct GradientSums
    : GradientOperator<T, kKind, kKind == Kind::kOutput ? 1 : 0, kKind == Kind::kRaw ? 3 : 2, /*per branch=*/3> {
  using A = acc_t<T>;
  using Reduction = Sums<A, kKind == Kind::kRaw ? 3 : 2>;
  Branch<A> x, raw;
  bool relu;
  int64_t channels;

  __device__ A vector(int k, int64_t c) const {
    const Branch<A>& branch = k < 3 ? x : raw;
    return k % 3 == 0 ? branch.scale[c] : k % 3 == 1 ? branch.shift[c] : branch.mean[c];
  }
  template <class C, class I>
  __device__ void apply(const C& c, const I& in, int j, T* out, A* terms) const {
    A dz = in.get(0, j);
    const A value = in.get(1, j);
    if constexpr (kKind == Kind::kOutput) {
      dz = relu_gradient(dz, in.get(2, j));
      store(out, dz);
    } else {
      A z = value * c[0] + c[1];
      if constexpr (kKind == Kind::kRaw) z += in.get(2, j) * c[3] + c[4];
      if (relu) dz = relu_gradient(dz, z);
    }
    terms[0] = dz;
    terms[1] = dz * (value - c[2]);
    if constexpr (kKind == Kind::kRaw) terms[2] = dz * (in.get(2, j) - c[5]);
  }
};

// grad_x = dz*scale + grad_mean/M + 2*grad_var/M*(x - mean), the last two where scale came from x's moments, and a raw
// residual's gradient likewise.
// coefficients: scale, shift, mean, constant, slope, then those of the raw residual
template <class T, Kind kKind>
struct Gradient : GradientOperator<T, kKind, kKind == Kind::kRaw ? 2 : 1, 0, /*per branch=*/5> {
  using A = acc_t<T>;
  Branch<A> x, raw;
  bool relu, moments;
  A count;

  __device__ A vector(int k, int64_t c) const {
    const Branch<A>& branch = k < 5 ? x : raw;
    switch (k % 5) {
      case 0: return branch.scale[c];
      case 1: return branch.shift[c];
      case 2: return branch.mean[c];
      case 3: return branch.grad_mean == nullptr ? A(0) : branch.grad_mean[c] / count;
      default: return branch.grad_var == nullptr ? A(0) : 2 * branch.grad_var[c] / count;
    }
  }
  template <class C, class I>
  __device__ void apply(const C& c, const I& in, int j, T* out, A*) const {
    A dz = in.get(0, j);
    const A value = in.get(1, j);
    A z = value * c[0] + c[1];
    if constexpr (kKind == Kind::kRaw) z += in.get(2, j) * c[5] + c[6];
    if (relu) dz = relu_gradient(dz, z);
    A grad = dz * c[0];
    if (moments) grad += c[3] + c[4] * (value - c[2]);
    store(out, grad);
    if constexpr (kKind == Kind::kRaw) {
      A grad_r = dz * c[5];
      if (moments) grad_r += c[8] + c[9] * (in.get(2, j) - c[7]);
      store(out + 1, grad_r);
    }
  }
};

}  // namespace resfuse::cuda
