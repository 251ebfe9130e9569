// Stands in for torch's header: the host is one device with one stream.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>

namespace torch::stable::accelerator {

using DeviceIndex = int32_t;

class DeviceGuard {
 public:
  explicit DeviceGuard(DeviceIndex) {}
};

}  // namespace torch::stable::accelerator

inline AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
