// Lanes of AVX-512: sixteen floats, masks in registers of their own, and with AVX512_BF16 pairs of bfloat16.
#pragma once  // for lanes.h alone, which includes what this needs

RESFUSE_TILES_BEGIN

namespace resfuse::cpu::RESFUSE_ISA {

constexpr int64_t kLanes = 16;
constexpr int kMaxPixels = 14;     // pixels of a register tile: 14 * 2 accumulators, 2 of b, 1 of a: 31 of 32 registers
constexpr int kNarrowPixels = 14;  // the same, half a panel wide
constexpr int64_t kWeightChannels = 8;             // rows of a weight gradient's register tile
constexpr int kWidePixels = 7, kWideChannels = 4;  // the same, two panels wide

using Lanes = __m512;
using LaneMask = __mmask16;
using Halves = __m256i;     // 16-bit values of as many channels
using UnitLanes = __m512i;  // units of a product, whatever they are

// A whole vector is the common case: masked stores of 16-bit values are many times slower on some processors.
constexpr LaneMask kAllLanes = 0xffff;

RESFUSE_LANES Lanes zero_lanes() { return _mm512_setzero_ps(); }
RESFUSE_LANES Lanes broadcast_lanes(float value) { return _mm512_set1_ps(value); }
// a*b + c
RESFUSE_LANES Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
// the second of a pair with a NaN
RESFUSE_LANES Lanes max_of(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }
// those outside the mask are zero
RESFUSE_LANES Lanes keep_lanes(LaneMask mask, Lanes value) { return _mm512_maskz_mov_ps(mask, value); }

// The greater of two, or NaN.
RESFUSE_LANES Lanes max_or_nan(Lanes most, Lanes value) {
  const auto wins = static_cast<LaneMask>(_mm512_cmp_ps_mask(value, most, _CMP_GT_OQ) |
                                          _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q));
  return _mm512_mask_mov_ps(most, wins, value);
}

// grad where z > 0 or NaN, else 0
RESFUSE_LANES Lanes relu_gradient_lanes(Lanes grad, Lanes z) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_NLE_UQ), grad);
}

// tile_moments.h's center: 12 significant bits, 0 for what is not finite
RESFUSE_LANES Lanes coarse_lanes(Lanes center) {
  const LaneMask finite = _mm512_cmp_ps_mask(center - center, _mm512_setzero_ps(), _CMP_EQ_OQ);
  return _mm512_castsi512_ps(
      _mm512_maskz_and_epi32(finite, _mm512_castps_si512(center), _mm512_set1_epi32(int(0xfffff000u))));
}

RESFUSE_LANES Lanes widen_halves(Halves half) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

RESFUSE_LANES Halves load_halves(const BFloat16* from, LaneMask mask) {
  return mask == kAllLanes ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
                           : _mm256_maskz_loadu_epi16(mask, from);
}

RESFUSE_LANES void store_halves(BFloat16* to, Halves half, LaneMask mask = kAllLanes) {
  if (mask == kAllLanes) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
  _mm256_mask_storeu_epi16(to, mask, half);
}

RESFUSE_LANES Lanes load_lanes(const float* from, LaneMask mask = kAllLanes) {
  return mask == kAllLanes ? _mm512_loadu_ps(from) : _mm512_maskz_loadu_ps(mask, from);
}

// Rounded to nearest, ties to even; subnormal results are zero.
RESFUSE_LANES Halves round_halves(Lanes value, BFloat16) { return (__m256i)_mm512_cvtneps_pbh(value); }

// The same without AVX512_BF16, as math.h's store, so that subnormal results are kept: in the upper halves, and not for
// NaN.
RESFUSE_LANES UnitLanes round_bits(Lanes value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
}
RESFUSE_LANES Halves round_halves(Lanes value, WideBFloat16) {
  const __m512i rounded = round_bits(value);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)), 16));
}

RESFUSE_LANES void store_lanes(float* to, Lanes value, LaneMask mask = kAllLanes) {
  if (mask == kAllLanes) return _mm512_storeu_ps(to, value);
  _mm512_mask_storeu_ps(to, mask, value);
}

// Sums in double of float lanes.
struct DoubleLanes {
  __m512d low, high;
  RESFUSE_LANES DoubleLanes() : low(_mm512_setzero_pd()), high(_mm512_setzero_pd()) {}  // not implicit: for this target
  RESFUSE_LANES void add(Lanes value) {
    low += _mm512_cvtps_pd(_mm512_castps512_ps256(value));
    high += _mm512_cvtps_pd(_mm512_extractf32x8_ps(value, 1));
  }
  RESFUSE_LANES void store(double* to) const {
    _mm512_storeu_pd(to, low);
    _mm512_storeu_pd(to + 8, high);
  }
};

// Units: a float, or a pair of bfloat16, the first in the lower half.
RESFUSE_LANES Lanes broadcast_unit(float a) { return _mm512_set1_ps(a); }
RESFUSE_LANES UnitLanes broadcast_unit(uint32_t a) { return _mm512_set1_epi32(static_cast<int>(a)); }
RESFUSE_LANES Lanes load_units(const float* from) { return _mm512_loadu_ps(from); }
RESFUSE_LANES UnitLanes load_units(const uint32_t* from) { return _mm512_loadu_si512(from); }
template <class U>
RESFUSE_LANES void store_units(U* to, UnitLanes value) {
  _mm512_storeu_si512(to, value);
}
RESFUSE_LANES UnitLanes as_units(Lanes value) { return _mm512_castps_si512(value); }
RESFUSE_LANES Lanes multiply_add(UnitLanes a, UnitLanes b, Lanes c) {
  return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
}

RESFUSE_LANES UnitLanes pair_halves(Halves first, Halves second) {
  const __m512i upper = _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16);
  return _mm512_or_si512(_mm512_cvtepu16_epi32(first), upper);
}
// Two vectors of floats rounded to pairs, the first in the lower halves.
RESFUSE_LANES UnitLanes round_pairs(Lanes first, Lanes second, BFloat16) {
  alignas(64) static constexpr uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                           21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                           11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), (__m512i)_mm512_cvtne2ps_pbh(second, first));
}
RESFUSE_LANES Lanes first_of_pairs(UnitLanes pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
RESFUSE_LANES Lanes second_of_pairs(UnitLanes pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000u))));
}
// Thirty-two consecutive values as pairs of neighbours.
RESFUSE_LANES UnitLanes join_halves(Halves low, Halves high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// As many rows of units as there are lanes, transposed.
RESFUSE_LANES void transpose_units(UnitLanes (&r)[kLanes]) {
  __m512i t[16], u[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(u[j], u[4 + j], 0x88), b = _mm512_shuffle_i32x4(u[j], u[4 + j], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0xdd);
    r[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    r[j + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
    r[j + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
    r[j + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}

}  // namespace resfuse::cpu::RESFUSE_ISA

RESFUSE_TILES_END
