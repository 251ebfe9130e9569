// Activations in the arena of a plan: channels last, pixels padded to whole cache lines, borders of zeros.
//
// A convolution reads its taps straight from such an image: the border stands for its padding. Pixels lie an odd number
// of cache lines apart, so that those of a register tile do not compete for the same sets. Channels that pad a pixel
// are zero.
#pragma once

#include <cstring>

#include "../tiles/patch.h"

namespace resfuse::cpu {

// Axis 0 is vertical, axis 1 horizontal. `data` is the first pixel inside the border.
template <class T>
struct Image {
  T* data;
  int64_t height, width, channels;
  int64_t pixel_step, row_step, image_step;  // in values
  int64_t halo;                              // pixels of the border, on each side

  T* row(int64_t image, int64_t row) const { return data + image * image_step + row * row_step; }
  // whether all pixels of all images form one line
  bool flat() const { return halo == 0; }
};

// Name the memory of rows [begin, end) of all images, of which each has `of` rows, for a prefetcher; a row of an image
// stands for `stride` rows of it, and for what lies between.
template <class T>
void prefetch_rows(const Image<T>& image, int64_t begin, int64_t end, int64_t of, int64_t stride, Prefetcher& to) {
  if (image.data == nullptr || begin >= end) return;
  const T* first = image.row(begin / of, begin % of * stride);
  const T* last = image.row((end - 1) / of, (end - 1) % of * stride) + image.row_step;
  to.add(first, (last - first) * static_cast<int64_t>(sizeof(T)));
}

// The borders beside rows [begin, end) of an image, and those above the first row and below the last.
template <class T>
void clear_halo(const Image<T>& to, int64_t image, int64_t begin, int64_t end) {
  if (to.halo == 0) return;
  const auto clear = [](T* from, int64_t values) {
    std::memset(static_cast<void*>(from), 0, static_cast<size_t>(values) * sizeof(T));
  };
  const int64_t side = to.halo * to.pixel_step;
  for (int64_t row = begin; row < end; ++row) {
    clear(to.row(image, row) - side, side);
    clear(to.row(image, row) + to.width * to.pixel_step, side);
  }
  if (begin == 0) clear(to.row(image, -to.halo) - side, to.halo * to.row_step);
  if (end == to.height) clear(to.row(image, end) - side, to.halo * to.row_step);
}

}  // namespace resfuse::cpu
