// The driver of 3x3 convolutions of stride 1 by Winograd's F(2x2, 3x3): 16 products for 4 outputs instead of 36.
//
//   Y = A^T [ (G g G^T) * (B^T d B) ] A     g: 3x3 weights, d: a 4x4 block of input, Y: a 2x2 block of output
//
// Summed over channels, each of the 16 positions of a block is one matrix product (blocks x C)(C x K). A tile's patch
// is filled as for any convolution, prologue included, but in float; its blocks are transformed, multiplied,
// transformed back, and handed to the same epilogues. Transforms only add, subtract and halve, and the sums are nine
// times shorter than those over all taps: in float32 errors are smaller than a direct convolution's. For products in
// bfloat16 both operands are rounded once, after their transform: errors are 1.4 to 1.9 times a direct convolution's,
// whose weights are rounded too. What is not finite reaches the same outputs as there, but an infinity may become NaN.
// Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016.
#pragma once

#include "product.h"

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

namespace resfuse::cpu::RESFUSE_ISA {

constexpr int64_t kPositions = 16;            // of a block
constexpr int64_t kBlockPixels = 224;         // pixels of a tile: 56 blocks, four register tiles
constexpr int64_t kBlocks = 64;               // blocks that are multiplied together: small tiles are joined
constexpr int64_t kLeastBlocks = 32;          // of a convolution: for fewer a weight is not transformed
constexpr int64_t kProductBytes = 512 << 10;  // products of some panels, before they are transformed back

// 2x2 blocks of a convolution's output.
inline int64_t block_count(const ConvShape& shape) {
  return shape.images * ceil_div(shape.height.out, 2) * ceil_div(shape.width.out, 2);
}

// A weight in bfloat16 would be rounded twice, where a direct convolution's is exact.
template <class T, class W>
constexpr bool kWinograd = kUnit<T> == 1 || std::is_same_v<W, float>;

// Whether a convolution is computed this way. Measured: docs/performance-log.md. On smaller maps most taps lie outside,
// so there is little to gain; and a weight is transformed for all its blocks, so that few of them do not pay for it.
template <class T, class W>
bool winograd_pays(const ConvShape& shape) {
  const auto fits = [](const ConvAxis& a) { return a.kernel == 3 && a.stride == 1 && a.dilation == 1 && a.out >= 6; };
  const int64_t blocks = block_count(shape), weight = shape.in_channels * shape.out_channels;
  return kWinograd<T, W> && blocks >= std::max(kLeastBlocks, weight / (kUnit<T> == 1 ? 4096 : 2048)) &&
         shape.groups == 1 && fits(shape.height) && fits(shape.width) && shape.height.padding <= 2 &&
         shape.width.padding <= 2 && shape.in_channels >= kPanel && shape.out_channels >= kPanel;
}

// Tiles of whole blocks. A tile's last row or column of blocks may be half outside.
struct WinogradPlan : Plan {
  int64_t step;        // floats between the pixels of a patch
  int64_t block_step;  // units between transformed blocks
  int64_t group;       // tiles that are multiplied together
  int64_t blocks;      // of so many tiles
  int64_t together;    // panels whose products are kept together

  // `pixels` of a tile, and `most` blocks that are multiplied together, as far as tiles are smaller
  WinogradPlan(const ConvShape& shape, bool backward, int64_t block_units, int64_t pixels = kBlockPixels,
               int64_t most = kBlocks)
      : Plan(shape, backward, sizeof(float), pixels, kPatchBytes),
        step(pixel_units<float>(in_channels)),
        block_step(block_units) {
    rows = std::min(round_up(rows, 2), height.base);
    const int64_t of_tile = ceil_div(rows, 2) * ceil_div(columns, 2);
    group = std::max<int64_t>(1, most / of_tile);
    blocks = group * of_tile;
    // an odd panel would be multiplied alone, where wide_tiles()
    const int64_t most_panels = kProductBytes / (kPositions * blocks * kPanel * 4);
    together = std::clamp<int64_t>(most_panels / 2 * 2, 1, ceil_div(out_channels, kPanel));
  }

  TileSlabs slabs() const { return TileSlabs(tiles(), ceil_div(out_channels, kPanel), ceil_div(tiles(), group)); }
  static Tile whole(Tile tile) {
    tile.rows = round_up(tile.rows, 2);
    tile.columns = round_up(tile.columns, 2);
    return tile;
  }
  int64_t whole_patch() const { return height.patch(round_up(rows, 2)) * width.patch(round_up(columns, 2)); }
};

// G along one axis: four vectors of three.
RESFUSE_LANES void transform_weights(const Lanes (&g)[3], Lanes (&u)[4]) {
  const Lanes half = broadcast_lanes(0.5f), ends = half * (g[0] + g[2]);
  const Lanes middle = half * g[1];
  u[0] = g[0];
  u[1] = ends + middle;
  u[2] = ends - middle;
  u[3] = g[2];
}

// G g G^T of a vector of nine taps, `tap_step` apart.
RESFUSE_LANES void transform_taps(const float* taps, int64_t tap_step, Lanes (&u)[4][4]) {
  Lanes columns[3][4];  // [tap down][position across]
  for (int r = 0; r < 3; ++r) {
    Lanes g[3];
    for (int c = 0; c < 3; ++c) g[c] = load_lanes(taps + (r * 3 + c) * tap_step);
    transform_weights(g, columns[r]);
  }
  for (int c = 0; c < 4; ++c) {
    const Lanes g[3] = {columns[0][c], columns[1][c], columns[2][c]};
    Lanes down[4];
    transform_weights(g, down);
    for (int r = 0; r < 4; ++r) u[r][c] = down[r];
  }
}

// Every panel of a weight, transformed: [panel][position][unit of k][kPanel lanes].
template <class T, class W>
unit_t<T>* pack_winograd(const WinogradPlan& plan, const W* weight, const WeightLayout& layout, bool backward,
                         const float* lane_scale = nullptr) {
  const int64_t panels = ceil_div(plan.out_channels, kPanel), units = ceil_div(plan.in_channels, kUnit<T>);
  const int64_t size = units * kPanel, tap_step = size * kUnit<T>;
  unit_t<T>* packed = workspace<unit_t<T>>(Slot::kWeights, panels * kPositions * size);
  parallel_tasks(panels, panels * kPositions * size, [&](int64_t panel) {
    float* taps = workspace<float>(Slot::kTile, 9 * tap_step);
    for (const AxisTap& h : plan.height.phases[0].taps) {
      for (const AxisTap& w : plan.width.phases[0].taps) {
        float* tap = taps + (h.offset * 3 + w.offset) * tap_step;
        std::fill_n(tap + (units - 1) * kUnit<T> * kPanel, kUnit<T> * kPanel, 0.0f);  // of a last unit, what is no k
        pack_panel<float>(
            WeightView<W>{weight + layout.at(h.kernel * 3 + w.kernel, 3), plan.out_channels, plan.in_channels,
                          layout.strides[backward ? 1 : 0], layout.strides[backward ? 0 : 1], lane_scale},
            panel, tap);
      }
    }
    unit_t<T>* to = packed + panel * kPositions * size;
    for (int64_t unit = 0; unit < units; ++unit) {
      for (int64_t half = 0; half < kPanel; half += kLanes) {
        const float* from = taps + unit * kUnit<T> * kPanel + half;
        Lanes first[4][4];
        transform_taps(from, tap_step, first);
        if constexpr (kUnit<T> == 1) {
          for (int64_t i = 0; i < kPositions; ++i)
            store_lanes(to + i * size + unit * kPanel + half, first[i / 4][i % 4]);
        } else {
          Lanes second[4][4];
          transform_taps(from + kPanel, tap_step, second);
          for (int64_t i = 0; i < kPositions; ++i)
            store_units(to + i * size + unit * kPanel + half,
                        round_pairs(first[i / 4][i % 4], second[i / 4][i % 4], T{}));
        }
      }
    }
  });
  return packed;
}

// B^T along one axis.
RESFUSE_LANES void transform_input(const Lanes (&d)[4], Lanes (&v)[4]) {
  v[0] = d[0] - d[2];
  v[1] = d[1] + d[2];
  v[2] = d[2] - d[1];
  v[3] = d[1] - d[3];
}

// Where transformed blocks go. Blocks come in runs, each for one vector of channels, and each with all its positions.
//
// Rows of the forward product: a block is a row of channels, in values that are multiplied.
template <class U>
struct BlockRows {
  U* to;
  int64_t step, position_step;

  void begin(int64_t, int64_t) {}
  RESFUSE_LANES void put(int64_t block, int64_t position, int64_t c, Lanes value) {
    U* row = to + position * position_step + block * step;
    if constexpr (std::is_same_v<U, float>) {
      store_lanes(row + c, value);
    } else {
      store_lanes(reinterpret_cast<BFloat16*>(row) + c, value);
    }
  }
  void end(int64_t, int64_t) {}
};

// Rows `positions` of the blocks of one tile, 4 positions to a row, from `block` on. Blocks beside each other share two
// columns.
template <class B>
void transform_patch(const float* patch, int64_t rows, int64_t columns, int64_t channels, int64_t step, int64_t block,
                     B blocks, Range positions = {0, 4}) {
  const int64_t width = columns + 2;
  for (int64_t row = 0; row < rows; row += 2, patch += 2 * width * step, block += columns / 2) {
    for (int64_t c = 0; c < channels; c += kLanes) {
      Lanes d[4][4];  // [column][position down]
      const auto load = [&](int64_t column, int at) RESFUSE_INLINE_LAMBDA {
        const float* from = patch + column * step + c;
        const Lanes pixels[4] = {load_lanes(from), load_lanes(from + width * step), load_lanes(from + 2 * width * step),
                                 load_lanes(from + 3 * width * step)};
        transform_input(pixels, d[at]);
      };
      load(0, 0);
      load(1, 1);
      blocks.begin(block, c);
      for (int64_t column = 0; column < columns; column += 2) {
        load(column + 2, 2);
        load(column + 3, 3);
        for (int64_t r = positions.begin; r < positions.end; ++r) {
          const Lanes across[4] = {d[0][r], d[1][r], d[2][r], d[3][r]};
          Lanes v[4];
          transform_input(across, v);
          for (int i = 0; i < 4; ++i) blocks.put(block + column / 2, (r - positions.begin) * 4 + i, c, v[i]);
          d[0][r] = d[2][r];
          d[1][r] = d[3][r];
        }
      }
      blocks.end(block + columns / 2, c);
    }
  }
}

// A^T along one axis.
RESFUSE_LANES void transform_output(const Lanes (&m)[4], Lanes (&y)[2]) {
  y[0] = m[0] + m[1] + m[2];
  y[1] = m[1] - m[2] - m[3];
}

// A panel of one tile's blocks as pixels: those outside the tile are dropped.
inline void transform_products(const float* products, int64_t position_step, int64_t rows, int64_t columns,
                               float* values) {
  for (int64_t row = 0; row < rows; row += 2) {
    for (int64_t column = 0; column < columns; column += 2, products += kPanel) {
      float* to = values + (row * columns + column) * kPanel;
      const bool below = row + 1 < rows, right = column + 1 < columns;
      for (int64_t half = 0; half < kPanel; half += kLanes) {
        Lanes down[2][4];
        for (int c = 0; c < 4; ++c) {
          const float* from = products + c * position_step + half;
          const Lanes m[4] = {load_lanes(from), load_lanes(from + 4 * position_step),
                              load_lanes(from + 8 * position_step), load_lanes(from + 12 * position_step)};
          Lanes y[2];
          transform_output(m, y);
          down[0][c] = y[0];
          down[1][c] = y[1];
        }
        for (int r = 0; r <= (below ? 1 : 0); ++r) {
          Lanes y[2];
          transform_output(down[r], y);
          store_lanes(to + r * columns * kPanel + half, y[0]);
          if (right) store_lanes(to + (r * columns + 1) * kPanel + half, y[1]);
        }
      }
    }
  }
}

// As run_tiles: fill(tile, patch) loads a tile, epilogue takes a panel of it. A tile may be asked for beyond its
// last row or column.
template <class T, class F, class A, class E>
void run_winograd(const WinogradPlan& plan, const unit_t<T>* packed, const TileSlabs& slabs, const F& fill,
                  const A& ahead, const E& epilogue) {
  using U = unit_t<T>;
  const int64_t step = plan.block_step, units = ceil_div(plan.in_channels, kUnit<T>), size = units * kPanel;
  const int64_t input_step = plan.blocks * step, product_step = plan.blocks * kPanel;
  const int64_t work = plan.images * plan.height.out * plan.width.out * plan.out_channels * 16;
  const std::vector<Tap> taps{{0, units, step, step}};
  parallel_tasks(slabs.slabs * slabs.blocks, work, [&](int64_t task) {
    const int64_t slab = task / slabs.blocks, share = task % slabs.blocks;
    const int64_t sizes[3] = {plan.whole_patch() * plan.step, plan.together * kPositions * product_step,
                              plan.rows * plan.columns * kPanel};
    int64_t bytes = Carver::bytes_of<U>(kPositions * input_step);
    for (const int64_t floats : sizes) bytes += Carver::bytes_of<float>(floats);
    Carver carver(static_cast<char*>(workspace_bytes(Slot::kTile, bytes)));
    U* inputs = carver.take<U>(kPositions * input_step);
    float *patch = carver.take<float>(sizes[0]), *products = carver.take<float>(sizes[1]);
    float* values = carver.take<float>(sizes[2]);
    const int64_t first_panel = slabs.first_panel(share), last_panel = slabs.first_panel(share + 1);
    const int64_t last_tile = slabs.first_tile(slab + 1), later = (task + 1) / slabs.blocks;
    for (int64_t first = slabs.first_tile(slab); first < last_tile; first += plan.group) {
      const int64_t end = std::min(first + plan.group, last_tile);
      int64_t blocks = 0;
      for (int64_t index = first; index < end; ++index) {
        const Tile tile = WinogradPlan::whole(plan.tile(index));
        fill(tile, patch);
        transform_patch(patch, tile.rows, tile.columns, plan.in_channels, plan.step, blocks,
                        BlockRows<U>{inputs, step, input_step});
        blocks += tile.rows / 2 * (tile.columns / 2);
      }
      Prefetcher next;
      if (end < last_tile || later < slabs.slabs) {
        const Tile tile = plan.tile(end < last_tile ? end : slabs.first_tile(later));
        ahead(tile, next);
        epilogue.touches((tile.image * plan.height.out + tile.row) * plan.width.out, tile.rows * tile.columns, next);
      }
      next.spread((last_panel - first_panel) * kPositions * ceil_div(blocks, kMaxPixels) * units, bytes);
      for (int64_t panel = first_panel; panel < last_panel; panel += plan.together) {
        const int64_t panels = std::min(plan.together, last_panel - panel);
        for (int64_t position = 0; position < kPositions; ++position) {
          for (int64_t i = 0, count; i < panels; i += count) {
            count = panels_together(panels - i);
            multiply<U>(inputs + position * input_step, 0, blocks, taps,
                        {packed + ((panel + i) * kPositions + position) * size,
                         products + (i * kPositions + position) * product_step, kPositions * size,
                         kPositions * product_step, kPanel},
                        count * kPanel, next, [](int64_t, int64_t) {});
          }
        }
        for (int64_t i = 0; i < panels; ++i) {
          int64_t block = 0;
          for (int64_t index = first; index < end; ++index) {
            const Tile tile = plan.tile(index);
            const int64_t pixel = (tile.image * plan.height.out + tile.row) * plan.width.out;
            epilogue.prefetch(pixel, tile.rows * tile.columns, 1, panel + i);
            transform_products(products + i * kPositions * product_step + block * kPanel, product_step, tile.rows,
                               tile.columns, values);
            epilogue(slab, pixel, tile.rows * tile.columns, panel + i, values);
            block += ceil_div(tile.rows, 2) * ceil_div(tile.columns, 2);
          }
        }
      }
    }
  });
}

}  // namespace resfuse::cpu::RESFUSE_ISA

RESFUSE_TILES_END
#endif
