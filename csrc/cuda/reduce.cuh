// Reductions over an activation, in two launches and a fixed order: sums, and moments by Chan's merge.
//
// First launch: a thread reduces its column in registers, batch by batch; the rows of a block are merged as a tree,
// through shared memory down to one warp and by shuffles within it; each block writes one partial result per channel.
// Second launch: a few threads for each channel merge the partial results, then each other's as such a tree.
// What a thread adds up has the activation's accumulation type; from then on everything is double. The split depends on
// the shape and on the number of multiprocessors, never on who comes first: no atomics.
#pragma once

#include "walk.cuh"

namespace resfuse::cuda {

constexpr int kMergeLanes = 8;  // channels that a block of the second launch takes
constexpr unsigned kWholeWarp = 0xffffffffu;

// A batch of values within a thread's reduction: how many, beside those before.
template <class A>
struct Batch {
  int valid;
  A inverse, before, before_inverse, share;

  __device__ __forceinline__ Batch(int valid, int64_t count)
      : valid(valid),
        inverse(A(1) / static_cast<A>(valid)),
        before(static_cast<A>(count)),
        before_inverse(count > 0 ? A(1) / before : A(0)),
        share(static_cast<A>(valid) / static_cast<A>(count + valid)) {}
};

template <class A, int kTerms>
struct Sums {
  using Total = Sums<double, kTerms>;
  static constexpr int kValues = kTerms;
  static constexpr bool kPivoted = false;
  A values[kValues];

  // add the terms of one element in each step of a batch
  template <int kUnroll, int kSize>
  __device__ __forceinline__ void add(const A (&terms)[kUnroll][kSize], const Batch<A>& batch) {
#pragma unroll
    for (int s = 0; s < kTerms; ++s) {
      A sum = 0;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) sum += u < batch.valid ? terms[u][s] : A(0);
      values[s] += sum;
    }
  }
  __device__ __forceinline__ Total total(int64_t, double) const {
    Total total;
#pragma unroll
    for (int s = 0; s < kTerms; ++s) total.values[s] = values[s];
    return total;
  }
  __device__ __forceinline__ void merge(const Sums& other, int64_t, int64_t) {
#pragma unroll
    for (int s = 0; s < kTerms; ++s) values[s] += other.values[s];
  }
  __device__ __forceinline__ void finish(int64_t) {}
};

// The sum and the sum of squared deviations from the mean; finish makes them mean and biased variance. A thread's terms
// are deviations from a pivot, a value of the channel, so that no digits are lost where |mean| >> std. Kept is the sum,
// not the mean, for the sake of an infinite value: added to others it stays what it is.
template <class A>
struct Moments {
  using Total = Moments<double>;
  static constexpr int kValues = 2;
  static constexpr bool kPivoted = true;
  A values[kValues];

  template <int kUnroll, int kSize>
  __device__ __forceinline__ void add(const A (&terms)[kUnroll][kSize], const Batch<A>& batch) {
    A sum = 0, m2 = 0;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) sum += u < batch.valid ? terms[u][0] : A(0);
    const A mean = sum * batch.inverse;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const A deviation = u < batch.valid ? terms[u][0] - mean : A(0);
      m2 += deviation * deviation;
    }
    A mean_before = values[0] * batch.before_inverse;
    merge_moments(&mean_before, &values[1], batch.before, batch.share, mean, m2);
    values[0] += sum;
  }
  __device__ __forceinline__ Total total(int64_t count, double pivot) const {
    return {{values[0] + static_cast<double>(count) * pivot, static_cast<double>(values[1])}};
  }
  __device__ __forceinline__ void merge(const Moments& other, int64_t count, int64_t other_count) {
    if (other_count == 0) return;
    const A n = static_cast<A>(count), m = static_cast<A>(other_count);
    A mean = count > 0 ? values[0] / n : A(0);
    merge_moments(&mean, &values[1], n, m / (n + m), other.values[0] / m, other.values[1]);
    values[0] += other.values[0];
  }
  __device__ __forceinline__ void finish(int64_t count) {
    values[0] /= static_cast<A>(count);
    values[1] /= static_cast<A>(count);
  }
};

// The pivot of a channel with this value: 0 stands in for Inf and NaN, which then reach the sums as they are.
template <class A>
__device__ __forceinline__ A pivot_of(A value) {
  return value - value == A(0) ? value : A(0);
}

// What a thread has reduced: kWidth results of `count` values each.
template <class R, int kWidth>
struct Part {
  R results[kWidth];
  int64_t count;

  __device__ __forceinline__ Part() : count(0) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
#pragma unroll
      for (int v = 0; v < R::kValues; ++v) results[j].values[v] = 0;
  }

  // merge `other_count` values whose results are other(j)
  template <class F>
  __device__ __forceinline__ void merge(int64_t other_count, const F& other) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) results[j].merge(other(j), count, other_count);
    count += other_count;
  }
};

// Where the upper half of a tree's threads leaves its parts for the lower half.
template <class R, int kWidth>
struct Exchange {
  R results[kWidth][kThreads / 2];
  int64_t counts[kThreads / 2];
};

// Merge the rows of a block, each `lanes` threads wide: afterwards the first `lanes` threads hold everything.
template <class R, int kWidth>
__device__ __forceinline__ void merge_rows(Part<R, kWidth>& part, int lanes, Exchange<R, kWidth>& exchange) {
  const int thread = threadIdx.x;
#pragma unroll
  for (int half = kThreads / 2; half >= kWarp; half /= 2) {
    if (half < lanes) return;
    if (thread >= half && thread < 2 * half) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) exchange.results[j][thread - half] = part.results[j];
      exchange.counts[thread - half] = part.count;
    }
    __syncthreads();
    if (thread < half) part.merge(exchange.counts[thread], [&](int j) { return exchange.results[j][thread]; });
    __syncthreads();
  }
#pragma unroll
  for (int half = kWarp / 2; half >= 1; half /= 2) {
    if (half < lanes) return;
    const int64_t count = __shfl_down_sync(kWholeWarp, part.count, half);
    part.merge(count, [&](int j) {
      R other;
#pragma unroll
      for (int v = 0; v < R::kValues; ++v)
        other.values[v] = __shfl_down_sync(kWholeWarp, part.results[j].values[v], half);
      return other;
    });
  }
}

template <class Op, int kWidth>
struct ReduceMemory {
  using A = acc_t<typename Op::Storage>;
  Staged<A, Op::kVectors, kWidth> staged;
  Exchange<typename Op::Reduction::Total, kWidth> exchange;
};

// The first launch: partials[slab][value][channel].
template <class Op, int kWidth>
__global__ void __launch_bounds__(kThreads, Op::kBlocks) reduce_kernel(const Op op, const Walk walk, double* partials) {
  using A = acc_t<typename Op::Storage>;
  using R = typename Op::Reduction;
  using Total = typename R::Total;
  auto& memory = shared_memory<ReduceMemory<Op, kWidth>>();
  memory.staged.fill(op, walk);
  Part<R, kWidth> own;
  for_each_step<Op, kWidth>(op, walk, memory.staged, [&](int j, const auto& terms, int valid) {
    own.results[j].add(terms, Batch<A>(valid, own.count));
    if (j == kWidth - 1) own.count += valid;
  });
  const Position at(walk);
  Part<Total, kWidth> part;
  part.count = own.count;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    const A pivot = R::kPivoted ? memory.staged.values[Op::kVectors - R::kPivoted][j][at.lane] : A(0);
    part.results[j] = own.results[j].total(own.count, pivot);
  }
  merge_rows(part, walk.lanes, memory.exchange);

  if (at.row > 0 || at.column >= walk.columns) return;
  double* partial = partials + int64_t{blockIdx.y} * R::kValues * op.channels;
  if (walk.channels_last) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
#pragma unroll
      for (int v = 0; v < R::kValues; ++v)
        partial[v * op.channels + walk.channel(at.column, j)] = part.results[j].values[v];
    return;
  }
  Part<Total, 1> whole;  // of one channel
#pragma unroll
  for (int j = 0; j < kWidth; ++j) whole.merge(part.count, [&](int) { return part.results[j]; });
#pragma unroll
  for (int v = 0; v < R::kValues; ++v) partial[v * op.channels + at.column] = whole.results[0].values[v];
}

template <class A, int kValues>
struct Outputs {
  A* values[kValues];
};

// The second launch: R is the reduction in double.
template <class R, class A>
__global__ void __launch_bounds__(kThreads, kLargeBlocksPerProcessor)
    merge_kernel(const double* partials, const Outputs<A, R::kValues> out, const Walk walk, int64_t channels) {
  auto& exchange = shared_memory<Exchange<R, 1>>();
  const int lane = threadIdx.x % kMergeLanes, row = threadIdx.x / kMergeLanes;
  const int64_t channel = int64_t{blockIdx.x} * kMergeLanes + lane;
  Part<R, 1> part;
  if (channel < channels)
#pragma unroll 4  // loads in flight
    for (int64_t slab = row; slab < walk.slabs; slab += kThreads / kMergeLanes) {
      R partial;
#pragma unroll
      for (int v = 0; v < R::kValues; ++v) partial.values[v] = partials[(slab * R::kValues + v) * channels + channel];
      part.merge(walk.count(slab), [&](int) { return partial; });
    }
  merge_rows(part, kMergeLanes, exchange);
  if (row > 0 || channel >= channels) return;
  part.results[0].finish(part.count);
#pragma unroll
  for (int v = 0; v < R::kValues; ++v) out.values[v][channel] = static_cast<A>(part.results[0].values[v]);
}

}  // namespace resfuse::cuda
