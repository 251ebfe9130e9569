// scale_shift_act on the CPU: out = act(x*scale + shift + r), r absent, residual, or residual*scale_r + shift_r.
//
// One read of each operand and one write. Bytes per element: 2 or 3 times the element size. The second form also gives
// the moments of the result, taken tile by tile from the values just written, while they are in L2.
#include <limits>

#include "rounding.h"
#include "tile_moments.h"

namespace resfuse::cpu {

enum class Residual { kNone, kIdentity, kRaw };

// lanes: scale, shift, residual_scale, residual_shift
template <class T, Residual kResidual>
void scale_shift_act_loop(const T* x, const T* residual, T* out, int64_t rows, int64_t width, const acc_t<T>* scale,
                          const acc_t<T>* shift, const acc_t<T>* residual_scale, const acc_t<T>* residual_shift,
                          acc_t<T> floor) {
  store_rows(out, rows, width, [=](int64_t i, int64_t j) RESFUSE_INLINE_LAMBDA {
    acc_t<T> z = load(x[i]) * scale[j] + shift[j];
    if constexpr (kResidual == Residual::kIdentity) z += load(residual[i]);
    if constexpr (kResidual == Residual::kRaw) z += load(residual[i]) * residual_scale[j] + residual_shift[j];
    return clamp_below(z, floor);
  });
}

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

__attribute__((noinline)) static void split_vector(float* lanes, int64_t count) { split_lanes<false>(lanes, count); }

// The loop on whole pairs of vectors of bfloat16, whose even values and whose odd ones are a vector each, as the lanes
// beside them: half the instructions of widening, rounding and narrowing them in order.
template <Residual kResidual>
__attribute__((noinline)) void scale_shift_act_pairs(const BFloat16* x, const BFloat16* residual, BFloat16* out,
                                                     int64_t rows, int64_t width, const float* scale,
                                                     const float* shift, const float* residual_scale,
                                                     const float* residual_shift, float floor) {
  const Lanes least = broadcast_lanes(floor);
  for (int64_t i = 0; i < rows * width; i += width) {
    for (int64_t j = 0; j < width; j += kPair) {
      LanePair z = load_pair(x + i + j);
      const LanePair a = load_pair(scale + j), b = load_pair(shift + j);
      z = {z.first * a.first + b.first, z.second * a.second + b.second};
      if constexpr (kResidual != Residual::kNone) {
        LanePair r = load_pair(residual + i + j);
        if constexpr (kResidual == Residual::kRaw) {
          const LanePair ra = load_pair(residual_scale + j), rb = load_pair(residual_shift + j);
          r = {r.first * ra.first + rb.first, r.second * ra.second + rb.second};
        }
        z = {z.first + r.first, z.second + r.second};
      }
      store_pair(out + i + j, {max_of(least, z.first), max_of(least, z.second)});
    }
  }
}

RESFUSE_TILES_END
#endif

// Whether bfloat16 is taken in pairs of vectors: AVX-512 without AVX512_BF16, which rounds in order by itself.
template <class T>
bool takes_pairs(const Geometry& g) {
#if RESFUSE_HAS_TILES
  return std::is_same_v<T, BFloat16> && has_avx512() && !multiplies_bfloat16() &&
         (!g.channels_last || g.channels % kPair == 0);
#else
  return false;
#endif
}

// Per-channel vectors as they lie beside rows: in order, or split as pairs are.
template <class A>
class RowVectors {
 public:
  RowVectors(const std::array<const A*, 4>& vectors, const Geometry& g, bool pairs)
      : pointers(vectors), split_(pairs && g.channels_last ? 4 * g.channels : 0) {
#if RESFUSE_HAS_TILES
    if constexpr (std::is_same_v<A, float>) {
      if (!pairs || !g.channels_last) return;
      float* to = split_.get();
      for (const float*& vector : pointers) {
        if (vector == nullptr) continue;
        std::copy_n(vector, g.channels, to);
        split_vector(to, g.channels);
        vector = to;
        to += g.channels;
      }
    }
#endif
  }
  std::array<const A*, 4> pointers;

 private:
  Scratch<A> split_;
};

// The operands of one call, checked once; `block` runs the loop on a block.
template <class T, Residual kResidual>
struct Pass {
  using A = acc_t<T>;
  const T* x;
  const T* residual;
  T* out;
  A floor;
  bool pairs;  // lanes are split

  template <class L>
  void block(int64_t i, int64_t rows, int64_t width, const L& lanes) const {
    const T* r = kResidual == Residual::kNone ? x : residual;
#if RESFUSE_HAS_TILES
    if constexpr (std::is_same_v<T, BFloat16>)
      if (pairs && width % kPair == 0)
        return scale_shift_act_pairs<kResidual>(x + i, r + i, out + i, rows, width, lanes[0], lanes[1], lanes[2],
                                                lanes[3], floor);
#endif
    scale_shift_act_loop<T, kResidual>(x + i, r + i, out + i, rows, width, lanes[0], lanes[1], lanes[2], lanes[3],
                                       floor);
  }
};

// The pass with moments of its result: each tile is written, then read back from L2.
template <class T, Residual kResidual>
void pass_with_moments(const Geometry& g, const std::array<const acc_t<T>*, 4>& vectors, const Pass<T, kResidual>& pass,
                       acc_t<T>* mean, acc_t<T>* var) {
  const int64_t repeat = g.channels_last ? pixels_per_row(g.channels) : std::min(g.pixels, kPlaneLanes);
  const int64_t channels = g.channels_last ? g.channels : 1;
  const LaneVectors<acc_t<T>, 4> shared(vectors, g.channels, g.channels_last ? repeat : 1);
  moments_of<T>(g, pass.out, mean, var, [&](int64_t offset, int64_t pixels, int64_t c) {
    const PlaneLanes<acc_t<T>, 4> plane(vectors, c, g.channels_last ? 0 : repeat);
    const auto& lanes = g.channels_last ? shared.pointers() : plane.pointers;
    for_each_row_block(offset, pixels, channels, repeat,
                       [&](int64_t i, int64_t rows, int64_t width) { pass.block(i, rows, width, lanes); });
  });
}

// Write act(...) to `out`, which may be x itself.
template <bool kMoments>
void run(const Tensor& x, const Tensor& out, const Tensor& scale, const Tensor& shift, const OptionalTensor& residual,
         const OptionalTensor& residual_scale, const OptionalTensor& residual_shift, bool relu, Tensor* mean,
         Tensor* var) {
  const Geometry g = geometry_of(x);
  if (residual.has_value()) check_like(*residual, x, "residual");
  STD_TORCH_CHECK(
      residual_scale.has_value() == residual_shift.has_value() && (residual.has_value() || !residual_scale.has_value()),
      "resfuse: residual_scale and residual_shift come together, with a residual");
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const std::array<const A*, 4> vectors = {vector_pointer<A>(scale, x, "scale"), vector_pointer<A>(shift, x, "shift"),
                                             vector_pointer<A>(residual_scale, x, "residual_scale"),
                                             vector_pointer<A>(residual_shift, x, "residual_shift")};
    const bool pairs = takes_pairs<T>(g);
    const RowVectors<A> rows(vectors, g, pairs);
    const A floor = relu ? A(0) : -std::numeric_limits<A>::infinity();
    auto go = [&](auto kind) {
      const Pass<T, decltype(kind)::value> pass{input_pointer<T>(x), input_pointer<T>(residual), output_pointer<T>(out),
                                                floor, pairs};
      if constexpr (kMoments) {
        pass_with_moments<T>(g, rows.pointers, pass, output_pointer<A>(*mean), output_pointer<A>(*var));
      } else {
        for_each_block<A, 4>(g, rows.pointers, [&](int64_t i, int64_t count, int64_t width, const auto& lanes) {
          pass.block(i, count, width, lanes);
        });
      }
    };
    if (g.numel() == 0) return;
    if (!residual.has_value()) return go(std::integral_constant<Residual, Residual::kNone>{});
    if (!residual_scale.has_value()) return go(std::integral_constant<Residual, Residual::kIdentity>{});
    go(std::integral_constant<Residual, Residual::kRaw>{});
  });
}

Tensor scale_shift_act(const Tensor& x, const Tensor& scale, const Tensor& shift, const OptionalTensor& residual,
                       const OptionalTensor& residual_scale, const OptionalTensor& residual_shift, bool relu) {
  Tensor out = new_activation(x);
  run<false>(x, out, scale, shift, residual, residual_scale, residual_shift, relu, nullptr, nullptr);
  return out;
}

void scale_shift_act_(const Tensor& x, const Tensor& scale, const Tensor& shift, const OptionalTensor& residual,
                      const OptionalTensor& residual_scale, const OptionalTensor& residual_shift, bool relu) {
  run<false>(x, x, scale, shift, residual, residual_scale, residual_shift, relu, nullptr, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> scale_shift_act_moments(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                                           const OptionalTensor& residual,
                                                           const OptionalTensor& residual_scale,
                                                           const OptionalTensor& residual_shift, bool relu) {
  STD_TORCH_CHECK(x.numel() > 0, "resfuse: an empty activation has no moments");
  Tensor out = new_activation(x), mean = new_vector(x, 1, x.size(1), accumulate_dtype(x)),
         var = new_vector(x, 1, x.size(1), accumulate_dtype(x));
  run<true>(x, out, scale, shift, residual, residual_scale, residual_shift, relu, &mean, &var);
  return {out, mean, var};
}

STABLE_TORCH_LIBRARY_IMPL(resfuse, CPU, m) {
  m.impl("scale_shift_act", TORCH_BOX(&scale_shift_act));
  m.impl("scale_shift_act_", TORCH_BOX(&scale_shift_act_));
  m.impl("scale_shift_act_moments", TORCH_BOX(&scale_shift_act_moments));
}

}  // namespace resfuse::cpu
