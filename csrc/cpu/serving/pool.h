// Pools and maps from image to image, a vector of channels at once; and a convolution whose output only a pool reads.
#pragma once

#include <limits>

#include "direct.h"

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

namespace resfuse::cpu::RESFUSE_ISA {

struct Window {
  int64_t kernel[2], stride[2], padding[2];
};

// One row of a max pool; padding never wins. `in` holds rows from `origin` on of a map of `height` rows.
template <class T>
void pool_row(const Image<T>& in, int64_t in_image, int64_t origin, int64_t height, const Window& window,
              const Image<T>& out, int64_t image, int64_t row) {
  const int64_t top = row * window.stride[0] - window.padding[0];
  const int64_t first = std::max<int64_t>(top, 0), last = std::min(top + window.kernel[0], height);
  for (int64_t column = 0; column < out.width; ++column) {
    const int64_t left = column * window.stride[1] - window.padding[1];
    const int64_t begin = std::max<int64_t>(left, 0), end = std::min(left + window.kernel[1], in.width);
    T* to = out.row(image, row) + column * out.pixel_step;
    for (int64_t c = 0; c < out.channels; c += kLanes) {
      Lanes most = broadcast_lanes(-std::numeric_limits<float>::infinity());
      for (int64_t i = first; i < last; ++i) {
        const T* from = in.row(in_image, i - origin) + begin * in.pixel_step + c;
        for (int64_t j = begin; j < end; ++j, from += in.pixel_step) most = max_or_nan(most, load_lanes(from));
      }
      store_lanes(to + c, most);
    }
  }
  clear_halo(out, image, row, row + 1);
}

template <class T>
void run_max_pool(const Image<T>& in, const Window& window, const Image<T>& out, int64_t images) {
  parallel_tasks(images * out.height, images * in.height * in.width * in.channels, [&](int64_t task) {
    pool_row(in, task / out.height, 0, in.height, window, out, task / out.height, task % out.height);
  });
}

// The mean over all pixels.
template <class T>
void run_global_pool(const Image<T>& in, const Image<T>& out, int64_t images) {
  const float pixels = static_cast<float>(in.height * in.width);
  const int64_t vectors = ceil_div(in.channels, kLanes);
  parallel_tasks(images * vectors, images * in.height * in.width * in.channels, [&](int64_t task) {
    const int64_t image = task / vectors, c = task % vectors * kLanes;
    Lanes sum = zero_lanes();
    for (int64_t i = 0; i < in.height; ++i) {  // a sum of short sums rounds less than one long one
      Lanes row = zero_lanes();
      for (int64_t j = 0; j < in.width; ++j) row += load_lanes(in.row(image, i) + j * in.pixel_step + c);
      sum += row;
    }
    store_lanes(out.row(image, 0) + c, sum / broadcast_lanes(pixels));
    if (c == 0) clear_halo(out, image, 0, 1);
  });
}

// act(x*scale + shift + residual); vectors are padded; null scale: x as it is.
template <class T>
void run_map(const Image<T>& in, const Image<T>& residual, const float* scale, const float* shift, bool relu,
             const Image<T>& out, int64_t images) {
  parallel_tasks(images * out.height, images * in.height * in.width * in.channels, [&](int64_t task) {
    const int64_t image = task / out.height, row = task % out.height;
    for (int64_t j = 0; j < out.width; ++j) {
      const T* x = in.row(image, row) + j * in.pixel_step;
      const T* r = residual.data == nullptr ? nullptr : residual.row(image, row) + j * residual.pixel_step;
      T* to = out.row(image, row) + j * out.pixel_step;
      for (int64_t c = 0; c < out.channels; c += kLanes) {
        Lanes z = load_lanes(x + c);
        if (scale != nullptr) z = multiply_add(z, load_lanes(scale + c), load_lanes(shift + c));
        if (r != nullptr) z += load_lanes(r + c);
        store_lanes(to + c, relu ? relu_lanes(z) : z);
      }
    }
    clear_halo(out, image, row, row + 1);
  });
}

// maxpool(conv): a few rows of windows at once; the rows of the convolution under them stay in L2, and neighbours
// compute the rows they share twice. `height`, `width`: the convolution's output.
template <class T>
void run_convolution_pool(DirectConvolution<T> c, int64_t height, int64_t width, const Window& window,
                          const Image<T>& out, int64_t images) {
  constexpr int64_t kRowsBytes = 512 << 10;
  const int64_t step = pixel_units<T>(round_up(out.channels, kPanel)) * kUnit<T>, row_step = width * step;
  const int64_t fit = kRowsBytes / (row_step * static_cast<int64_t>(sizeof(T)));
  int64_t tall = std::clamp<int64_t>((fit - window.kernel[0]) / window.stride[0] + 1, 1, out.height);
  tall = ceil_div(out.height, ceil_div(out.height, tall));
  const int64_t rows = (tall - 1) * window.stride[0] + window.kernel[0], pieces = ceil_div(out.height, tall);
  parallel_tasks(images * pieces, images * height * width * out.channels * 16, [&](int64_t task) {
    const int64_t image = task / pieces, first = task % pieces * tall, last = std::min(first + tall, out.height);
    T* memory = static_cast<T*>(workspace_bytes(Slot::kTile, (rows * row_step) * static_cast<int64_t>(sizeof(T)) + 64));
    const int64_t begin = std::max<int64_t>(first * window.stride[0] - window.padding[0], 0);
    const int64_t end = std::min((last - 1) * window.stride[0] - window.padding[0] + window.kernel[0], height);
    Prefetcher next;
    DirectConvolution<T> part = c;
    part.out = {memory - begin * row_step, height, width, out.channels, step, row_step, 0, 0};
    part.in.data += image * c.in.image_step;
    for (int64_t strip = 0, together; strip < c.strips(); strip += together) {
      together = c.kernel.windows.together(strip, c.strips());
      for (int64_t row = begin; row < end; ++row) part.line(0, row, 0, width, strip, together, next);
    }
    const Image<T> band{memory, end - begin, width, out.channels, step, row_step, 0, 0};
    for (int64_t row = first; row < last; ++row) pool_row(band, 0, begin, height, window, out, image, row);
  });
}

}  // namespace resfuse::cpu::RESFUSE_ISA

RESFUSE_TILES_END
#endif
