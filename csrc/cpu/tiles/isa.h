// The instruction sets that tile kernels are written for: AVX-512, with AVX512_BF16 where a processor has it, and AVX2.
//
// Tile kernels multiply small matrices that lie in cache. Every file of them is compiled twice, for AVX-512 as it is
// and for AVX2 by way of avx2.cpp, into namespaces of their own; when the library is loaded, the ops of one of the two
// are registered, by `isa_runs`. Without either, convolutions stay torch's and only the passes around them are ours.
// Everything between RESFUSE_TILES_BEGIN and RESFUSE_TILES_END is compiled for the set; headers of others stay outside.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define RESFUSE_HAS_TILES 1
#else
#define RESFUSE_HAS_TILES 0
#endif

#if RESFUSE_HAS_TILES
// GCC's own intrinsics pass undefined vectors on purpose, and GCC 12 warns about them.
#ifdef RESFUSE_AVX2
#define RESFUSE_ISA avx2
#define RESFUSE_TILES_BEGIN                                                                     \
  _Pragma("GCC push_options") _Pragma("GCC target(\"arch=x86-64-v3,prefer-vector-width=256\")") \
      _Pragma("GCC diagnostic ignored \"-Wmaybe-uninitialized\"")
#else
#define RESFUSE_ISA avx512
#define RESFUSE_TILES_BEGIN                                                                                \
  _Pragma("GCC push_options") _Pragma("GCC target(\"arch=x86-64-v4,avx512bf16,prefer-vector-width=512\")") \
      _Pragma("GCC diagnostic ignored \"-Wmaybe-uninitialized\"")
#endif
#define RESFUSE_TILES_END _Pragma("GCC pop_options")
#include <cpuid.h>

#include <cstdlib>
#include <cstring>
#else
#define RESFUSE_ISA portable
#endif

#include <torch/headeronly/core/ScalarType.h>

namespace resfuse::cpu {

// what depends on the instruction set; everything else is shared
inline namespace RESFUSE_ISA {}

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

#if RESFUSE_HAS_TILES
// For tests, a setting of 0 hides what a processor has.
inline bool hidden(const char* setting) {
  const char* value = std::getenv(setting);
  return value != nullptr && std::strcmp(value, "0") == 0;
}
#endif

inline bool has_avx512() {
#if RESFUSE_HAS_TILES
  static const bool found = __builtin_cpu_supports("x86-64-v4") && !hidden("RESFUSE_AVX512");
  return found;
#else
  return false;
#endif
}

inline bool has_avx2() {
#if RESFUSE_HAS_TILES
  static const bool found = __builtin_cpu_supports("x86-64-v3");
  return found;
#else
  return false;
#endif
}

// Whether this processor multiplies pairs of bfloat16 (AVX512_BF16). Without it tile kernels multiply bfloat16
// activations as floats.
inline bool multiplies_bfloat16() {
#if RESFUSE_HAS_TILES
  static const bool found = has_avx512() && __builtin_cpu_supports("avx512bf16") && !hidden("RESFUSE_AVX512_BF16");
  return found;
#else
  return false;
#endif
}

// Whether register tiles are two panels wide. A narrow one has too many loads for its products on processors of Intel
// (measured: Ice Lake); on those of AMD only narrow ones were measured. Results are the same bits. RESFUSE_WIDE_TILES
// is 0 or 1 where a test wants one of them.
inline bool wide_tiles() {
#if RESFUSE_HAS_TILES
  static const char* const setting = std::getenv("RESFUSE_WIDE_TILES");
  static const bool found =
      has_avx512() && (setting == nullptr ? __builtin_cpu_is("intel") != 0 : !hidden("RESFUSE_WIDE_TILES"));
  return found;
#else
  return false;
#endif
}

// Whether this machine runs tile kernels on activations of `dtype`.
inline bool tiles_support(torch::headeronly::ScalarType dtype) {
  const bool found = has_avx512() || has_avx2();
  if (dtype == torch::headeronly::ScalarType::Float) return found;
  return dtype == torch::headeronly::ScalarType::BFloat16 && found && !has_amx();
}

// Whether they multiply its values as they are, not as floats.
inline bool tiles_multiply(torch::headeronly::ScalarType dtype) {
  return tiles_support(dtype) && (dtype == torch::headeronly::ScalarType::Float || multiplies_bfloat16());
}

namespace RESFUSE_ISA {

// Whether the ops of this compilation are the ones that run here. Where none do, those for AVX-512 say so.
inline bool isa_runs() {
#ifdef RESFUSE_AVX2
  return !has_avx512() && has_avx2();
#else
  return has_avx512() || !has_avx2();
#endif
}

}  // namespace RESFUSE_ISA

}  // namespace resfuse::cpu
