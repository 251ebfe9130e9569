// finalize on the CPU: batch moments and affine parameters become two vectors, scale and shift.
//
//     scale = weight / sqrt(var + eps),  shift = bias - mean * scale
// and, where running statistics are given, they and their counter are updated in place. All work is of length C.
#include "memory.h"

namespace resfuse::cpu {

// A per-channel tensor of any floating dtype, read and written as double.
class Channels {
 public:
  Channels(const OptionalTensor& tensor, int64_t channels, const char* name) {
    if (!tensor.has_value()) return;
    STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == channels && tensor->is_cpu(), "resfuse: ", name,
                    " must be a CPU tensor of shape (", channels, ",)");
    data_ = tensor->data_ptr();
    stride_ = tensor->stride(0);
    dtype_ = tensor->scalar_type();
    dispatch_dtype(dtype_, [](auto) {});
  }
  explicit operator bool() const { return data_ != nullptr; }

  double get(int64_t c, double otherwise) const {
    if (data_ == nullptr) return otherwise;
    double value = 0;
    dispatch_dtype(dtype_, [&](auto tag) { value = load(static_cast<const decltype(tag)*>(data_)[c * stride_]); });
    return value;
  }
  void set(int64_t c, double value) {
    dispatch_dtype(dtype_, [&](auto tag) {
      using T = decltype(tag);
      store(static_cast<T*>(data_) + c * stride_, static_cast<acc_t<T>>(value));
    });
  }

 private:
  void* data_ = nullptr;
  int64_t stride_ = 1;
  ScalarType dtype_ = ScalarType::Float;
};

// The weight of this batch in the running average; momentum None means the cumulative average 1 / batches.
double average_factor(const OptionalTensor& batches, std::optional<double> momentum) {
  if (!batches.has_value()) return momentum.value_or(0.0);
  STD_TORCH_CHECK(batches->scalar_type() == ScalarType::Long && batches->numel() == 1 && batches->is_cpu(),
                  "resfuse: num_batches_tracked must be one int64 on the CPU");
  const int64_t tracked = ++*static_cast<int64_t*>(batches->mutable_data_ptr());
  return momentum.has_value() ? *momentum : 1.0 / static_cast<double>(tracked);
}

std::tuple<Tensor, Tensor> finalize(const Tensor& mean, const Tensor& var, int64_t count, const OptionalTensor& weight,
                                    const OptionalTensor& bias, const OptionalTensor& running_mean,
                                    const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                                    std::optional<double> momentum, double eps) {
  const int64_t channels = mean.numel();
  const ScalarType dtype = accumulate_dtype(mean);
  const Channels means(mean, channels, "mean"), vars(var, channels, "var"), weights(weight, channels, "weight"),
      biases(bias, channels, "bias");
  Channels running_means(running_mean, channels, "running_mean"), running_vars(running_var, channels, "running_var");
  Tensor scale = new_vector(mean, 1, channels, dtype), shift = new_vector(mean, 1, channels, dtype);

  // An empty batch is counted and leaves the running statistics alone: there is nothing to average in.
  const bool update = running_means && running_vars && count > 0;
  const double factor = average_factor(num_batches_tracked, momentum);
  const double unbiased = count > 1 ? static_cast<double>(count) / static_cast<double>(count - 1) : 1.0;
  dispatch_dtype(dtype, [&](auto tag) {
    using A = acc_t<decltype(tag)>;
    auto *ps = output_pointer<A>(scale), *pt = output_pointer<A>(shift);
    for (int64_t c = 0; c < channels; ++c) {
      const double m = means.get(c, 0), v = vars.get(c, 0);
      const Affine<double> affine = affine_of(m, v, weights.get(c, 1), biases.get(c, 0), eps);
      ps[c] = static_cast<A>(affine.scale);
      pt[c] = static_cast<A>(affine.shift);
      if (!update) continue;
      running_means.set(c, running_average(running_means.get(c, 0), m, factor));
      running_vars.set(c, running_average(running_vars.get(c, 0), v * unbiased, factor));
    }
  });
  return {scale, shift};
}

// grad_centered is grad_scale - mean * grad_shift, which reductions sum directly as dz * (x - mean).
std::tuple<Tensor, Tensor, Tensor> finalize_backward(const Tensor& grad_centered, const Tensor& grad_shift,
                                                     const Tensor& var, const OptionalTensor& weight, double eps) {
  const int64_t channels = var.numel();
  const ScalarType dtype = accumulate_dtype(grad_shift);
  const Channels centered(grad_centered, channels, "grad_centered"), shifts(grad_shift, channels, "grad_shift"),
      vars(var, channels, "var"), weights(weight, channels, "weight");
  Tensor grad_mean = new_vector(var, 1, channels, dtype), grad_var = new_vector(var, 1, channels, dtype),
         grad_weight = new_vector(var, 1, channels, dtype);
  dispatch_dtype(dtype, [&](auto tag) {
    using A = acc_t<decltype(tag)>;
    auto *pm = output_pointer<A>(grad_mean), *pv = output_pointer<A>(grad_var), *pw = output_pointer<A>(grad_weight);
    for (int64_t c = 0; c < channels; ++c) {
      const FinalizeGradient<double> grad =
          affine_gradient(centered.get(c, 0), shifts.get(c, 0), vars.get(c, 0), weights.get(c, 1), eps);
      pm[c] = static_cast<A>(grad.mean);
      pv[c] = static_cast<A>(grad.var);
      pw[c] = static_cast<A>(grad.weight);
    }
  });
  return {grad_mean, grad_var, grad_weight};
}

STABLE_TORCH_LIBRARY_IMPL(resfuse, CPU, m) {
  m.impl("finalize", TORCH_BOX(&finalize));
  m.impl("finalize_backward", TORCH_BOX(&finalize_backward));
}

}  // namespace resfuse::cpu
