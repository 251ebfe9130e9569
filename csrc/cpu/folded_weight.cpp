// The algebra of train-time folding on the CPU: what lies between the passes over activations, on K-by-C matrices.
//
//   folded_moments:          of W a from those of a:  mean = W mean_a,  var = rowsum((W Cov) * W)
//   folded_weight:           W' = scale*W, rounded as it is multiplied, and shift = bias - W' mean_a
//   folded_weight_backward:  with G0 = G - grad_bias mean_a^T and M pixels:
//     grad_weight_bn = invstd * rowsum(G0 * W),  c1 = scale*invstd*grad_weight_bn / M
//     grad_W = scale*G0 - c1*M * (W Cov)
//     correction = -W^T diag(c1) W,  row = -(grad_bias/M)^T W' - mean_a^T correction
// W Cov is never stored: each product goes through the tiles' epilogue. A row of W is read once for all that is its
// own.
#include <cmath>

#include "tiles/convolution.h"
#include "tiles/symmetric.h"

namespace resfuse::cpu::RESFUSE_ISA {

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

constexpr int64_t kMatrixRows = 32;  // rows of a matrix that a task takes

// f(c, mask) for every vector of a row.
template <class F>
RESFUSE_LANES void for_row_lanes(int64_t columns, const F& f) {
  for (int64_t c = 0; c < columns; c += kLanes) f(c, lane_mask(c, columns));
}

RESFUSE_LANES float sum_of(Lanes lanes) {
  alignas(64) float values[kLanes];
  store_lanes(values, lanes);
  double total = 0;
  for (int64_t i = 0; i < kLanes; ++i) total += values[i];
  return static_cast<float>(total);
}

// A K-by-C matrix as the pixels of a 1x1 convolution with C outputs.
inline ConvShape matrix_shape(int64_t rows, int64_t columns) {
  return {1, columns, columns, {1, 1, 1, 1, 0, 1}, {rows, rows, 1, 1, 0, 1}};
}

// An epilogue that asks for no memory ahead: matrices are small, and lie in cache.
struct MatrixEpilogue {
  void prefetch(int64_t, int64_t, int64_t, int64_t) const {}
  void touches(int64_t, int64_t, Prefetcher&) const {}
};

// Per panel, the sums of rows of product * W.
struct RowSums : MatrixEpilogue {
  const float* matrix;
  int64_t rows, columns;
  float* sums;  // (panels, rows)

  RowSums(const float* w, int64_t row_count, int64_t column_count, float* to)
      : matrix(w), rows(row_count), columns(column_count), sums(to) {}

  void operator()(int64_t, int64_t row, int64_t count, int64_t panel, const float* values) const {
    for (int64_t i = 0; i < count; ++i) {
      Lanes sum = zero_lanes();
      for (int64_t half = 0; half < kPanel; half += kLanes) {
        const int64_t c = panel * kPanel + half;
        const LaneMask mask = lane_mask(c, columns);
        if (c < columns)
          sum = multiply_add(load_lanes(values + i * kPanel + half), load_lanes(matrix + (row + i) * columns + c, mask),
                             sum);
      }
      sums[panel * rows + row + i] = sum_of(sum);
    }
  }
};

// grad_W = scale*(G - grad_bias mean^T) - slope * product
struct WeightGradient : MatrixEpilogue {
  const float *gram, *grad_bias, *mean, *scale, *slope;
  int64_t columns;
  float* grad;

  WeightGradient(const float* g, const float* bias, const float* a_mean, const float* s, const float* c1,
                 int64_t column_count, float* to)
      : gram(g), grad_bias(bias), mean(a_mean), scale(s), slope(c1), columns(column_count), grad(to) {}

  void operator()(int64_t, int64_t row, int64_t count, int64_t panel, const float* values) const {
    for (int64_t half = 0; half < kPanel; half += kLanes) {
      const int64_t c = panel * kPanel + half;
      if (c >= columns) return;
      const LaneMask mask = lane_mask(c, columns);
      const Lanes a = load_lanes(mean + c, mask);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t k = row + i, at = k * columns + c;
        const Lanes centered = load_lanes(gram + at, mask) - broadcast_lanes(grad_bias[k]) * a;
        const Lanes through = broadcast_lanes(slope[k]) * load_lanes(values + i * kPanel + half);
        store_lanes(grad + at, broadcast_lanes(scale[k]) * centered - through, mask);
      }
    }
  }
};

// epilogue of W Cov
template <class E>
void multiply_covariance(const float* matrix, int64_t rows, int64_t columns, const float* covariance,
                         const E& epilogue) {
  const Convolution<float, float> product(matrix_shape(rows, columns), false);
  product.run(Activation<float>{matrix, columns, nullptr, nullptr, false}, covariance, WeightLayout{{columns, 1, 1, 1}},
              epilogue);
}

inline void moments_of_rows(const float* matrix, int64_t rows, int64_t columns, const float* a_mean,
                            const float* covariance, float* mean, float* var) {
  const int64_t panels = ceil_div(columns, kPanel);
  Scratch<float> sums(panels * rows);
  multiply_covariance(matrix, rows, columns, covariance, RowSums(matrix, rows, columns, sums.get()));
  parallel_tasks(ceil_div(rows, kMatrixRows), rows * columns, [&](int64_t task) {
    for (int64_t k = task * kMatrixRows; k < std::min(rows, (task + 1) * kMatrixRows); ++k) {
      Lanes sum = zero_lanes();
      for_row_lanes(columns, [&](int64_t c, LaneMask mask) RESFUSE_INLINE_LAMBDA {
        sum = multiply_add(load_lanes(matrix + k * columns + c, mask), load_lanes(a_mean + c, mask), sum);
      });
      mean[k] = sum_of(sum);
      double total = 0;
      for (int64_t panel = 0; panel < panels; ++panel) total += sums[panel * rows + k];
      var[k] = total < 0 ? 0.0f : static_cast<float>(total);  // rounded terms may sum to less than nothing
    }
  });
}

template <class T>
void fold_rows(const float* matrix, int64_t rows, int64_t columns, const float* scale, const float* bias,
               const float* a_mean, T* folded, float* shift) {
  parallel_tasks(ceil_div(rows, kMatrixRows), rows * columns, [&](int64_t task) {
    for (int64_t k = task * kMatrixRows; k < std::min(rows, (task + 1) * kMatrixRows); ++k) {
      Lanes sum = zero_lanes();
      for_row_lanes(columns, [&](int64_t c, LaneMask mask) RESFUSE_INLINE_LAMBDA {
        const Lanes value = load_lanes(matrix + k * columns + c, mask) * broadcast_lanes(scale[k]);
        store_lanes(folded + k * columns + c, value, mask);
        sum = multiply_add(round_lanes<T>(value), load_lanes(a_mean + c, mask), sum);
      });
      shift[k] = (bias == nullptr ? 0.0f : bias[k]) - sum_of(sum);
    }
  });
}

struct FoldedMatrix {
  const float *matrix, *a_mean, *covariance;
  int64_t rows, columns;
};

struct FoldedGradients {
  const float *gram, *grad_bias, *var, *scale;
  float eps, pixels;
};

// What each row of the matrix gives by itself: grad_weight_bn and c1*M; for the input's gradient the folded row, the
// row times -c1, and, of so many rows, -(grad_bias/M)^T W'.
template <class T>
void backward_rows(const FoldedMatrix& w, const FoldedGradients& g, float* grad_weight_bn, float* slope, T* folded,
                   float* scaled, float* partial) {
  const int64_t columns = w.columns;
  parallel_tasks(ceil_div(w.rows, kMatrixRows), w.rows * columns, [&](int64_t task) {
    float* sums = folded == nullptr ? nullptr : partial + task * columns;
    if (sums != nullptr) std::fill_n(sums, columns, 0.0f);
    for (int64_t k = task * kMatrixRows; k < std::min(w.rows, (task + 1) * kMatrixRows); ++k) {
      const float *row = w.matrix + k * columns, *gram = g.gram + k * columns;
      const Lanes bias = broadcast_lanes(g.grad_bias[k]);
      Lanes sum = zero_lanes();
      for_row_lanes(columns, [&](int64_t c, LaneMask mask) RESFUSE_INLINE_LAMBDA {
        const Lanes centered = load_lanes(gram + c, mask) - bias * load_lanes(w.a_mean + c, mask);
        sum = multiply_add(centered, load_lanes(row + c, mask), sum);
      });
      const float invstd = 1 / std::sqrt(g.var[k] + g.eps);
      grad_weight_bn[k] = invstd * sum_of(sum);
      slope[k] = g.scale[k] * invstd * grad_weight_bn[k];
      if (folded == nullptr) continue;
      const Lanes scale = broadcast_lanes(g.scale[k]), share = broadcast_lanes(g.grad_bias[k] / -g.pixels),
                  factor = broadcast_lanes(slope[k] / -g.pixels);
      for_row_lanes(columns, [&](int64_t c, LaneMask mask) RESFUSE_INLINE_LAMBDA {
        const Lanes value = load_lanes(row + c, mask), own = value * scale;
        store_lanes(folded + k * columns + c, own, mask);
        store_lanes(scaled + k * columns + c, value * factor, mask);
        store_lanes(sums + c, multiply_add(round_lanes<T>(own), share, load_lanes(sums + c, mask)), mask);
      });
    }
  });
}

// correction = scaled^T W, symmetric, and row = the sum of the partial ones - mean^T correction.
template <class T>
void correct_rows(const FoldedMatrix& w, const float* scaled, const float* partial, float* correction, float* row) {
  const int64_t columns = w.columns;
  const Activation<float> left{scaled, columns, nullptr, nullptr, false},
      right{w.matrix, columns, nullptr, nullptr, false};
  // as kernels multiply it, so that row cancels its mean
  symmetric_product<float>(matrix_shape(w.rows, columns), left, right, [&](int64_t r, int64_t c, double value) {
    correction[r * columns + c] = correction[c * columns + r] = round_to<T>(static_cast<float>(value));
  });
  std::vector<double> total(static_cast<size_t>(columns));
  for (int64_t part = 0; part < ceil_div(w.rows, kMatrixRows); ++part)
    for (int64_t c = 0; c < columns; ++c) total[static_cast<size_t>(c)] += partial[part * columns + c];
  for (int64_t r = 0; r < columns; ++r)
    for (int64_t c = 0; c < columns; ++c)
      total[static_cast<size_t>(c)] -= static_cast<double>(correction[r * columns + c] * w.a_mean[r]);
  for (int64_t c = 0; c < columns; ++c) row[c] = static_cast<float>(total[static_cast<size_t>(c)]);
}

RESFUSE_TILES_END
#endif

static const float* matrix_pointer(const Tensor& m, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(m.dim() == 2 && m.size(0) == rows && m.size(1) == columns && m.is_contiguous() &&
                      m.scalar_type() == ScalarType::Float,
                  "resfuse: ", name, " must be float32 (", rows, ", ", columns, ")");
  return static_cast<const float*>(m.const_data_ptr());
}
static const float* row_pointer(const OptionalTensor& v, int64_t size, const char* name) {
  if (!v.has_value()) return nullptr;
  STD_TORCH_CHECK(v->dim() == 1 && v->size(0) == size && v->is_contiguous() && v->scalar_type() == ScalarType::Float,
                  "resfuse: ", name, " must be float32 (", size, ")");
  return static_cast<const float*>(v->const_data_ptr());
}
static Tensor new_matrix(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype) {
  return torch::stable::new_empty(like, {rows, columns}, dtype);
}

std::tuple<Tensor, Tensor> folded_moments(const Tensor& weight, const Tensor& a_mean, const Tensor& covariance) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.numel() > 0, "resfuse: weight must be 2D and not empty");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  const float *matrix = matrix_pointer(weight, rows, columns, "weight"), *mean = row_pointer(a_mean, columns, "a_mean"),
              *cov = matrix_pointer(covariance, columns, columns, "covariance");
  Tensor out_mean = torch::stable::new_empty(weight, {rows}), out_var = torch::stable::new_empty(weight, {rows});
#if RESFUSE_HAS_TILES
  moments_of_rows(matrix, rows, columns, mean, cov, output_pointer<float>(out_mean), output_pointer<float>(out_var));
#endif
  return {out_mean, out_var};
}

std::tuple<Tensor, Tensor> folded_weight(const Tensor& weight, const Tensor& scale, const OptionalTensor& bias,
                                         const Tensor& a_mean, const Tensor& like) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.numel() > 0, "resfuse: weight must be 2D and not empty");
  STD_TORCH_CHECK(tiles_support(like.scalar_type()), "resfuse: this machine has no tile kernels for like's dtype");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  const float *matrix = matrix_pointer(weight, rows, columns, "weight"), *scales = row_pointer(scale, rows, "scale"),
              *biases = row_pointer(bias, rows, "bias"), *mean = row_pointer(a_mean, columns, "a_mean");
  Tensor folded = new_matrix(weight, rows, columns, like.scalar_type()),
         shift = torch::stable::new_empty(weight, {rows});
#if RESFUSE_HAS_TILES
  with_tile_types(like, folded, [&](auto tag, auto) {
    using T = decltype(tag);
    fold_rows<T>(matrix, rows, columns, scales, biases, mean, output_pointer<T>(folded), output_pointer<float>(shift));
  });
#endif
  return {folded, shift};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> folded_weight_backward(const Tensor& gram, const Tensor& grad_bias,
                                                                          const Tensor& weight, const Tensor& a_mean,
                                                                          const Tensor& covariance, const Tensor& var,
                                                                          const Tensor& scale, int64_t pixels,
                                                                          double eps, const Tensor& like, bool need_x,
                                                                          bool need_weight) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.numel() > 0, "resfuse: weight must be 2D and not empty");
  STD_TORCH_CHECK(tiles_support(like.scalar_type()), "resfuse: this machine has no tile kernels for like's dtype");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  const ScalarType dtype = like.scalar_type();
  const FoldedMatrix w{matrix_pointer(weight, rows, columns, "weight"), row_pointer(a_mean, columns, "a_mean"),
                       matrix_pointer(covariance, columns, columns, "covariance"), rows, columns};
  const FoldedGradients g{matrix_pointer(gram, rows, columns, "gram"),
                          row_pointer(grad_bias, rows, "grad_bias"),
                          row_pointer(var, rows, "var"),
                          row_pointer(scale, rows, "scale"),
                          static_cast<float>(eps),
                          static_cast<float>(pixels)};
  Tensor grad_weight_bn = torch::stable::new_empty(weight, {rows});
  Tensor grad_weight = new_matrix(weight, need_weight ? rows : 0, columns, ScalarType::Float);
  Tensor folded = new_matrix(weight, need_x ? rows : 0, columns, dtype);
  Tensor correction = new_matrix(weight, need_x ? columns : 0, columns, ScalarType::Float);
  Tensor row = torch::stable::new_empty(weight, {need_x ? columns : 0});
#if RESFUSE_HAS_TILES
  Scratch<float> slope(rows), scaled(need_x ? rows * columns : 0),
      partial(need_x ? ceil_div(rows, kMatrixRows) * columns : 0);
  with_tile_types(like, folded, [&](auto tag, auto) {
    using T = decltype(tag);
    backward_rows<T>(w, g, output_pointer<float>(grad_weight_bn), slope.get(),
                     need_x ? output_pointer<T>(folded) : nullptr, scaled.get(), partial.get());
    if (need_x)
      correct_rows<T>(w, scaled.get(), partial.get(), output_pointer<float>(correction), output_pointer<float>(row));
  });
  if (need_weight)
    multiply_covariance(w.matrix, rows, columns, w.covariance,
                        WeightGradient(g.gram, g.grad_bias, w.a_mean, g.scale, slope.get(), columns,
                                       output_pointer<float>(grad_weight)));
#endif
  return {grad_weight_bn, grad_weight, folded, correction, row};
}

STABLE_TORCH_LIBRARY_IMPL(resfuse, CPU, m) {
  if (!isa_runs()) return;
  m.impl("folded_moments", TORCH_BOX(&folded_moments));
  m.impl("folded_weight", TORCH_BOX(&folded_weight));
  m.impl("folded_weight_backward", TORCH_BOX(&folded_weight_backward));
}

}  // namespace resfuse::cpu::RESFUSE_ISA
