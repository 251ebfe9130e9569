// What every kernel asks of its tensors before it touches their memory: device, dtype, layout and sizes.
//
// These are safety checks. Errors that a user can cause are raised, in the user's terms, by resfuse/functional.py.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "math.h"

namespace resfuse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// An activation (N, C, H, W) as memory sees it: dense, channels innermost or outermost.
struct Geometry {
  int64_t batch;
  int64_t channels;
  int64_t pixels;
  bool channels_last;

  int64_t rows() const { return batch * pixels; }
  int64_t numel() const { return batch * channels * pixels; }
};

inline bool dense_in_order(const Tensor& x, const int (&order)[4]) {
  int64_t expected = 1;
  for (int dim : order) {
    if (x.size(dim) != 1 && x.stride(dim) != expected) return false;
    expected *= x.size(dim);
  }
  return true;
}

inline Geometry geometry_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "resfuse: an activation must be (N, C, H, W), got ", x.dim(), " dimensions");
  // A tensor that is dense in both orders is one value wide in C or in H*W, where the two walks are the same.
  const bool channels_last = dense_in_order(x, {1, 3, 2, 0});
  STD_TORCH_CHECK(x.numel() == 0 || channels_last || dense_in_order(x, {3, 2, 1, 0}),
                  "resfuse: an activation must be dense, contiguous or channels_last");
  return {x.size(0), x.size(1), x.size(2) * x.size(3), channels_last};
}

inline bool same_layout(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) != b.size(i) || (a.size(i) != 1 && a.stride(i) != b.stride(i))) return false;
  return true;
}

inline void check_like(const Tensor& tensor, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type() && tensor.device() == x.device(), "resfuse: ", name,
                  " must have the first tensor's dtype and device");
  STD_TORCH_CHECK(x.numel() == tensor.numel() && (x.numel() == 0 || same_layout(tensor, x)), "resfuse: ", name,
                  " must have the first tensor's shape and strides");
}

// Equal shapes and strides, with every element of the storage range used once.
inline void check_flat(const Tensor& x, const Tensor& other, const char* name) {
  check_like(other, x, name);
  int64_t last = 0;
  for (int64_t i = 0; i < x.dim(); ++i) last += (x.size(i) - 1) * x.stride(i);
  STD_TORCH_CHECK(x.numel() == 0 || last + 1 == x.numel(), "resfuse: tensors must be dense");
}

inline ScalarType accumulate_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_vector(const Tensor& vector, int64_t channels, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(vector.dim() == 1 && vector.size(0) == channels && vector.is_contiguous(), "resfuse: ", name,
                  " must be contiguous of shape (", channels, ",)");
  STD_TORCH_CHECK(vector.scalar_type() == dtype, "resfuse: ", name, " has the wrong dtype");
}

// A per-channel vector in x's accumulation dtype, or null where it is absent.
template <class A>
const A* vector_pointer(const OptionalTensor& vector, const Tensor& x, const char* name) {
  if (!vector.has_value()) return nullptr;
  STD_TORCH_CHECK(vector->device() == x.device(), "resfuse: ", name, " must be on the activation's device");
  check_vector(*vector, x.size(1), accumulate_dtype(x), name);
  return static_cast<const A*>(vector->const_data_ptr());
}

template <class T>
const T* input_pointer(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
const T* input_pointer(const OptionalTensor& x) {
  return x.has_value() ? input_pointer<T>(*x) : nullptr;
}

template <class T>
T* output_pointer(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Call f with a value of the storage type that `dtype` names.
template <class F>
void dispatch_dtype(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Half{});
    case ScalarType::Double: return f(double{});
    default: STD_TORCH_CHECK(false, "resfuse: dtype must be float16, bfloat16, float32 or float64");
  }
}

inline Tensor new_vector(const Tensor& x, int64_t rows, int64_t columns, ScalarType dtype) {
  if (rows == 1) return torch::stable::new_empty(x, {columns}, dtype);
  return torch::stable::new_empty(x, {rows, columns}, dtype);
}

// Check that what normalises a raw residual comes with it.
inline void check_raw_branch(const OptionalTensor& residual, const OptionalTensor& scale, const OptionalTensor& shift,
                             const OptionalTensor& mean) {
  STD_TORCH_CHECK(!residual.has_value() || (scale.has_value() && shift.has_value() && mean.has_value()),
                  "resfuse: residual_scale, residual_shift and residual_mean come with a raw residual");
}

}  // namespace resfuse
