// The driver of a convolution by tiles: fill a patch, multiply it with every panel, hand each panel to an epilogue.
//
// Tiles are grouped into slabs by shape alone. A slab is computed by one thread in order and has its own sums, which
// are merged in order: results do not depend on the number of threads. Where an activation has few tiles, panels are
// shared out too.
//
// A patch holds all channels of the input, and a strip of output channels, a panel or half of one, reads a window of
// them: everything, or, of a grouped convolution, the channels of the groups that the strip belongs to. What a window
// holds of other groups meets zeros in the packed weight, so a strip is half a panel where that makes windows shorter.
#pragma once

#include "operands.h"
#include "patch.h"

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

namespace resfuse::cpu::RESFUSE_ISA {

constexpr int64_t kTilePixels = 112;        // a panel of a tile, 14 KiB in float, is read again by its epilogue
constexpr int64_t kPatchBytes = 512 << 10;  // a patch is read again by every panel: it stays in L2
constexpr int64_t kMinTasks = 8;

// The channels of a patch that strips of `lanes` output channels read, in units: equally many for all, and within the
// padded patch.
struct Windows {
  int64_t lanes;
  int64_t units = 0;
  std::vector<int64_t> begin;  // of every strip

  // `unit`: channels of a unit
  Windows(const Plan& plan, int64_t unit, int64_t strip_lanes) : lanes(strip_lanes) {
    for (int64_t lane = 0; lane < plan.out_channels; lane += lanes) {
      const Range strip{lane, std::min(lane + lanes, plan.out_channels)};
      const Range reads = same_groups(strip, plan.out_channels, plan.in_channels, plan.groups);
      begin.push_back(reads.begin / unit);
      units = std::max(units, ceil_div(reads.end, unit) - begin.back());
    }
    const int64_t last = ceil_div(plan.in_channels, unit) - units;
    for (int64_t& first : begin) first = std::min(first, last);
  }

  static Windows shortest(const Plan& plan, int64_t unit) {
    Windows wide(plan, unit, kPanel), narrow(plan, unit, kLanes);
    return narrow.units < wide.units ? narrow : wide;
  }

  int64_t strips() const { return static_cast<int64_t>(begin.size()); }
  // Panels from `panel` on, before `end`, that are multiplied together.
  int64_t together(int64_t panel, int64_t end) const {
    return lanes == kPanel && panel + 1 < end && at(panel) == at(panel + 1) ? panels_together(end - panel) : 1;
  }
  int64_t at(int64_t strip) const { return begin[static_cast<size_t>(strip)]; }
};

// The taps of each phase as offsets into a window, and where each phase's units begin in a strip.
struct PhaseTaps {
  int64_t row, column;  // phase
  int64_t begin;        // of its units in a strip
  std::vector<Tap> taps;
  std::vector<int64_t> kernel;  // index of each tap's kernel element
};

struct Taps {
  Windows windows;
  std::vector<PhaseTaps> phases;
  int64_t units = 0;  // of one lane

  // `unit`: channels of a unit
  Taps(const Plan& plan, int64_t kernel_width, int64_t unit, int64_t pixel_step)
      : windows(Windows::shortest(plan, unit)) {
    const int64_t columns = plan.width.patch(plan.columns);
    for (const AxisPhase& h : plan.height.phases) {
      for (const AxisPhase& w : plan.width.phases) {
        PhaseTaps phase{h.phase, w.phase, units, {}, {}};
        for (const AxisTap& row : h.taps) {
          for (const AxisTap& column : w.taps) {
            phase.taps.push_back({(row.offset * columns + column.offset) * pixel_step, windows.units, pixel_step,
                                  plan.width.base_step * pixel_step});
            phase.kernel.push_back(row.kernel * kernel_width + column.kernel);
            units += windows.units;
          }
        }
        phases.push_back(std::move(phase));
      }
    }
  }

  // One more run of channels for a dense 1x1 convolution, from another patch `offset` units further; where its weights
  // lie.
  int64_t append(int64_t offset, int64_t steps, int64_t pixel_step) {
    phases[0].taps.push_back({offset, steps, pixel_step, pixel_step});
    units += steps;
    return units - steps;
  }
};

// Every strip of a weight for one plan. Forward, lanes are output channels; backward, input channels.
template <class T, class W>
void pack_weight_into(const Plan& plan, const Taps& taps, const W* weight, const WeightLayout& layout,
                      int64_t kernel_width, bool backward, const float* lane_scale, unit_t<T>* packed) {
  const Windows& windows = taps.windows;
  const int64_t lane_step = layout.strides[backward ? 1 : 0], k_step = layout.strides[backward ? 0 : 1];
  const int64_t group_step = (backward ? plan.out_channels : plan.in_channels) / plan.groups * layout.strides[1];
  parallel_tasks(windows.strips(), plan.out_channels * windows.units * 4, [&](int64_t strip) {
    unit_t<T>* to = packed + strip * taps.units * windows.lanes;
    for (const PhaseTaps& phase : taps.phases) {
      for (const int64_t kernel : phase.kernel) {
        const WeightView<W> view{weight + layout.at(kernel, kernel_width),
                                 plan.out_channels,
                                 plan.in_channels,
                                 lane_step,
                                 k_step,
                                 lane_scale,
                                 plan.groups,
                                 group_step};
        pack_strip<T>(view, {strip * windows.lanes, windows.lanes, windows.at(strip) * kUnit<T>, windows.units}, to);
        to += windows.units * windows.lanes;
      }
    }
  });
}

// The same in this thread's workspace, where it stays until the next call.
template <class T, class W>
unit_t<T>* pack_weight(const Plan& plan, const Taps& taps, const W* weight, const WeightLayout& layout,
                       int64_t kernel_width, bool backward, const float* lane_scale = nullptr) {
  const int64_t size = taps.windows.strips() * taps.units * taps.windows.lanes;
  unit_t<T>* packed = workspace<unit_t<T>>(Slot::kWeights, size);
  pack_weight_into<T>(plan, taps, weight, layout, kernel_width, backward, lane_scale, packed);
  return packed;
}

// The panels of a run that was appended: `begin` is where its weights lie.
template <class T, class W>
void pack_appended(const WeightView<W>& weight, const Taps& taps, int64_t begin, unit_t<T>* packed) {
  const int64_t panels = ceil_div(weight.lanes, kPanel);
  parallel_tasks(panels, weight.lanes * weight.depth * 4,
                 [&](int64_t panel) { pack_panel<T>(weight, panel, packed + (panel * taps.units + begin) * kPanel); });
}

// How tiles and panels are shared out.
struct TileSlabs {
  int64_t tiles, slabs, blocks, panels;

  TileSlabs(int64_t tile_count, int64_t panel_count, int64_t most = kMaxSlabs)
      : tiles(tile_count), panels(panel_count) {
    slabs = std::min({tiles, most, kMaxSlabs});
    blocks = std::clamp<int64_t>(kMinTasks / std::max<int64_t>(slabs, 1), 1, panels);
  }
  int64_t first_tile(int64_t slab) const { return slab * tiles / slabs; }
  int64_t first_panel(int64_t block) const { return block * panels / blocks; }
};

// The sums of every slab, per padded output channel.
class SlabSums {
 public:
  SlabSums(int64_t slabs, int64_t channels, int64_t kinds)
      : slabs_(slabs), channels_(round_up(channels, kPanel)), kinds_(kinds) {
    data_.resize(static_cast<size_t>(slabs_ * channels_ * kinds_), 0.0);
  }
  int64_t slabs() const { return slabs_; }
  double* at(int64_t slab, int64_t kind) { return data_.data() + (slab * kinds_ + kind) * channels_; }

  // the sum of all slabs, in order
  void merge(int64_t kind, int64_t channels, float* to) {
    for (int64_t c = 0; c < channels; ++c) {
      double total = 0;
      for (int64_t slab = 0; slab < slabs_; ++slab) total += at(slab, kind)[c];
      to[c] = static_cast<float>(total);
    }
  }

 private:
  int64_t slabs_, channels_, kinds_;
  std::vector<double> data_;
};

// fill(tile, patch) loads a tile; epilogue(slab, tile's first output pixel, pixels, panel, values) takes a panel of
// it, and may change its values[pixel * kPanel + lane], pixels in memory order.
// ahead(tile, prefetcher) names the memory that fill will read.
template <class T, class F, class A, class E>
void run_tiles(const Plan& plan, const Taps& taps, const unit_t<T>* packed, int64_t patch_units, const TileSlabs& slabs,
               const F& fill, const A& ahead, const E& epilogue) {
  const AxisPlan &h = plan.height, &w = plan.width;
  const int64_t lanes = taps.windows.lanes;
  const int64_t product_step = plan.rows * h.out_step * plan.columns * w.out_step * kPanel;  // between panels
  const int64_t work = plan.images * h.out * w.out * plan.out_channels * 16;
  parallel_tasks(slabs.slabs * slabs.blocks, work, [&](int64_t task) {
    const int64_t slab = task / slabs.blocks, block = task % slabs.blocks;
    using U = unit_t<T>;
    const int64_t bytes = Carver::bytes_of<U>(patch_units) + Carver::bytes_of<float>(2 * product_step);
    Carver carver(static_cast<char*>(workspace_bytes(Slot::kTile, bytes)));
    U* patch = carver.take<U>(patch_units);
    float* values = carver.take<float>(2 * product_step);
    for (int64_t index = slabs.first_tile(slab); index < slabs.first_tile(slab + 1); ++index) {
      const Tile tile = plan.tile(index);
      fill(tile, patch);
      const int64_t row = tile.row * h.out_step, rows = std::min(tile.rows * h.out_step, h.out - row);
      const int64_t column = tile.column * w.out_step, columns = std::min(tile.columns * w.out_step, w.out - column);
      const int64_t patch_row = w.patch(tile.columns) * h.base_step;  // patch pixels between rows of base pixels
      const int64_t pixel = (tile.image * h.out + row) * w.out + column;
      Prefetcher next;
      // after a slab's last tile, this thread will likely take the next task
      const int64_t later = (task + 1) / slabs.blocks;
      const bool last = index + 1 == slabs.first_tile(slab + 1);
      if (!last || later < slabs.slabs) {
        const Tile following = plan.tile(last ? slabs.first_tile(later) : index + 1);
        ahead(following, next);
        const int64_t begin = following.row * h.out_step, first = following.column * w.out_step;
        const int64_t pixels = std::min(following.rows * h.out_step, h.out - begin) *
                               std::min(following.columns * w.out_step, w.out - first);
        epilogue.touches((following.image * h.out + begin) * w.out + first, pixels, next);
      }
      next.spread((slabs.first_panel(block + 1) - slabs.first_panel(block)) * kPanel / lanes * tile.rows *
                      ceil_div(tile.columns, lanes < kPanel ? kNarrowPixels : kMaxPixels) * taps.units,
                  bytes);
      const int64_t last_panel = slabs.first_panel(block + 1);
      for (int64_t panel = slabs.first_panel(block), together; panel < last_panel; panel += together) {
        together = taps.windows.together(panel, last_panel);
        for (int64_t half = 0; half < kPanel; half += lanes) {
          const int64_t strip = (panel * kPanel + half) / lanes;
          if (strip == taps.windows.strips()) break;
          const U *a = patch + taps.windows.at(strip), *b = packed + strip * taps.units * lanes;
          for (const PhaseTaps& phase : taps.phases) {
            for (int64_t r = phase.row, base = 0; r < rows; r += h.out_step, ++base) {
              float* to = values + (r * columns + phase.column) * kPanel + half;
              const int64_t count = ceil_div(columns - phase.column, w.out_step), step = w.out_step * kPanel;
              if (phase.taps.empty()) {
                for (int64_t at = 0; at < together; ++at)
                  for (int64_t i = 0; i < count; ++i) std::fill_n(to + at * product_step + i * step, lanes, 0.0f);
                continue;
              }
              const int64_t row_pixel = pixel + r * w.out + phase.column;
              multiply<U>(a, base * patch_row, count, phase.taps,
                          {b + phase.begin * lanes, to, taps.units * lanes, product_step, step}, together * lanes, next,
                          [&](int64_t i, int64_t n) RESFUSE_INLINE_LAMBDA {
                            for (int64_t at = 0; half == 0 && at < together; ++at)
                              epilogue.prefetch(row_pixel + i * w.out_step, n, w.out_step, panel + at);
                          });
            }
          }
        }
        for (int64_t at = 0; at < together; ++at)
          epilogue(slab, pixel, rows * columns, panel + at, values + at * product_step);
      }
    }
  });
}

}  // namespace resfuse::cpu::RESFUSE_ISA

RESFUSE_TILES_END
#endif
