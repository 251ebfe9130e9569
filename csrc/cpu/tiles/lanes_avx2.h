// Lanes of AVX2: eight floats; masks are bits, spread over a vector where they are used; bfloat16 is always widened.
#pragma once  // for lanes.h alone, which includes what this needs

RESFUSE_TILES_BEGIN

namespace resfuse::cpu::RESFUSE_ISA {

constexpr int64_t kLanes = 8;
constexpr int kMaxPixels = 6;      // pixels of a register tile: 6 * 2 accumulators, 2 of b, 1 of a: 15 of 16 registers
constexpr int kNarrowPixels = 12;  // the same, half a panel wide
constexpr int64_t kWeightChannels = 6;             // rows of a weight gradient's register tile
constexpr int kWidePixels = 0, kWideChannels = 0;  // none is two panels wide

using Lanes = __m256;
using LaneMask = uint8_t;
using Halves = __m128i;     // 16-bit values of as many channels
using UnitLanes = __m256i;  // units of a product

constexpr LaneMask kAllLanes = 0xff;

RESFUSE_LANES Lanes zero_lanes() { return _mm256_setzero_ps(); }
RESFUSE_LANES Lanes broadcast_lanes(float value) { return _mm256_set1_ps(value); }
// a*b + c
RESFUSE_LANES Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
// the second of a pair with a NaN
RESFUSE_LANES Lanes max_of(Lanes a, Lanes b) { return _mm256_max_ps(a, b); }

RESFUSE_LANES __m256i spread_mask(LaneMask mask) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(mask), bits), bits);
}
// those outside the mask are zero
RESFUSE_LANES Lanes keep_lanes(LaneMask mask, Lanes value) {
  return _mm256_and_ps(value, _mm256_castsi256_ps(spread_mask(mask)));
}

// The greater of two, or NaN.
RESFUSE_LANES Lanes max_or_nan(Lanes most, Lanes value) {
  const __m256 wins = _mm256_or_ps(_mm256_cmp_ps(value, most, _CMP_GT_OQ), _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  return _mm256_blendv_ps(most, value, wins);
}

// grad where z > 0 or NaN, else 0
RESFUSE_LANES Lanes relu_gradient_lanes(Lanes grad, Lanes z) {
  return _mm256_and_ps(grad, _mm256_cmp_ps(z, _mm256_setzero_ps(), _CMP_NLE_UQ));
}

// tile_moments.h's center: 12 significant bits, 0 for what is not finite
RESFUSE_LANES Lanes coarse_lanes(Lanes center) {
  const __m256 finite = _mm256_cmp_ps(center - center, _mm256_setzero_ps(), _CMP_EQ_OQ);
  const __m256 kept = _mm256_castsi256_ps(_mm256_set1_epi32(int(0xfffff000u)));
  return _mm256_and_ps(_mm256_and_ps(center, kept), finite);
}

RESFUSE_LANES Lanes widen_halves(Halves half) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

RESFUSE_LANES Halves load_halves(const BFloat16* from, LaneMask mask) {
  if (mask == kAllLanes) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  alignas(16) uint16_t values[kLanes] = {};
  for (int i = 0; i < kLanes; ++i)
    if ((mask >> i & 1) != 0) std::memcpy(values + i, from + i, 2);
  return _mm_load_si128(reinterpret_cast<const __m128i*>(values));
}

RESFUSE_LANES void store_halves(BFloat16* to, Halves half, LaneMask mask = kAllLanes) {
  if (mask == kAllLanes) return _mm_storeu_si128(reinterpret_cast<__m128i*>(to), half);
  alignas(16) uint16_t values[kLanes];
  _mm_store_si128(reinterpret_cast<__m128i*>(values), half);
  for (int i = 0; i < kLanes; ++i)
    if ((mask >> i & 1) != 0) std::memcpy(static_cast<void*>(to + i), values + i, 2);
}

RESFUSE_LANES Lanes load_lanes(const float* from, LaneMask mask = kAllLanes) {
  return mask == kAllLanes ? _mm256_loadu_ps(from) : _mm256_maskload_ps(from, spread_mask(mask));
}

// Rounded to nearest, ties to even, as math.h's store.
RESFUSE_LANES Halves round_halves(Lanes value, BFloat16) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
}

RESFUSE_LANES void store_lanes(float* to, Lanes value, LaneMask mask = kAllLanes) {
  if (mask == kAllLanes) return _mm256_storeu_ps(to, value);
  _mm256_maskstore_ps(to, spread_mask(mask), value);
}

// Sums in double of float lanes.
struct DoubleLanes {
  __m256d low, high;
  RESFUSE_LANES DoubleLanes() : low(_mm256_setzero_pd()), high(_mm256_setzero_pd()) {}  // not implicit: for this target
  RESFUSE_LANES void add(Lanes value) {
    low += _mm256_cvtps_pd(_mm256_castps256_ps128(value));
    high += _mm256_cvtps_pd(_mm256_extractf128_ps(value, 1));
  }
  RESFUSE_LANES void store(double* to) const {
    _mm256_storeu_pd(to, low);
    _mm256_storeu_pd(to + 4, high);
  }
};

// Units: floats.
RESFUSE_LANES Lanes broadcast_unit(float a) { return _mm256_set1_ps(a); }
RESFUSE_LANES Lanes load_units(const float* from) { return _mm256_loadu_ps(from); }
RESFUSE_LANES void store_units(float* to, UnitLanes value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value);
}
RESFUSE_LANES UnitLanes as_units(Lanes value) { return _mm256_castps_si256(value); }

// As many rows of units as there are lanes, transposed.
RESFUSE_LANES void transpose_units(UnitLanes (&r)[kLanes]) {
  __m256i t[8], u[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    u[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    u[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    u[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm256_permute2x128_si256(u[j], u[4 + j], 0x20);
    r[j + 4] = _mm256_permute2x128_si256(u[j], u[4 + j], 0x31);
  }
}

}  // namespace resfuse::cpu::RESFUSE_ISA

RESFUSE_TILES_END
