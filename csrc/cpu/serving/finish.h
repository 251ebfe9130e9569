// The register tile of inference: a product of some pixels with a panel of channels that is finished before it is
// stored.
//
//   out = act(bias + sum over taps and input channels of a[pixel][k] * b[k][lane] + residual)
// Units and panels are microkernel.h's, and so is the rule that a long sum is one of sums: those before the last lie in
// memory. The k of a second activation, a projection shortcut's, may follow those of the first.
#pragma once

#include "../tiles/microkernel.h"
#include "../tiles/prefetch.h"

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

namespace resfuse::cpu::RESFUSE_ISA {

// A run of consecutive units that a pixel reads, `offset` after its first.
struct Run {
  int64_t offset, units;
};

// What a register tile reads of one activation: its first pixel, units between pixels, and the runs of each.
template <class U>
struct Operand {
  const U* at;
  int64_t step;
  const Run* runs;
  int64_t count;

  int64_t units() const {
    int64_t sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += runs[i].units;
    return sum;
  }
  Operand after(int64_t pixels) const { return {at + pixels * step, step, runs, count}; }
};

// Where the first pixel of a register tile is finished; steps lead to its neighbours.
template <class T>
struct Finish {
  const float* bias;
  const T* residual;  // or null
  int64_t residual_step;
  T* out;
  int64_t out_step;
  bool relu;
};

// Memory that will be written, or read, once the product is there.
template <class T, int V>
RESFUSE_LANES void prefetch_pixel(const T* at) {
  const char* line = reinterpret_cast<const char*>(at);
  _mm_prefetch(line, _MM_HINT_T0);
  for (int64_t i = 1; i < V * kLanes * static_cast<int64_t>(sizeof(T)) / kLine; ++i)
    _mm_prefetch(line + i * kLine, _MM_HINT_T0);
}

// R pixels of two operands, one behind the other in b, whose panels lie b_panel apart; the second may have no runs.
template <class T, int V, int R>
__attribute__((noinline)) void finish_pixels(const Operand<unit_t<T>> (&operands)[2], const unit_t<T>* b,
                                             int64_t b_panel, const Finish<T>& to, Ahead ahead) {
  constexpr int kSide = kPanelVectors<V>;
  Lanes sum[R][V];
  for_sums<R, V>([&](auto r, auto v) RESFUSE_INLINE_LAMBDA { sum[r][v] = zero_lanes(); });
  alignas(64) float sums[R * V * kLanes];  // of the parts before
  bool first = true;
  const auto add_sums = [&]() RESFUSE_INLINE_LAMBDA {
    if (first) return;
    for_sums<R, V>([&](auto r, auto v) RESFUSE_INLINE_LAMBDA { sum[r][v] += load_lanes(sums + (r * V + v) * kLanes); });
  };
  int64_t left = kSumSteps;
  for (int r = 0; r < R; ++r) {
    prefetch_pixel<T, V>(to.out + r * to.out_step);
    if (to.residual != nullptr) prefetch_pixel<T, V>(to.residual + r * to.residual_step);
  }
  for (const Operand<unit_t<T>>& a : operands) {
    const int64_t step = a.step;
    for (const Run* run = a.runs; run < a.runs + a.count; ++run) {
      const unit_t<T>* at = a.at + run->offset;
      const unit_t<T>* end = at + run->units;
      while (at < end) {
        if (left == 0) {
          add_sums();
          for_sums<R, V>([&](auto r, auto v) RESFUSE_INLINE_LAMBDA {
            store_lanes(sums + (r * V + v) * kLanes, sum[r][v]);
            sum[r][v] = zero_lanes();
          });
          first = false;
          left = kSumSteps;
        }
        const unit_t<T>* stop = at + std::min<int64_t>(end - at, left);
        left -= stop - at;
        for (; at < stop; ++at, b += kSide * kLanes) {
          ask(ahead);
          multiply_step<unit_t<T>, V, R>(at, step, b, b_panel, sum);
        }
      }
    }
  }
  add_sums();
  for_sums<R, V>([&](auto r, auto v) RESFUSE_INLINE_LAMBDA { sum[r][v] += load_lanes(to.bias + v * kLanes); });
  if (to.residual != nullptr)
    for_sums<R, V>([&](auto r, auto v) RESFUSE_INLINE_LAMBDA {
      sum[r][v] += load_lanes(to.residual + r * to.residual_step + v * kLanes);
    });
  if (to.relu) for_sums<R, V>([&](auto r, auto v) RESFUSE_INLINE_LAMBDA { sum[r][v] = relu_lanes(sum[r][v]); });
  for_sums<R, V>([&](auto r, auto v)
                     RESFUSE_INLINE_LAMBDA { store_lanes(to.out + r * to.out_step + v * kLanes, sum[r][v]); });
}

template <class T>
using FinishPixels = void (*)(const Operand<unit_t<T>> (&)[2], const unit_t<T>*, int64_t, const Finish<T>&, Ahead);

template <class T, int V, size_t... R>
constexpr std::array<FinishPixels<T>, sizeof...(R)> finish_table(std::index_sequence<R...>) {
  return {&finish_pixels<T, V, static_cast<int>(R) + 1>...};
}

// A line of `pixels` pixels, in groups as equal as their number allows; `lanes` is half a panel's, one's or two's.
// Meanwhile a share of the memory is asked for that `next` names.
template <class T>
void finish_line(const Operand<unit_t<T>>& first, const Operand<unit_t<T>>& second, int64_t pixels, const unit_t<T>* b,
                 int64_t b_panel, int64_t lanes, Finish<T> to, Prefetcher& next) {
  static constexpr auto kNarrow = finish_table<T, 1>(std::make_index_sequence<kNarrowPixels>{});
  static constexpr auto kWhole = finish_table<T, 2>(std::make_index_sequence<kMaxPixels>{});
  static constexpr auto kWide = finish_table<T, 4>(std::make_index_sequence<kWidePixels>{});
  const auto run = [&](const auto& table) RESFUSE_INLINE_LAMBDA {
    Operand<unit_t<T>> operands[2] = {first, second};
    for (int64_t groups = groups_of(pixels, static_cast<int64_t>(table.size())); groups > 0; --groups) {
      const int64_t count = pixels / groups;
      table[static_cast<size_t>(count - 1)](operands, b, b_panel, to, next.take(first.units() + second.units()));
      pixels -= count;
      for (auto& operand : operands) operand = operand.after(count);
      to.out += count * to.out_step;
      if (to.residual != nullptr) to.residual += count * to.residual_step;
    }
  };
  if constexpr (kWidePixels > 0)
    if (lanes > kPanel) return run(kWide);
  lanes == kPanel ? run(kWhole) : run(kNarrow);
}

}  // namespace resfuse::cpu::RESFUSE_ISA

RESFUSE_TILES_END
#endif
