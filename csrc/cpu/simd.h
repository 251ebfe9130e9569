// Function multiversioning: one binary whose inner loops are compiled for AVX-512, AVX2 and the baseline.
//
// RESFUSE_CLONES goes on named functions only, explicitly instantiated templates included; a lambda is not cloned. The
// dynamic loader picks the version once. All versions give the same bits: no loop reassociates or contracts floating
// point (-ffp-contract=off), and reductions keep their lanes in memory order.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define RESFUSE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), noinline))
#else
#define RESFUSE_CLONES __attribute__((noinline))
#endif

// Stands before a loop over lanes: its iterations are independent. Without it a sum in float might alias x, and the
// compiler gives up on telling a dozen pointers apart.
#if defined(__clang__)
#define RESFUSE_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define RESFUSE_INDEPENDENT _Pragma("GCC ivdep")
#else
#define RESFUSE_INDEPENDENT
#endif

#define RESFUSE_INLINE_LAMBDA __attribute__((always_inline))

namespace resfuse::cpu {

// Call f(group, row) for groups of four consecutive rows, then for the rows that are left, one by one.
template <int kGroup = 4, class F>
inline __attribute__((always_inline)) void for_row_groups(int64_t rows, const F& f) {
  int64_t row = 0;
  for (; row + kGroup <= rows; row += kGroup) f(std::integral_constant<int, kGroup>{}, row);
  for (; row < rows; ++row) f(std::integral_constant<int, 1>{}, row);
}

}  // namespace resfuse::cpu
