// scale_shift_relu_maxpool on CUDA: out = maxpool(relu(x*scale + shift)), the tail of the stem.
//
// Reads x once from memory, and again from cache where windows overlap; writes out and, as one byte, each window's
// arg-max in row-major order. Values are rounded to x's dtype: ties are decided on what a stock pool would see. The
// first maximum wins, the last NaN wins over everything, and padding never wins.
// Grid: as a walk over the pooled activation (walk.cuh). Limits: in contiguous memory a vector is one element.
// registers: pool_kernel <= 80
#include "pool.cuh"

namespace resfuse::cuda {

template <class T>
struct Pool {
  using A = acc_t<T>;
  static constexpr int kVectors = 2;
  const T* x;
  T* out;
  uint8_t* indices;
  const A *scale, *shift;
  PoolWindows windows;

  __device__ A vector(int k, int64_t c) const { return k == 0 ? scale[c] : shift[c]; }
};

// The best of a window so far, in each lane.
template <class T, int kWidth>
struct Best {
  using A = acc_t<T>;
  A most[kWidth];
  int at[kWidth];

  __device__ __forceinline__ Best() {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) most[j] = -A(INFINITY), at[j] = 0;
  }
  // kTaps neighbours in a row; the first one's number in the window is `first`. Those of [begin, end) are inside x.
  template <class S>
  __device__ __forceinline__ void add(const Vector<T, kWidth> (&values)[kTaps], int begin, int end, int first,
                                      const S& staged, int lane) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const Coefficients<A, Pool<T>::kVectors, kWidth> c(staged, j, lane);
#pragma unroll
      for (int k = 0; k < kTaps; ++k) {
        const A value = round_to<T>(clamp_below(load(values[k].values[j]) * c[0] + c[1], A(0)));
        const bool wins = k >= begin && k < end && (value > most[j] || value != value);
        most[j] = wins ? value : most[j];
        at[j] = wins ? first + k : at[j];
      }
    }
  }
};

template <class T, int kWidth>
struct PoolMemory {
  Staged<acc_t<T>, Pool<T>::kVectors, kWidth> staged;
};

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) pool_kernel(const Pool<T> call, const Walk walk) {
  auto& memory = shared_memory<PoolMemory<T, kWidth>>();
  memory.staged.fill(call, walk);
  const Position at(walk);
  if (at.column >= walk.columns) return;
  const PoolWindows& w = call.windows;
  Cursor cursor(walk, at);
#pragma unroll 1
  for (int64_t step = at.first; step < walk.steps; step += walk.stride, cursor.advance(walk)) {
    const Quotient image = divide(step, w.pooled_pixels), window = divide(image.remainder, w.width);
    const int top = w.vertical.origin(static_cast<int>(window.quotient)),
              left = w.horizontal.origin(static_cast<int>(window.remainder));
    const int64_t origin = w.image(image.quotient, at.column, w.pixels);
    Best<T, kWidth> best;
#pragma unroll 1
    for (int r = top < 0 ? -top : 0; r < w.vertical.kernel && top + r < w.vertical.size; ++r) {
      const int64_t row = origin + (int64_t{top} + r) * w.horizontal.size * w.pitch;
#pragma unroll 1
      for (int tap = 0; tap < w.horizontal.kernel; tap += kTaps) {
        const int x = left + tap, begin = -x, inside = w.horizontal.size - x, whole = w.horizontal.kernel - tap;
        const int end = inside < whole ? inside : whole;
        Vector<T, kWidth> values[kTaps];
#pragma unroll
        for (int k = 0; k < kTaps; ++k)
          if (k >= begin && k < end) values[k] = load_vector<T, kWidth>(call.x, row + (int64_t{x} + k) * w.pitch);
        best.add(values, begin, end, r * w.horizontal.kernel + tap, memory.staged, at.lane);
      }
    }
    Vector<T, kWidth> out;
    Vector<uint8_t, kWidth> indices;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      store(&out.values[j], best.most[j]);
      indices.values[j] = static_cast<uint8_t>(best.at[j]);
    }
    store_vector<T, kWidth>(call.out, cursor.index(), out);
    store_vector<uint8_t, kWidth>(call.indices, cursor.index(), indices);
  }
}

std::tuple<Tensor, Tensor> scale_shift_relu_maxpool(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                                    const Pair& kernel_size, const Pair& stride, const Pair& padding) {
  const Geometry g = pooled_geometry(x);
  const Windows windows = windows_of(x, kernel_size, stride, padding);
  Tensor out = empty_pooled(x, g, windows, x.scalar_type()), indices = empty_pooled(x, g, windows, ScalarType::Byte);
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const T* px = input_pointer<T>(x);
    T* po = output_pointer<T>(out);
    uint8_t* pi = output_pointer<uint8_t>(indices);
    const A *s = vector_pointer<A>(scale, x, "scale"), *t = vector_pointer<A>(shift, x, "shift");
    if (g.numel() == 0) return;
    const int64_t blocks = int64_t{multiprocessors(x)} * kBlocksPerProcessor;
    dispatch_pool_width<T>(g, {px, po, pi}, [&](auto width) {
      constexpr int kWidth = width();
      const Walk walk(g.batch, g.channels, windows.pixels(), g.channels_last, kWidth, blocks);
      const Pool<T> call{px, po, pi, s, t, PoolWindows(windows, g, walk)};
      launch("scale_shift_relu_maxpool", pool_kernel<T, kWidth>, grid_of(walk), sizeof(PoolMemory<T, kWidth>), x, call,
             walk);
    });
  });
  return {out, indices};
}

STABLE_TORCH_LIBRARY_IMPL(resfuse, CUDA, m) {
  m.impl("scale_shift_relu_maxpool", TORCH_BOX(&scale_shift_relu_maxpool));
}

}  // namespace resfuse::cuda
