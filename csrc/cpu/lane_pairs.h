// Pairs of vectors of AVX-512: what is loaded at once of any dtype, and how bfloat16 is widened and rounded cheapest.
//
// Of 32 neighbours in bfloat16 the even ones are a vector of floats and the odd ones another: to widen or round them in
// order takes twice as many instructions. Lanes beside them are split in the same way.
#pragma once

#include "tiles/lanes.h"

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

namespace resfuse::cpu::RESFUSE_ISA {

constexpr int64_t kPair = 2 * kLanes;

struct LanePair {
  Lanes first, second;
};
RESFUSE_LANES LanePair load_pair(const float* from) { return {_mm512_loadu_ps(from), _mm512_loadu_ps(from + kLanes)}; }
RESFUSE_LANES LanePair load_pair(const Half* from) {
  const auto load = [=](int64_t i) RESFUSE_INLINE_LAMBDA {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
  };
  return {load(0), load(kLanes)};
}
// Of bfloat16 the even values and the odd ones: one shifted, one masked.
RESFUSE_LANES LanePair load_pair(const BFloat16* from) {
  const UnitLanes pairs = _mm512_loadu_si512(from);
  return {first_of_pairs(pairs), second_of_pairs(pairs)};
}

// So lanes beside bfloat16 are split as its values are, even before odd in every pair of vectors, or put back in order.
template <bool kBack>
RESFUSE_LANES void split_lanes(float* lanes, int64_t width) {
  alignas(64) int32_t low[kLanes], high[kLanes];
  for (int32_t i = 0; i < kLanes; ++i) {
    low[i] = kBack ? i / 2 + i % 2 * int32_t(kLanes) : 2 * i;
    high[i] = kBack ? low[i] + int32_t(kLanes) / 2 : 2 * i + 1;
  }
  const __m512i first = _mm512_load_si512(low), second = _mm512_load_si512(high);
  for (int64_t j = 0; j < width; j += kPair) {
    const LanePair pair = load_pair(lanes + j);
    _mm512_storeu_ps(lanes + j, _mm512_permutex2var_ps(pair.first, first, pair.second));
    _mm512_storeu_ps(lanes + j + kLanes, _mm512_permutex2var_ps(pair.first, second, pair.second));
  }
}

// Rounded as math.h's store does it, and put back in order.
RESFUSE_LANES void store_pair(BFloat16* to, LanePair z) {
  if (_mm512_cmp_ps_mask(z.first, z.second, _CMP_UNORD_Q) != 0) {  // rare
    alignas(64) float even[kLanes], odd[kLanes];
    _mm512_store_ps(even, z.first);
    _mm512_store_ps(odd, z.second);
    for (int64_t i = 0; i < kLanes; ++i) {
      store(to + 2 * i, even[i]);
      store(to + 2 * i + 1, odd[i]);
    }
    return;
  }
  const UnitLanes low = _mm512_srli_epi32(round_bits(z.first), 16), high = round_bits(z.second);
  _mm512_storeu_si512(to, _mm512_mask_blend_epi16(0xaaaaaaaau, low, high));
}

}  // namespace resfuse::cpu::RESFUSE_ISA

RESFUSE_TILES_END
#endif
