// Weights as panels: for 32 channels side by side, every unit of the inner product in the order of its taps.
//
// A panel's lanes are output channels of the product: K forward, C backward to the input. Weights are rounded to the
// what is multiplied here, so that float32 parameters need no cast beside bfloat16 activations. Of a grouped weight,
// what a lane reads of other groups is zero.
#pragma once

#include "microkernel.h"
#include "plan.h"

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

namespace resfuse::cpu {

// A matrix in memory: value (lane, k) at data[lane * lane_step + k * k_step]; `scale` multiplies lanes or is null.
// Grouped, only lanes and k of one group have a value, `group_step` further ahead for each group before theirs: a
// weight's second index counts from its group's first channel.
template <class W>
struct WeightView {
  const W* data;
  int64_t lanes, depth, lane_step, k_step;
  const float* scale;
  int64_t groups = 1, group_step = 0;

  Range depth_of(int64_t lane) const { return same_groups({lane, lane + 1}, lanes, depth, groups); }
  Range lanes_of(int64_t k) const {
    return groups == 1 ? Range{0, lanes} : same_groups({k, k + 1}, depth, lanes, groups);
  }
  // where the row of a lane, or of k, would begin if it were dense
  const W* lane_row(int64_t lane) const { return data + lane * lane_step - before(lane, lanes); }
  const W* depth_row(int64_t k) const { return data + k * k_step - before(k, depth); }

 private:
  int64_t before(int64_t channel, int64_t channels) const {
    return groups == 1 ? 0 : channel / (channels / groups) * group_step;
  }
};

// What is packed side by side: `lanes` lanes, 32 or 16, and `units` units of the inner product.
struct Strip {
  int64_t lane, lanes, k, units;
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

// Sixteen consecutive units of one lane, from consecutive memory; those outside [first, last) are zero.
template <class T, class W>
RESFUSE_LANES __m512i row_units(const W* from, int64_t first, int64_t last, float scale) {
  const auto load = [&](int64_t i) RESFUSE_INLINE_LAMBDA {
    return _mm512_mul_ps(load_lanes(from + i, lane_mask(i, first, last)), _mm512_set1_ps(scale));
  };
  if constexpr (kUnit<T> == 1) return _mm512_castps_si512(load(0));
  const __m256i low = round_to_bfloat16(load(0)), high = round_to_bfloat16(load(16));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// Lanes lie `lane_step` apart and k is consecutive: blocks of 16 x 16 units are transposed.
template <class T, class W>
void pack_transposed(const WeightView<W>& w, const Strip& strip, unit_t<T>* to) {
  for (int64_t half = 0; half < strip.lanes; half += kLanes) {
    const int64_t lane = strip.lane + half, count = std::clamp<int64_t>(w.lanes - lane, 0, kLanes);
    Range reads[kLanes];
    const W* from[kLanes];
    float scale[kLanes];
    for (int64_t i = 0; i < count; ++i) {
      reads[i] = w.depth_of(lane + i);
      from[i] = w.lane_row(lane + i);
      scale[i] = w.scale == nullptr ? 1.0f : w.scale[lane + i];
    }
    for (int64_t unit = 0; unit < strip.units; unit += kLanes) {
      const int64_t k = strip.k + unit * kUnit<T>;
      __m512i rows[kLanes];
      for (int64_t i = 0; i < kLanes; ++i)
        rows[i] = i >= count ? _mm512_setzero_si512()
                             : row_units<T>(from[i] + k, reads[i].begin - k, reads[i].end - k, scale[i]);
      transpose_units(rows);
      for (int64_t i = 0; i < std::min(kLanes, strip.units - unit); ++i)
        _mm512_storeu_si512(to + (unit + i) * strip.lanes + half, rows[i]);
    }
  }
}

// Lanes are consecutive, or lie anywhere: one unit after the other.
template <class T, class W>
void pack_rows(const WeightView<W>& w, const Strip& strip, unit_t<T>* to) {
  for (int64_t unit = 0; unit < strip.units; ++unit) {
    for (int64_t half = 0; half < strip.lanes; half += kLanes) {
      const int64_t lane = strip.lane + half;
      const auto row = [&](int64_t k) RESFUSE_INLINE_LAMBDA {
        if (k >= w.depth) return _mm512_setzero_ps();
        const Range own = w.lanes_of(k);
        const LaneMask mask = lane_mask(lane, own.begin, own.end);
        const W* from = w.depth_row(k) + lane * w.lane_step;
        Lanes512 value;
        if (w.lane_step == 1) {
          value = load_lanes(from, mask);
        } else {
          alignas(64) float gathered[kLanes] = {};
          for (int64_t i = std::max<int64_t>(own.begin - lane, 0); i < std::min(kLanes, own.end - lane); ++i)
            gathered[i] = load(from[i * w.lane_step]);
          value = load_lanes(gathered);
        }
        return w.scale == nullptr ? value : _mm512_mul_ps(value, load_lanes(w.scale + lane, mask));
      };
      const int64_t k = strip.k + unit * kUnit<T>;
      unit_t<T>* at = to + unit * strip.lanes + half;
      if constexpr (kUnit<T> == 1) {
        store_lanes(at, row(k));
      } else {
        _mm512_storeu_si512(at, pair_halves(round_to_bfloat16(row(k)), round_to_bfloat16(row(k + 1))));
      }
    }
  }
}

template <class T, class W>
void pack_strip(const WeightView<W>& w, const Strip& strip, unit_t<T>* to) {
  if (w.k_step == 1) return pack_transposed<T>(w, strip, to);
  pack_rows<T>(w, strip, to);
}

template <class T, class W>
void pack_panel(const WeightView<W>& w, int64_t panel, unit_t<T>* to) {
  pack_strip<T>(w, {panel * kPanel, kPanel, 0, ceil_div(w.depth, kUnit<T>)}, to);
}

}  // namespace resfuse::cpu

RESFUSE_TILES_END
#endif
