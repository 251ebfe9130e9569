// Sixteen lanes: loads and stores of activations as float vectors, and the formulas of math.h on them.
//
// bfloat16 has two types here: BFloat16, which is multiplied in pairs, and WideBFloat16, for processors that cannot:
// the same bits in memory, a float from the load to the store. The lanes of a vector are channels. A mask names the
// channels that exist, so that any C is a whole number of vectors.
#pragma once

#include <type_traits>

#include "../../math.h"
#include "isa.h"

#if RESFUSE_HAS_TILES
#include <immintrin.h>

RESFUSE_TILES_BEGIN

namespace resfuse::cpu {

constexpr int64_t kLanes = 16;

struct WideBFloat16 : BFloat16 {};

using Lanes512 = __m512;
using LaneMask = __mmask16;

#define RESFUSE_LANES inline __attribute__((always_inline))

// The lanes that exist of sixteen starting at `begin`, of `size` in all.
RESFUSE_LANES LaneMask lane_mask(int64_t begin, int64_t size) {
  const int64_t left = size - begin;
  return left >= kLanes ? LaneMask(0xffff) : left <= 0 ? LaneMask(0) : static_cast<LaneMask>((1u << left) - 1);
}

// Those of sixteen starting at `begin` that lie in [first, last).
RESFUSE_LANES LaneMask lane_mask(int64_t begin, int64_t first, int64_t last) {
  const LaneMask mask = lane_mask(begin, last);
  return begin >= first ? mask : static_cast<LaneMask>(mask & ~lane_mask(begin, first));
}

// A whole vector is the common case: masked stores of 16-bit values are many times slower on some processors.
constexpr LaneMask kAllLanes = 0xffff;

RESFUSE_LANES Lanes512 load_lanes(const float* from, LaneMask mask = kAllLanes) {
  return mask == kAllLanes ? _mm512_loadu_ps(from) : _mm512_maskz_loadu_ps(mask, from);
}

RESFUSE_LANES Lanes512 widen_halves(__m256i half) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

RESFUSE_LANES Lanes512 load_lanes(const BFloat16* from, LaneMask mask = kAllLanes) {
  const __m256i bits = mask == kAllLanes ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
                                         : _mm256_maskz_loadu_epi16(mask, from);
  return widen_halves(bits);
}

// Sixteen bfloat16, rounded to nearest, ties to even; subnormal results are zero.
RESFUSE_LANES __m256i round_to_bfloat16(Lanes512 value) { return (__m256i)_mm512_cvtneps_pbh(value); }

// The same without AVX512_BF16, as math.h's store, so that subnormal results are kept.
RESFUSE_LANES __m256i round_wide(Lanes512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)), 16));
}

// Pairs of bfloat16: `first` in the lower half of each lane, `second` in the upper.
RESFUSE_LANES __m512i pair_halves(__m256i first, __m256i second) {
  const __m512i upper = _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16);
  return _mm512_or_si512(_mm512_cvtepu16_epi32(first), upper);
}

RESFUSE_LANES void store_lanes(float* to, Lanes512 value, LaneMask mask = kAllLanes) {
  if (mask == kAllLanes) return _mm512_storeu_ps(to, value);
  _mm512_mask_storeu_ps(to, mask, value);
}

RESFUSE_LANES void store_halves(BFloat16* to, __m256i half, LaneMask mask) {
  if (mask == kAllLanes) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
  _mm256_mask_storeu_epi16(to, mask, half);
}
RESFUSE_LANES void store_lanes(BFloat16* to, Lanes512 value, LaneMask mask = kAllLanes) {
  store_halves(to, round_to_bfloat16(value), mask);
}
RESFUSE_LANES void store_lanes(WideBFloat16* to, Lanes512 value, LaneMask mask = kAllLanes) {
  store_halves(to, round_wide(value), mask);
}

// The value that a later reader of the stored result will see.
template <class T>
RESFUSE_LANES Lanes512 round_lanes(Lanes512 value) {
  if constexpr (std::is_same_v<T, float>) return value;
  return widen_halves(std::is_same_v<T, WideBFloat16> ? round_wide(value) : round_to_bfloat16(value));
}

// relu(NaN) = NaN: of a pair with a NaN, and of two zeros, the second operand is the maximum
RESFUSE_LANES Lanes512 relu_lanes(Lanes512 z) { return _mm512_max_ps(_mm512_setzero_ps(), z); }

// grad where z > 0 or NaN, else 0
RESFUSE_LANES Lanes512 relu_gradient_lanes(Lanes512 grad, Lanes512 z) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_NLE_UQ), grad);
}

// Call f with a mask that the compiler knows to be whole, or with the mask there is.
struct WholeMask {
  RESFUSE_LANES constexpr operator LaneMask() const { return kAllLanes; }
};
template <class F>
RESFUSE_LANES void with_mask(LaneMask mask, const F& f) {
  mask == kAllLanes ? f(WholeMask{}) : f(mask);
}

// Sums in double of float lanes.
struct DoubleLanes {
  __m512d low, high;
  RESFUSE_LANES DoubleLanes() : low(_mm512_setzero_pd()), high(_mm512_setzero_pd()) {}  // not implicit: for this target
  RESFUSE_LANES void add(Lanes512 value) {
    low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(value)));
    high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(value, 1)));
  }
  RESFUSE_LANES void store(double* to) const {
    _mm512_storeu_pd(to, low);
    _mm512_storeu_pd(to + 8, high);
  }
};

}  // namespace resfuse::cpu

RESFUSE_TILES_END
#endif
