// Where the windows of a max-pool lie on the device: a pooled activation beside the one that it was pooled from.
#pragma once

#include "../pool_windows.h"
#include "launch.cuh"

namespace resfuse::cuda {

using DeviceAxis = BasicAxis<int>;

// Positions in vectors, as a Walk counts them. An image is a batch entry (channels_last) or one of its planes.
struct PoolWindows {
  DeviceAxis vertical, horizontal;
  int height, width;              // windows of an image
  int64_t columns, pitch;         // vectors side by side; from one pixel to the next
  int64_t pixels, pooled_pixels;  // of an image

  PoolWindows(const Windows& windows, const Geometry& g, const Walk& walk)
      : vertical(narrow(windows.vertical)),
        horizontal(narrow(windows.horizontal)),
        height(vertical.count()),
        width(horizontal.count()),
        columns(walk.columns),
        pitch(g.channels_last ? walk.columns : 1),
        pixels(g.pixels),
        pooled_pixels(windows.pixels()) {}

  // The first pixel's vector of an image with `size` pixels.
  __device__ __forceinline__ int64_t image(int64_t n, int64_t column, int64_t size) const {
    return pitch == 1 ? (n * columns + column) * size : n * size * columns + column;
  }

  static DeviceAxis narrow(const Axis& axis) {
    STD_TORCH_CHECK(axis.size <= kMostPixels && axis.stride <= 2 * kMostPixels, "resfuse: an image must be at most ",
                    kMostPixels, " pixels wide and high");
    return {static_cast<int>(axis.size), static_cast<int>(axis.kernel), static_cast<int>(axis.stride),
            static_cast<int>(axis.padding)};
  }
  static constexpr int64_t kMostPixels = int64_t{1} << 29;  // sums of positions have 31 bits
};

// The width of a pool's vectors: neighbours along a plane belong to different windows, so 16 bytes are taken of
// neighbouring channels alone.
template <class T, class F>
void dispatch_pool_width(const Geometry& g, std::initializer_list<const void*> pointers, const F& f) {
  if (g.channels_last) return dispatch_width<T>(g, pointers, f);
  f(std::integral_constant<int, 1>{});
}

}  // namespace resfuse::cuda
