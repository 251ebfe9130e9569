// A convolution, or its gradient to the input, by tiles: by Winograd's method where that pays, else tap by tap.
#pragma once

#include <optional>

#include "operands.h"
#include "winograd.h"

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

namespace resfuse::cpu::RESFUSE_ISA {

// The plan comes first, since epilogues count by its tiles and slabs; then `run`, once.
template <class T, class W>
class Convolution {
 public:
  Convolution(const ConvShape& shape, bool backward, int64_t pixels = kTilePixels)
      : shape_(shape), backward_(backward) {
    if (winograd_pays<T, W>(shape)) {
      blocks_.emplace(shape, backward, pixel_units<T>(backward ? shape.out_channels : shape.in_channels));
    } else {
      taps_.emplace(shape, backward, sizeof(operand_t<T>), pixels, kPatchBytes);
    }
  }
  const Plan& plan() const { return blocks_ ? *blocks_ : *taps_; }
  TileSlabs slabs() const { return blocks_ ? blocks_->slabs() : TileSlabs(plan().tiles(), panels()); }

  // `source` is what the product reads: the input or, backward, the output's gradient. `lane_scale` multiplies weights.
  template <class S, class E>
  void run(const S& source, const W* weight, const WeightLayout& layout, const E& epilogue,
           const float* lane_scale = nullptr) const {
    const auto ahead = [&](const Tile& tile, Prefetcher& to) { prefetch_tile(plan(), tile, source, to); };
    if (blocks_) {
      const auto fill = [&, wide = source.wide()](const Tile& tile, float* patch) {
        fill_patch(*blocks_, tile, wide, 0, blocks_->in_channels, Pixels(patch, blocks_->step));
      };
      const unit_t<T>* packed = pack_winograd<T>(*blocks_, weight, layout, backward_, lane_scale);
      return run_winograd<T>(*blocks_, packed, slabs(), fill, ahead, epilogue);
    }
    const int64_t step = pixel_units<T>(plan().in_channels), kernel_width = shape_.width.kernel;
    const auto fill = [&](const Tile& tile, unit_t<T>* patch) {
      fill_patch(plan(), tile, source, 0, plan().in_channels, patch_pixels<T>(patch, step));
    };
    const Taps taps(plan(), kernel_width, kUnit<T>, step);
    const unit_t<T>* packed = pack_weight<T>(plan(), taps, weight, layout, kernel_width, backward_, lane_scale);
    run_tiles<T>(plan(), taps, packed, plan().patch_pixels() * step, slabs(), fill, ahead, epilogue);
  }

 private:
  int64_t panels() const { return ceil_div(plan().out_channels, kPanel); }

  ConvShape shape_;
  bool backward_;
  std::optional<WinogradPlan> blocks_;
  std::optional<Plan> taps_;
};

}  // namespace resfuse::cpu::RESFUSE_ISA

RESFUSE_TILES_END
#endif
