// How CUDA kernels walk an activation: every thread takes one column of vectors of 16 bytes, step by step.
//
// Memory is rows of `columns` vectors. In channels_last memory a column is a few channels and a step is a pixel; in
// contiguous memory a column is a channel and a step is a vector within its planes. So one loop serves both layouts,
// and a thread's channels never change: their coefficients lie in shared memory, as many side by side as a block has
// columns. Where memory is not aligned, or 16 bytes would reach across channels or planes, a vector is one element.
//
// Nothing here knows a tensor: this file and reduce.cuh also compile for the host (tests/cuda_on_host).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../math.h"

namespace resfuse::cuda {

constexpr int kThreads = 256;
// What a multiprocessor runs at once leaves a thread 80 registers, or 128 where it holds more. With four 16-byte loads
// a thread either is 32 KiB in flight or more, what the fastest GPU's bandwidth times latency asks of a multiprocessor.
constexpr int kBlocksPerProcessor = 3;
constexpr int kLargeBlocksPerProcessor = 2;
static_assert(kThreads * kBlocksPerProcessor <= 1024, "every GPU since sm_75 runs 1024 threads per multiprocessor");
constexpr int kWarp = 32;
constexpr int kMaxLanes = kWarp;      // columns of a block: 512 consecutive bytes
constexpr int64_t kMaxSlabs = 65535;  // a grid's height
constexpr int kVectorBytes = 16;
constexpr int kLoads = 4;  // 16-byte loads that a thread wants in flight

template <class T, int kWidth>
struct alignas(kWidth * sizeof(T)) Vector {
  T values[kWidth];
};

template <class T, int kWidth>
__device__ __forceinline__ Vector<T, kWidth> load_vector(const T* base, int64_t index) {
  using V = Vector<T, kWidth>;
  static_assert(sizeof(V) <= kVectorBytes, "one access");
  const V* from = reinterpret_cast<const V*>(base) + index;
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(V) == kVectorBytes) {  // opaque: the compiler would split it where values are used one by one
    uint4 bits;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                 : "l"(__cvta_generic_to_global(from)));
    V vector;
    memcpy(&vector, &bits, sizeof vector);
    return vector;
  }
#endif
  return *from;
}

template <class T, int kWidth>
__device__ __forceinline__ void store_vector(T* base, int64_t index, const Vector<T, kWidth>& vector) {
  reinterpret_cast<Vector<T, kWidth>*>(base)[index] = vector;
}

// Division of positions is worth a branch: almost always both numbers have 32 bits, and that is several times faster.
struct Quotient {
  int64_t quotient, remainder;
};

RESFUSE_INLINE Quotient divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) {
    const uint32_t a32 = static_cast<uint32_t>(a), b32 = static_cast<uint32_t>(b), quotient = a32 / b32;
    return {quotient, a32 - quotient * b32};
  }
  return {a / b, a % b};
}

// An activation in vectors of `width` elements, and how a grid of tiles by slabs shares it. What is the same for every
// thread is computed here, once: kernels read it from constant memory.
struct Walk {
  int64_t columns;  // side by side: groups of channels (channels_last) or channels
  int64_t plane;    // vectors of a column that follow each other in memory: 1, or those of a plane
  int64_t steps;    // vectors of a column: pixels, or those of a channel's planes
  int64_t tiles, slabs;
  int64_t stride;                 // steps from one of a thread's vectors to its next, as far as it stays in a plane:
  int64_t distance, plane_share;  // that many vectors away, and nearer to the plane's end by this
  int64_t skip;                   // vectors from a plane's end to the column's next plane
  int width;                      // elements of a vector
  int lanes;                      // columns that a block takes: a power of two, a warp holds whole rows of them
  bool channels_last;

  // At most `blocks` blocks, or one for each tile of columns.
  RESFUSE_INLINE Walk(int64_t batch, int64_t channels, int64_t pixels, bool channels_last, int width, int64_t blocks)
      : columns(channels_last ? channels / width : channels),
        plane(channels_last ? 1 : pixels / width),
        steps(batch * (channels_last ? pixels : plane)),
        skip((columns - 1) * plane),
        width(width),
        lanes(1),
        channels_last(channels_last) {
    while (channels_last && lanes < kMaxLanes && lanes < columns) lanes *= 2;
    tiles = (columns + lanes - 1) / lanes;
    const int64_t useful = (steps + rows() - 1) / rows(), wanted = blocks / tiles;
    slabs = wanted < useful ? wanted : useful;
    slabs = slabs < 1 ? 1 : slabs < kMaxSlabs ? slabs : kMaxSlabs;
    stride = slabs * rows();
    plane_share = stride % plane;
    distance = stride / plane * columns * plane + plane_share;
  }

  RESFUSE_INLINE int rows() const { return kThreads / lanes; }
  RESFUSE_INLINE int64_t channel(int64_t column, int j) const { return channels_last ? column * width + j : column; }
  // The values of a channel that a slab has.
  RESFUSE_INLINE int64_t count(int64_t slab) const {
    const int64_t left = steps % stride - slab * rows(), last = left < 0 ? 0 : left < rows() ? left : rows();
    return (steps / stride * rows() + last) * (channels_last ? 1 : width);
  }
};

// Where a thread is. blockIdx.x names a tile of columns, blockIdx.y a slab of steps, dealt out row by row.
struct Position {
  int lane, row;
  int64_t column, first;

  __device__ __forceinline__ explicit Position(const Walk& walk)
      : lane(static_cast<int>(threadIdx.x) & (walk.lanes - 1)),
        row(static_cast<int>(threadIdx.x) / walk.lanes),
        column(int64_t{blockIdx.x} * walk.lanes + lane),
        first(int64_t{blockIdx.y} * walk.rows() + row) {}
};

// A thread's vector, counted from the beginning of the activation, and its next.
class Cursor {
 public:
  __device__ __forceinline__ Cursor(const Walk& walk, const Position& at) {
    const Quotient first = divide(at.first, walk.plane);
    index_ = (first.quotient * walk.columns + at.column) * walk.plane + first.remainder;
    left_ = walk.plane - first.remainder;
  }
  __device__ __forceinline__ int64_t index() const { return index_; }
  __device__ __forceinline__ void advance(const Walk& walk) {
    index_ += walk.distance;
    left_ -= walk.plane_share;
    if (left_ > 0) return;
    left_ += walk.plane;
    index_ += walk.skip;
  }

 private:
  int64_t index_, left_;
};

#if defined(__CUDACC__)
// The block's shared memory, of sizeof(S) bytes at launch.
template <class S>
__device__ __forceinline__ S& shared_memory() {
  extern __shared__ __align__(kVectorBytes) unsigned char resfuse_shared_memory[];
  return *reinterpret_cast<S*>(resfuse_shared_memory);
}
#endif

template <int kCount>
constexpr int kAtLeastOne = kCount > 0 ? kCount : 1;  // an array is not empty

// The coefficients of a block's columns: kVectors vectors of length C, staged in shared memory.
template <class A, int kVectors, int kWidth>
struct Staged {
  A values[kAtLeastOne<kVectors>][kWidth][kMaxLanes];

  template <class Op>
  __device__ __forceinline__ void fill(const Op& op, const Walk& walk) {
    static_assert(kWidth * kMaxLanes <= kThreads, "a thread for each coefficient of a vector");
    const int lane = threadIdx.x / kWidth, j = threadIdx.x % kWidth;
    const int64_t column = int64_t{blockIdx.x} * walk.lanes + lane;
    if (lane < walk.lanes)
#pragma unroll
      for (int k = 0; k < kVectors; ++k)
        values[k][j][lane] = column < walk.columns ? op.vector(k, walk.channel(column, j)) : A(0);
    __syncthreads();
  }
};

// Coefficients are read in every round of a loop: kept in registers, as nvcc would, they leave too few for the loads.
__device__ __forceinline__ void keep_in_shared_memory() { asm volatile("" ::: "memory"); }

// The coefficients of one element.
template <class A, int kVectors, int kWidth>
struct Coefficients {
  A values[kAtLeastOne<kVectors>];

  __device__ __forceinline__ Coefficients(const Staged<A, kVectors, kWidth>& staged, int j, int lane) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) values[k] = staged.values[k][j][lane];
  }
  __device__ __forceinline__ A operator[](int k) const { return values[k]; }
};

// What an operator reads at one step: the vectors of its inputs.
template <class T, int kInputs, int kWidth>
struct Inputs {
  Vector<T, kWidth> vectors[kInputs];

  template <class Op>
  __device__ __forceinline__ void fetch(const Op& op, int64_t, int64_t, int64_t index) {
#pragma unroll
    for (int i = 0; i < kInputs; ++i) vectors[i] = load_vector<T, kWidth>(op.in[i], index);
  }
  __device__ __forceinline__ acc_t<T> get(int i, int j) const { return load(vectors[i].values[j]); }
};

// What every operator has. It adds vector(k, c), which is coefficient k of channel c, and
// apply(coefficients, operands, j, out, terms), which takes element j of its operands to the outputs' elements and to
// the terms of a Reduction, if it has one. Operands may be other than Inputs: what fetches and gives values as they do.
template <class T, int kIn, int kOut, int kCoefficients, int kTerm = 0>
struct Operator {
  using Storage = T;
  using A = acc_t<T>;
  static constexpr int kInputs = kIn, kOutputs = kOut, kVectors = kCoefficients, kTerms = kTerm;
  // vectors to be stored are held beside those that are loaded and what is reduced
  static constexpr bool kLarge = kInputs + kOutputs > 4 || (kOutputs > 0 && kTerms > 0);
  static constexpr int kSteps = (kLoads + kInputs - 1) / kInputs;
  static constexpr int kUnroll = kLarge && kSteps > 3 ? 3 : kSteps;  // steps at once
  static constexpr int kBlocks = kLarge ? kLargeBlocksPerProcessor : kBlocksPerProcessor;
  template <int kWidth>
  using Operands = Inputs<T, kInputs, kWidth>;
  const T* in[kInputs];
  T* out[kAtLeastOne<kOutputs>];
};

// Call op for every element of a thread's column, several steps at once, and f(j, terms, valid) with what it returns
// to be reduced: terms[u] of the first `valid` steps u.
template <class Op, int kWidth, class F>
__device__ __forceinline__ void for_each_step(const Op& op, const Walk& walk,
                                              const Staged<acc_t<typename Op::Storage>, Op::kVectors, kWidth>& staged,
                                              F f) {
  using T = typename Op::Storage;
  using A = acc_t<T>;
  constexpr int kUnroll = Op::kUnroll;
  const Position at(walk);
  if (at.column >= walk.columns) return;
  Cursor cursor(walk, at);

#pragma unroll 1  // nvcc would unroll again: no more loads in flight, but more registers
  for (int64_t step = at.first; step < walk.steps; step += kUnroll * walk.stride) {
    typename Op::template Operands<kWidth> operands[kUnroll];
    int64_t index[kUnroll];
    int valid = 0;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      index[u] = cursor.index();
      cursor.advance(walk);
      if (step + u * walk.stride < walk.steps)
        operands[u].fetch(op, at.column, step + u * walk.stride, index[u]), valid = u + 1;
    }
    Vector<T, kWidth> results[kUnroll][kAtLeastOne<Op::kOutputs>];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const Coefficients<A, Op::kVectors, kWidth> coefficients(staged, j, at.lane);
      A terms[kUnroll][kAtLeastOne<Op::kTerms>];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        T out[kAtLeastOne<Op::kOutputs>];
        op.apply(coefficients, operands[u], j, out, terms[u]);
#pragma unroll
        for (int o = 0; o < Op::kOutputs; ++o) results[u][o].values[j] = out[o];
      }
      f(j, terms, valid);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (u < valid)
#pragma unroll
        for (int o = 0; o < Op::kOutputs; ++o) store_vector<T, kWidth>(op.out[o], index[u], results[u][o]);
    keep_in_shared_memory();
  }
}

// An operator that reduces nothing.
template <class Op, int kWidth>
struct MapMemory {
  Staged<acc_t<typename Op::Storage>, Op::kVectors, kWidth> staged;
};

template <class Op, int kWidth>
__global__ void __launch_bounds__(kThreads, Op::kBlocks) map_kernel(const Op op, const Walk walk) {
  auto& memory = shared_memory<MapMemory<Op, kWidth>>();
  memory.staged.fill(op, walk);
  for_each_step<Op, kWidth>(op, walk, memory.staged, [](int, const auto&, int) {});
}

}  // namespace resfuse::cuda
