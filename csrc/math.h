// The scalar mathematics that every backend shares: conversions, activation, normalisation, merging of statistics.
//
// Nothing here knows a tensor, a thread or a layout. The functions are branch-free, so that compilers vectorise loops
// over them, and they are compiled for the host and, under nvcc, for the device: if the CPU and the GPU differ by a
// formula, one of them is wrong.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define RESFUSE_INLINE __host__ __device__ __forceinline__
#else
#define RESFUSE_INLINE inline __attribute__((always_inline))
#endif

namespace resfuse {

// Storage types of activations: 16-bit floats are bits in memory and float in registers.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The type that a storage type is computed and accumulated in: float, and double for double.
template <class T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <class T>
using acc_t = typename AccumulateType<T>::type;

RESFUSE_INLINE float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

RESFUSE_INLINE uint32_t bits_from_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

RESFUSE_INLINE double load(double value) { return value; }
RESFUSE_INLINE float load(float value) { return value; }
RESFUSE_INLINE float load(BFloat16 value) { return float_from_bits(static_cast<uint32_t>(value.bits) << 16); }

// A half's exponent and mantissa, shifted into a float's fields, are 2^112 too small; exponent 31 is Inf or NaN.
RESFUSE_INLINE float load(Half value) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const uint32_t scaled = bits_from_float(float_from_bits(magnitude) * 0x1p112f);
  const uint32_t bits = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : scaled;
  return float_from_bits(bits | sign);
#endif
}

// Conversion at the store rounds to nearest, ties to even, and keeps NaN and Inf. A GPU's own conversions do the same,
// subnormals included, and differ in the bits of a NaN alone; that to bfloat16 came with sm_80.
RESFUSE_INLINE void store(double* out, double value) { *out = value; }
RESFUSE_INLINE void store(float* out, float value) { *out = value; }

RESFUSE_INLINE void store(BFloat16* out, float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out->bits) : "f"(value));
#else
  const uint32_t bits = bits_from_float(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
#endif
}

RESFUSE_INLINE void store(Half* out, float value) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(value));
#else
  const uint32_t bits = bits_from_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the result is subnormal: adding 0.5 aligns its last bit with a float's, and the FPU rounds.
  const uint32_t subnormal = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  out->bits = static_cast<uint16_t>((magnitude >= 0x477ff000u ? special : finite) | sign);
#endif
}

// The value that a later reader of the stored result will see.
template <class T>
RESFUSE_INLINE acc_t<T> round_to(acc_t<T> value) {
  T stored;
  store(&stored, value);
  return load(stored);
}

// The same in a float's 32 bits and in a fraction of the instructions: where 2^13 times the power of two at or below
// the value is added, the FPU rounds to a half's last bit, and taking it away is exact. Subnormal halves have the last
// bit of 2^-14.
template <>
RESFUSE_INLINE float round_to<Half>(float value) {
#if defined(__CUDA_ARCH__)
  Half stored;
  store(&stored, value);
  return load(stored);
#else
  const uint32_t bits = bits_from_float(value), magnitude = bits & 0x7fffffffu, power = magnitude & 0x7f800000u;
  const uint32_t at_least = power < 0x38800000u ? 0x38800000u : power;
  const uint32_t at_most = at_least > 0x47000000u ? 0x47000000u : at_least;
  const float shift = float_from_bits(at_most + (13u << 23));
  const float rounded = float_from_bits(magnitude) + shift - shift;
  const float finite = rounded > 65504.0f ? float_from_bits(0x7f800000u) : rounded;
  return float_from_bits(bits_from_float(finite) | (bits & 0x80000000u));
#endif
}

// relu(z) = max(z, 0) with relu(NaN) = NaN. `floor` is 0 for ReLU and -infinity for the identity.
template <class A>
RESFUSE_INLINE A clamp_below(A z, A floor) {
  return z < floor ? floor : z;
}

// The derivative of relu: 0 at 0; a NaN lets the gradient through, as torch's threshold_backward does.
template <class A>
RESFUSE_INLINE A relu_gradient(A grad, A z) {
  return z <= A(0) ? A(0) : grad;
}

// Chan, Golub, LeVeque (1979): the moments of a union, from the mean and the sum of squared deviations (m2) of both
// parts; `share` is the second part's fraction of the count. Never E[x^2] - E[x]^2, which cancels where |mean| >> std.
// A mean of Inf stays that, as a sum's does: +Inf and -Inf alone make a NaN.
template <class A>
RESFUSE_INLINE void merge_moments(A* mean, A* m2, A count, A share, A other_mean, A other_m2) {
  const A delta = other_mean - *mean;
  const bool finite = delta - delta == A(0);
  *mean += finite ? delta * share : other_mean;
  *m2 += other_m2 + delta * delta * count * share;
}

template <class A>
struct Affine {
  A scale;
  A shift;
};

// scale = weight / sqrt(var + eps), shift = bias - mean * scale: normalisation as two numbers per channel.
template <class A>
RESFUSE_INLINE A inverse_std(A var, A eps) {
  return A(1) / sqrt(var + eps);
}

template <class A>
RESFUSE_INLINE Affine<A> affine_of(A mean, A var, A weight, A bias, A eps) {
  const A scale = weight * inverse_std(var, eps);
  return {scale, bias - mean * scale};
}

template <class A>
struct FinalizeGradient {
  A mean;
  A var;
  A weight;
};

// The backward of affine_of, from grad_shift and grad_centered = grad_scale - mean * grad_shift. The gradient of the
// bias is grad_shift itself.
template <class A>
RESFUSE_INLINE FinalizeGradient<A> affine_gradient(A grad_centered, A grad_shift, A var, A weight, A eps) {
  const A invstd = inverse_std(var, eps);
  const A scale = weight * invstd;
  return {-scale * grad_shift, A(-0.5) * invstd * invstd * scale * grad_centered, invstd * grad_centered};
}

// running <- running + factor * (value - running), as torch.nn.BatchNorm2d: factor 1 replaces, factor 0 keeps.
template <class A>
RESFUSE_INLINE A running_average(A running, A value, A factor) {
  return (A(1) - factor) * running + factor * value;
}

}  // namespace resfuse
