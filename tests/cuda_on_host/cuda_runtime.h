// Stands in for CUDA's header where a .cu file is compiled as C++ for the host: what the kernels use of CUDA, and no
// more. A launch runs at once; see executor.h.
#pragma once

#include <utility>

#include "executor.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (::cuda_on_host::thread_index())
#define blockIdx (::cuda_on_host::Executor::instance().block_index())
#define blockDim (::cuda_on_host::Executor::instance().block())
#define gridDim (::cuda_on_host::Executor::instance().grid())

namespace cuda_on_host {

constexpr int kMultiprocessors = 2;  // few, so that small tensors take several rounds of a loop
constexpr size_t kMostSharedBytes = 49152;
constexpr unsigned kMostBlocksY = 65535;

inline Index thread_index() { return {Executor::instance().thread_index(), 0, 0}; }

}  // namespace cuda_on_host

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}  // NOLINT: as CUDA's, it converts
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
using cudaStream_t = void*;

namespace cuda_on_host {
inline cudaError_t last_error = cudaSuccess;
inline bool fail_next_launch = false;

// What CUDA refuses, so does this, in the same way: the next cudaGetLastError tells.
template <class Kernel, class... Arguments>
void launch(Kernel kernel, dim3 grid, unsigned threads, size_t shared_bytes, const Arguments&... arguments) {
  if (std::exchange(fail_next_launch, false) || grid.x == 0 || grid.y == 0 || grid.y > kMostBlocksY ||
      shared_bytes > kMostSharedBytes) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  Executor::instance().launch({grid.x, grid.y, grid.z}, threads, shared_bytes, [&] { kernel(arguments...); });
}

}  // namespace cuda_on_host

inline cudaError_t cudaGetLastError() { return std::exchange(cuda_on_host::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = cuda_on_host::kMultiprocessors;
  return cudaSuccess;
}

inline void __syncthreads(int line = __builtin_LINE()) { cuda_on_host::Executor::instance().barrier(line); }

template <class T>
T __shfl_down_sync(unsigned, T value, unsigned delta, int line = __builtin_LINE()) {
  auto& executor = cuda_on_host::Executor::instance();
  return executor.shuffle(value, executor.thread_index() % cuda_on_host::kWarp + delta, line);
}

#define RESFUSE_LAUNCH(kernel, grid, shared_bytes, stream, ...) \
  ((void)(stream), ::cuda_on_host::launch(kernel, grid, ::resfuse::cuda::kThreads, shared_bytes, __VA_ARGS__))

namespace resfuse::cuda {

template <class S>
S& shared_memory() {
  return *static_cast<S*>(::cuda_on_host::Executor::instance().shared_memory());
}

}  // namespace resfuse::cuda
