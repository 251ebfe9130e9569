// The windows of a max-pool: sizes, which of them cover a position, and the layout of what is pooled.
#pragma once

#include <algorithm>
#include <vector>

#include "../checks.h"

namespace resfuse::cpu {

constexpr int64_t kMaxWindow = 256;  // an arg-max is one byte
constexpr int kTaps = 3;             // neighbours in a row of a window, taken together

// The windows along one dimension.
struct Axis {
  int64_t size, kernel, stride, padding;

  int64_t count() const { return (size + 2 * padding - kernel) / stride + 1; }
  int64_t origin(int64_t window) const { return window * stride - padding; }
  // The windows [first, end) that cover a position.
  int64_t first_covering(int64_t at) const { return at + padding < kernel ? 0 : (at + padding - kernel) / stride + 1; }
  int64_t end_covering(int64_t at) const { return std::min(count(), (at + padding) / stride + 1); }
};

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

}  // namespace resfuse::cpu
