// A plan as `run_plan` takes it: a list of integers that holds sizes, values, chunks and steps, each a row of fields.
//
// resfuse/folding/program.py writes it; both sides name the same fields in the same order. Which memory of the arena is
// touched is checked here, before the first step runs; constants and inputs are checked by the step that reads them.
#pragma once

#include <algorithm>
#include <cstring>
#include <initializer_list>

#include "image.h"

namespace resfuse::cpu {

// values of a pixel, and of a vector of constants, come in such numbers: a panel of the widest instruction set
constexpr int64_t kStoredLanes = 32;

enum class StepKind : int64_t { kLoad, kStore, kConvolution, kWinograd, kConvolutionPool, kMaxPool, kGlobalPool, kMap };

// An activation in the arena. A local one holds the images of one chunk only.
struct ValueFields {
  int64_t offset;  // of its memory in the arena, in bytes, on a cache line
  int64_t local, images, height, width, channels, pixel_step, halo;

  int64_t row_step() const { return (width + 2 * halo) * pixel_step; }
  int64_t image_step() const { return (height + 2 * halo) * row_step(); }
};

// A run of steps, [first, last), that takes the batch `images` images at a time.
struct ChunkFields {
  int64_t first, last, images;
};

// One step. Indices of values and constants are -1 where there is none. The kernel of a convolution counts runs of
// `run` channels: a narrow input's row of taps is one run, and `kernel[1]` is then 1.
struct StepFields {
  StepKind kind;
  int64_t input, second, residual, output;  // values; for kLoad input, for kStore output is a tensor's index
  int64_t weight, bias;                     // constants
  int64_t relu, groups, run;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t size[2];  // of the map that a convolution's pool reads
  int64_t pool_kernel[2], pool_stride[2], pool_padding[2];
  int64_t second_stride[2];
};

constexpr int64_t kSlackBytes = 128;         // after every value: what a vector or a run reads beyond the last pixel
constexpr int64_t kMost = int64_t{1} << 30;  // of a step's numbers, so that no product of two leaves int64

struct Program {
  int64_t lanes = 0;  // of the vectors that its weights were packed for
  int64_t images = 0, arena_bytes = 0;
  std::vector<ValueFields> values;
  std::vector<ChunkFields> chunks;
  std::vector<StepFields> steps;

  explicit Program(const std::vector<int64_t>& data) {
    STD_TORCH_CHECK(data.size() >= 6, "resfuse: a program begins with six sizes");
    lanes = data[0];
    images = data[1];
    arena_bytes = data[2];
    const int64_t* at = data.data() + 6;
    const int64_t* end = data.data() + data.size();
    at = read(at, end, data[3], values);
    at = read(at, end, data[4], chunks);
    for (const int64_t* number = at; number < end; ++number)
      STD_TORCH_CHECK(*number >= -kMost && *number <= kMost, "resfuse: no step has a number as large as ", *number);
    at = read(at, end, data[5], steps);
    STD_TORCH_CHECK(at == end, "resfuse: a program ends with its last step");
    STD_TORCH_CHECK(images > 0 && arena_bytes >= 0, "resfuse: a program needs images and an arena");
  }

  const ValueFields& value(int64_t index) const {
    STD_TORCH_CHECK(index >= 0 && index < static_cast<int64_t>(values.size()), "resfuse: no value ", index);
    return values[static_cast<size_t>(index)];
  }

  // Every value inside the arena, every chunk a run of steps, every step on values of this program.
  void check(int64_t element_size) const {
    for (const ValueFields& v : values) {
      STD_TORCH_CHECK(v.images > 0 && v.height > 0 && v.width > 0 && v.channels > 0 && v.halo >= 0 &&
                          std::max({v.height, v.width, v.halo}) <= kMost,
                      "resfuse: a value must have a size");
      STD_TORCH_CHECK(
          v.pixel_step >= v.channels && v.offset >= 0 && v.offset % 64 == 0 && v.offset <= arena_bytes &&
              product_fits({element_size, v.images, v.height + 2 * v.halo, v.width + 2 * v.halo, v.pixel_step},
                           arena_bytes - v.offset - kSlackBytes),
          "resfuse: a value must lie in the arena");
    }
    int64_t next = 0;
    for (const ChunkFields& chunk : chunks) {
      STD_TORCH_CHECK(chunk.first == next && chunk.last >= chunk.first && chunk.images > 0,
                      "resfuse: chunks must cover the steps in order");
      next = chunk.last;
      for (int64_t i = chunk.first; i < chunk.last; ++i)
        check_step(steps.at(static_cast<size_t>(i)), chunk.images, 4 / element_size);
    }
    STD_TORCH_CHECK(next == static_cast<int64_t>(steps.size()), "resfuse: chunks must cover the steps");
  }

 private:
  // Whether a product of positive factors, which may not fit into int64, is at most this.
  static bool product_fits(std::initializer_list<int64_t> factors, int64_t most) {
    for (const int64_t factor : factors) most = std::max<int64_t>(most, 0) / factor;
    return most > 0;
  }

  template <class F>
  static const int64_t* read(const int64_t* at, const int64_t* end, int64_t count, std::vector<F>& rows) {
    constexpr int64_t kFields = sizeof(F) / sizeof(int64_t);
    STD_TORCH_CHECK(count >= 0 && count <= (end - at) / kFields, "resfuse: a program is shorter than its sizes say");
    rows.resize(static_cast<size_t>(count));
    if (count > 0) std::memcpy(static_cast<void*>(rows.data()), at, static_cast<size_t>(count) * sizeof(F));
    return at + count * kFields;
  }

  void check_images(const ValueFields& v, int64_t chunk) const {
    STD_TORCH_CHECK(v.images >= (v.local != 0 ? std::min(chunk, images) : images),
                    "resfuse: a value holds fewer images than a step takes");
  }

  void check_step(const StepFields& s, int64_t chunk, int64_t unit) const {
    STD_TORCH_CHECK(s.kind >= StepKind::kLoad && s.kind <= StepKind::kMap, "resfuse: no such step");
    if (s.kind != StepKind::kLoad) check_images(value(s.input), chunk);
    if (s.kind != StepKind::kStore) check_images(value(s.output), chunk);
    if (s.kind == StepKind::kLoad || s.kind == StepKind::kStore) return;
    const ValueFields &in = value(s.input), &out = value(s.output);
    if (s.residual >= 0) {
      const ValueFields& r = value(s.residual);
      check_images(r, chunk);
      STD_TORCH_CHECK(r.height == out.height && r.width == out.width && r.channels == out.channels,
                      "resfuse: a residual must have its output's shape");
    }
    if (s.second >= 0) check_second(s, value(s.second), out, chunk, unit);
    STD_TORCH_CHECK(out.pixel_step >= round_up(out.channels, kStoredLanes), "resfuse: an output is stored in vectors");
    const bool pooled = s.kind == StepKind::kConvolutionPool;
    if (s.kind == StepKind::kGlobalPool || s.kind == StepKind::kMap || s.kind == StepKind::kMaxPool)
      STD_TORCH_CHECK(in.channels == out.channels, "resfuse: this step keeps its channels");
    if (s.kind == StepKind::kGlobalPool)
      STD_TORCH_CHECK(out.height == 1 && out.width == 1, "resfuse: a global pool has one pixel");
    if (s.kind == StepKind::kMap)
      STD_TORCH_CHECK(in.height == out.height && in.width == out.width, "resfuse: a map keeps its pixels");
    if (s.kind == StepKind::kMaxPool) check_pool(s, in.height, in.width, out);
    if (pooled) {
      STD_TORCH_CHECK(s.residual < 0, "resfuse: a convolution that ends in a pool adds nothing");
      check_pool(s, s.size[0], s.size[1], out);
    }
    if (pooled || s.kind == StepKind::kConvolution)
      check_windows(s, in, pooled ? s.size[0] : out.height, pooled ? s.size[1] : out.width, unit);
    if (s.kind == StepKind::kWinograd)
      STD_TORCH_CHECK(out.height == in.height && out.width == in.width && in.pixel_step >= round_up(in.channels, 16),
                      "resfuse: a Winograd step keeps the size of its map");
  }

  // that a second activation has a pixel for each of the output's
  void check_second(const StepFields& s, const ValueFields& second, const ValueFields& out, int64_t chunk,
                    int64_t unit) const {
    check_images(second, chunk);
    STD_TORCH_CHECK(s.groups == 1 && s.kind == StepKind::kConvolution && s.second_stride[0] > 0 &&
                        s.second_stride[1] > 0 && (out.height - 1) * s.second_stride[0] < second.height &&
                        (out.width - 1) * s.second_stride[1] < second.width && second.channels % unit == 0 &&
                        second.pixel_step % unit == 0,
                    "resfuse: a second activation must have a pixel for each of the output's");
  }

  // that there is a map, and every window holds a pixel of it
  static void check_pool(const StepFields& s, int64_t height, int64_t width, const ValueFields& out) {
    const int64_t in[2] = {height, width}, count[2] = {out.height, out.width};
    for (int axis = 0; axis < 2; ++axis)
      STD_TORCH_CHECK(in[axis] > 0 && s.pool_kernel[axis] > s.pool_padding[axis] && s.pool_padding[axis] >= 0 &&
                          s.pool_stride[axis] > 0 &&
                          (count[axis] - 1) * s.pool_stride[axis] - s.pool_padding[axis] < in[axis],
                      "resfuse: a pool's windows must lie on its map");
  }

  // that the last window ends within the value, borders and slack included
  static void check_windows(const StepFields& s, const ValueFields& in, int64_t height, int64_t width, int64_t unit) {
    for (int axis = 0; axis < 2; ++axis)
      STD_TORCH_CHECK(s.kernel[axis] > 0 && s.stride[axis] > 0 && s.dilation[axis] > 0 && s.padding[axis] >= 0 &&
                          s.padding[axis] <= in.halo,
                      "resfuse: a convolution's padding must lie in its input's border");
    const int64_t row = (height - 1) * s.stride[0] + (s.kernel[0] - 1) * s.dilation[0] - s.padding[0];
    const int64_t column = (width - 1) * s.stride[1] + (s.kernel[1] - 1) * s.dilation[1] - s.padding[1];
    const int64_t columns = ceil_div(s.run, in.pixel_step);
    STD_TORCH_CHECK(row < in.height + in.halo && column + columns <= in.width + in.halo && s.run > 0,
                    "resfuse: a convolution's windows must lie in its input");
    STD_TORCH_CHECK(in.row_step() % unit == 0 && s.stride[1] * in.pixel_step % unit == 0 &&
                        (in.halo - s.padding[1]) * in.pixel_step % unit == 0 &&
                        (s.kernel[1] == 1 || s.dilation[1] * in.pixel_step % unit == 0),
                    "resfuse: a convolution reads whole units");
  }
};

}  // namespace resfuse::cpu
