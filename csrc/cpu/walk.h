// How CPU kernels walk an activation: blocks of consecutive elements beside per-lane coefficients.
//
// Every inner loop sees a block of `rows` x `width` consecutive elements and coefficient arrays of length `width`; lane
// j of each row uses coefficient j. channels_last memory is such a block already, its lanes the channels; when C is
// small, several pixels form one wide row. A contiguous plane is one too, its coefficients one repeated number. So one
// inner loop serves both layouts and every C.
//
// Reductions are split into slabs by shape alone, never by the number of threads, and slabs are merged in order, in
// double: results are identical from run to run and for any number of threads.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <vector>

#include "memory.h"
#include "simd.h"

namespace resfuse::cpu {

constexpr int64_t kMinLanes = 128;         // a channels_last row narrower than this is widened to several pixels
constexpr int64_t kPlaneLanes = 256;       // the width of a block within a contiguous plane
constexpr int64_t kTaskElements = 16384;   // elements that a thread takes at once
constexpr int64_t kGrainElements = 32768;  // below this a tensor is not worth a second thread
constexpr int64_t kTileBytes = 131072;     // a tile that was just written, or is read twice, is still in L2
constexpr int64_t kTileRows = 128;         // a float sum over a tile is exact to a few units in the last place
constexpr int64_t kMaxSlabs = 64;
constexpr int64_t kSlabRows = 64;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Pixels that form one row of lanes in channels_last memory.
inline int64_t pixels_per_row(int64_t channels) { return channels >= kMinLanes ? 1 : ceil_div(kMinLanes, channels); }

inline int64_t workers_for(int64_t tasks, int64_t elements) {
  const int64_t useful = std::min(tasks, std::max<int64_t>(elements / kGrainElements, 1));
  return std::min<int64_t>(useful, torch::stable::get_num_threads());
}

// Consecutive tasks of one worker.
struct alignas(64) TaskRun {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

// Each worker has a run of tasks of its own, the same share of a tensor in one call after the other, so that it finds
// in its cache what it wrote there; one that is done helps the others, so that no thread that is held up holds up the
// rest. Which thread runs a task has no influence on results: every task writes its own output.
template <class F>
void parallel_tasks(int64_t tasks, int64_t elements, const F& f) {
  const int64_t workers = workers_for(tasks, elements);
  if (workers <= 1) {
    for (int64_t task = 0; task < tasks; ++task) f(task);
    return;
  }
  std::vector<TaskRun> runs(static_cast<size_t>(workers));
  for (int64_t worker = 0; worker < workers; ++worker) {
    TaskRun& run = runs[static_cast<size_t>(worker)];
    run.next = worker * tasks / workers;
    run.end = (worker + 1) * tasks / workers;
  }
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t turn = 0; turn < workers; ++turn) {
        TaskRun& run = runs[static_cast<size_t>((worker + turn) % workers)];
        for (int64_t task = run.next++; task < run.end; task = run.next++) f(task);
      }
  });
}

// K coefficient vectors, laid out for rows of `repeat` pixels. Absent vectors stay null.
template <class A, int K>
class LaneVectors {
 public:
  LaneVectors(const std::array<const A*, K>& vectors, int64_t channels, int64_t repeat)
      : storage_(repeat > 1 ? K * repeat * channels : 0) {
    for (int k = 0; k < K; ++k) {
      pointers_[k] = vectors[k];
      if (vectors[k] == nullptr || repeat == 1) continue;
      A* lanes = storage_.get() + k * repeat * channels;
      for (int64_t r = 0; r < repeat; ++r) std::copy_n(vectors[k], channels, lanes + r * channels);
      pointers_[k] = lanes;
    }
  }
  const std::array<const A*, K>& pointers() const { return pointers_; }

 private:
  Scratch<A> storage_;
  std::array<const A*, K> pointers_;
};

// The coefficients of one contiguous plane: each vector's value at channel c, repeated over the lanes.
template <class A, int K>
struct PlaneLanes {
  A storage[K][kPlaneLanes];
  std::array<const A*, K> pointers;

  PlaneLanes(const std::array<const A*, K>& vectors, int64_t c, int64_t width) {
    for (int k = 0; k < K; ++k) {
      if (vectors[k] != nullptr) std::fill_n(storage[k], width, vectors[k][c]);
      pointers[k] = vectors[k] == nullptr ? nullptr : storage[k];
    }
  }
};

// The vectors that a gradient through batch moments adds: grad_mean / M and 2 * grad_var / M, zero where absent.
template <class A>
void moment_terms(const OptionalTensor& grad_mean, const OptionalTensor& grad_var, const Tensor& x, A* constant,
                  A* slope) {
  const A *gm = vector_pointer<A>(grad_mean, x, "grad_mean"), *gv = vector_pointer<A>(grad_var, x, "grad_var");
  const A count = static_cast<A>(x.numel() / x.size(1));
  for (int64_t c = 0; c < x.size(1); ++c) {
    constant[c] = gm == nullptr ? A(0) : gm[c] / count;
    slope[c] = gv == nullptr ? A(0) : 2 * gv[c] / count;
  }
}

// Cut `pixels` pixels into whole rows of lanes and the shorter row that is left: f(offset, rows, width).
template <class F>
void for_each_row_block(int64_t offset, int64_t pixels, int64_t channels, int64_t repeat, const F& f) {
  const int64_t rows = pixels / repeat, rest = pixels % repeat;
  if (rows > 0) f(offset, rows, repeat * channels);
  if (rest > 0) f(offset + rows * repeat * channels, int64_t{1}, rest * channels);
}

// Call f(offset, rows, width, lanes) for blocks that cover the activation once, in parallel.
template <class A, int K, class F>
void for_each_block(const Geometry& g, const std::array<const A*, K>& vectors, const F& f) {
  if (g.numel() == 0) return;
  if (g.channels_last) {
    const int64_t repeat = pixels_per_row(g.channels);
    const LaneVectors<A, K> lanes(vectors, g.channels, repeat);
    const int64_t step = repeat * std::max<int64_t>(1, kTaskElements / (repeat * g.channels));
    parallel_tasks(ceil_div(g.rows(), step), g.numel(), [&](int64_t task) {
      const int64_t begin = task * step, pixels = std::min(step, g.rows() - begin);
      for_each_row_block(
          begin * g.channels, pixels, g.channels, repeat,
          [&](int64_t offset, int64_t rows, int64_t width) { f(offset, rows, width, lanes.pointers()); });
    });
    return;
  }
  const int64_t width = std::min(g.pixels, kPlaneLanes);
  parallel_tasks(g.batch * g.channels, g.numel(), [&](int64_t plane) {
    const PlaneLanes<A, K> lanes(vectors, plane % g.channels, width);
    for_each_row_block(plane * g.pixels, g.pixels, 1, width,
                       [&](int64_t offset, int64_t rows, int64_t w) { f(offset, rows, w, lanes.pointers); });
  });
}

// Add the lanes of each channel, `repeat` of them, to its sum in double.
template <class A>
RESFUSE_CLONES void add_lanes(const A* lanes, int64_t repeat, int64_t channels, double* sums) {
  for (int64_t r = 0; r < repeat; ++r) RESFUSE_INDEPENDENT
  for (int64_t c = 0; c < channels; ++c) sums[c] += lanes[r * channels + c];
}

// The fixed partition of a reduction. A slab is a run of pixels (channels_last) or one image (contiguous); a tile is a
// piece of a slab, short enough that float sums over it are exact to a few units in the last place.
struct Slabs {
  int64_t count;
  int64_t pixels;  // per slab; the last one of a channels_last activation may be shorter
  int64_t tile;    // pixels per tile

  Slabs(const Geometry& g, int64_t element_size, int64_t tile_bytes = kTileBytes) {
    const int64_t row_bytes = (g.channels_last ? g.channels : 1) * element_size;
    const int64_t repeat = g.channels_last ? pixels_per_row(g.channels) : kPlaneLanes;
    tile = repeat * std::clamp<int64_t>(tile_bytes / (row_bytes * repeat), 8, kTileRows);
    // Merging reads a slab's sums once, so a slab of at least kSlabRows pixels makes it a small part of the work.
    const int64_t wanted =
        std::clamp<int64_t>(std::min(g.numel() / kGrainElements, g.rows() / kSlabRows), 1, kMaxSlabs);
    pixels = g.channels_last ? repeat * ceil_div(ceil_div(g.rows(), wanted), repeat) : g.pixels;
    count = g.channels_last ? ceil_div(g.rows(), pixels) : g.batch;
  }
};

// The S per-channel sums that f adds up: f(offset, rows, width, lanes, sums) adds each lane's contribution to
// sums[s][lane]. totals is (S, C).
template <class A, int K, int S, class F>
void reduce_blocks(const Geometry& g, int64_t element_size, const std::array<const A*, K>& vectors, A* totals,
                   const F& f) {
  if (g.numel() == 0) {
    std::fill_n(totals, S * g.channels, A(0));
    return;
  }
  const Slabs slabs(g, element_size);
  const int64_t channels = g.channels_last ? g.channels : 1;
  const int64_t planes = g.channels_last ? 1 : g.channels;
  const int64_t repeat = g.channels_last ? pixels_per_row(g.channels) : std::min(g.pixels, kPlaneLanes);
  const int64_t width = repeat * channels;
  const LaneVectors<A, K> shared(vectors, g.channels, g.channels_last ? repeat : 1);
  Scratch<double> partial(slabs.count * S * g.channels);

  parallel_tasks(slabs.count * planes, g.numel(), [&](int64_t task) {
    const int64_t slab = task / planes, c = task % planes;
    const PlaneLanes<A, K> plane(vectors, c, g.channels_last ? 0 : width);
    const auto& lanes = g.channels_last ? shared.pointers() : plane.pointers;
    const int64_t begin = g.channels_last ? slab * slabs.pixels : 0;
    const int64_t end = g.channels_last ? std::min(begin + slabs.pixels, g.rows()) : g.pixels;
    const int64_t origin = g.channels_last ? 0 : task * g.pixels;
    double* out = partial.get() + slab * S * g.channels + c;
    for (int s = 0; s < S; ++s) std::fill_n(out + s * g.channels, channels, 0.0);

    Scratch<A> storage(S * width);
    std::array<A*, S> sums;
    for (int s = 0; s < S; ++s) sums[s] = storage.get() + s * width;
    for (int64_t tile = begin; tile < end; tile += slabs.tile) {
      std::fill_n(storage.get(), S * width, A(0));
      for_each_row_block(origin + tile * channels, std::min(slabs.tile, end - tile), channels, repeat,
                         [&](int64_t offset, int64_t rows, int64_t w) { f(offset, rows, w, lanes, sums); });
      for (int s = 0; s < S; ++s) add_lanes(sums[s], repeat, channels, out + s * g.channels);
    }
  });
  const int64_t size = S * g.channels;
  for (int64_t slab = 1; slab < slabs.count; ++slab)
    for (int64_t i = 0; i < size; ++i) partial[i] += partial[slab * size + i];
  for (int64_t i = 0; i < size; ++i) totals[i] = static_cast<A>(partial[i]);
}

}  // namespace resfuse::cpu
