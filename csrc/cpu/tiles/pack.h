// Weights as panels: for 32 channels side by side, every unit of the inner product in the order of its taps.
//
// A panel's lanes are output channels of the product: K forward, C backward to the input. Weights are rounded to the
// activation's dtype here, so that float32 parameters need no cast beside bfloat16 activations.
#pragma once

#include "microkernel.h"

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

namespace resfuse::cpu {

// A matrix in memory: value (lane, k) at data[lane * lane_step + k * k_step]; `scale` multiplies lanes or is null.
template <class W>
struct WeightView {
  const W* data;
  int64_t lanes, depth, lane_step, k_step;
  const float* scale;
};

// Sixteen rows of sixteen units, transposed.
RESFUSE_LANES void transpose_units(__m512i (&r)[16]) {
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

// Sixteen consecutive units of one lane, from consecutive memory.
template <class T, class W>
RESFUSE_LANES __m512i row_units(const W* from, int64_t left, float scale) {
  const auto load = [&](int64_t i) RESFUSE_INLINE_LAMBDA {
    return _mm512_mul_ps(load_lanes(from + i, lane_mask(i, left)), _mm512_set1_ps(scale));
  };
  if constexpr (sizeof(T) == 4) return _mm512_castps_si512(load(0));
  const __m256i low = round_to_bfloat16(load(0)), high = round_to_bfloat16(load(16));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// Lanes lie `lane_step` apart and k is consecutive: blocks of 16 x 16 units are transposed.
template <class T, class W>
void pack_transposed(const WeightView<W>& w, int64_t panel, unit_t<T>* to) {
  const int64_t units = ceil_div(w.depth, kUnit<T>);
  for (int64_t half = 0; half < kPanel; half += kLanes) {
    for (int64_t unit = 0; unit < units; unit += kLanes) {
      __m512i rows[16];
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t lane = panel * kPanel + half + i, k = unit * kUnit<T>;
        rows[i] = lane >= w.lanes ? _mm512_setzero_si512()
                                  : row_units<T>(w.data + lane * w.lane_step + k, w.depth - k,
                                                 w.scale == nullptr ? 1.0f : w.scale[lane]);
      }
      transpose_units(rows);
      for (int64_t i = 0; i < std::min(kLanes, units - unit); ++i)
        _mm512_storeu_si512(to + (unit + i) * kPanel + half, rows[i]);
    }
  }
}

// Lanes are consecutive, or lie anywhere: one unit after the other.
template <class T, class W>
void pack_rows(const WeightView<W>& w, int64_t panel, unit_t<T>* to) {
  const int64_t units = ceil_div(w.depth, kUnit<T>);
  for (int64_t unit = 0; unit < units; ++unit) {
    for (int64_t half = 0; half < kPanel; half += kLanes) {
      const int64_t lane = panel * kPanel + half;
      const LaneMask mask = lane_mask(lane, w.lanes);
      const auto row = [&](int64_t k) RESFUSE_INLINE_LAMBDA {
        if (k >= w.depth) return _mm512_setzero_ps();
        Lanes512 value;
        if (w.lane_step == 1) {
          value = load_lanes(w.data + lane + k * w.k_step, mask);
        } else {
          alignas(64) float gathered[kLanes] = {};
          for (int64_t i = 0; i < std::min(kLanes, w.lanes - lane); ++i)
            gathered[i] = load(w.data[(lane + i) * w.lane_step + k * w.k_step]);
          value = load_lanes(gathered);
        }
        return w.scale == nullptr ? value : _mm512_mul_ps(value, load_lanes(w.scale + lane, mask));
      };
      unit_t<T>* at = to + unit * kPanel + half;
      if constexpr (kUnit<T> == 1) {
        store_lanes(at, row(unit));
      } else {
        _mm512_storeu_si512(at, pair_halves(round_to_bfloat16(row(2 * unit)), round_to_bfloat16(row(2 * unit + 1))));
      }
    }
  }
}

template <class T, class W>
void pack_panel(const WeightView<W>& w, int64_t panel, unit_t<T>* to) {
  if (w.k_step == 1) return pack_transposed<T>(w, panel, to);
  pack_rows<T>(w, panel, to);
}

}  // namespace resfuse::cpu

RESFUSE_TILES_END
#endif
