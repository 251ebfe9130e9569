// The gradient of a 3x3 convolution's weight by Winograd's F(2x2, 3x3): the derivative of winograd.h's forward.
//
//   dU[position] = sum over blocks of (A dY A^T)[position]^T (B^T d B)[position]
//   dW = G^T dU G
// The sums are 16 products (K x blocks)(blocks x C).
//
// dY of a block is 2x2, d is 4x4; for bfloat16 neighbouring blocks form one unit. Tasks share slabs of tiles, as
// elsewhere; where sums are large and slabs few, they share rows of positions and output channels too. Slabs are merged
// in order when dU is transformed back.
#pragma once

#include "weight_gradient.h"
#include "winograd.h"

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

namespace resfuse::cpu::RESFUSE_ISA {

constexpr int64_t kGradientPixels = 448;  // of a tile: 112 blocks
constexpr int64_t kGradientBlocks = 128;  // blocks that are summed at once: small tiles are joined

// A along one axis: one or two values to four.
RESFUSE_LANES void transform_gradient(Lanes first, Lanes second, Lanes (&m)[4]) {
  m[0] = first;
  m[1] = first + second;
  m[2] = first - second;
  m[3] = zero_lanes() - second;
}

// Steps of the sum over blocks, of so many positions, `position_step` apart: a block in float, or two to a unit.
template <class U>
class BlockSteps {
 public:
  BlockSteps(const Pixels<U>& to, int64_t position_step, int64_t) : to_(to), position_step_(position_step) {}

  void begin(int64_t, int64_t) {}
  RESFUSE_LANES void put(int64_t block, int64_t position, int64_t c, Lanes value) {
    store_lanes(to_.at(block, c) + position * position_step_, value);
  }
  void end(int64_t, int64_t) {}

 private:
  Pixels<U> to_;
  int64_t position_step_;
};

#ifndef RESFUSE_AVX2
// A run may begin or end in the middle of a unit.
template <>
class BlockSteps<uint32_t> {
 public:
  BlockSteps(const Pixels<uint32_t>& to, int64_t position_step, int64_t positions)
      : to_(to), position_step_(position_step), positions_(positions) {}

  RESFUSE_LANES void begin(int64_t block, int64_t c) {
    if (block % 2 == 1)
      for (int64_t i = 0; i < positions_; ++i) first_[i] = first_of_pairs(load_units(at(block, i, c)));
  }
  RESFUSE_LANES void put(int64_t block, int64_t position, int64_t c, Lanes value) {
    if (block % 2 == 0) {
      first_[position] = value;
    } else {
      store_units(at(block, position, c), round_pairs(first_[position], value, BFloat16{}));
    }
  }
  RESFUSE_LANES void end(int64_t block, int64_t c) {
    if (block % 2 == 1)
      for (int64_t i = 0; i < positions_; ++i)
        store_units(at(block, i, c), round_pairs(first_[i], zero_lanes(), BFloat16{}));
  }

 private:
  uint32_t* at(int64_t block, int64_t position, int64_t c) const {
    return to_.at(block / 2, c) + position * position_step_;
  }

  Pixels<uint32_t> to_;
  int64_t position_step_, positions_;
  Lanes first_[kPositions] = {};  // of each position, where a unit still lacks its second block
};
#endif

// Blocks to a step of the sum.
template <class U>
constexpr int64_t kStepBlocks = std::is_same_v<U, float> ? 1 : 2;

// Rows `positions` of A dY A^T of one tile's blocks, for output channels [begin, end): 4 positions to a row.
template <bool kComputed, class G, class B>
void transform_gradients(const Plan& plan, const Tile& tile, const G& grad, Range channels, Range positions,
                         int64_t block, B blocks) {
  const int64_t width = plan.width.out, image = (tile.image * plan.height.out + tile.row) * width;
  const int64_t across = ceil_div(tile.columns, 2);
  for (int64_t row = 0; row < tile.rows; row += 2, block += across) {
    const bool below = row + 1 < tile.rows;
    for (int64_t c = channels.begin; c < channels.end; c += kLanes) {
      const LaneMask mask = lane_mask(c, channels.end);
      const auto get = [&](bool inside, int64_t at) RESFUSE_INLINE_LAMBDA {
        return inside ? grad.template get<kComputed>(at, c, mask) : zero_lanes();
      };
      blocks.begin(block, c - channels.begin);
      for (int64_t i = 0; i < across; ++i) {
        const bool right = 2 * i + 1 < tile.columns;
        const int64_t pixel = image + row * width + 2 * i;
        Lanes down[2][4];
        transform_gradient(get(true, pixel), get(below, pixel + width), down[0]);
        transform_gradient(get(right, pixel + 1), get(below && right, pixel + width + 1), down[1]);
        for (int64_t r = positions.begin; r < positions.end; ++r) {
          Lanes m[4];
          transform_gradient(down[0][r], down[1][r], m);
          for (int j = 0; j < 4; ++j) blocks.put(block + i, (r - positions.begin) * 4 + j, c - channels.begin, m[j]);
        }
      }
      blocks.end(block + across, c - channels.begin);
    }
  }
}

// How the sums of a slab are shared out: rows of positions, and bundles of output channels.
struct GradientShares {
  int64_t rows, parts, bundles;

  explicit GradientShares(const WeightSums& sums)
      : rows(sums.slabs < weight_tasks() ? 1 : 4),
        parts(std::min(ceil_div(weight_tasks() * rows, sums.slabs * 4), sums.bundles)),
        bundles(sums.bundles) {}
  int64_t count() const { return 4 / rows * parts; }
  Range positions(int64_t share) const { return {share / parts * rows, share / parts * rows + rows}; }
  Range bundles_of(int64_t share) const {
    return {share % parts * bundles / parts, (share % parts + 1) * bundles / parts};
  }
  int64_t most_bundles() const { return ceil_div(bundles, parts); }
};

// Into `totals`, (slabs, size) of sums.
template <class U, class G, class A>
void sum_winograd_gradient(const WinogradPlan& plan, const G& grad, const A& input, const WeightSums& sums,
                           const GradientShares& shares, float* totals) {
  const int64_t tiles = plan.tiles(), most_steps = ceil_div(plan.blocks, kStepBlocks<U>), count = shares.count();
  const int64_t grad_channels = shares.most_bundles() * kWeightChannels;
  // of one position; the last strip of the inputs is read as a whole panel
  const int64_t input_step = round_up(plan.in_channels, kPanel) / kLanes * vector_units(most_steps);
  const int64_t grad_step = bundled_size(most_steps, grad_channels);
  const int64_t work = plan.images * plan.height.out * plan.width.out * plan.out_channels * 16;
  parallel_tasks(sums.slabs * count, work, [&](int64_t task) {
    const int64_t slab = task / count;
    const Range positions = shares.positions(task % count), bundles = shares.bundles_of(task % count);
    const Range channels{bundles.begin * kWeightChannels, std::min(bundles.end * kWeightChannels, plan.out_channels)};
    const int64_t patch_size = plan.whole_patch() * plan.step, inputs_size = shares.rows * 4 * input_step;
    const int64_t gradients_size = shares.rows * 4 * grad_step;
    const int64_t bytes =
        Carver::bytes_of<float>(patch_size) + Carver::bytes_of<U>(inputs_size) + Carver::bytes_of<U>(gradients_size);
    Carver carver(static_cast<char*>(workspace_bytes(Slot::kTile, bytes)));
    float* patch = carver.take<float>(patch_size);
    const Pixels<U> inputs(carver.take<U>(inputs_size), kLanes, vector_units(most_steps));
    const Pixels<U> gradients = bundled(carver.take<U>(gradients_size), most_steps, grad_channels);
    const BlockSteps<U> input_steps(inputs, input_step, shares.rows * 4);
    const BlockSteps<U> gradient_steps(gradients, grad_step, shares.rows * 4);
    const auto tile_of = [&](int64_t at) { return at * tiles / sums.slabs; };
    const int64_t last = tile_of(slab + 1), later = (task + 1) / count;
    for (int64_t first = tile_of(slab); first < last; first += plan.group) {
      const int64_t end = std::min(first + plan.group, last);
      int64_t blocks = 0;
      for (int64_t index = first; index < end; ++index) {
        const Tile tile = plan.tile(index), whole = WinogradPlan::whole(tile);
        fill_patch(plan, whole, input, 0, plan.in_channels, Pixels(patch, plan.step));
        transform_patch(patch, whole.rows, whole.columns, plan.in_channels, plan.step, blocks, input_steps, positions);
        const auto transform = grad.computed() ? transform_gradients<true, G, BlockSteps<U>>
                                               : transform_gradients<false, G, BlockSteps<U>>;
        transform(plan, tile, grad, channels, positions, blocks, gradient_steps);
        blocks += whole.rows / 2 * (whole.columns / 2);
      }
      Prefetcher next;
      if (end < last || later < sums.slabs) {
        const Tile following = plan.tile(end < last ? end : tile_of(later));
        prefetch_tile(plan, following, input, next);
        grad.prefetch((following.image * plan.height.out + following.row) * plan.width.out,
                      following.rows * following.columns, next);
      }
      const int64_t summed = ceil_div(blocks, kStepBlocks<U>);
      next.spread(shares.rows * 4 * sums.strips.count() * (bundles.end - bundles.begin) * summed, bytes);
      const int64_t rows[1] = {0};
      for (int64_t i = 0; i < shares.rows * 4; ++i) {
        for (int64_t strip = 0, together; strip < sums.strips.count(); strip += together) {
          together = sums.strips.together(strip, sums.strips.count());
          const Accumulator<U> some(together * kPanel);
          for (int64_t bundle = bundles.begin; bundle < bundles.end; ++bundle) {
            for (int64_t r = 0; r < kWeightChannels; r += some.rows) {
              const PixelRows<U> steps{gradients.at(0, (bundle - bundles.begin) * kWeightChannels + r) + i * grad_step,
                                       gradients.pixel_step,
                                       inputs.at(0, strip * kPanel) + i * input_step,
                                       inputs.pixel_step,
                                       inputs.vector_step,
                                       rows,
                                       1,
                                       summed};
              some.add(steps, first == tile_of(slab),
                       totals + slab * sums.size() + sums.at(positions.begin * 4 + i, strip, bundle) + r * kPanel,
                       sums.strips.depth * sums.strips.block(), next.take(summed));
            }
          }
        }
      }
    }
  });
}

// G^T along one axis.
RESFUSE_LANES void transform_sums(const Lanes (&u)[4], Lanes (&g)[3]) {
  const Lanes half = broadcast_lanes(0.5f), ends = half * (u[1] + u[2]);
  g[0] = u[0] + ends;
  g[1] = half * (u[1] - u[2]);
  g[2] = ends + u[3];
}

// Slabs merged, positions to taps: into the first slab's place.
inline void positions_to_taps(const WeightSums& sums, float* totals) {
  const int64_t size = sums.strips.sums();
  parallel_tasks(ceil_div(size, kTaskElements), sums.size() * sums.slabs, [&](int64_t task) {
    for (int64_t i = task * kTaskElements; i < std::min(size, (task + 1) * kTaskElements); i += kLanes) {
      Lanes down[4][3];  // [position across][tap down]
      for (int c = 0; c < 4; ++c) {
        Lanes u[4];
        for (int r = 0; r < 4; ++r) {
          const float* at = totals + (r * 4 + c) * size + i;
          u[r] = load_lanes(at);
          for (int64_t slab = 1; slab < sums.slabs; ++slab) u[r] += load_lanes(at + slab * sums.size());
        }
        transform_sums(u, down[c]);
      }
      for (int r = 0; r < 3; ++r) {
        const Lanes u[4] = {down[0][r], down[1][r], down[2][r], down[3][r]};
        Lanes g[3];
        transform_sums(u, g);
        for (int c = 0; c < 3; ++c) store_lanes(totals + (r * 3 + c) * size + i, g[c]);
      }
    }
  });
}

template <class U, class W, class G, class A>
void winograd_weight_gradient(const ConvShape& shape, const G& grad, const A& source, const WeightLayout& layout,
                              W* grad_weight) {
  const WinogradPlan plan(shape, false, kLanes, kGradientPixels, kGradientBlocks);
  WeightSums sums(plan, kPositions);
  // a slab's sums are written and merged for so many blocks at least
  sums.slabs = std::clamp<int64_t>(block_count(shape) / kGradientBlocks, 1, sums.slabs);
  float* totals = workspace<float>(Slot::kSums, sums.slabs * sums.size());
  sum_winograd_gradient<U>(plan, grad, source, sums, GradientShares(sums), totals);
  positions_to_taps(sums, totals);
  WeightSums taps(plan, shape.taps());
  taps.slabs = 1;
  write_weight_gradient(shape, taps, totals, layout, grad_weight);
}

}  // namespace resfuse::cpu::RESFUSE_ISA

RESFUSE_TILES_END
#endif
