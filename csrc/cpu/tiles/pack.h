// Weights as panels: for a panel's channels side by side, every unit of the inner product in the order of its taps.
//
// A panel's lanes are output channels of the product: K forward, C backward to the input. Weights are rounded to
// what is multiplied here, so that float32 parameters need no cast beside bfloat16 activations. Of a grouped weight,
// what a lane reads of other groups is zero.
#pragma once

#include "microkernel.h"
#include "plan.h"

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

namespace resfuse::cpu::RESFUSE_ISA {

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

// What is packed side by side: `lanes` lanes, of a panel or half of one, and `units` units of the inner product.
struct Strip {
  int64_t lane, lanes, k, units;
};

// Consecutive units of one lane, from consecutive memory; those outside [first, last) are zero.
template <class T, class W>
RESFUSE_LANES UnitLanes row_units(const W* from, int64_t first, int64_t last, float scale) {
  const auto load = [&](int64_t i) RESFUSE_INLINE_LAMBDA {
    return load_lanes(from + i, lane_mask(i, first, last)) * broadcast_lanes(scale);
  };
  if constexpr (kUnit<T> == 1) {
    return as_units(load(0));
  } else {
    return join_halves(round_halves(load(0), T{}), round_halves(load(kLanes), T{}));
  }
}

// Lanes lie `lane_step` apart and k is consecutive: square blocks of units are transposed.
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
      UnitLanes rows[kLanes];
      for (int64_t i = 0; i < kLanes; ++i)
        rows[i] = i >= count ? as_units(zero_lanes())
                             : row_units<T>(from[i] + k, reads[i].begin - k, reads[i].end - k, scale[i]);
      transpose_units(rows);
      for (int64_t i = 0; i < std::min(kLanes, strip.units - unit); ++i)
        store_units(to + (unit + i) * strip.lanes + half, rows[i]);
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
        if (k >= w.depth) return zero_lanes();
        const Range own = w.lanes_of(k);
        const LaneMask mask = lane_mask(lane, own.begin, own.end);
        const W* from = w.depth_row(k) + lane * w.lane_step;
        Lanes value;
        if (w.lane_step == 1) {
          value = load_lanes(from, mask);
        } else {
          alignas(64) float gathered[kLanes] = {};
          for (int64_t i = std::max<int64_t>(own.begin - lane, 0); i < std::min(kLanes, own.end - lane); ++i)
            gathered[i] = load(from[i * w.lane_step]);
          value = load_lanes(gathered);
        }
        return w.scale == nullptr ? value : value * load_lanes(w.scale + lane, mask);
      };
      const int64_t k = strip.k + unit * kUnit<T>;
      unit_t<T>* at = to + unit * strip.lanes + half;
      if constexpr (kUnit<T> == 1) {
        store_lanes(at, row(k));
      } else {
        store_units(at, pair_halves(round_halves(row(k), T{}), round_halves(row(k + 1), T{})));
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

}  // namespace resfuse::cpu::RESFUSE_ISA

RESFUSE_TILES_END
#endif
