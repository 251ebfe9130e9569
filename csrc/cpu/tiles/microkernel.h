// The two matrix products that everything rests on: a register tile of accumulators, operands in cache.
//
// `multiply`:    c[R pixels][panel] = sum over taps and input channels of a[pixel][k] * b[k][panel]
// `accumulate`:  w[R channels][panel] += sum over pixels of p[pixel][R] * q[pixel][panel]
// A panel is two vectors: 32 channels of AVX-512, 16 of AVX2. Both also exist for half a panel: grouped convolutions
// multiply fewer zeros then. And for two panels, with half the rows: every value that is broadcast meets four vectors,
// and sums run in the same order as with one, so results are the same bits.
// A unit is what one step of the inner product takes: a float, or a pair of bfloat16 whose products are summed in
// float by one instruction.
#pragma once

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "lanes.h"
#include "prefetch.h"

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

namespace resfuse::cpu::RESFUSE_ISA {

constexpr int64_t kPanel = 2 * kLanes;  // channels side by side
constexpr int64_t kAheadSteps = 8;      // steps of `accumulate` between asking for a line of p and reading it
constexpr int kFewSums = 8;             // fewer vectors of sums than additions that a core has on their way
constexpr int64_t kSumSteps = 512;      // a longer sum is one of sums: it rounds less, at 1 % of its time

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

// One contiguous run of input channels: its begin relative to the first pixel, its length, and the units between
// neighbours in the patch and between the pixels that are multiplied.
struct Tap {
  int64_t offset;
  int64_t steps;
  int64_t patch_step;
  int64_t pixel_step;
};

// How many panels are multiplied together where there are `left` of them.
inline int64_t panels_together(int64_t left) { return wide_tiles() && left > 1 ? 2 : 1; }

// Panels that are multiplied together, or part of one: where the weights and the products of the first lie, how far the
// next panel's are, and how far those of the next pixel.
template <class U>
struct Panels {
  const U* b;
  float* c;
  int64_t b_panel, c_panel, c_pixel;
};

// Vectors of a panel, of V vectors in all.
template <int V>
constexpr int kPanelVectors = V < 2 ? V : 2;

// Ask for the line that a step is due to ask for, for L1 too: the steps after it ask for the same one, and find it.
RESFUSE_LANES void ask(Ahead& ahead) {
  _mm_prefetch(ahead.at, _MM_HINT_T0);
  ahead.at += ahead.bytes;
}

// Keep a vector in a register: a compiler may think it cheaper to read it again for each of its uses.
template <class L>
RESFUSE_LANES void keep(L& lanes) {
  asm("" : "+v"(lanes));
}

// f(0) to f(N - 1) with constants, so that arrays of vectors are registers from the start.
template <class F, int... I>
RESFUSE_LANES void repeat(const F& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
RESFUSE_LANES void repeat(const F& f) {
  repeat(f, std::make_integer_sequence<int, N>{});
}
// f(r, v) for R by V sums
template <int R, int V, class F>
RESFUSE_LANES void for_sums(const F& f) {
  repeat<R>([&](auto r) RESFUSE_INLINE_LAMBDA { repeat<V>([&](auto v) RESFUSE_INLINE_LAMBDA { f(r, v); }); });
}

// One step of R pixels, whose values lie `step` apart, with V vectors of b, whose panels lie b_panel apart.
template <class U, int V, int R>
RESFUSE_LANES void multiply_step(const U* at, int64_t step, const U* b, int64_t b_panel, Lanes (&sum)[R][V]) {
  constexpr int kSide = kPanelVectors<V>;
  decltype(load_units(b)) lanes[V];
  repeat<V>([&](auto v) RESFUSE_INLINE_LAMBDA {
    lanes[v] = load_units(b + v / kSide * b_panel + v % kSide * kLanes);
    keep(lanes[v]);
  });
  repeat<R>([&](auto r) RESFUSE_INLINE_LAMBDA {
    const auto value = broadcast_unit(at[r * step]);
    repeat<V>([&](auto v) RESFUSE_INLINE_LAMBDA { sum[r][v] = multiply_add(value, lanes[v], sum[r][v]); });
  });
}

// `origin` is the patch pixel from which taps count, `pixel` the first of R pixels.
template <class U, int V, int R>
__attribute__((noinline)) void multiply_pixels(const U* patch, int64_t origin, int64_t pixel, const Tap* taps,
                                               int64_t tap_count, const Panels<U>& panels, Ahead ahead) {
  constexpr int kSide = kPanelVectors<V>;
  const U* b = panels.b;
  Lanes sum[R][V];
  const auto clear = [&]() RESFUSE_INLINE_LAMBDA {
    for_sums<R, V>([&](auto r, auto v) RESFUSE_INLINE_LAMBDA { sum[r][v] = zero_lanes(); });
  };
  clear();
  bool first = true;
  const auto store_sums = [&]() RESFUSE_INLINE_LAMBDA {
    for_sums<R, V>([&](auto r, auto v) RESFUSE_INLINE_LAMBDA {
      float* to = panels.c + v / kSide * panels.c_panel + (pixel + r) * panels.c_pixel + v % kSide * kLanes;
      store_lanes(to, first ? sum[r][v] : load_lanes(to) + sum[r][v]);
    });
  };
  int64_t left = kSumSteps;
  for (const Tap* tap = taps; tap < taps + tap_count; ++tap) {
    const int64_t step = tap->pixel_step;
    const U* at = patch + tap->offset + origin * tap->patch_step + pixel * step;
    const U* end = at + tap->steps;
    while (at < end) {
      if (left == 0) {
        store_sums();
        clear();
        first = false;
        left = kSumSteps;
      }
      const U* stop = at + std::min<int64_t>(end - at, left);
      left -= stop - at;
      for (; at < stop; ++at, b += kSide * kLanes) {
        ask(ahead);
        multiply_step<U, V, R>(at, step, b, panels.b_panel, sum);
      }
    }
  }
  store_sums();
}

template <class U>
using MultiplyPixels = void (*)(const U*, int64_t, int64_t, const Tap*, int64_t, const Panels<U>&, Ahead);

template <class U, int V, size_t... R>
constexpr std::array<MultiplyPixels<U>, sizeof...(R)> multiply_table(std::index_sequence<R...>) {
  return {&multiply_pixels<U, V, static_cast<int>(R) + 1>...};
}

// How many groups of pixels are multiplied, of at most `most`. Two panels wide, 7 pixels are one more vector than there
// are registers, 6 are faster; but every group reads all of b, and two groups are better than three.
inline int64_t groups_of(int64_t pixels, int64_t most) {
  if (most == kWidePixels && pixels > 2 * most) --most;
  return (pixels + most - 1) / most;
}

// Products of `pixels` pixels, in groups as equal as their number allows, with `lanes` channels: of half a panel, of
// one, or of two, where wide_tiles(). Meanwhile a share of what `next` names is asked for. Before each group,
// `before(pixel, count)` is called: it may ask for memory that is needed soon.
template <class U, class P>
void multiply(const U* patch, int64_t origin, int64_t pixels, const std::vector<Tap>& taps, const Panels<U>& panels,
              int64_t lanes, Prefetcher& next, const P& before) {
  static constexpr auto kNarrow = multiply_table<U, 1>(std::make_index_sequence<kNarrowPixels>{});
  static constexpr auto kWhole = multiply_table<U, 2>(std::make_index_sequence<kMaxPixels>{});
  static constexpr auto kWide = multiply_table<U, 4>(std::make_index_sequence<kWidePixels>{});
  int64_t steps = 0;
  for (const Tap& tap : taps) steps += tap.steps;
  const auto run = [&](const auto& table) RESFUSE_INLINE_LAMBDA {
    const auto tap_count = static_cast<int64_t>(taps.size());
    const int64_t groups = groups_of(pixels, static_cast<int64_t>(table.size()));
    int64_t pixel = 0;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t count = (pixels - pixel) / (groups - group);
      before(pixel, count);
      table[static_cast<size_t>(count - 1)](patch, origin, pixel, taps.data(), tap_count, panels, next.take(steps));
      pixel += count;
    }
  };
  if constexpr (kWidePixels > 0)
    if (lanes > kPanel) return run(kWide);
  lanes == kPanel ? run(kWhole) : run(kNarrow);
}

// Rows of `steps` pixels each: p is dense over all rows, row r of q begins at q + rows[r], and q's vectors of channels
// lie q_vector apart.
template <class U>
struct PixelRows {
  const U* p;
  int64_t p_step;
  const U* q;
  int64_t q_step, q_vector;
  const int64_t* rows;
  int64_t row_count, steps;
};

// w's panels lie w_panel apart. `first`: w is written, not added to.
// The rows are summed from zero and then added to w: a sum of short sums rounds less than one long one. A sum waits for
// its last addition, so where there are few of them, steps take turns with two sets.
template <class U, int V, int R = kWeightChannels>
__attribute__((noinline)) void accumulate(const PixelRows<U>& from, bool first, float* w, int64_t w_panel,
                                          Ahead ahead) {
  constexpr int kSide = kPanelVectors<V>;
  const auto [begin, p_step, q, q_step, q_vector, rows, row_count, steps] = from;
  const U* p = begin;
  constexpr int kSets = R * V < kFewSums ? 2 : 1;
  Lanes sums[kSets][R][V];
  for (auto& sum : sums) for_sums<R, V>([&](auto r, auto v) RESFUSE_INLINE_LAMBDA { sum[r][v] = zero_lanes(); });
  const auto step = [&](const U* at, Lanes(&sum)[R][V]) RESFUSE_INLINE_LAMBDA {
    _mm_prefetch(reinterpret_cast<const char*>(p + kAheadSteps * p_step), _MM_HINT_T0);
    ask(ahead);
    decltype(load_units(at)) lanes[V];
    repeat<V>([&](auto v) RESFUSE_INLINE_LAMBDA {
      lanes[v] = load_units(at + v * q_vector);
      keep(lanes[v]);
    });
    repeat<R>([&](auto r) RESFUSE_INLINE_LAMBDA {
      const auto value = broadcast_unit(p[r]);
      repeat<V>([&](auto v) RESFUSE_INLINE_LAMBDA { sum[r][v] = multiply_add(value, lanes[v], sum[r][v]); });
    });
    p += p_step;
  };
  for (int64_t row = 0; row < row_count; ++row) {
    const U* at = q + rows[row];
    int64_t i = 0;
    for (; i + kSets <= steps; i += kSets)
      repeat<kSets>([&](auto set) RESFUSE_INLINE_LAMBDA { step(at + (i + set) * q_step, sums[set]); });
    for (; i < steps; ++i) step(at + i * q_step, sums[0]);
  }
  auto& sum = sums[0];
  if constexpr (kSets == 2) for_sums<R, V>([&](auto r, auto v) RESFUSE_INLINE_LAMBDA { sum[r][v] += sums[1][r][v]; });
  for_sums<R, V>([&](auto r, auto v) RESFUSE_INLINE_LAMBDA {
    float* to = w + v / kSide * w_panel + (r * kSide + v % kSide) * kLanes;
    store_lanes(to, first ? sum[r][v] : load_lanes(to) + sum[r][v]);
  });
}

template <class U>
using Accumulate = void (*)(const PixelRows<U>&, bool, float*, int64_t, Ahead);

// A bundle's sums with half a panel, one, or two: `rows` of the bundle at once.
template <class U>
struct Accumulator {
  int64_t rows;
  Accumulate<U> add;

  explicit Accumulator(int64_t lanes)
      : rows(kWeightChannels), add(lanes == kPanel ? accumulate<U, 2> : accumulate<U, 1>) {
    if constexpr (kWideChannels > 0) {
      if (lanes <= kPanel) return;
      rows = kWideChannels;
      add = accumulate<U, 4, kWideChannels>;
    }
  }
};

}  // namespace resfuse::cpu::RESFUSE_ISA

RESFUSE_TILES_END
#endif
