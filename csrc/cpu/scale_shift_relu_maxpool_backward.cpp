// The backward of scale_shift_relu_maxpool on the CPU, in two passes over x, as for scale_shift_act.
//
// For each piece of x both first gather dz, the sum of grad_out over the windows that selected a pixel: a pixel looks
// at the windows that cover it, in order, so no two threads meet. dz is masked by the recomputed pre-activation.
//   reduce: sum dz, sum dz*(x - mean).
//   apply:  grad_x = dz*scale + grad_mean/M + 2*grad_var/M*(x - mean), the last two where scale came from x's moments.
#include "../pool_windows.h"
#include "rounding.h"
#include "walk.h"

namespace resfuse::cpu {

constexpr int64_t kPieceElements = 4096;  // dz is still in L1 when it is read

// dz of the pixels [begin, end) of input row `at`, channels_last. grad_out and indices are the image's.
template <class T>
RESFUSE_CLONES void gather_loop(const T* grad_out, const uint8_t* indices, const Windows& windows, int64_t channels,
                                int64_t at, int64_t begin, int64_t end, acc_t<T>* dz) {
  using A = acc_t<T>;
  const Axis &vertical = windows.vertical, &horizontal = windows.horizontal;
  std::fill_n(dz, (end - begin) * channels, A(0));
  for (int64_t v = vertical.first_covering(at); v < vertical.end_covering(at); ++v) {
    const int64_t row = (at - vertical.origin(v)) * horizontal.kernel;
    for (int64_t h = horizontal.first_covering(begin); h < horizontal.end_covering(end - 1); ++h) {
      const int64_t left = horizontal.origin(h), first = std::max<int64_t>(0, begin - left),
                    last = std::min(horizontal.kernel, end - left), from = (v * horizontal.count() + h) * channels;
      const T* grads = grad_out + from;
      const uint8_t* selected = indices + from;
      for_row_groups<kTaps>(last - first, [&](auto group, int64_t tap) RESFUSE_INLINE_LAMBDA {
        A* target = dz + (left - begin + first + tap) * channels;
        const int index = static_cast<int>(row + first + tap);
        RESFUSE_INDEPENDENT
        for (int64_t j = 0; j < channels; ++j) {
          const int chosen = selected[j];
          const A grad = load(grads[j]);
          for (int k = 0; k < decltype(group)::value; ++k)
            target[k * channels + j] += chosen == index + k ? grad : A(0);
        }
      });
    }
  }
}

// dz of the pixels [begin, end) of a plane. grad_out and indices are the plane's.
template <class T>
void gather_plane(const T* grad_out, const uint8_t* indices, const Windows& windows, int64_t begin, int64_t end,
                  acc_t<T>* dz) {
  const Axis &vertical = windows.vertical, &horizontal = windows.horizontal;
  const int64_t width = horizontal.size;
  int64_t offsets[kMaxWindow] = {};
  for (int64_t i = 0; i < vertical.kernel * horizontal.kernel; ++i)
    offsets[i] = i / horizontal.kernel * width + i % horizontal.kernel;
  std::fill_n(dz, end - begin, acc_t<T>(0));
  for (int64_t v = vertical.first_covering(begin / width); v < vertical.end_covering((end - 1) / width); ++v)
    for (int64_t h = 0; h < horizontal.count(); ++h) {
      const int64_t from = v * horizontal.count() + h;
      const int64_t at = vertical.origin(v) * width + horizontal.origin(h) + offsets[indices[from]] - begin;
      if (0 <= at && at < end - begin) dz[at] += load(grad_out[from]);
    }
}

// dz of any block of x.
template <class T>
struct Gather {
  const Geometry& g;
  const Windows& windows;
  const T* grad_out;
  const uint8_t* indices;

  void operator()(int64_t offset, int64_t elements, acc_t<T>* dz) const {
    if (!g.channels_last) {
      const int64_t from = offset / g.pixels * windows.pixels(), begin = offset % g.pixels;
      return gather_plane(grad_out + from, indices + from, windows, begin, begin + elements, dz);
    }
    const int64_t width = windows.horizontal.size, last = (offset + elements) / g.channels;
    for (int64_t pixel = offset / g.channels; pixel < last;) {
      const int64_t begin = pixel % width, end = std::min(width, begin + last - pixel);
      const int64_t from = pixel / g.pixels * windows.pixels() * g.channels;
      gather_loop(grad_out + from, indices + from, windows, g.channels, pixel % g.pixels / width, begin, end, dz);
      pixel += end - begin;
      dz += (end - begin) * g.channels;
    }
  }

  // Call f(dz, offset, rows, width) for the pieces of a block, dz being in L1.
  template <class F>
  void for_each_piece(int64_t offset, int64_t rows, int64_t width, const F& f) const {
    const int64_t step = std::min(rows, std::max<int64_t>(1, kPieceElements / width));
    Scratch<acc_t<T>> dz(step * width);
    for (int64_t row = 0; row < rows; row += step) {
      const int64_t at = offset + row * width, count = std::min(step, rows - row);
      (*this)(at, count* width, dz.get());
      f(dz.get(), at, count, width);
    }
  }
};

// lanes: scale, shift, mean
template <class T>
RESFUSE_CLONES void pooled_reduce_loop(const acc_t<T>* dz, const T* x, int64_t rows, int64_t width,
                                       const acc_t<T>* const* lanes, acc_t<T>* sum, acc_t<T>* sum_x) {
  using A = acc_t<T>;
  const A *scale = lanes[0], *shift = lanes[1], *mean = lanes[2];
  for_row_groups(rows, [&](auto group, int64_t row) RESFUSE_INLINE_LAMBDA {
    RESFUSE_INDEPENDENT
    for (int64_t j = 0; j < width; ++j) {
      A s = 0, sx = 0;
      for (int k = 0; k < decltype(group)::value; ++k) {
        const int64_t i = (row + k) * width + j;
        const A value = load(x[i]), grad = relu_gradient(dz[i], value * scale[j] + shift[j]);
        s += grad;
        sx += grad * (value - mean[j]);
      }
      sum[j] += s;
      sum_x[j] += sx;
    }
  });
}

// lanes: scale, shift, mean, constant, slope
template <class T, bool kMoments>
void pooled_apply_loop(const acc_t<T>* dz, const T* x, T* grad_x, int64_t rows, int64_t width,
                       const acc_t<T>* const* lanes) {
  using A = acc_t<T>;
  const A *scale = lanes[0], *shift = lanes[1], *mean = lanes[2], *constant = lanes[3], *slope = lanes[4];
  store_rows(grad_x, rows, width, [=](int64_t i, int64_t j) RESFUSE_INLINE_LAMBDA {
    const A value = load(x[i]);
    A grad = relu_gradient(dz[i], value * scale[j] + shift[j]) * scale[j];
    if constexpr (kMoments) grad += constant[j] + slope[j] * (value - mean[j]);
    return grad;
  });
}

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
    const std::array<const A*, 3> vectors = {vector_pointer<A>(scale, x, "scale"), vector_pointer<A>(shift, x, "shift"),
                                             vector_pointer<A>(mean, x, "mean")};
    const Gather<T> gather{g, windows, input_pointer<T>(grad_out), input_pointer<uint8_t>(indices)};
    const T* px = input_pointer<T>(x);
    reduce_blocks<A, 3, 2>(g, sizeof(T), vectors, output_pointer<A>(sums),
                           [&](int64_t i, int64_t rows, int64_t width, const auto& lanes, const auto& s) {
                             gather.for_each_piece(i, rows, width, [&](const A* dz, int64_t at, int64_t n, int64_t w) {
                               pooled_reduce_loop<T>(dz, px + at, n, w, lanes.data(), s[0], s[1]);
                             });
                           });
  });
  return sums;
}

// Write the gradient of x to grad_x, which may be x.
void write_pooled_gradient(const Tensor& grad_x, const Tensor& grad_out, const Tensor& indices, const Tensor& x,
                           const Tensor& scale, const Tensor& shift, const Tensor& mean,
                           const OptionalTensor& grad_mean, const OptionalTensor& grad_var, const Windows& windows) {
  const Geometry g = pooled_geometry(x);
  check_pooled(grad_out, x, g, windows, x.scalar_type(), "grad_out");
  check_pooled(indices, x, g, windows, ScalarType::Byte, "indices");
  if (g.numel() == 0) return;
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    Scratch<A> constant(g.channels), slope(g.channels);
    moment_terms<A>(grad_mean, grad_var, x, constant.get(), slope.get());
    const std::array<const A*, 5> vectors = {vector_pointer<A>(scale, x, "scale"), vector_pointer<A>(shift, x, "shift"),
                                             vector_pointer<A>(mean, x, "mean"), constant.get(), slope.get()};
    const Gather<T> gather{g, windows, input_pointer<T>(grad_out), input_pointer<uint8_t>(indices)};
    const T* px = input_pointer<T>(x);
    T* pg = output_pointer<T>(grad_x);
    auto go = [&](auto with_moments) {
      for_each_block<A, 5>(g, vectors, [&](int64_t i, int64_t rows, int64_t width, const auto& lanes) {
        gather.for_each_piece(i, rows, width, [&](const A* dz, int64_t at, int64_t n, int64_t w) {
          pooled_apply_loop<T, decltype(with_moments)::value>(dz, px + at, pg + at, n, w, lanes.data());
        });
      });
    };
    grad_mean.has_value() ? go(std::true_type{}) : go(std::false_type{});
  });
}

Tensor scale_shift_relu_maxpool_backward_apply(const Tensor& grad_out, const Tensor& indices, const Tensor& x,
                                               const Tensor& scale, const Tensor& shift, const Tensor& mean,
                                               const OptionalTensor& grad_mean, const OptionalTensor& grad_var,
                                               const Pair& kernel_size, const Pair& stride, const Pair& padding) {
  Tensor grad_x = new_activation(x);
  write_pooled_gradient(grad_x, grad_out, indices, x, scale, shift, mean, grad_mean, grad_var,
                        windows_of(x, kernel_size, stride, padding));
  return grad_x;
}

// The same in place: a convolution's output that nobody reads again becomes its own gradient.
void scale_shift_relu_maxpool_backward_apply_(const Tensor& grad_out, const Tensor& indices, const Tensor& x,
                                              const Tensor& scale, const Tensor& shift, const Tensor& mean,
                                              const OptionalTensor& grad_mean, const OptionalTensor& grad_var,
                                              const Pair& kernel_size, const Pair& stride, const Pair& padding) {
  write_pooled_gradient(x, grad_out, indices, x, scale, shift, mean, grad_mean, grad_var,
                        windows_of(x, kernel_size, stride, padding));
}

STABLE_TORCH_LIBRARY_IMPL(resfuse, CPU, m) {
  m.impl("scale_shift_relu_maxpool_backward_reduce", TORCH_BOX(&scale_shift_relu_maxpool_backward_reduce));
  m.impl("scale_shift_relu_maxpool_backward_apply", TORCH_BOX(&scale_shift_relu_maxpool_backward_apply));
  m.impl("scale_shift_relu_maxpool_backward_apply_", TORCH_BOX(&scale_shift_relu_maxpool_backward_apply_));
}

}  // namespace resfuse::cpu
