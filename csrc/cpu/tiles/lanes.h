// Lanes: vectors of floats, the loads and stores of activations as such, and the formulas of math.h on them.
//
// A vector is the processor's own: sixteen lanes of AVX-512 or eight of AVX2, from one of the two headers below, which
// define the same names. Arithmetic is the compiler's, on vectors: a*b + c rounds twice, multiply_add once. The lanes
// are channels. A mask names the channels that exist, so that any C is a whole number of vectors.
#pragma once

#include <type_traits>

#include "../../math.h"
#include "isa.h"

#if RESFUSE_HAS_TILES
#include <immintrin.h>

#define RESFUSE_LANES inline __attribute__((always_inline))

RESFUSE_TILES_BEGIN

namespace resfuse::cpu::RESFUSE_ISA {

// bfloat16 has two types here: BFloat16, which is multiplied in pairs, and this one, for processors that cannot: the
// same bits in memory, a float from the load to the store.
struct WideBFloat16 : BFloat16 {};

}  // namespace resfuse::cpu::RESFUSE_ISA

RESFUSE_TILES_END

#ifdef RESFUSE_AVX2
#include "lanes_avx2.h"
#else
#include "lanes_avx512.h"
#endif

RESFUSE_TILES_BEGIN

namespace resfuse::cpu::RESFUSE_ISA {

// The lanes that exist of a vector's starting at `begin`, of `size` in all.
RESFUSE_LANES LaneMask lane_mask(int64_t begin, int64_t size) {
  const int64_t left = size - begin;
  return left >= kLanes ? kAllLanes : left <= 0 ? LaneMask(0) : static_cast<LaneMask>((1u << left) - 1);
}

// Those starting at `begin` that lie in [first, last).
RESFUSE_LANES LaneMask lane_mask(int64_t begin, int64_t first, int64_t last) {
  const LaneMask mask = lane_mask(begin, last);
  return begin >= first ? mask : static_cast<LaneMask>(mask & ~lane_mask(begin, first));
}

RESFUSE_LANES Lanes load_lanes(const BFloat16* from, LaneMask mask = kAllLanes) {
  return widen_halves(load_halves(from, mask));
}
template <class T>
RESFUSE_LANES void store_lanes(T* to, Lanes value, LaneMask mask = kAllLanes) {
  store_halves(to, round_halves(value, T{}), mask);
}

// The value that a later reader of the stored result will see.
template <class T>
RESFUSE_LANES Lanes round_lanes(Lanes value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else {
    return widen_halves(round_halves(value, T{}));
  }
}

// relu(NaN) = NaN: of a pair with a NaN, and of two zeros, the second operand is the maximum
RESFUSE_LANES Lanes relu_lanes(Lanes z) { return max_of(zero_lanes(), z); }

// Call f with a mask that the compiler knows to be whole, or with the mask there is.
struct WholeMask {
  RESFUSE_LANES constexpr operator LaneMask() const { return kAllLanes; }
};
template <class F>
RESFUSE_LANES void with_mask(LaneMask mask, const F& f) {
  mask == kAllLanes ? f(WholeMask{}) : f(mask);
}

}  // namespace resfuse::cpu::RESFUSE_ISA

RESFUSE_TILES_END
#endif
