// A convolution from image to image: out = act(conv(x, weight) + bias + residual), taps read where they lie.
//
// Work is cut into blocks of output pixels, about as many as keep their input in L2, and, where blocks are few, of
// output channels. A block multiplies all its pixels with one strip of channels after the other. Every output is one
// register tile's, so results depend neither on the cut nor on the number of threads.
#pragma once

#include "../tiles/product.h"
#include "finish.h"
#include "image.h"

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

namespace resfuse::cpu::RESFUSE_ISA {

constexpr int64_t kInputBytes = 256 << 10;   // of a block's input: it is read once for each strip, from L2
constexpr int64_t kWeightBytes = 256 << 10;  // weights that stay in L2 themselves: then blocks are small,
constexpr int64_t kFewPixels = 56;           // and what they write is still in L1 when its next strip is written
constexpr int64_t kMostPixels = 448;

// What a convolution multiplies: packed strips, and the runs of units that one pixel reads.
struct Kernel {
  Windows windows;
  std::vector<Run> runs;
  Run behind{};       // the second activation's
  int64_t units = 0;  // of a strip's lane

  // `run`: channels of a run; steps in values
  // `second`: channels of a second activation, whose pixels are read as they are
  Kernel(const int64_t (&kernel)[2], const int64_t (&dilation)[2], int64_t run, int64_t out_channels, int64_t groups,
         int64_t unit, int64_t row_step, int64_t pixel_step, int64_t second)
      : windows(strips_of(run, out_channels, groups, unit)) {
    for (int64_t i = 0; i < kernel[0]; ++i)
      for (int64_t j = 0; j < kernel[1]; ++j)
        runs.push_back({(i * dilation[0] * row_step + j * dilation[1] * pixel_step) / unit, windows.units});
    behind = {0, second / unit};
    units = kernel[0] * kernel[1] * windows.units + behind.units;
  }

  static Windows strips_of(int64_t run, int64_t out_channels, int64_t groups, int64_t unit) {
    const ConvAxis one{1, 1, 1, 1, 0, 1};
    return Windows::shortest(Plan({1, run, out_channels, one, one, groups}, false, 4, 1, 1 << 20), unit);
  }
};

template <class T>
struct DirectConvolution {
  Image<T> in, second, out, residual;  // the data of second and residual may be null
  const Kernel& kernel;
  const unit_t<T>* weight;
  const float* bias;  // padded
  int64_t stride[2], padding[2], second_stride[2];
  bool relu;

  int64_t strips() const { return kernel.windows.strips(); }

  // `pixels` output pixels of a row, from `column` on, in one strip, or two together.
  void line(int64_t image, int64_t row, int64_t column, int64_t pixels, int64_t strip, int64_t together,
            Prefetcher& next) const {
    const int64_t lanes = kernel.windows.lanes, channel = strip * lanes, window = kernel.windows.at(strip);
    const T* a = in.row(image, row * stride[0] - padding[0]) + (column * stride[1] - padding[1]) * in.pixel_step;
    const Operand<unit_t<T>> first{units(a) + window, stride[1] * in.pixel_step / kUnit<T>, kernel.runs.data(),
                                   static_cast<int64_t>(kernel.runs.size())};
    Operand<unit_t<T>> other{nullptr, 0, nullptr, 0};
    if (second.data != nullptr)
      other = {units(second.row(image, row * second_stride[0]) + column * second_stride[1] * second.pixel_step),
               second_stride[1] * second.pixel_step / kUnit<T>, &kernel.behind, 1};
    const T* r = residual.data == nullptr ? nullptr : residual.row(image, row) + column * residual.pixel_step + channel;
    T* to = out.row(image, row) + column * out.pixel_step + channel;
    finish_line<T>(first, other, pixels, weight + strip * kernel.units * lanes, kernel.units * lanes, together * lanes,
                   {bias + channel, r, residual.pixel_step, to, out.pixel_step, relu}, next);
  }

  // Name what a block of lines will touch; flat, of pixels.
  void prefetch(bool flat, int64_t first, int64_t last, Prefetcher& to) const {
    if (first >= last) return;
    const auto pixels = [&](const Image<T>& image) {
      if (image.data != nullptr)
        to.add(image.data + first * image.pixel_step,
               (last - first) * image.pixel_step * static_cast<int64_t>(sizeof(T)));
    };
    if (flat) {
      for (const Image<T>* image : {&in, &second, &residual, &out}) pixels(*image);
      return;
    }
    prefetch_rows(in, first, last, out.height, stride[0], to);
    prefetch_rows(second, first, last, out.height, second_stride[0], to);
    prefetch_rows(residual, first, last, out.height, 1, to);
    prefetch_rows(out, first, last, out.height, 1, to);
  }

  // Whether consecutive pixels of all images are one line to all operands. A run may be a row of taps, whose input is
  // wider than its output.
  bool flat() const {
    return kernel.runs.size() == 1 && stride[0] == 1 && stride[1] == 1 && in.flat() && out.flat() && like_out(in) &&
           (residual.data == nullptr || residual.flat()) &&
           (second.data == nullptr ||
            (second.flat() && like_out(second) && second_stride[0] == 1 && second_stride[1] == 1));
  }

 private:
  bool like_out(const Image<T>& image) const { return image.height == out.height && image.width == out.width; }
  static const unit_t<T>* units(const T* values) { return reinterpret_cast<const unit_t<T>*>(values); }
};

// A block of pixels: lines [first, last), of each `pixels` from `column` on.
struct Part {
  int64_t first, last, column, pixels;
};

// How a convolution's pixels and strips are shared out, in parts as equal as can be. A line is a row, or all pixels.
struct Blocks {
  int64_t lines, pixels;  // of the whole, and of a line
  int64_t down, across;   // blocks of pixels
  int64_t cuts;           // of the strips, for each
  int64_t strips;

  Blocks(bool flat, int64_t images, int64_t height, int64_t width, int64_t strip_count, int64_t line_bytes,
         int64_t pixel_bytes, int64_t weight_bytes)
      : lines(flat ? 1 : images * height), pixels(flat ? images * height * width : width), strips(strip_count) {
    const int64_t most = weight_bytes <= kWeightBytes ? kFewPixels : kMostPixels;
    const int64_t tall =
        std::clamp<int64_t>(kInputBytes / std::max<int64_t>(line_bytes, 1), 1, std::max<int64_t>(most / pixels, 1));
    const int64_t wide = std::clamp<int64_t>(kInputBytes / pixel_bytes, 2 * kMaxPixels, most);
    down = ceil_div(lines, tall);
    across = flat ? ceil_div(pixels, wide) : 1;
    cuts = std::clamp<int64_t>(ceil_div(kMinTasks, tiles()), 1, strips);
  }
  int64_t tiles() const { return down * across; }
  int64_t tasks() const { return tiles() * cuts; }
  int64_t first_strip(int64_t cut) const { return cut * strips / cuts; }
  Part part(int64_t tile) const {
    const int64_t row = tile / across, column = tile % across, begin = column * pixels / across;
    return {row * lines / down, (row + 1) * lines / down, begin, (column + 1) * pixels / across - begin};
  }
};

// All output of `images` images.
template <class T>
void run_convolution(const DirectConvolution<T>& c, int64_t images) {
  const int64_t size = static_cast<int64_t>(sizeof(T));
  const bool flat = c.flat();
  const Blocks blocks(flat, images, c.out.height, c.out.width, c.strips(), c.in.row_step * size * c.stride[0],
                      c.in.pixel_step * size, c.kernel.units * c.kernel.windows.lanes * c.strips() * 4);
  const int64_t work = images * c.out.height * c.out.width * c.out.channels * 16;
  parallel_tasks(blocks.tasks(), work, [&](int64_t task) {
    const int64_t tile = task / blocks.cuts, cut = task % blocks.cuts;
    const Part part = blocks.part(tile);
    Prefetcher next;
    // this thread will likely take the next task
    const int64_t later_tile = (task + 1) / blocks.cuts;
    if (tile < later_tile && later_tile < blocks.tiles()) {
      const Part later = blocks.part(later_tile);
      flat ? c.prefetch(true, later.column, later.column + later.pixels, next)
           : c.prefetch(false, later.first, later.last, next);
    }
    const int64_t first = blocks.first_strip(cut), last = blocks.first_strip(cut + 1);
    const int64_t together = c.kernel.windows.lanes < kPanel ? kNarrowPixels : kMaxPixels;
    next.spread((last - first) * (part.last - part.first) * ceil_div(part.pixels, together) * c.kernel.units, 0);
    if (cut == 0 && !flat)
      for (int64_t line = part.first; line < part.last; ++line)
        clear_halo(c.out, line / c.out.height, line % c.out.height, line % c.out.height + 1);
    for (int64_t strip = first, together; strip < last; strip += together) {
      together = c.kernel.windows.together(strip, last);
      for (int64_t line = part.first; line < part.last; ++line)
        flat ? c.line(0, 0, part.column, part.pixels, strip, together, next)
             : c.line(line / c.out.height, line % c.out.height, part.column, part.pixels, strip, together, next);
    }
  });
}

}  // namespace resfuse::cpu::RESFUSE_ISA

RESFUSE_TILES_END
#endif
