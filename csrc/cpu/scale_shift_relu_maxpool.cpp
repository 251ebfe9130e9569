// scale_shift_relu_maxpool on the CPU: out = maxpool(relu(x*scale + shift)), the tail of the stem.
//
// Reads x once and writes out and, as one byte, each window's arg-max in row-major order. The activated rows under the
// current windows are kept in a ring, rounded to x's dtype: ties are decided on the values that a stock pool would see.
// The first maximum wins, the last NaN wins over everything, and padding never wins.
#include <limits>

#include "../pool_windows.h"
#include "rounding.h"
#include "walk.h"

namespace resfuse::cpu {

constexpr int64_t kPoolRows = 32;     // output rows that a thread pools at once
constexpr int64_t kNarrowPixel = 16;  // narrower pixels do not fill a vector: a row of windows is pooled at once

// How an activated row lies in the ring, so that what a tap reads for neighbouring lanes lies side by side.
//
// Wide pixels lie in their own order, and a window's lanes are its channels. Narrow ones, a contiguous plane's among
// them, are sorted by their position modulo the stride; then a row of windows has its lanes side by side.
struct RingRow {
  int64_t channels, used;           // of the input row, up to the last window's end
  int64_t padding, phases, length;  // pixels before the first, and pixels per phase
  int64_t windows, step, lanes;     // runs of lanes in an output row, the distance of their taps, their width
  std::vector<int64_t> offsets;     // of each tap in a row of a window

  RingRow(const Axis& axis, int64_t channels) : channels(channels), padding(axis.padding) {
    const int64_t count = axis.count();
    const bool narrow = channels < kNarrowPixel;
    used = std::min(axis.size, axis.origin(count - 1) + axis.kernel);
    phases = narrow ? axis.stride : 1;
    length = (count - 1) * (axis.stride / phases) + (axis.kernel - 1) / phases + 1;
    windows = narrow ? 1 : count;
    step = axis.stride * channels;
    lanes = narrow ? count * channels : channels;
    for (int64_t tap = 0; tap < axis.kernel; ++tap) offsets.push_back(place(tap - padding));
  }
  int64_t size() const { return phases * length * channels; }
  int64_t place(int64_t pixel) const {
    return ((pixel + padding) % phases * length + (pixel + padding) / phases) * channels;
  }
};

// lanes: scale, shift
template <class T>
RESFUSE_CLONES void activate_loop(const T* x, acc_t<T>* out, int64_t rows, int64_t width, const acc_t<T>* scale,
                                  const acc_t<T>* shift) {
  for (int64_t r = 0; r < rows; ++r, x += width, out += width) RESFUSE_INDEPENDENT
  for (int64_t j = 0; j < width; ++j) out[j] = round_to<T>(clamp_below(load(x[j]) * scale[j] + shift[j], acc_t<T>(0)));
}

template <class A>
RESFUSE_CLONES void every_second(const A* in, A* out, int64_t count) {
  RESFUSE_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) out[i] = in[2 * i];
}

template <class A>
void sort_by_phase(const RingRow& ring, const A* line, A* row) {
  for (int64_t first = 0; first < std::min(ring.phases, ring.used); ++first) {
    const int64_t count = ceil_div(ring.used - first, ring.phases), c = ring.channels;
    A* out = row + ring.place(first);
    if (ring.phases == 2 && c == 1)
      every_second(line + first, out, count);
    else
      for (int64_t i = 0; i < count; ++i) std::copy_n(line + (first + i * ring.phases) * c, c, out + i * c);
  }
}

// One output row: the maximum over `rows`, whose first is the window's row `top`, and its position in the window.
template <class T>
RESFUSE_CLONES void pool_loop(const RingRow& ring, const acc_t<T>* const* rows, int64_t count, int64_t top, T* out,
                              uint8_t* indices, acc_t<T>* best, acc_t<T>* index) {
  using A = acc_t<T>;
  const int64_t lanes = ring.lanes, kernel = static_cast<int64_t>(ring.offsets.size());
  for (int64_t window = 0; window < ring.windows; ++window, out += lanes, indices += lanes) {
    std::fill_n(best, lanes, -std::numeric_limits<A>::infinity());
    for (int64_t r = 0; r < count; ++r) {
      const A* row = rows[r] + window * ring.step;
      for_row_groups<kTaps>(kernel, [&](auto group, int64_t tap) RESFUSE_INLINE_LAMBDA {
        constexpr int kGroup = decltype(group)::value;
        const A first = static_cast<A>((top + r) * kernel + tap);
        const A* values[kGroup];
        for (int k = 0; k < kGroup; ++k) values[k] = row + ring.offsets[static_cast<size_t>(tap + k)];
        RESFUSE_INDEPENDENT
        for (int64_t j = 0; j < lanes; ++j) {
          A most = best[j], at = index[j];
          for (int k = 0; k < kGroup; ++k) {
            const A value = values[k][j];
            const bool wins = (value > most) | (value != value);
            most = wins ? value : most;
            at = wins ? first + static_cast<A>(k) : at;
          }
          best[j] = most;
          index[j] = at;
        }
      });
    }
    store_rows(out, 1, lanes, [=](int64_t, int64_t j) RESFUSE_INLINE_LAMBDA { return best[j]; });
    RESFUSE_INDEPENDENT
    for (int64_t j = 0; j < lanes; ++j) indices[j] = static_cast<uint8_t>(index[j]);
  }
}

// The operands of a forward call; an image is what one thread walks: (H, W, C), or one plane of a contiguous
// activation.
template <class T>
struct Forward {
  using A = acc_t<T>;
  const Windows& windows;
  const RingRow& ring;
  const T* x;
  T* out;
  uint8_t* indices;

  template <class L>
  void activate(const T* in, const L& lanes, int64_t repeat, A* line, A* row) const {
    A* target = ring.phases == 1 ? row + ring.place(0) : line;
    for_each_row_block(0, ring.used, ring.channels, repeat, [&](int64_t i, int64_t rows, int64_t width) {
      activate_loop<T>(in + i, target + i, rows, width, lanes[0], lanes[1]);
    });
    if (ring.phases > 1) sort_by_phase(ring, line, row);
  }

  // The output rows [begin, end) of one image.
  template <class L>
  void rows(int64_t image, int64_t begin, int64_t end, const L& lanes, int64_t repeat) const {
    const Axis& axis = windows.vertical;
    const int64_t in_row = windows.horizontal.size * ring.channels,
                  out_row = windows.horizontal.count() * ring.channels;
    Scratch<A> rows(axis.kernel * ring.size()), line(ring.phases > 1 ? in_row : 0), best(ring.lanes), index(ring.lanes);
    std::fill_n(rows.get(), axis.kernel * ring.size(), -std::numeric_limits<A>::infinity());  // padding stays so
    std::fill_n(index.get(), ring.lanes, A(0));
    std::vector<const A*> taken(static_cast<size_t>(axis.kernel));
    int64_t ready = 0;  // the rows below this are in the ring, or behind it
    for (int64_t o = begin; o < end; ++o) {
      const int64_t top = std::max<int64_t>(0, axis.origin(o)),
                    bottom = std::min(axis.size, axis.origin(o) + axis.kernel);
      for (int64_t i = top; i < bottom; ++i) {
        A* row = rows.get() + i % axis.kernel * ring.size();
        if (i >= ready) activate(x + (image * axis.size + i) * in_row, lanes, repeat, line.get(), row);
        taken[static_cast<size_t>(i - top)] = row;
      }
      ready = bottom;
      const int64_t at = (image * axis.count() + o) * out_row;
      pool_loop<T>(ring, taken.data(), bottom - top, top - axis.origin(o), out + at, indices + at, best.get(),
                   index.get());
    }
  }

  void run(const Geometry& g, const std::array<const A*, 2>& vectors) const {
    const int64_t images = g.channels_last ? g.batch : g.batch * g.channels;
    const int64_t repeat = g.channels_last ? pixels_per_row(g.channels) : std::min(ring.used, kPlaneLanes);
    const LaneVectors<A, 2> shared(vectors, g.channels, g.channels_last ? repeat : 1);
    const int64_t height = windows.vertical.count(), pieces = ceil_div(height, kPoolRows);
    parallel_tasks(images * pieces, g.numel(), [&](int64_t task) {
      const int64_t image = task / pieces, begin = task % pieces * kPoolRows;
      const PlaneLanes<A, 2> plane(vectors, image % g.channels, g.channels_last ? 0 : repeat);
      rows(image, begin, std::min(begin + kPoolRows, height), g.channels_last ? shared.pointers() : plane.pointers,
           repeat);
    });
  }
};

Tensor new_pooled(const Tensor& x, const Geometry& g, const Windows& windows, ScalarType dtype) {
  Tensor out = empty_pooled(x, g, windows, dtype);
  advise_huge_pages(out.mutable_data_ptr(), static_cast<size_t>(out.numel()) * out.element_size());
  return out;
}

std::tuple<Tensor, Tensor> scale_shift_relu_maxpool(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                                    const Pair& kernel_size, const Pair& stride, const Pair& padding) {
  const Geometry g = pooled_geometry(x);
  const Windows windows = windows_of(x, kernel_size, stride, padding);
  Tensor out = new_pooled(x, g, windows, x.scalar_type()), indices = new_pooled(x, g, windows, ScalarType::Byte);
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const std::array<const A*, 2> vectors = {vector_pointer<A>(scale, x, "scale"),
                                             vector_pointer<A>(shift, x, "shift")};
    if (g.numel() == 0) return;
    const RingRow ring(windows.horizontal, g.channels_last ? g.channels : 1);
    Forward<T>{windows, ring, input_pointer<T>(x), output_pointer<T>(out), output_pointer<uint8_t>(indices)}.run(
        g, vectors);
  });
  return {out, indices};
}

STABLE_TORCH_LIBRARY_IMPL(resfuse, CPU, m) { m.impl("scale_shift_relu_maxpool", TORCH_BOX(&scale_shift_relu_maxpool)); }

}  // namespace resfuse::cpu
