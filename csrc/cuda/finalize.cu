// finalize on CUDA: batch moments and affine parameters become two vectors, scale and shift.
//
//     scale = weight / sqrt(var + eps),  shift = bias - mean * scale
// and, where running statistics are given, they and their counter are updated in place, on the device.
// All work is of length C, in double. Grid: threads stride over channels. The cumulative average reads the counter that
// it increments: it takes one block, whose barrier stands between the two.
// registers: finalize_kernel <= 80
// registers: finalize_backward_kernel <= 80
#include "launch.cuh"

namespace resfuse::cuda {

// A per-channel tensor of any floating dtype, read and written as double; absent where data is null.
struct Channels {
  void* data = nullptr;
  int64_t stride = 1;
  ScalarType dtype = ScalarType::Float;

  template <class F>
  __device__ void with_element(int64_t c, const F& f) const {
    switch (dtype) {
      case ScalarType::Float: return f(static_cast<float*>(data) + c * stride);
      case ScalarType::BFloat16: return f(static_cast<BFloat16*>(data) + c * stride);
      case ScalarType::Half: return f(static_cast<Half*>(data) + c * stride);
      default: return f(static_cast<double*>(data) + c * stride);
    }
  }
  __device__ double get(int64_t c, double otherwise) const {
    if (data == nullptr) return otherwise;
    double value = 0;
    with_element(c, [&](const auto* element) { value = load(*element); });
    return value;
  }
  __device__ void set(int64_t c, double value) const {
    with_element(c, [&](auto* element) { store(element, static_cast<decltype(load(*element))>(value)); });
  }
};

Channels channels_of(const OptionalTensor& tensor, const Tensor& like, const char* name) {
  if (!tensor.has_value()) return {};
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == like.numel() && tensor->device() == like.device(),
                  "resfuse: ", name, " must be of shape (", like.numel(), ",) and on the statistics' device");
  dispatch_dtype(tensor->scalar_type(), [](auto) {});
  return {tensor->data_ptr(), tensor->stride(0), tensor->scalar_type()};
}

struct Finalize {
  Channels mean, var, weight, bias, running_mean, running_var;
  int64_t* batches;
  bool update, cumulative;
  double unbiased, momentum, eps;
  int64_t channels;
};

template <class A>
__global__ void __launch_bounds__(kThreads) finalize_kernel(const Finalize call, A* scale, A* shift) {
  const int64_t tracked = call.cumulative ? *call.batches + 1 : 0;
  const double factor = call.cumulative ? 1.0 / static_cast<double>(tracked) : call.momentum;
  __syncthreads();
  if (call.batches != nullptr && blockIdx.x == 0 && threadIdx.x == 0) ++*call.batches;
  for (int64_t c = int64_t{blockIdx.x} * kThreads + threadIdx.x; c < call.channels;
       c += int64_t{gridDim.x} * kThreads) {
    const double m = call.mean.get(c, 0), v = call.var.get(c, 0);
    const Affine<double> affine = affine_of(m, v, call.weight.get(c, 1), call.bias.get(c, 0), call.eps);
    scale[c] = static_cast<A>(affine.scale);
    shift[c] = static_cast<A>(affine.shift);
    if (!call.update) continue;
    call.running_mean.set(c, running_average(call.running_mean.get(c, 0), m, factor));
    call.running_var.set(c, running_average(call.running_var.get(c, 0), v * call.unbiased, factor));
  }
}

std::tuple<Tensor, Tensor> finalize(const Tensor& mean, const Tensor& var, int64_t count, const OptionalTensor& weight,
                                    const OptionalTensor& bias, const OptionalTensor& running_mean,
                                    const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                                    std::optional<double> momentum, double eps) {
  const int64_t channels = mean.numel();
  const ScalarType dtype = accumulate_dtype(mean);
  Finalize call{};
  call.mean = channels_of(mean, mean, "mean"), call.var = channels_of(var, mean, "var");
  call.weight = channels_of(weight, mean, "weight"), call.bias = channels_of(bias, mean, "bias");
  call.running_mean = channels_of(running_mean, mean, "running_mean");
  call.running_var = channels_of(running_var, mean, "running_var");
  if (num_batches_tracked.has_value()) {
    STD_TORCH_CHECK(num_batches_tracked->scalar_type() == ScalarType::Long && num_batches_tracked->numel() == 1 &&
                        num_batches_tracked->device() == mean.device(),
                    "resfuse: num_batches_tracked must be one int64 on the statistics' device");
    call.batches = static_cast<int64_t*>(num_batches_tracked->mutable_data_ptr());
  }
  // An empty batch is counted and leaves the running statistics alone: there is nothing to average in.
  call.update = running_mean.has_value() && running_var.has_value() && count > 0;
  call.cumulative = call.batches != nullptr && !momentum.has_value();
  call.unbiased = count > 1 ? static_cast<double>(count) / static_cast<double>(count - 1) : 1.0;
  call.momentum = momentum.value_or(0.0);
  call.eps = eps;
  call.channels = channels;

  Tensor scale = new_vector(mean, 1, channels, dtype), shift = new_vector(mean, 1, channels, dtype);
  if (channels == 0 && call.batches == nullptr) return {scale, shift};
  dispatch_dtype(dtype, [&](auto tag) {
    using A = acc_t<decltype(tag)>;
    const int blocks = call.cumulative ? 1 : std::max(1, grid_size(channels, mean));
    launch("finalize", finalize_kernel<A>, blocks, 0, mean, call, output_pointer<A>(scale), output_pointer<A>(shift));
  });
  return {scale, shift};
}

struct FinalizeBackward {
  Channels grad_centered, grad_shift, var, weight;
  double eps;
  int64_t channels;
};

template <class A>
__global__ void __launch_bounds__(kThreads)
    finalize_backward_kernel(const FinalizeBackward call, A* grad_mean, A* grad_var, A* grad_weight) {
  for (int64_t c = int64_t{blockIdx.x} * kThreads + threadIdx.x; c < call.channels;
       c += int64_t{gridDim.x} * kThreads) {
    const FinalizeGradient<double> grad = affine_gradient(call.grad_centered.get(c, 0), call.grad_shift.get(c, 0),
                                                          call.var.get(c, 0), call.weight.get(c, 1), call.eps);
    grad_mean[c] = static_cast<A>(grad.mean);
    grad_var[c] = static_cast<A>(grad.var);
    grad_weight[c] = static_cast<A>(grad.weight);
  }
}

// grad_centered is grad_scale - mean * grad_shift, which reductions sum directly as dz * (x - mean).
std::tuple<Tensor, Tensor, Tensor> finalize_backward(const Tensor& grad_centered, const Tensor& grad_shift,
                                                     const Tensor& var, const OptionalTensor& weight, double eps) {
  const int64_t channels = var.numel();
  const ScalarType dtype = accumulate_dtype(grad_shift);
  const FinalizeBackward call{channels_of(grad_centered, var, "grad_centered"),
                              channels_of(grad_shift, var, "grad_shift"),
                              channels_of(var, var, "var"),
                              channels_of(weight, var, "weight"),
                              eps,
                              channels};
  Tensor grad_mean = new_vector(var, 1, channels, dtype), grad_var = new_vector(var, 1, channels, dtype),
         grad_weight = new_vector(var, 1, channels, dtype);
  if (channels == 0) return {grad_mean, grad_var, grad_weight};
  dispatch_dtype(dtype, [&](auto tag) {
    using A = acc_t<decltype(tag)>;
    launch("finalize_backward", finalize_backward_kernel<A>, grid_size(channels, var), 0, var, call,
           output_pointer<A>(grad_mean), output_pointer<A>(grad_var), output_pointer<A>(grad_weight));
  });
  return {grad_mean, grad_var, grad_weight};
}

STABLE_TORCH_LIBRARY_IMPL(resfuse, CUDA, m) {
  m.impl("finalize", TORCH_BOX(&finalize));
  m.impl("finalize_backward", TORCH_BOX(&finalize_backward));
}

}  // namespace resfuse::cuda
