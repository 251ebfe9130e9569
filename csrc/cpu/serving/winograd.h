// A 3x3 convolution of stride 1 and padding 1 by Winograd's F(2x2, 3x3): 16 products for 4 outputs instead of 36.
//
//   y = A^T [(G g G^T) * (B^T d B)] A     d a 4x4 piece of the input, y the 2x2 outputs in its middle
// (Lavin and Gray, arXiv:1509.09308). A block of pieces is transformed into sixteen matrices (pieces x C), each is
// multiplied with its matrix of weights (C x K), which is packed beforehand, and the sixteen products are transformed
// back, finished and stored. The matrices of a block stay in cache; a matrix of weights is read once for each block.
#pragma once

#include "../tiles/winograd.h"
#include "direct.h"

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

namespace resfuse::cpu::RESFUSE_ISA {

constexpr int64_t kBlockBytes = 1 << 20;  // of a block's matrices, but for wide layers, which have few pieces

// The 4x4 pieces of all images, in one row.
struct Pieces {
  int64_t down, across, count;

  Pieces(int64_t images, int64_t height, int64_t width)
      : down(ceil_div(height, 2)), across(ceil_div(width, 2)), count(images * down * across) {}
  int64_t image(int64_t piece) const { return piece / (down * across); }
  int64_t row(int64_t piece) const { return piece / across % down * 2; }
  int64_t column(int64_t piece) const { return piece % across * 2; }
  // Name what pieces [begin, end) touch of an image.
  template <class T>
  void prefetch(const Image<T>& of, int64_t begin, int64_t end, Prefetcher& to) const {
    if (begin >= end || of.data == nullptr) return;
    const T* last = of.row(image(end - 1), std::min(row(end - 1) + 2, of.height));
    const T* first = of.row(image(begin), row(begin));
    to.add(first, (last - first) * static_cast<int64_t>(sizeof(T)));
  }
};

template <class T>
struct Winograd {
  Image<T> in, out, residual;  // residual.data may be null
  const unit_t<T>* weight;     // [position][panel][unit][kPanel]
  const float* bias;           // padded
  bool relu;

  int64_t step() const { return pixel_units<T>(in.channels); }  // units between pieces of a matrix
  int64_t units() const { return ceil_div(in.channels, kUnit<T>); }
  int64_t panels() const { return ceil_div(out.channels, kPanel); }

  // B^T d B of one piece, all channels, into row `to` of matrices `matrix` units apart.
  void gather(const Pieces& pieces, int64_t piece, unit_t<T>* to, int64_t matrix) const {
    alignas(64) static const T kZeros[kLanes] = {};
    const int64_t image = pieces.image(piece), top = pieces.row(piece) - 1, left = pieces.column(piece) - 1;
    const T* from[4][4];
    bool inside[4][4];
    for (int64_t i = 0; i < 4; ++i)
      for (int64_t j = 0; j < 4; ++j) {
        inside[i][j] = top + i >= 0 && top + i < in.height && left + j >= 0 && left + j < in.width;
        from[i][j] = inside[i][j] ? in.row(image, top + i) + (left + j) * in.pixel_step : kZeros;
      }
    for (int64_t c = 0; c < in.channels; c += kLanes) {
      Lanes d[4][4], t[4][4];
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) d[i][j] = load_lanes(from[i][j] + (inside[i][j] ? c : 0));
      for (int j = 0; j < 4; ++j) spread(d[0][j], d[1][j], d[2][j], d[3][j], t[0][j], t[1][j], t[2][j], t[3][j]);
      for (int i = 0; i < 4; ++i) spread(t[i][0], t[i][1], t[i][2], t[i][3], d[i][0], d[i][1], d[i][2], d[i][3]);
      for (int i = 0; i < 16; ++i)
        store_rounded(reinterpret_cast<T*>(to + i * matrix) + c, rounded(d[i / 4][i % 4], T{}));
    }
  }

  // A^T m A of one piece and panel, finished; products of a position lie `matrix` floats apart.
  void scatter(const Pieces& pieces, int64_t piece, int64_t panel, const float* from, int64_t matrix) const {
    const int64_t image = pieces.image(piece), row = pieces.row(piece), column = pieces.column(piece);
    for (int64_t half = 0; half < kPanel; half += kLanes) {
      const int64_t channel = panel * kPanel + half;
      Lanes t[2][4], y[2][2];
      for (int j = 0; j < 4; ++j) {
        const float* m = from + half + j * matrix;
        gather_two(load_lanes(m), load_lanes(m + 4 * matrix), load_lanes(m + 8 * matrix), load_lanes(m + 12 * matrix),
                   t[0][j], t[1][j]);
      }
      for (int i = 0; i < 2; ++i) gather_two(t[i][0], t[i][1], t[i][2], t[i][3], y[i][0], y[i][1]);
      for (int64_t i = 0; i < 2 && row + i < out.height; ++i)
        for (int64_t j = 0; j < 2 && column + j < out.width; ++j) {
          Lanes z = y[i][j] + load_lanes(bias + channel);
          if (residual.data != nullptr)
            z += load_lanes(residual.row(image, row + i) + (column + j) * residual.pixel_step + channel);
          store_lanes(out.row(image, row + i) + (column + j) * out.pixel_step + channel, relu ? relu_lanes(z) : z);
        }
    }
  }

 private:
  RESFUSE_LANES static void spread(Lanes a, Lanes b, Lanes c, Lanes d, Lanes& p, Lanes& q, Lanes& r, Lanes& s) {
    p = a - c;
    q = b + c;
    r = c - b;
    s = b - d;
  }
  RESFUSE_LANES static void gather_two(Lanes a, Lanes b, Lanes c, Lanes d, Lanes& p, Lanes& q) {
    p = a + b + c;
    q = b - c - d;
  }
};

// All output of `images` images.
template <class T>
void run_winograd(const Winograd<T>& w, int64_t images) {
  using U = unit_t<T>;
  const Pieces pieces(images, w.out.height, w.out.width);
  const int64_t fit = kBlockBytes / (kPositions * 4 * (w.in.channels + w.out.channels));
  const int64_t most = std::clamp<int64_t>(fit / kMaxPixels, 4, 12) * kMaxPixels;
  const int64_t blocks = ceil_div(pieces.count, most), panels = w.panels();
  const int64_t cuts = std::clamp<int64_t>(ceil_div(kMinTasks, blocks), 1, std::min<int64_t>(panels, 4));
  const int64_t work = images * w.out.height * w.out.width * w.out.channels * 16;
  const std::vector<Tap> taps{{0, w.units(), w.step(), w.step()}};
  parallel_tasks(blocks * cuts, work, [&](int64_t task) {
    const int64_t block = task / cuts, cut = task % cuts;
    const int64_t begin = block * pieces.count / blocks, count = (block + 1) * pieces.count / blocks - begin;
    const int64_t first = cut * panels / cuts, own = (cut + 1) * panels / cuts - first;
    const int64_t matrix = count * w.step(), product = own * count * kPanel;
    char* memory = static_cast<char*>(workspace_bytes(
        Slot::kTile, Carver::bytes_of<U>(kPositions * matrix) + Carver::bytes_of<float>(kPositions * product)));
    Carver carver(memory);
    U* gathered = carver.take<U>(kPositions * matrix);
    float* products = carver.take<float>(kPositions * product);
    for (int64_t i = 0; i < count; ++i) w.gather(pieces, begin + i, gathered + i * w.step(), matrix);
    // the products take long enough to fetch what is read and written after them
    Prefetcher next;
    pieces.prefetch(w.residual, begin, begin + count, next);
    pieces.prefetch(w.out, begin, begin + count, next);
    const int64_t later = (task + 1) / cuts;  // this thread will likely take the next task
    if (block < later && later < blocks)
      pieces.prefetch(w.in, later * pieces.count / blocks, (later + 1) * pieces.count / blocks, next);
    next.spread(kPositions * own * ceil_div(count, kMaxPixels) * w.units(), 0);
    for (int64_t position = 0; position < kPositions; ++position)
      for (int64_t panel = 0, together; panel < own; panel += together) {
        together = panels_together(own - panel);
        multiply<U>(
            gathered + position * matrix, 0, count, taps,
            {w.weight + (position * panels + first + panel) * w.units() * kPanel,
             products + position * product + panel * count * kPanel, w.units() * kPanel, count * kPanel, kPanel},
            together * kPanel, next, [](int64_t, int64_t) {});
      }
    for (int64_t panel = 0; panel < own; ++panel)
      for (int64_t i = 0; i < count; ++i)
        w.scatter(pieces, begin + i, first + panel, products + (panel * count + i) * kPanel, product);
  });
  if (w.out.halo > 0)
    for (int64_t image = 0; image < images; ++image) clear_halo(w.out, image, 0, w.out.height);
}

}  // namespace resfuse::cpu::RESFUSE_ISA

RESFUSE_TILES_END
#endif
