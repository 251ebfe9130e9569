// Rows of results as they are stored: 16-bit ones are computed in float, a block in cache, and rounded by the block.
//
// Rounding to 16 bits one value at a time is half the instructions of a pass; AVX512_BF16 and AVX-512 round sixteen or
// thirty-two at once. Both round to nearest, ties to even. AVX512_BF16 takes subnormal numbers (below 1.2e-38) for
// zero, so vectors that hold one are rounded one value at a time.
#pragma once

#include <algorithm>
#include <array>

#include "../math.h"
#include "simd.h"
#include "tiles/lanes.h"

namespace resfuse::cpu {

constexpr int64_t kRoundValues = 256;

template <class T>
RESFUSE_CLONES void round_one_by_one(const float* from, T* to, int64_t count) {
  RESFUSE_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) store(to + i, from[i]);
}

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

// Thirty-two values.
RESFUSE_LANES void round_pair(const float* from, BFloat16* to) {
  constexpr int kSubnormal = 0x20;
  const Lanes low = _mm512_loadu_ps(from), high = _mm512_loadu_ps(from + kLanes);
  if ((_mm512_fpclass_ps_mask(low, kSubnormal) | _mm512_fpclass_ps_mask(high, kSubnormal)) != 0)
    return round_one_by_one(from, to, 2 * kLanes);
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}
RESFUSE_LANES void round_pair(const float* from, Half* to) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m256i low = _mm512_cvtps_ph(_mm512_loadu_ps(from), kNearest);
  const __m256i high = _mm512_cvtps_ph(_mm512_loadu_ps(from + kLanes), kNearest);
  _mm512_storeu_si512(to, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
}

// The last values go through a whole pair too.
template <class T>
void round_pairs(const float* from, T* to, int64_t count) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) round_pair(from + i, to + i);
  if (i == count) return;
  alignas(64) float rest[2 * kLanes] = {};
  alignas(64) T rounded[2 * kLanes];
  std::copy_n(from + i, count - i, rest);
  round_pair(rest, rounded);
  std::copy_n(rounded, count - i, to + i);
}

RESFUSE_TILES_END
#endif

template <class T>
using RoundValues = void (*)(const float*, T*, int64_t);

// How this processor rounds.
template <class T>
RoundValues<T> rounding() {
#if RESFUSE_HAS_TILES
  const bool hardware =
      __builtin_cpu_supports("x86-64-v4") && (std::is_same_v<T, Half> || __builtin_cpu_supports("avx512bf16"));
  if (hardware) return round_pairs<T>;
#endif
  return round_one_by_one<T>;
}
template <class T>
inline const RoundValues<T> round_values = rounding<T>();

// outs[n][j] = value(j)[n] for j < width. An out may be what value reads, at the same j.
template <class T, size_t N, class F>
inline __attribute__((always_inline)) void store_rows(const std::array<T*, N>& outs, int64_t width, const F& value) {
  if constexpr (sizeof(T) != 2) {
    RESFUSE_INDEPENDENT
    for (int64_t j = 0; j < width; ++j) {
      const auto values = value(j);
      for (size_t n = 0; n < N; ++n) store(outs[n] + j, values[n]);
    }
  } else {
    alignas(64) float blocks[N][kRoundValues];
    for (int64_t begin = 0; begin < width; begin += kRoundValues) {
      const int64_t count = std::min(kRoundValues, width - begin);
      RESFUSE_INDEPENDENT
      for (int64_t j = 0; j < count; ++j) {
        const auto values = value(begin + j);
        for (size_t n = 0; n < N; ++n) blocks[n][j] = values[n];
      }
      for (size_t n = 0; n < N; ++n) round_values<T>(blocks[n], outs[n] + begin, count);
    }
  }
}

// out[j] = value(j) for j < width.
template <class T, class F>
inline __attribute__((always_inline)) void store_row(T* out, int64_t width, const F& value) {
  store_rows(std::array<T*, 1>{out}, width,
             [&](int64_t j) RESFUSE_INLINE_LAMBDA { return std::array<acc_t<T>, 1>{value(j)}; });
}

}  // namespace resfuse::cpu
