// How a kernel reaches the GPU: the size of its grid, and the one macro through which every kernel is launched.
//
// Nothing here synchronises, and memory comes from torch's allocator: everything may run inside a CUDA graph's capture.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <type_traits>

#include "../checks.h"
#include "reduce.cuh"

// The launch is a macro because its syntax is nvcc's alone: a stand-in for the CUDA runtime brings its own.
#if defined(__CUDACC__)
#define RESFUSE_LAUNCH(kernel, grid, shared_bytes, stream, ...) \
  kernel<<<grid, ::resfuse::cuda::kThreads, shared_bytes, stream>>>(__VA_ARGS__)
#endif

namespace resfuse::cuda {

constexpr int kKnownDevices = 64;

inline void check_cuda(cudaError_t error, const char* action, const char* object) {
  STD_TORCH_CHECK(error == cudaSuccess, "resfuse: ", action, " ", object, " failed: ", cudaGetErrorString(error));
}

// The number of multiprocessors of the tensor's device, asked for once.
inline int multiprocessors(const Tensor& tensor) {
  static std::atomic<int> known[kKnownDevices];
  const int device = std::max(0, static_cast<int>(tensor.get_device_index()));
  int count = device < kKnownDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (count == 0) {
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "reading",
               "the number of multiprocessors");
    if (device < kKnownDevices) known[device].store(count, std::memory_order_relaxed);
  }
  return count;
}

// The blocks of a grid-stride loop over `tasks` tasks, one per thread: as many as there is work for, at most as many as
// run at once.
inline int grid_size(int64_t tasks, const Tensor& tensor) {
  return static_cast<int>(
      std::min((tasks + kThreads - 1) / kThreads, int64_t{multiprocessors(tensor)} * kBlocksPerProcessor));
}

// Run `kernel` on the tensor's device, in its current stream; `name` is what an error calls the kernel.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, size_t shared_bytes, const Tensor& tensor,
            const Arguments&... arguments) {
  const torch::stable::accelerator::DeviceGuard guard(tensor.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  RESFUSE_LAUNCH(kernel, grid, shared_bytes, static_cast<cudaStream_t>(stream), arguments...);
  check_cuda(cudaGetLastError(), "launching", name);
}

inline bool is_aligned(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; });
}

// Call f(width) with the width of a vector: 16 bytes where they fit into an activation's channels or planes and every
// pointer is aligned, else one element.
template <class T, class F>
void dispatch_width(const Geometry& g, std::initializer_list<const void*> pointers, const F& f) {
  constexpr int kWidth = kVectorBytes / sizeof(T);
  const bool whole = (g.channels_last ? g.channels : g.pixels) % kWidth == 0;
  if (whole && is_aligned(pointers)) return f(std::integral_constant<int, kWidth>{});
  f(std::integral_constant<int, 1>{});
}

// From a channel's first element to the next one's.
inline int64_t channel_stride(const Geometry& g) { return g.channels_last ? 1 : g.pixels; }

// How an operator walks over an activation: as many blocks as run at once.
template <class Op>
Walk walk_of(const Geometry& g, int width, const Tensor& x) {
  return Walk(g.batch, g.channels, g.pixels, g.channels_last, width, int64_t{multiprocessors(x)} * Op::kBlocks);
}

inline dim3 grid_of(const Walk& walk) {
  return dim3(static_cast<unsigned>(walk.tiles), static_cast<unsigned>(walk.slabs));
}

// Run an operator over an activation that is not empty.
template <int kWidth, class Op>
void map(const char* name, const Op& op, const Geometry& g, const Tensor& x) {
  const Walk walk = walk_of<Op>(g, kWidth, x);
  launch(name, map_kernel<Op, kWidth>, grid_of(walk), sizeof(MapMemory<Op, kWidth>), x, op, walk);
}

// Run an operator over an activation that is not empty, and reduce: out has the reduction's values, each (C,).
template <int kWidth, class Op, class A, int kValues>
void reduce(const char* name, const Op& op, const Geometry& g, const Tensor& x, const Outputs<A, kValues>& out) {
  using R = typename Op::Reduction::Total;
  static_assert(kValues == R::kValues, "one output for each value");
  const Walk walk = walk_of<Op>(g, kWidth, x);
  const Tensor scratch = torch::stable::new_empty(x, {walk.slabs, kValues, g.channels}, ScalarType::Double);
  double* partials = output_pointer<double>(scratch);
  launch(name, reduce_kernel<Op, kWidth>, grid_of(walk), sizeof(ReduceMemory<Op, kWidth>), x, op, walk, partials);
  const dim3 blocks(static_cast<unsigned>((g.channels + kMergeLanes - 1) / kMergeLanes));
  launch(name, merge_kernel<R, A>, blocks, sizeof(Exchange<R, 1>), x, partials, out, walk, g.channels);
}

}  // namespace resfuse::cuda
