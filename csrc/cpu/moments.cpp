// moments on the CPU: per-channel mean and biased variance over N, H and W, and their backward.
//
// Forward reads x once. Backward reads x and writes
//     grad_x = grad_mean / M + 2 * grad_var / M * (x - mean),  M = N * H * W.
#include <limits>

#include "rounding.h"
#include "tile_moments.h"

namespace resfuse::cpu {

template <class T>
void moments_backward_loop(const T* x, T* grad, int64_t rows, int64_t width, const acc_t<T>* mean,
                           const acc_t<T>* constant, const acc_t<T>* slope) {
  store_rows(grad, rows, width, [=](int64_t i, int64_t j) RESFUSE_INLINE_LAMBDA {
    return constant[j] + slope[j] * (load(x[i]) - mean[j]);
  });
}

std::tuple<Tensor, Tensor> moments(const Tensor& x) {
  const Geometry g = geometry_of(x);
  Tensor mean = new_vector(x, 1, g.channels, accumulate_dtype(x));
  Tensor var = new_vector(x, 1, g.channels, accumulate_dtype(x));
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    auto *pm = output_pointer<acc_t<T>>(mean), *pv = output_pointer<acc_t<T>>(var);
    if (g.numel() == 0) {
      // the mean of nothing, as torch.var_mean
      std::fill_n(pm, g.channels, std::numeric_limits<acc_t<T>>::quiet_NaN());
      std::fill_n(pv, g.channels, std::numeric_limits<acc_t<T>>::quiet_NaN());
      return;
    }
    // a tile's sample alone is read twice, and the longer a tile, the less its merging costs beside its sums
    moments_of<T>(g, input_pointer<T>(x), pm, pv, [](int64_t, int64_t, int64_t) {}, 8 * kTileBytes);
  });
  return {mean, var};
}

Tensor moments_backward(const Tensor& grad_mean, const Tensor& grad_var, const Tensor& x, const Tensor& mean) {
  const Geometry g = geometry_of(x);
  Tensor grad = new_activation(x);
  if (g.numel() == 0) return grad;
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const A* gm = vector_pointer<A>(grad_mean, x, "grad_mean");
    const A* gv = vector_pointer<A>(grad_var, x, "grad_var");
    Scratch<A> constant(g.channels), slope(g.channels);
    for (int64_t c = 0; c < g.channels; ++c) {
      constant[c] = gm[c] / static_cast<A>(g.rows());
      slope[c] = 2 * gv[c] / static_cast<A>(g.rows());
    }
    const T* px = input_pointer<T>(x);
    T* pg = output_pointer<T>(grad);
    for_each_block<A, 3>(g, {vector_pointer<A>(mean, x, "mean"), constant.get(), slope.get()},
                         [&](int64_t i, int64_t rows, int64_t width, const auto& lanes) {
                           moments_backward_loop<T>(px + i, pg + i, rows, width, lanes[0], lanes[1], lanes[2]);
                         });
  });
  return grad;
}

STABLE_TORCH_LIBRARY_IMPL(resfuse, CPU, m) {
  m.impl("moments", TORCH_BOX(&moments));
  m.impl("moments_backward", TORCH_BOX(&moments_backward));
}

}  // namespace resfuse::cpu
