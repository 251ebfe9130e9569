// The gradient of a convolution's weight by tiles: dW[k][c] = sum over output pixels of dY[pixel][k] * a[tap pixel][c].
//
// Both operands are filled by sources, so neither dY nor the activated input is ever stored. For bfloat16 neighbouring
// output pixels form one unit: two steps of the sum in one instruction. A task is a slab of tiles and a block of
// channels of the longer side; each slab has sums of its own, merged in order.
#pragma once

#include "epilogue.h"

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

namespace resfuse::cpu {

constexpr int64_t kWeightPixels = 224;            // of a tile: sums are read and written once for so many products
constexpr int64_t kWeightPatchBytes = 768 << 10;  // the input's side of a tile stays in L2
constexpr int64_t kWeightTasks = 16;
constexpr int64_t kWeightSlabBytes = int64_t{4} << 20;  // the sums of all slabs together

// Sums of one slab: blocks of 8 x 32 floats, [tap][panel of c][group of k]. Slabs and blocks of the longer side share
// the work: enough tasks, not too much memory for their sums, and the shorter side is what every task fills again.
struct WeightSums {
  int64_t taps, panels, groups, slabs, panel_blocks = 1, group_blocks = 1;

  // `once`: every value of dY is asked for by one task only
  WeightSums(const Plan& plan, int64_t tap_count, bool once = false)
      : taps(tap_count),
        panels(ceil_div(plan.in_channels, kPanel)),
        groups(ceil_div(plan.out_channels, kWeightChannels)) {
    const int64_t bytes = size() * static_cast<int64_t>(sizeof(float));
    slabs = std::clamp<int64_t>(kWeightSlabBytes / bytes, 1, std::min<int64_t>(plan.tiles(), kWeightTasks));
    const int64_t blocks = ceil_div(kWeightTasks, slabs);
    if (taps == 1 && plan.in_channels > plan.out_channels && !once) {
      panel_blocks = std::min(blocks, panels);
    } else {
      group_blocks = std::min(blocks, groups);
    }
  }
  int64_t size() const { return taps * panels * groups * kWeightChannels * kPanel; }
  int64_t tasks() const { return slabs * panel_blocks * group_blocks; }
  int64_t at(int64_t tap, int64_t panel, int64_t group) const {
    return ((tap * panels + panel) * groups + group) * kWeightChannels * kPanel;
  }
};

// Neighbours `distance` apart as pairs: to[i] = (pixel[i*step], pixel[i*step + distance]), zero past the end of the
// row.
inline void pair_row(const BFloat16* pixels, int64_t columns, int64_t pixel_step, int64_t step, int64_t distance,
                     int64_t count, int64_t channels, uint32_t* to, int64_t to_step) {
  for (int64_t i = 0; i < count; ++i, to += to_step) {
    const int64_t first = i * step, second = first + distance;
    const BFloat16 *low = pixels + first * pixel_step, *high = pixels + second * pixel_step;
    for (int64_t c = 0; c < channels; c += kLanes) {
      const __m256i next = second < columns ? raw(high + c, kAllLanes) : _mm256_setzero_si256();
      _mm512_storeu_si512(to + c, pair_halves(raw(low + c, kAllLanes), next));
    }
  }
}

// The same straight from a source: pixels 2*i and 2*i + 1 of a row.
template <bool kComputed, class S>
void pair_pixels(const S& source, int64_t pixel, int64_t step, int64_t columns, int64_t begin, int64_t end,
                 uint32_t* to, int64_t to_step) {
  const int64_t whole = begin + (end - begin) / kLanes * kLanes;
  const auto pair = [&](int64_t i, int64_t c, LaneMask mask) RESFUSE_INLINE_LAMBDA {
    const __m256i first = source.template get<kComputed>(pixel + i * step, c, mask);
    const bool alone = i + 1 == columns;
    const __m256i second =
        alone ? _mm256_setzero_si256() : source.template get<kComputed>(pixel + (i + 1) * step, c, mask);
    _mm512_storeu_si512(to + c - begin, pair_halves(first, second));
  };
  for (int64_t i = 0; i < columns; i += 2, to += to_step) {
    for (int64_t c = begin; c < whole; c += kLanes) pair(i, c, kAllLanes);
    if (whole < end) pair(i, whole, lane_mask(whole, end));
  }
}

// One row of one operand, its units in pairs or not.
template <class T, class S>
void fill_units(const S& source, int64_t pixel, int64_t step, int64_t columns, int64_t begin, int64_t end,
                unit_t<T>* to, int64_t to_step) {
  if constexpr (kUnit<T> == 1) {
    fill_row(source, pixel, step, columns, begin, end, to, to_step);
  } else if (source.computed()) {
    pair_pixels<true>(source, pixel, step, columns, begin, end, to, to_step);
  } else {
    pair_pixels<false>(source, pixel, step, columns, begin, end, to, to_step);
  }
}

// The input pixel that the first output pixel of a tile's row reads, where a tap reads nothing else.
inline int64_t first_pixel(const Plan& plan, const Tile& tile, int64_t row) {
  const AxisPlan &h = plan.height, &w = plan.width;
  return (tile.image * h.in + (tile.row + row) * h.in_step) * w.in + tile.column * w.in_step;
}

// The layout of q, the input's side of the sum, in units. A pointwise tap reads each pixel once, so q is filled
// straight from the source; else a patch is filled first, and for bfloat16 every pixel is paired with its right
// neighbour.
template <class T>
struct InputSide {
  const Plan& plan;
  int64_t patch_step, unit_step, q_step;  // units between pixels of the patch, between those of q, and in a step
  int64_t patch_size, q_size;
  bool pointwise;

  InputSide(const Plan& p, int64_t channels)
      : plan(p),
        patch_step(pixel_units<T>(channels)),
        unit_step(pixel_units<float>(channels)),
        pointwise(p.height.span == 0 && p.width.span == 0 && p.height.base_step == 1 && p.width.base_step == 1 &&
                  p.height.origin == 0 && p.width.origin == 0) {
    const int64_t pixels = p.patch_pixels();
    patch_size = pointwise ? 0 : pixels * patch_step;
    q_size = pointwise ? p.rows * ceil_div(p.columns, kUnit<T>) * unit_step : kUnit<T> == 1 ? 0 : pixels * unit_step;
    q_step = (pointwise ? 1 : p.width.base_step * kUnit<T>)*unit_step;
  }

  int64_t row(int64_t base_row, int64_t steps, int64_t columns, const AxisTap& h, const AxisTap& w) const {
    if (pointwise) return base_row * steps * unit_step;
    return ((base_row * plan.height.base_step + h.offset) * columns + w.offset) * unit_step;
  }

  // channels [begin, end)
  template <class A>
  const unit_t<T>* fill(const Tile& tile, const A& input, int64_t begin, int64_t end, unit_t<T>* patch,
                        unit_t<T>* q) const {
    const AxisPlan &h = plan.height, &w = plan.width;
    const int64_t columns = w.patch(tile.columns);
    if (pointwise) {
      const int64_t steps = ceil_div(tile.columns, kUnit<T>);
      for (int64_t r = 0; r < tile.rows; ++r) {
        fill_units<T>(input, first_pixel(plan, tile, r), w.in_step, tile.columns, begin, end, q + r * steps * unit_step,
                      unit_step);
      }
      return q;
    }
    T* values = reinterpret_cast<T*>(patch);
    fill_patch<T>(plan, tile, input, begin, end, values, patch_step * kUnit<T>);
    if constexpr (kUnit<T> == 1) {
      return patch;
    } else {
      for (int64_t r = 0; r < h.patch(tile.rows); ++r)
        pair_row(values + r * columns * patch_step * 2, columns, patch_step * 2, 1, w.base_step, columns, end - begin,
                 q + r * columns * unit_step, unit_step);
      return q;
    }
  }
};

// Add the columns of one tile's p to a slab's sums.
inline void add_columns(const float* p, int64_t p_step, int64_t steps, int64_t channels, double* to) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    DoubleLanes total;
    for (int64_t begin = 0; begin < steps; begin += kFloatRows) {
      Lanes512 sum = _mm512_setzero_ps();
      for (int64_t i = begin; i < std::min(steps, begin + kFloatRows); ++i)
        sum = _mm512_add_ps(sum, load_lanes(p + i * p_step + c));
      total.add(sum);
    }
    alignas(64) double values[kLanes];
    total.store(values);
    for (int64_t j = 0; j < std::min(kLanes, channels - c); ++j) to[c + j] += values[j];
  }
}

inline void add_columns(const uint32_t* p, int64_t p_step, int64_t steps, int64_t channels, double* to) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    DoubleLanes total;
    for (int64_t begin = 0; begin < steps; begin += kFloatRows) {
      Lanes512 first = _mm512_setzero_ps(), second = first;
      for (int64_t i = begin; i < std::min(steps, begin + kFloatRows); ++i) {
        const __m512i pair = load_units(p + i * p_step + c);
        first = _mm512_add_ps(first, _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)));
        second =
            _mm512_add_ps(second, _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32(int(0xffff0000u)))));
      }
      total.add(first);
      total.add(second);
    }
    alignas(64) double values[kLanes];
    total.store(values);
    for (int64_t j = 0; j < std::min(kLanes, channels - c); ++j) to[c + j] += values[j];
  }
}

// Into `totals`, (slabs, size) of sums; `columns` receives the sums of dY's channels. If `symmetric`, dY is the input
// and blocks below the diagonal are left out.
template <class T, class G, class A>
void sum_weight_gradient(const Plan& plan, const G& grad, const A& input, int64_t kernel_width, const WeightSums& sums,
                         float* totals, SlabSums* columns = nullptr, bool symmetric = false) {
  using U = unit_t<T>;
  const int64_t slabs = sums.slabs, tiles = plan.tiles(), out_channels = plan.out_channels;
  const int64_t block_groups = ceil_div(sums.groups, sums.group_blocks);
  const int64_t block_panels = ceil_div(sums.panels, sums.panel_blocks);
  const AxisPlan &h = plan.height, &w = plan.width;
  const InputSide<T> side(plan, std::min(block_panels * kPanel, plan.in_channels));
  const int64_t p_step = pixel_units<float>(block_groups * kWeightChannels);
  const int64_t max_steps = plan.rows * ceil_div(plan.columns, kUnit<T>);
  const int64_t work = plan.images * plan.height.out * plan.width.out * out_channels * 16;

  const int64_t workers = workers_for(sums.tasks(), work);
  parallel_tasks(sums.tasks(), work, [&](int64_t task) {
    const int64_t first_group = task % sums.group_blocks * block_groups, rest = task / sums.group_blocks;
    const int64_t first_panel = rest % sums.panel_blocks * block_panels, slab = rest / sums.panel_blocks;
    const int64_t groups = std::min(block_groups, sums.groups - first_group);
    const int64_t panels = std::min(block_panels, sums.panels - first_panel);
    if (groups <= 0 || panels <= 0) return;
    const int64_t begin = first_group * kWeightChannels, end = std::min(begin + groups * kWeightChannels, out_channels);
    const int64_t in_begin = first_panel * kPanel, in_end = std::min(in_begin + panels * kPanel, plan.in_channels);
    const int64_t bytes = Carver::bytes_of<U>(side.patch_size) + Carver::bytes_of<U>(side.q_size + kPanel) +
                          Carver::bytes_of<U>(max_steps * p_step) + Carver::bytes_of<int64_t>(plan.rows);
    Carver carver(static_cast<char*>(workspace_bytes(Slot::kTile, bytes)));
    U* patch = carver.take<U>(side.patch_size);
    U* q_memory = carver.take<U>(side.q_size + kPanel);
    U* p = carver.take<U>(max_steps * p_step);
    int64_t* rows = carver.take<int64_t>(plan.rows);
    float* total = totals + slab * sums.size();
    const int64_t first_tile = slab * tiles / slabs;

    for (int64_t index = first_tile; index < (slab + 1) * tiles / slabs; ++index) {
      const Tile tile = plan.tile(index);
      Prefetcher next;
      // after its last tile, this thread will likely take the task that is one round of workers away
      const int64_t later = (task + workers) / (sums.group_blocks * sums.panel_blocks);
      const bool last = index + 1 == (slab + 1) * tiles / slabs;
      if (!last || later < slabs) {
        const Tile following = plan.tile(last ? later * tiles / slabs : index + 1);
        prefetch_tile(plan, following, input, next);
        const int64_t at = (following.image * plan.height.out + following.row) * plan.width.out + following.column;
        if (!symmetric) grad.prefetch(at, following.rows * following.columns, next);
      }
      next.spread(sums.taps * panels * groups);
      const U* q = side.fill(tile, input, in_begin, in_end, patch, q_memory);
      const int64_t patch_columns = plan.width.patch(tile.columns), steps = ceil_div(tile.columns, kUnit<T>);
      for (int64_t row = 0; row < tile.rows; ++row) {
        const int64_t pixel =
            symmetric ? first_pixel(plan, tile, row) : (tile.image * h.out + tile.row + row) * w.out + tile.column;
        fill_units<T>(grad, pixel, symmetric ? w.in_step : 1, tile.columns, begin, end, p + row * steps * p_step,
                      p_step);
      }
      if (columns != nullptr && first_panel == 0)
        add_columns(p, p_step, tile.rows * steps, end - begin, columns->at(slab, 0) + begin);
      for (const AxisTap& down : h.phases[0].taps) {
        for (const AxisTap& across : w.phases[0].taps) {
          for (int64_t row = 0; row < tile.rows; ++row) rows[row] = side.row(row, steps, patch_columns, down, across);
          for (int64_t panel = 0; panel < panels; ++panel)
            for (int64_t group = 0; group < groups; ++group) {
              if (symmetric && (first_panel + panel + 1) * kPanel <= (first_group + group) * kWeightChannels) continue;
              next.step();
              accumulate<U>(p + group * kWeightChannels, p_step, q + panel * kPanel, side.q_step, rows, tile.rows,
                            steps, index == first_tile,
                            total + sums.at(down.kernel * kernel_width + across.kernel, first_panel + panel,
                                            first_group + group));
            }
        }
      }
    }
  });
}

// Merge slabs and write a gradient with the weight's strides and dtype.
template <class W>
void write_weight_gradient(const ConvShape& shape, const WeightSums& sums, const float* totals,
                           const WeightLayout& layout, W* grad) {
  parallel_tasks(sums.groups, sums.size(), [&](int64_t group) {
    for (int64_t tap = 0; tap < sums.taps; ++tap) {
      const int64_t offset = layout.at(tap, shape.width.kernel);
      for (int64_t panel = 0; panel < sums.panels; ++panel) {
        const float* block = totals + sums.at(tap, panel, group);
        for (int64_t r = 0; r < kWeightChannels && group * kWeightChannels + r < shape.out_channels; ++r) {
          W* to =
              grad + offset + (group * kWeightChannels + r) * layout.strides[0] + panel * kPanel * layout.strides[1];
          for (int64_t half = 0; half < kPanel; half += kLanes) {
            const LaneMask mask = lane_mask(panel * kPanel + half, shape.in_channels);
            Lanes512 total = load_lanes(block + r * kPanel + half);
            for (int64_t slab = 1; slab < sums.slabs; ++slab)
              total = _mm512_add_ps(total, load_lanes(block + slab * sums.size() + r * kPanel + half));
            if (layout.strides[1] == 1) {
              store_lanes(to + half, total, mask);
              continue;
            }
            alignas(64) float values[kLanes];
            store_lanes(values, total);
            for (int64_t j = 0; j < kLanes && panel * kPanel + half + j < shape.in_channels; ++j)
              store(to + (half + j) * layout.strides[1], values[j]);
          }
        }
      }
    }
  });
}

template <class T, class W, class G>
void weight_gradient_tiles(const ConvShape& shape, const G& grad, const Activation<T>& source,
                           const WeightLayout& layout, W* grad_weight, float* column_sums = nullptr) {
  const Plan plan(shape, false, sizeof(T), kWeightPixels, kWeightPatchBytes);
  const WeightSums sums(plan, shape.taps(), column_sums != nullptr);
  float* totals = workspace<float>(Slot::kSums, sums.slabs * sums.size());
  SlabSums columns(column_sums == nullptr ? 0 : sums.slabs, shape.out_channels, 1);
  sum_weight_gradient<T>(plan, grad, source, shape.width.kernel, sums, totals,
                         column_sums == nullptr ? nullptr : &columns);
  write_weight_gradient(shape, sums, totals, layout, grad_weight);
  if (column_sums != nullptr) columns.merge(0, shape.out_channels, column_sums);
}

}  // namespace resfuse::cpu

RESFUSE_TILES_END
#endif
