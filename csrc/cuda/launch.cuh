// How a kernel reaches the GPU: the size of its grid, and the one function through which every kernel is launched.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "../checks.h"

namespace resfuse::cuda {

// A multiprocessor runs kBlocksPerProcessor blocks of kThreads at once, which leaves a thread 64 registers. With four
// 16-byte loads a thread that is 64 KiB in flight, above what any GPU's bandwidth times latency asks of one.
constexpr int kThreads = 256;
constexpr int kBlocksPerProcessor = 4;
static_assert(kThreads * kBlocksPerProcessor <= 1024, "every GPU since sm_75 runs 1024 threads per multiprocessor");

inline void check_cuda(cudaError_t error, const char* action, const char* object) {
  STD_TORCH_CHECK(error == cudaSuccess, "resfuse: ", action, " ", object, " failed: ", cudaGetErrorString(error));
}

// The blocks of a grid-stride loop over `tasks` tasks, one per thread: as many as there is work for, at most as many as
// the tensor's device runs at once.
inline int grid_size(int64_t tasks, const Tensor& tensor) {
  int processors = 0;
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, tensor.get_device_index()), "reading",
             "the number of multiprocessors");
  return static_cast<int>(std::min<int64_t>((tasks + kThreads - 1) / kThreads, processors * kBlocksPerProcessor));
}

// Run `kernel` on the tensor's device, in its current stream; `name` is what an error calls the kernel.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int blocks, const Tensor& tensor, Arguments... arguments) {
  const torch::stable::accelerator::DeviceGuard guard(tensor.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check_cuda(cudaGetLastError(), "launching", name);
}

}  // namespace resfuse::cuda
