// The instructions that tile kernels are written for: AVX-512, and AVX512_BF16 for bfloat16 where a processor has it.
//
// Tile kernels multiply small matrices that lie in cache. They are compiled for one instruction set, chosen here, and
// run only where `tiles_support` says so; elsewhere convolutions stay torch's and only the passes around them are ours.
// Everything between RESFUSE_TILES_BEGIN and RESFUSE_TILES_END is compiled for it; headers of others stay outside.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define RESFUSE_HAS_TILES 1
// GCC's own intrinsics pass undefined vectors on purpose, and GCC 12 warns about them.
#define RESFUSE_TILES_BEGIN                                                                                \
  _Pragma("GCC push_options") _Pragma("GCC target(\"arch=x86-64-v4,avx512bf16,prefer-vector-width=512\")") \
      _Pragma("GCC diagnostic ignored \"-Wmaybe-uninitialized\"")
#define RESFUSE_TILES_END _Pragma("GCC pop_options")
#else
#define RESFUSE_HAS_TILES 0
#endif

#if RESFUSE_HAS_TILES
#include <cpuid.h>

#include <cstdlib>
#include <cstring>
#endif

#include <torch/headeronly/core/ScalarType.h>

namespace resfuse::cpu {

// Whether this processor multiplies bfloat16 tiles in hardware (AMX): torch's convolutions use it, these kernels do
// not.
inline bool has_amx() {
#if RESFUSE_HAS_TILES
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && ((d >> 22) & 1) != 0;
#else
  return false;
#endif
}

// Whether this processor multiplies pairs of bfloat16 (AVX512_BF16). Without it tile kernels multiply bfloat16
// activations as floats. RESFUSE_AVX512_BF16=0 does so everywhere, for tests.
inline bool multiplies_bfloat16() {
#if RESFUSE_HAS_TILES
  static const bool found = [] {
    const char* setting = std::getenv("RESFUSE_AVX512_BF16");
    return __builtin_cpu_supports("avx512bf16") && (setting == nullptr || std::strcmp(setting, "0") != 0);
  }();
  return found;
#else
  return false;
#endif
}

// Whether this machine runs tile kernels on activations of `dtype`.
inline bool tiles_support(torch::headeronly::ScalarType dtype) {
#if RESFUSE_HAS_TILES
  static const bool avx512 = __builtin_cpu_supports("x86-64-v4");
  static const bool bfloat16 = avx512 && !has_amx();
  if (dtype == torch::headeronly::ScalarType::Float) return avx512;
  if (dtype == torch::headeronly::ScalarType::BFloat16) return bfloat16;
#endif
  (void)dtype;
  return false;
}

// Whether they multiply its values as they are, not as floats.
inline bool tiles_multiply(torch::headeronly::ScalarType dtype) {
  return tiles_support(dtype) && (dtype == torch::headeronly::ScalarType::Float || multiplies_bfloat16());
}

}  // namespace resfuse::cpu
