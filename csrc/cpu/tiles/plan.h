// The geometry of a convolution, forward or backward to its input, as tiles of output pixels over patches of input.
//
// A tile is a block of base pixels; a patch holds every input pixel that they need, padding included, so that a tap of
// the kernel is one constant offset. Forward, base pixel b is output pixel b, and its input begins at b * stride -
// padding. Backward, output pixels (those of the input's gradient) fall into stride * stride phases; in each, base
// pixel b stands for output pixel b * stride + phase and sees only the taps that reach it. Where nothing but pixels
// counts (1x1, stride 1), all images are one row.
#pragma once

#include <algorithm>
#include <vector>

#include "../../checks.h"
#include "../walk.h"
#include "workspace.h"

namespace resfuse::cpu {

// One axis of a convolution.
struct ConvAxis {
  int64_t in, out, kernel, stride, padding, dilation;
};

struct ConvShape {
  int64_t images, in_channels, out_channels;
  ConvAxis height, width;
  int64_t groups = 1;

  int64_t taps() const { return height.kernel * width.kernel; }
  bool pointwise() const { return taps() == 1 && height.padding == 0 && width.padding == 0; }
};

struct Range {
  int64_t begin, end;
};

// The channels of one side, `to` in all, that share a group with channels `of` the other side, `from` in all.
inline Range same_groups(Range of, int64_t from, int64_t to, int64_t groups) {
  const int64_t step = from / groups, to_step = to / groups;
  return {of.begin / step * to_step, ((of.end - 1) / step + 1) * to_step};
}

// A tap of one axis: which kernel element, and where its pixel lies in the patch, relative to the base pixel's.
struct AxisTap {
  int64_t kernel, offset;
};

struct AxisPhase {
  int64_t phase;
  std::vector<AxisTap> taps;
};

// How base pixels of one axis relate to the pixels of input and output.
struct AxisPlan {
  int64_t in, out;
  int64_t base;       // number of base pixels
  int64_t in_step;    // input pixels between patch pixels: a strided 1x1 convolution skips what nobody reads
  int64_t base_step;  // patch pixels between base pixels
  int64_t out_step;   // output pixels between base pixels
  int64_t origin;     // the patch pixel of base pixel 0, in the input: negative where the input is padded
  int64_t span;       // patch pixels beyond the base pixel's
  std::vector<AxisPhase> phases;

  int64_t patch(int64_t bases) const { return (bases - 1) * base_step + 1 + span; }
};

inline AxisPlan forward_axis(const ConvAxis& a) {
  const bool skips = a.kernel == 1 && a.padding == 0;
  AxisPlan plan{a.in,
                a.out,
                a.out,
                skips ? a.stride : 1,
                skips ? 1 : a.stride,
                1,
                -a.padding,
                (a.kernel - 1) * a.dilation,
                {AxisPhase{0, {}}}};
  for (int64_t k = 0; k < a.kernel; ++k) plan.phases[0].taps.push_back({k, k * a.dilation});
  return plan;
}

inline AxisPlan backward_axis(const ConvAxis& a) {
  AxisPlan plan{a.out, a.in, ceil_div(a.in, a.stride), 1, 1, a.stride, 0, 0, {}};
  int64_t low = 0, high = 0;
  bool any = false;
  for (int64_t phase = 0; phase < a.stride; ++phase) {
    AxisPhase found{phase, {}};
    for (int64_t k = 0; k < a.kernel; ++k) {
      const int64_t shifted = phase + a.padding - k * a.dilation;
      if (shifted % a.stride != 0) continue;
      const int64_t offset = shifted / a.stride;
      low = any ? std::min(low, offset) : offset;
      high = any ? std::max(high, offset) : offset;
      any = true;
      found.taps.push_back({k, offset});
    }
    plan.phases.push_back(found);
  }
  plan.origin = low;
  plan.span = high - low;
  for (AxisPhase& phase : plan.phases)
    for (AxisTap& tap : phase.taps) tap.offset -= low;
  return plan;
}

constexpr int64_t kMinTiles = 16;  // of a 1x1 convolution, so that threads finish together

struct Tile {
  int64_t image, row, rows, column, columns;  // base pixels
};

struct Plan {
  int64_t images, in_channels, out_channels, groups;
  AxisPlan height, width;
  int64_t rows, columns;  // base pixels of a full tile

  // `flat`: all images of a 1x1 convolution are one row
  Plan(const ConvShape& shape, bool backward, int64_t element_size, int64_t target_pixels, int64_t target_bytes,
       bool flat = true)
      : images(shape.images), in_channels(shape.in_channels), out_channels(shape.out_channels), groups(shape.groups) {
    ConvAxis h = shape.height, w = shape.width;
    if (flat && shape.pointwise() && h.stride == 1 && w.stride == 1) {
      w.in = w.out = images * h.in * w.in;
      images = h.in = h.out = 1;
    }
    if (backward) std::swap(in_channels, out_channels);
    height = backward ? backward_axis(h) : forward_axis(h);
    width = backward ? backward_axis(w) : forward_axis(w);
    choose_tile(element_size, target_pixels, target_bytes);
  }

  int64_t tiles_down() const { return ceil_div(height.base, rows); }
  int64_t tiles_across() const { return ceil_div(width.base, columns); }
  int64_t tiles() const { return images * tiles_down() * tiles_across(); }

  Tile tile(int64_t index) const {
    const int64_t across = index % tiles_across(), rest = index / tiles_across();
    const int64_t down = rest % tiles_down(), row = down * rows, column = across * columns;
    return {rest / tiles_down(), row, std::min(rows, height.base - row), column,
            std::min(columns, width.base - column)};
  }

  int64_t patch_pixels() const { return height.patch(rows) * width.patch(columns); }

  // The plan of another activation that is read beside this one's: the same tiles.
  Plan beside(Plan other) const {
    STD_TORCH_CHECK(other.images == images && other.height.base == height.base && other.width.base == width.base,
                    "resfuse: two activations read together must have as many pixels");
    other.rows = rows;
    other.columns = columns;
    return other;
  }

 private:
  // Whole rows of base pixels; only the one long row of a 1x1 convolution is cut.
  void choose_tile(int64_t element_size, int64_t pixels, int64_t bytes) {
    const int64_t per_base = height.out_step * width.out_step, row_bytes = in_channels * element_size;
    const bool flat = images == 1 && height.out == 1 && height.base == 1 && height.span == 0 && width.span == 0;
    columns = width.base;
    if (flat) columns = std::clamp<int64_t>(std::min(pixels, bytes / row_bytes), 28, 448) / 14 * 14;
    if (flat) columns = std::min(columns, std::max<int64_t>(width.base / kMinTiles / 14 * 14, 28));
    rows = std::clamp<int64_t>(pixels / (columns * per_base), 1, height.base);
    while (rows > 1 && patch_pixels() * row_bytes > bytes) --rows;
    rows = ceil_div(height.base, ceil_div(height.base, rows));  // tiles of equal height
    columns = std::min(columns, width.base);
  }
};

}  // namespace resfuse::cpu
