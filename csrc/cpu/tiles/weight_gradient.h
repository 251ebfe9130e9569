// The gradient of a convolution's weight by tiles: dW[k][c] = sum over output pixels of dY[pixel][k] * a[tap pixel][c].
//
// Both operands are filled by sources, so neither dY nor the activated input is ever stored. For bfloat16 neighbouring
// output pixels form one unit: two steps of the sum in one instruction. A task is a slab of tiles and a block of
// channels of the longer side; each slab has sums of its own, merged in order. What nobody wants is not summed: one
// half of a symmetric product, and of a grouped convolution all but the blocks that hold pairs of channels of one
// group.
#pragma once

#include <numeric>

#include "epilogue.h"
#include "pairs.h"

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

namespace resfuse::cpu::RESFUSE_ISA {

constexpr int64_t kWeightPixels = 112;            // of a tile: sums are read and written once for so many products
constexpr int64_t kWeightPatchBytes = 768 << 10;  // the input's side of a tile stays in L2
constexpr int64_t kWeightTasks = 16;              // slabs, at most
constexpr int64_t kMomentSlabs = 256;  // of a symmetric product: a float sum runs over one tile, where memory allows
constexpr int64_t kWeightSlabBytes = int64_t{4} << 20;  // the sums of all slabs together

// Tasks that are worth what each of them fills again: enough for threads to finish together. What a task sums does not
// depend on it.
inline int64_t weight_tasks() {
  const int64_t threads = torch::stable::get_num_threads();
  return threads == 1 ? 1 : 2 * threads;
}

// Blocks of channels of every slab: as few as give threads equal shares, and no more than are worth it.
inline int64_t blocks_for(int64_t slabs) {
  const int64_t threads = torch::stable::get_num_threads();
  return std::min(threads / std::gcd(slabs, threads), ceil_div(weight_tasks(), slabs));
}

// The greatest that is no greater: slabs that most numbers of threads share evenly.
inline int64_t power_of_two(int64_t most) {
  int64_t found = 1;
  while (2 * found <= most) found *= 2;
  return found;
}

// Channels of c side by side, `lanes` at a time, and the bundles of k (of kWeightChannels) that each strip wants. A
// strip is a panel, or half of one where a grouped convolution then sums fewer pairs of channels that share no group.
struct WeightStrips {
  int64_t lanes;
  int64_t depth = 0;          // most bundles that a strip wants
  std::vector<Range> wanted;  // bundles, of every strip

  // `symmetric`: dY is the input, and blocks below the diagonal are left out
  WeightStrips(const Plan& plan, bool symmetric, int64_t strip_lanes) : lanes(strip_lanes) {
    for (int64_t begin = 0; begin < plan.in_channels; begin += lanes) {
      const Range strip{begin, std::min(begin + lanes, plan.in_channels)};
      Range k = same_groups(strip, plan.in_channels, plan.out_channels, plan.groups);
      if (symmetric) k.end = strip.end;
      wanted.push_back({k.begin / kWeightChannels, ceil_div(k.end, kWeightChannels)});
      depth = std::max(depth, wanted.back().end - wanted.back().begin);
    }
  }

  static WeightStrips fewest_sums(const Plan& plan, bool symmetric) {
    WeightStrips wide(plan, symmetric, kPanel), narrow(plan, symmetric, kLanes);
    return plan.groups > 1 && narrow.sums() < wide.sums() ? narrow : wide;
  }

  int64_t count() const { return static_cast<int64_t>(wanted.size()); }
  int64_t block() const { return kWeightChannels * lanes; }
  int64_t sums() const { return count() * depth * block(); }
  Range wants(int64_t strip) const { return wanted[static_cast<size_t>(strip)]; }
  // Strips from `strip` on, before `end`, that are summed together.
  int64_t together(int64_t strip, int64_t end) const {
    if (lanes < kPanel || strip + 1 == end) return 1;
    const Range one = wants(strip), next = wants(strip + 1);
    return one.begin == next.begin && one.end == next.end ? panels_together(end - strip) : 1;
  }
};

// The share of one task: bundles of k, and the strips of c that want any of them.
struct WeightBlock {
  Range bundles, strips;
};

// Sums of one slab: blocks of kWeightChannels x `lanes` floats, [tap][strip of c][bundle of k], of those bundles that
// the strip wants.
struct WeightSums {
  WeightStrips strips;
  bool symmetric;  // dY is the input, and is read where the input is
  int64_t taps, bundles, slabs;
  int64_t max_strips = 0, max_bundles = 0;  // of a block
  std::vector<WeightBlock> blocks;

  // `once`: every value of dY is asked for by one task only
  WeightSums(const Plan& plan, int64_t tap_count, bool once = false, bool symmetric = false)
      : strips(WeightStrips::fewest_sums(plan, symmetric)),
        symmetric(symmetric),
        taps(tap_count),
        bundles(ceil_div(plan.out_channels, kWeightChannels)) {
    const int64_t bytes = size() * static_cast<int64_t>(sizeof(float));
    const int64_t most = symmetric ? kMomentSlabs : kWeightTasks;
    slabs = std::clamp<int64_t>(kWeightSlabBytes / bytes, 1, std::min<int64_t>(plan.tiles(), most));
    if (!symmetric) slabs = power_of_two(slabs);
    const bool by_strips = taps == 1 && plan.in_channels > plan.out_channels && plan.groups == 1 && !once;
    share_out(blocks_for(slabs), by_strips);
  }
  int64_t size() const { return taps * strips.sums(); }
  int64_t block_count() const { return static_cast<int64_t>(blocks.size()); }
  int64_t at(int64_t tap, int64_t strip, int64_t bundle) const {
    return tap * strips.sums() + (strip * strips.depth + bundle - strips.wants(strip).begin) * strips.block();
  }

 private:
  // Slabs and blocks of the longer side share the work: enough tasks, not too much memory for their sums, and the
  // shorter side is what every task fills again.
  void share_out(int64_t count, bool by_strips) {
    const int64_t wide = by_strips ? ceil_div(strips.count(), count) : strips.count();
    const int64_t high = by_strips ? bundles : ceil_div(bundles, count);
    for (int64_t strip = 0; strip < strips.count(); strip += wide) {
      for (int64_t bundle = 0; bundle < bundles; bundle += high) {
        WeightBlock block{{bundle, std::min(bundle + high, bundles)}, {strip, std::min(strip + wide, strips.count())}};
        while (strips.wants(block.strips.begin).end <= block.bundles.begin) ++block.strips.begin;
        while (strips.wants(block.strips.end - 1).begin >= block.bundles.end) --block.strips.end;
        max_strips = std::max(max_strips, block.strips.end - block.strips.begin);
        max_bundles = std::max(max_bundles, block.bundles.end - block.bundles.begin);
        blocks.push_back(block);
      }
    }
  }
};

// Operands lie as the sum reads them: each vector of channels with all its pixels, one run of memory. Bundles that are
// no part of a vector need their pixels' channels side by side.
constexpr bool kBundlesInVectors = kLanes % kWeightChannels == 0;

inline int64_t vector_units(int64_t steps) { return pixel_units<float>(steps * kLanes); }

// An operand of p, of `steps` pixels or pairs of them, and the memory that it takes.
template <class U>
Pixels<U> bundled(U* data, int64_t steps, int64_t channels) {
  return kBundlesInVectors ? Pixels<U>(data, kLanes, vector_units(steps))
                           : Pixels<U>(data, pixel_units<float>(channels));
}
inline int64_t bundled_size(int64_t steps, int64_t channels) {
  return kBundlesInVectors ? ceil_div(channels, kLanes) * vector_units(steps) : steps * pixel_units<float>(channels);
}

// One row of one operand, its units in pairs or not.
template <class T, class S>
void fill_units(const S& source, int64_t pixel, int64_t step, int64_t columns, int64_t begin, int64_t end,
                const Pixels<unit_t<T>>& to) {
  if constexpr (kUnit<T> == 1) {
    fill_row(source, pixel, step, columns, begin, end, to);
  } else if (source.computed()) {
    pair_pixels(std::true_type{}, source, pixel, step, columns, begin, end, to);
  } else {
    pair_pixels(std::false_type{}, source, pixel, step, columns, begin, end, to);
  }
}

// The input pixel that the first output pixel of a tile's row reads, where a tap reads nothing else.
inline int64_t first_pixel(const Plan& plan, const Tile& tile, int64_t row) {
  const AxisPlan &h = plan.height, &w = plan.width;
  return (tile.image * h.in + (tile.row + row) * h.in_step) * w.in + tile.column * w.in_step;
}

// The layout of q, the input's side of the sum, in units. A pointwise tap reads each pixel once, so q is filled
// straight from the source; else q is a patch, and for bfloat16 every pixel of a patch is paired with its right
// neighbour.
template <class T>
struct InputSide {
  const Plan& plan;
  int64_t patch_step;           // units between pixels of a patch whose pixels are paired
  int64_t vector_step, q_step;  // units between vectors of q, and between the pixels of its steps
  int64_t patch_size, q_size;
  bool pointwise;

  InputSide(const Plan& p, int64_t channels)
      : plan(p),
        patch_step(pixel_units<T>(channels)),
        pointwise(p.height.span == 0 && p.width.span == 0 && p.height.base_step == 1 && p.width.base_step == 1 &&
                  p.height.origin == 0 && p.width.origin == 0) {
    const int64_t pixels = p.patch_pixels();
    patch_size = pointwise || kUnit<T> == 1 ? 0 : pixels * patch_step;
    vector_step = vector_units(pointwise ? p.rows * ceil_div(p.columns, kUnit<T>) : pixels);
    q_size = round_up(channels, kPanel) / kLanes * vector_step;  // a strip of the last channels is read as a panel
    q_step = (pointwise ? 1 : p.width.base_step * kUnit<T>)*kLanes;
  }

  int64_t row(int64_t base_row, int64_t steps, int64_t columns, const AxisTap& h, const AxisTap& w) const {
    if (pointwise) return base_row * steps * kLanes;
    return ((base_row * plan.height.base_step + h.offset) * columns + w.offset) * kLanes;
  }

  // channels [begin, end)
  template <class A>
  void fill(const Tile& tile, const A& input, int64_t begin, int64_t end, unit_t<T>* patch,
            const Pixels<unit_t<T>>& q) const {
    const AxisPlan &h = plan.height, &w = plan.width;
    const int64_t columns = w.patch(tile.columns);
    if (pointwise) {
      const int64_t steps = ceil_div(tile.columns, kUnit<T>);
      for (int64_t r = 0; r < tile.rows; ++r) {
        fill_units<T>(input, first_pixel(plan, tile, r), w.in_step, tile.columns, begin, end, q.from(r * steps));
      }
    } else if constexpr (kUnit<T> == 1) {
      fill_patch(plan, tile, input, begin, end, q);
    } else {
      auto* values = reinterpret_cast<T*>(patch);
      fill_patch(plan, tile, input, begin, end, Pixels(values, patch_step * 2));
      for (int64_t r = 0; r < h.patch(tile.rows); ++r)
        pair_row(values + r * columns * patch_step * 2, columns, patch_step * 2, 1, w.base_step, columns, end - begin,
                 q.from(r * columns));
    }
  }
};

// Add the columns of one tile's p to a slab's sums.
inline void add_columns(const Pixels<float>& p, int64_t steps, int64_t channels, double* to) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    DoubleLanes total;
    for (int64_t begin = 0; begin < steps; begin += kFloatRows) {
      Lanes sum = zero_lanes();
      for (int64_t i = begin; i < std::min(steps, begin + kFloatRows); ++i) sum += load_lanes(p.at(i, c));
      total.add(sum);
    }
    alignas(64) double values[kLanes];
    total.store(values);
    for (int64_t j = 0; j < std::min(kLanes, channels - c); ++j) to[c + j] += values[j];
  }
}

// Into `totals`, (slabs, size) of sums; `columns` receives the sums of dY's channels, if every one is asked for once.
template <class T, class G, class A>
void sum_weight_gradient(const Plan& plan, const G& grad, const A& input, int64_t kernel_width, const WeightSums& sums,
                         float* totals, SlabSums* columns = nullptr) {
  using U = unit_t<T>;
  const int64_t slabs = sums.slabs, tiles = plan.tiles(), out_channels = plan.out_channels;
  const AxisPlan &h = plan.height, &w = plan.width;
  const InputSide<T> side(plan, std::min(sums.max_strips * sums.strips.lanes, plan.in_channels));
  const int64_t max_steps = plan.rows * ceil_div(plan.columns, kUnit<T>), blocks = sums.block_count();
  const int64_t p_channels = sums.max_bundles * kWeightChannels, p_size = bundled_size(max_steps, p_channels);
  const int64_t work = plan.images * plan.height.out * plan.width.out * out_channels * 16;

  parallel_tasks(slabs * blocks, work, [&](int64_t task) {
    const auto [bundles, strips] = sums.blocks[static_cast<size_t>(task % blocks)];
    const int64_t slab = task / blocks;
    const int64_t begin = bundles.begin * kWeightChannels, end = std::min(bundles.end * kWeightChannels, out_channels);
    const int64_t in_begin = strips.begin * sums.strips.lanes,
                  in_end = std::min(strips.end * sums.strips.lanes, plan.in_channels);
    const int64_t bytes = Carver::bytes_of<U>(side.patch_size) + Carver::bytes_of<U>(side.q_size) +
                          Carver::bytes_of<U>(p_size) + Carver::bytes_of<int64_t>(plan.rows);
    Carver carver(static_cast<char*>(workspace_bytes(Slot::kTile, bytes)));
    U* patch = carver.take<U>(side.patch_size);
    const Pixels<U> q(carver.take<U>(side.q_size), kLanes, side.vector_step);
    const Pixels<U> p = bundled(carver.take<U>(p_size), max_steps, p_channels);
    int64_t* rows = carver.take<int64_t>(plan.rows);
    float* total = totals + slab * sums.size();
    const int64_t first_tile = slab * tiles / slabs;

    for (int64_t index = first_tile; index < (slab + 1) * tiles / slabs; ++index) {
      const Tile tile = plan.tile(index);
      Prefetcher next;
      // after its last tile, this thread will likely take the next task
      const int64_t later = (task + 1) / blocks;
      const bool last = index + 1 == (slab + 1) * tiles / slabs;
      if (!last || later < slabs) {
        const Tile following = plan.tile(last ? later * tiles / slabs : index + 1);
        prefetch_tile(plan, following, input, next);
        const int64_t at = (following.image * plan.height.out + following.row) * plan.width.out + following.column;
        if (!sums.symmetric) grad.prefetch(at, following.rows * following.columns, next);
      }
      const int64_t steps = ceil_div(tile.columns, kUnit<T>);
      next.spread(sums.taps * (strips.end - strips.begin) * std::min(bundles.end - bundles.begin, sums.strips.depth) *
                      tile.rows * steps,
                  bytes);
      side.fill(tile, input, in_begin, in_end, patch, q);
      const int64_t patch_columns = plan.width.patch(tile.columns);
      for (int64_t row = 0; row < tile.rows; ++row) {
        const int64_t pixel =
            sums.symmetric ? first_pixel(plan, tile, row) : (tile.image * h.out + tile.row + row) * w.out + tile.column;
        fill_units<T>(grad, pixel, sums.symmetric ? w.in_step : 1, tile.columns, begin, end, p.from(row * steps));
      }
      if (columns != nullptr) add_columns(p, tile.rows * steps, end - begin, columns->at(slab, 0) + begin);
      for (const AxisTap& down : h.phases[0].taps) {
        for (const AxisTap& across : w.phases[0].taps) {
          for (int64_t row = 0; row < tile.rows; ++row) rows[row] = side.row(row, steps, patch_columns, down, across);
          const int64_t tap = down.kernel * kernel_width + across.kernel;
          for (int64_t strip = strips.begin, together; strip < strips.end; strip += together) {
            together = sums.strips.together(strip, strips.end);
            const Accumulator<U> some(together * sums.strips.lanes);
            const Range wanted = sums.strips.wants(strip);
            const int64_t stop = std::min(bundles.end, wanted.end);
            for (int64_t bundle = std::max(bundles.begin, wanted.begin); bundle < stop; ++bundle) {
              for (int64_t r = 0; r < kWeightChannels; r += some.rows) {
                const PixelRows<U> pixels{p.at(0, bundle * kWeightChannels - begin + r),
                                          p.pixel_step,
                                          q.at(0, strip * sums.strips.lanes - in_begin),
                                          side.q_step,
                                          side.vector_step,
                                          rows,
                                          tile.rows,
                                          steps};
                some.add(pixels, index == first_tile, total + sums.at(tap, strip, bundle) + r * sums.strips.lanes,
                         sums.strips.depth * sums.strips.block(), next.take(tile.rows * steps));
              }
            }
          }
        }
      }
    }
  });
}

// Merge a vector of sums of every slab and write those from lane `first` to `last`, `step` apart.
template <class W>
RESFUSE_LANES void write_sums(const WeightSums& sums, const float* from, int64_t first, int64_t last, W* to,
                              int64_t step) {
  Lanes total = load_lanes(from);
  for (int64_t slab = 1; slab < sums.slabs; ++slab) total += load_lanes(from + slab * sums.size());
  if (step == 1 && last - first == kLanes) return store_lanes(to, total);
  alignas(64) float values[kLanes];
  store_lanes(values, total);
  for (int64_t j = first; j < last; ++j) store(to + (j - first) * step, values[j]);
}

// Write a gradient with the weight's strides and dtype: for each output channel, the input channels of its group.
template <class W>
void write_weight_gradient(const ConvShape& shape, const WeightSums& sums, const float* totals,
                           const WeightLayout& layout, W* grad) {
  const int64_t lanes = sums.strips.lanes;
  parallel_tasks(sums.bundles, sums.size(), [&](int64_t bundle) {
    const int64_t begin = bundle * kWeightChannels, rows = std::min(kWeightChannels, shape.out_channels - begin);
    Range inputs[kWeightChannels];
    for (int64_t r = 0; r < rows; ++r)
      inputs[r] = same_groups({begin + r, begin + r + 1}, shape.out_channels, shape.in_channels, shape.groups);
    for (int64_t tap = 0; tap < sums.taps; ++tap) {
      W* to = grad + layout.at(tap, shape.width.kernel) + begin * layout.strides[0];
      for (int64_t strip = inputs[0].begin / lanes; strip * lanes < inputs[rows - 1].end; ++strip) {
        const float* block = totals + sums.at(tap, strip, bundle);
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t c = strip * lanes; c < (strip + 1) * lanes; c += kLanes) {
            const int64_t first = std::max(c, inputs[r].begin), last = std::min(c + kLanes, inputs[r].end);
            if (first < last)
              write_sums(sums, block + r * lanes + c % lanes, first - c, last - c,
                         to + r * layout.strides[0] + (first - inputs[r].begin) * layout.strides[1], layout.strides[1]);
          }
        }
      }
    }
  });
}

template <class T, class W, class G, class A>
void weight_gradient_tiles(const ConvShape& shape, const G& grad, const A& source, const WeightLayout& layout,
                           W* grad_weight, float* column_sums = nullptr) {
  const Plan plan(shape, false, sizeof(operand_t<T>), kWeightPixels, kWeightPatchBytes);
  const WeightSums sums(plan, shape.taps(), column_sums != nullptr);
  float* totals = workspace<float>(Slot::kSums, sums.slabs * sums.size());
  SlabSums columns(column_sums == nullptr ? 0 : sums.slabs, shape.out_channels, 1);
  sum_weight_gradient<T>(plan, grad, source, shape.width.kernel, sums, totals,
                         column_sums == nullptr ? nullptr : &columns);
  write_weight_gradient(shape, sums, totals, layout, grad_weight);
  if (column_sums != nullptr) columns.merge(0, shape.out_channels, column_sums);
}

}  // namespace resfuse::cpu::RESFUSE_ISA

RESFUSE_TILES_END
#endif
