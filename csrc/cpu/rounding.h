// Rows of results as they are stored: rounded to 16 bits as many at once as the processor can.
//
// Rounding to 16 bits one value at a time is half the instructions of a pass. AVX512_BF16 and AVX-512 round thirty-two
// at once, to nearest, ties to even, as math.h's store does. AVX512_BF16 takes subnormal numbers (below 1.2e-38) for
// zero, so vectors that hold one are rounded one value at a time.
#pragma once

#include <array>

#include "../math.h"
#include "simd.h"
#include "tiles/lanes.h"

namespace resfuse::cpu {

// outs[n][i] = value(i, j)[n] for all i of rows * width values; j is i's place in its row. An out may be what value
// reads, at the same i.
template <class T, size_t N, class F>
RESFUSE_CLONES void store_values(const std::array<T*, N> outs, int64_t rows, int64_t width, const F value) {
  for (int64_t begin = 0; begin < rows * width; begin += width) {
    RESFUSE_INDEPENDENT
    for (int64_t j = 0; j < width; ++j) {
      const auto values = value(begin + j, j);
      for (size_t n = 0; n < N; ++n) store(outs[n] + begin + j, values[n]);
    }
  }
}

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

constexpr int64_t kRounded = 2 * kLanes;  // values that are rounded at once

RESFUSE_LANES void round_block(const float (&from)[kRounded], BFloat16* to) {
  constexpr int kSubnormal = 0x20;
  const Lanes low = _mm512_load_ps(from), high = _mm512_load_ps(from + kLanes);
  if (!_kortestz_mask16_u8(_mm512_fpclass_ps_mask(low, kSubnormal), _mm512_fpclass_ps_mask(high, kSubnormal))) {
    for (int64_t i = 0; i < kRounded; ++i) store(to + i, from[i]);
    return;
  }
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}
RESFUSE_LANES void round_block(const float (&from)[kRounded], Half* to) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m256i low = _mm512_cvtps_ph(_mm512_load_ps(from), kNearest);
  const __m256i high = _mm512_cvtps_ph(_mm512_load_ps(from + kLanes), kNearest);
  _mm512_storeu_si512(to, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
}

// The same by blocks, which the compiler keeps in registers, but for what is left of a row.
template <class T, size_t N, class F>
__attribute__((noinline)) void store_blocks(const std::array<T*, N> outs, int64_t rows, int64_t width, const F value) {
  alignas(64) float block[N][kRounded];
  for (int64_t begin = 0; begin < rows * width; begin += width) {
    int64_t j = 0;
    for (; j + kRounded <= width; j += kRounded) {
      RESFUSE_INDEPENDENT
      for (int64_t k = 0; k < kRounded; ++k) {
        const auto values = value(begin + j + k, j + k);
        for (size_t n = 0; n < N; ++n) block[n][k] = values[n];
      }
      for (size_t n = 0; n < N; ++n) round_block(block[n], outs[n] + begin + j);
    }
    for (; j < width; ++j) {
      const auto values = value(begin + j, j);
      for (size_t n = 0; n < N; ++n) store(outs[n] + begin + j, values[n]);
    }
  }
}

RESFUSE_TILES_END
#endif

// Whether this processor rounds results of T by blocks.
template <class T>
bool rounds_blocks() {
  return std::is_same_v<T, Half> ? has_avx512() : std::is_same_v<T, BFloat16> && multiplies_bfloat16();
}

template <class T, size_t N, class F>
void store_rows(const std::array<T*, N>& outs, int64_t rows, int64_t width, const F& value) {
#if RESFUSE_HAS_TILES
  if constexpr (sizeof(T) == 2)
    if (rounds_blocks<T>()) return store_blocks(outs, rows, width, value);
#endif
  store_values(outs, rows, width, value);
}

// out[i] = value(i, j)
template <class T, class F>
void store_rows(T* out, int64_t rows, int64_t width, const F& value) {
  store_rows(std::array<T*, 1>{out}, rows, width,
             [=](int64_t i, int64_t j) RESFUSE_INLINE_LAMBDA { return std::array<acc_t<T>, 1>{value(i, j)}; });
}

}  // namespace resfuse::cpu
