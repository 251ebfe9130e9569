// Runs walk.cuh and reduce.cuh without torch, in every order of threads, and compares with plain loops: the program
// that test_cuda_on_host compiles as it is, when it must pass, and with an error planted in the kernels, when it must
// not.
//
// The last part walks over activations of more than 2^32 elements, in memory that is reserved and hardly touched.
#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <type_traits>

#include "cuda/reduce.cuh"

namespace resfuse::cuda {

void require(bool condition, const char* what, int64_t at) {
  if (condition) return;
  std::printf("%s, at %lld\n", what, static_cast<long long>(at));
  std::exit(1);
}

// out = x + offset, and the sum of out
template <class T>
struct AddOffset : Operator<T, 1, 1, 1, 1> {
  using A = acc_t<T>;
  using Reduction = Sums<A, 1>;
  const A* offsets;
  int64_t channels;

  A vector(int, int64_t c) const { return offsets[c]; }
  template <class C, class I>
  void apply(const C& c, const I& in, int j, T* out, A* terms) const {
    store(out, in.get(0, j) + c[0]);
    terms[0] = load(*out);
  }
};

// the mean and variance of x around its first value
struct MomentsOf : Operator<float, 1, 0, 1, 1> {
  using Reduction = Moments<float>;
  int64_t channels, channel_stride;

  float vector(int, int64_t c) const { return pivot_of(in[0][c * channel_stride]); }
  template <class C, class I>
  void apply(const C& c, const I& in, int j, float*, float* terms) const {
    terms[0] = in.get(0, j) - c[0];
  }
};

struct Shape {
  int64_t batch, channels, pixels;
  bool channels_last;
  int width;

  int64_t size() const { return batch * channels * pixels; }
  int64_t index(int64_t n, int64_t c, int64_t p) const {
    return channels_last ? (n * pixels + p) * channels + c : (n * channels + c) * pixels + p;
  }
  Walk walk(int64_t blocks) const { return Walk(batch, channels, pixels, channels_last, width, blocks); }
};

// An array of exactly this size, all NaN.
template <class T>
std::unique_ptr<T[]> fresh(int64_t size) {
  std::unique_ptr<T[]> array(new T[static_cast<size_t>(size)]);
  std::memset(array.get(), cuda_on_host::kPoison, static_cast<size_t>(size) * sizeof(T));
  return array;
}

dim3 grid_of(const Walk& walk) { return dim3(unsigned(walk.tiles), unsigned(walk.slabs)); }

template <class Op, int kWidth>
std::unique_ptr<float[]> reduced(const Op& op, const Shape& shape, const Walk& walk) {
  using R = typename Op::Reduction::Total;
  auto partials = fresh<double>(walk.slabs * R::kValues * shape.channels);
  auto out = fresh<float>(R::kValues * shape.channels);
  cuda_on_host::launch(reduce_kernel<Op, kWidth>, grid_of(walk), kThreads, sizeof(ReduceMemory<Op, kWidth>), op, walk,
                       partials.get());
  Outputs<float, R::kValues> outputs;
  for (int v = 0; v < R::kValues; ++v) outputs.values[v] = out.get() + v * shape.channels;
  const dim3 blocks(unsigned((shape.channels + kMergeLanes - 1) / kMergeLanes));
  cuda_on_host::launch(merge_kernel<R, float>, blocks, kThreads, sizeof(Exchange<R, 1>), partials.get(), outputs, walk,
                       shape.channels);
  return out;
}

template <int kWidth>
void check(const Shape& shape) {
  using Op = AddOffset<float>;
  const Walk walk = shape.walk(6);
  auto x = fresh<float>(shape.size()), out = fresh<float>(shape.size()), offsets = fresh<float>(shape.channels);
  for (int64_t i = 0; i < shape.size(); ++i) x[i] = static_cast<float>(i % 61);
  for (int64_t c = 0; c < shape.channels; ++c) offsets[c] = static_cast<float>(c);

  const Op op{{{x.get()}, {out.get()}}, offsets.get(), shape.channels};
  cuda_on_host::launch(map_kernel<Op, kWidth>, grid_of(walk), kThreads, sizeof(MapMemory<Op, kWidth>), op, walk);
  const auto mapped = std::move(out);
  out = fresh<float>(shape.size());
  const auto sums = reduced<Op, kWidth>({{{x.get()}, {out.get()}}, offsets.get(), shape.channels}, shape, walk);
  const int64_t stride = shape.channels_last ? 1 : shape.pixels;
  const auto moments = reduced<MomentsOf, kWidth>({{{x.get()}, {}}, shape.channels, stride}, shape, walk);

  for (int64_t c = 0; c < shape.channels; ++c) {
    double sum = 0, squares = 0;
    const double count = static_cast<double>(shape.batch * shape.pixels);
    for (int64_t n = 0; n < shape.batch; ++n)
      for (int64_t p = 0; p < shape.pixels; ++p) {
        const int64_t i = shape.index(n, c, p);
        require(mapped[i] == x[i] + offsets[c] && out[i] == mapped[i], "an element is wrong", i);
        sum += x[i], squares += double{x[i]} * x[i];
      }
    const double mean = sum / count, var = squares / count - mean * mean;
    require(std::abs(sums[c] - sum - count * offsets[c]) <= 1e-6 * (sum + count * offsets[c]), "a sum is wrong", c);
    require(std::abs(moments[c] - mean) <= 1e-5 * mean, "a mean is wrong", c);
    require(std::abs(moments[shape.channels + c] - var) <= 1e-5 * var, "a variance is wrong", c);
  }
}

// Two blocks of a walk over more elements than 32 bits can count, in place.
template <int kWidth>
void check_beyond_32_bits(const Shape& shape) {
  using Op = AddOffset<BFloat16>;
  const size_t bytes = static_cast<size_t>(shape.size()) * sizeof(BFloat16);
  const int protection = PROT_READ | PROT_WRITE, kind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, bytes, protection, kind, -1, 0);
  require(memory != MAP_FAILED && shape.size() >> 32 != 0, "no memory can be reserved", shape.size());
  auto* x = static_cast<BFloat16*>(memory);
  const std::vector<float> offsets(static_cast<size_t>(shape.channels), 1.0f);
  const Walk walk = shape.walk(4096);
  const Op op{{{x}, {x}}, offsets.data(), shape.channels};
  const auto chosen = [&](int64_t slab) { return slab == walk.slabs / 2 || slab == walk.slabs - 1; };
  const auto some_blocks = [&] {
    if (chosen(blockIdx.y)) map_kernel<Op, kWidth>(op, walk);
  };
  cuda_on_host::launch(some_blocks, grid_of(walk), kThreads, sizeof(MapMemory<Op, kWidth>));

  int64_t all = 0, seen = 0;
  for (int64_t slab = 0; slab < walk.slabs; ++slab) {
    all += walk.count(slab);
    if (!chosen(slab)) continue;
    for (int64_t first = slab * walk.rows(); first < walk.steps; first += walk.stride)
      for (int64_t step = first; step < std::min(first + walk.rows(), walk.steps); ++step, ++seen) {
        const int64_t pixel = step * (shape.channels_last ? 1 : kWidth), c = shape.channels - 1;
        const int64_t i = shape.index(pixel / shape.pixels, c, pixel % shape.pixels);
        require(load(x[i]) == 1.0f, "an element beyond 32 bits is wrong", i);
      }
  }
  require(all == shape.batch * shape.pixels, "the counts of all slabs are not the pixels", all);
  require(seen * (shape.channels_last ? 1 : kWidth) == walk.count(walk.slabs / 2) + walk.count(walk.slabs - 1),
          "the counts of two slabs are not their pixels", seen);
  munmap(memory, bytes);
}

}  // namespace resfuse::cuda

int main() {
  using namespace resfuse::cuda;
  for (unsigned seed = 0; seed < 4; ++seed) {
    cuda_on_host::Executor::instance().set_seed(seed);
    check<1>({3, 57, 10, true, 1});
    check<4>({2, 160, 9, true, 4});
    check<4>({300, 4, 7, true, 4});
    check<1>({3, 2, 49, false, 1});
    check<4>({2, 3, 2600, false, 4});
  }
  check_beyond_32_bits<8>({4, 64, (int64_t{1} << 24) + 3, true, 8});
  check_beyond_32_bits<8>({2, 3, (int64_t{1} << 30) + 8, false, 8});
  check_beyond_32_bits<1>({4, 57, 19'000'003, true, 1});
  return 0;
}
