// The windows of a max-pool: sizes, which of them cover a position, and the layout and checks of what is pooled.
#pragma once

#include <algorithm>
#include <vector>

#include "checks.h"

namespace resfuse {

constexpr int64_t kMaxWindow = 256;  // an arg-max is one byte
constexpr int kTaps = 3;             // neighbours in a row of a window, taken together

// The windows along one dimension. Narrow integers are for the device, where division is slow.
template <class I>
struct BasicAxis {
  I size, kernel, stride, padding;

  RESFUSE_INLINE I count() const { return (size + 2 * padding - kernel) / stride + 1; }
  RESFUSE_INLINE I origin(I window) const { return window * stride - padding; }
  // The windows [first, end) that cover a position.
  RESFUSE_INLINE I first_covering(I at) const {
    return at + padding < kernel ? 0 : (at + padding - kernel) / stride + 1;
  }
  RESFUSE_INLINE I end_covering(I at) const {
    const I all = count(), end = (at + padding) / stride + 1;
    return end < all ? end : all;
  }
};
using Axis = BasicAxis<int64_t>;

struct Windows {
  Axis vertical, horizontal;

  int64_t pixels() const { return vertical.count() * horizontal.count(); }
};

using Pair = std::vector<int64_t>;

inline Windows windows_of(const Tensor& x, const Pair& kernel_size, const Pair& stride, const Pair& padding) {
  STD_TORCH_CHECK(kernel_size.size() == 2 && stride.size() == 2 && padding.size() == 2,
                  "resfuse: kernel_size, stride and padding must be (vertical, horizontal)");
  Axis axes[2];
  for (int i = 0; i < 2; ++i) {
    STD_TORCH_CHECK(kernel_size[i] > 0 && stride[i] > 0 && padding[i] >= 0 && padding[i] <= kernel_size[i] / 2,
                    "resfuse: kernel_size and stride must be positive, padding at most half the kernel_size");
    STD_TORCH_CHECK(kernel_size[i] <= kMaxWindow && kernel_size[0] * kernel_size[1] <= kMaxWindow,
                    "resfuse: a window must have at most ", kMaxWindow, " positions");
    const int64_t padded = x.size(2 + i) + 2 * padding[i];
    STD_TORCH_CHECK(kernel_size[i] <= padded, "resfuse: kernel_size must not exceed the padded input");
    // a longer stride leads out of the input just as well
    axes[i] = {x.size(2 + i), kernel_size[i], std::min(stride[i], padded), padding[i]};
  }
  return {axes[0], axes[1]};
}

// An activation that is dense in both orders pools to a contiguous one.
inline Geometry pooled_geometry(const Tensor& x) {
  Geometry g = geometry_of(x);
  g.channels_last = !x.is_contiguous();
  return g;
}

// An uninitialised tensor of the pooled shape, in g's memory order.
inline Tensor empty_pooled(const Tensor& x, const Geometry& g, const Windows& windows, ScalarType dtype) {
  using torch::headeronly::MemoryFormat;
  return torch::stable::empty({g.batch, g.channels, windows.vertical.count(), windows.horizontal.count()}, dtype,
                              std::nullopt, x.device(), std::nullopt,
                              g.channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

inline void check_pooled(const Tensor& pooled, const Tensor& x, const Geometry& g, const Windows& windows,
                         ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(pooled.scalar_type() == dtype && pooled.device() == x.device(), "resfuse: ", name,
                  " has the wrong dtype or device");
  STD_TORCH_CHECK(pooled.dim() == 4 && pooled.size(0) == g.batch && pooled.size(1) == g.channels &&
                      pooled.size(2) == windows.vertical.count() && pooled.size(3) == windows.horizontal.count(),
                  "resfuse: ", name, " must have the pooled shape");
  STD_TORCH_CHECK(pooled.numel() == 0 ||
                      (g.channels_last ? dense_in_order(pooled, {1, 3, 2, 0}) : dense_in_order(pooled, {3, 2, 1, 0})),
                  "resfuse: ", name, " must have x's memory order");
}

}  // namespace resfuse
