// The two matrix products that everything rests on: a register tile of 28 or 16 accumulators, operands in cache.
//
// `multiply`:    c[R pixels][32 channels] = sum over taps and input channels of a[pixel][k] * b[k][32]
// `accumulate`:  w[8 channels][32 channels] += sum over pixels of p[pixel][8] * q[pixel][32]
// Both also exist for 16 channels, one vector instead of two: grouped convolutions multiply fewer zeros then.
// A unit is what one step of the inner product takes: a float, or a pair of bfloat16 whose products are summed in
// float by one instruction.
#pragma once

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "lanes.h"

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

namespace resfuse::cpu {

constexpr int64_t kPanel = 32;          // channels side by side: two vectors
constexpr int kMaxPixels = 14;          // pixels of a register tile: 14 * 2 accumulators, 2 of b, 1 of a: 31 registers
constexpr int64_t kSumSteps = 512;      // a longer sum is one of sums: it rounds less, at 1 % of its time
constexpr int64_t kWeightChannels = 8;  // rows of a weight gradient's register tile

template <class T>
struct UnitOf {
  using type = float;
  static constexpr int64_t kWidth = 1;  // values per unit
};
template <>
struct UnitOf<BFloat16> {
  using type = uint32_t;
  static constexpr int64_t kWidth = 2;
};
template <class T>
using unit_t = typename UnitOf<T>::type;
template <class T>
constexpr int64_t kUnit = UnitOf<T>::kWidth;
// A value of an activation as it lies in a patch: bfloat16, or a float that was one and is multiplied as it is.
template <class T>
using operand_t = std::conditional_t<kUnit<T> == 1, float, T>;

RESFUSE_LANES Lanes512 broadcast_unit(float a) { return _mm512_set1_ps(a); }
RESFUSE_LANES __m512i broadcast_unit(uint32_t a) { return _mm512_set1_epi32(static_cast<int>(a)); }
RESFUSE_LANES Lanes512 load_units(const float* from) { return _mm512_loadu_ps(from); }
RESFUSE_LANES __m512i load_units(const uint32_t* from) { return _mm512_loadu_si512(from); }
RESFUSE_LANES Lanes512 multiply_add(Lanes512 a, Lanes512 b, Lanes512 c) { return _mm512_fmadd_ps(a, b, c); }
RESFUSE_LANES Lanes512 multiply_add(__m512i a, __m512i b, Lanes512 c) {
  return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
}

// One contiguous run of input channels: its begin relative to the first pixel, its length, and the units between
// neighbours in the patch and between the pixels that are multiplied.
struct Tap {
  int64_t offset;
  int64_t steps;
  int64_t patch_step;
  int64_t pixel_step;
};

// `origin` is the patch pixel from which taps count, `pixel` the first of R pixels.
template <class U, int V, int R>
__attribute__((noinline)) void multiply_pixels(const U* patch, int64_t origin, int64_t pixel, const Tap* taps,
                                               int64_t tap_count, const U* b, float* c, int64_t c_step) {
  Lanes512 sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = _mm512_setzero_ps();
  bool first = true;
  const auto store_sums = [&]() RESFUSE_INLINE_LAMBDA {
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) {
        float* to = c + r * c_step + v * kLanes;
        _mm512_storeu_ps(to, first ? sum[r][v] : _mm512_add_ps(_mm512_loadu_ps(to), sum[r][v]));
      }
    }
  };
  int64_t left = kSumSteps;
  for (const Tap* tap = taps; tap < taps + tap_count; ++tap) {
    const int64_t step = tap->pixel_step;
    const U* at = patch + tap->offset + origin * tap->patch_step + pixel * step;
    const U* end = at + tap->steps;
    while (at < end) {
      if (left == 0) {
        store_sums();
        for (int r = 0; r < R; ++r)
          for (int v = 0; v < V; ++v) sum[r][v] = _mm512_setzero_ps();
        first = false;
        left = kSumSteps;
      }
      const U* stop = at + std::min<int64_t>(end - at, left);
      left -= stop - at;
      for (; at < stop; ++at, b += V * kLanes) {
        decltype(load_units(b)) lanes[V];
        for (int v = 0; v < V; ++v) lanes[v] = load_units(b + v * kLanes);
        for (int r = 0; r < R; ++r) {
          const auto value = broadcast_unit(at[r * step]);
          for (int v = 0; v < V; ++v) sum[r][v] = multiply_add(value, lanes[v], sum[r][v]);
        }
      }
    }
  }
  store_sums();
}

template <class U>
using MultiplyPixels = void (*)(const U*, int64_t, int64_t, const Tap*, int64_t, const U*, float*, int64_t);

template <class U, int V, size_t... R>
constexpr std::array<MultiplyPixels<U>, sizeof...(R)> multiply_table(std::index_sequence<R...>) {
  return {&multiply_pixels<U, V, static_cast<int>(R) + 1>...};
}

// c[i] for `pixels` pixels, in groups as equal as their number allows, and `lanes` channels, 32 or 16.
// Before each group, `before(pixel, count)` is called: it may ask for memory that is needed soon.
template <class U, class P>
void multiply(const U* patch, int64_t origin, int64_t pixels, const std::vector<Tap>& taps, const U* b, int64_t lanes,
              float* c, int64_t c_step, const P& before) {
  static constexpr std::array kTables{multiply_table<U, 1>(std::make_index_sequence<kMaxPixels>{}),
                                      multiply_table<U, 2>(std::make_index_sequence<kMaxPixels>{})};
  const auto& table = kTables[lanes == kPanel];
  const int64_t groups = (pixels + kMaxPixels - 1) / kMaxPixels, tap_count = static_cast<int64_t>(taps.size());
  int64_t pixel = 0;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t count = (pixels - pixel) / (groups - group);
    before(pixel, count);
    table[static_cast<size_t>(count - 1)](patch, origin, pixel, taps.data(), tap_count, b, c + pixel * c_step, c_step);
    pixel += count;
  }
}

// Rows of pixels: p is dense over all rows, row r of q begins at q + rows[r]. `first`: w is written, not added to.
// The rows are summed from zero and then added to w: a sum of short sums rounds less than one long one.
template <class U, int V>
__attribute__((noinline)) void accumulate(const U* p, int64_t p_step, const U* q, int64_t q_step, const int64_t* rows,
                                          int64_t row_count, int64_t steps, bool first, float* w) {
  constexpr int R = kWeightChannels;
  Lanes512 sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = _mm512_setzero_ps();
  for (int64_t row = 0; row < row_count; ++row) {
    const U* at = q + rows[row];
    for (int64_t i = 0; i < steps; ++i, p += p_step, at += q_step) {
      decltype(load_units(at)) lanes[V];
      for (int v = 0; v < V; ++v) lanes[v] = load_units(at + v * kLanes);
      for (int r = 0; r < R; ++r) {
        const auto value = broadcast_unit(p[r]);
        for (int v = 0; v < V; ++v) sum[r][v] = multiply_add(value, lanes[v], sum[r][v]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      float* to = w + (r * V + v) * kLanes;
      _mm512_storeu_ps(to, first ? sum[r][v] : _mm512_add_ps(_mm512_loadu_ps(to), sum[r][v]));
    }
  }
}

}  // namespace resfuse::cpu

RESFUSE_TILES_END
#endif
