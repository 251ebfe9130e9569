// run_plan on the CPU: the steps of a folded network over one arena, from its inputs to its outputs, in one call.
//
// Activations lie in memory that the calling thread keeps, at places that the program chose: those whose lives do not
// overlap share it. A chunk of steps takes the batch a few images at a time, so that what one step writes is still in
// cache when the next one reads it. Weights come packed, by pack_weight.
#include "serving/pool.h"
#include "serving/program.h"
#include "serving/winograd.h"

namespace resfuse::cpu::RESFUSE_ISA {

using Tensors = std::vector<Tensor>;

#if RESFUSE_HAS_TILES
RESFUSE_TILES_BEGIN

// A tensor (N, C, H, W) of any strides.
template <class T>
struct Strided {
  T* data;
  int64_t image, channel, row, pixel;

  explicit Strided(const Tensor& x, T* data)
      : data(data), image(x.stride(0)), channel(x.stride(1)), row(x.stride(2)), pixel(x.stride(3)) {}
  T* at(int64_t n, int64_t h) const { return data + n * image + h * row; }
};

// Channels that pad a pixel become zero.
template <class T>
void load_row(const Strided<const T>& from, int64_t image, int64_t row, const Image<T>& to, int64_t to_image) {
  const T* x = from.at(image, row);
  T* out = to.row(to_image, row);
  const int64_t channels = to.channels, step = to.pixel_step;
  if (from.channel == 1 && from.pixel == channels && step == channels) {
    std::copy_n(x, to.width * channels, out);
  } else if (from.channel == 1) {
    for (int64_t j = 0; j < to.width; ++j) {
      std::copy_n(x + j * from.pixel, channels, out + j * step);
      std::fill_n(out + j * step + channels, step - channels, T{});
    }
  } else {
    for (int64_t c = 0; c < step; ++c)
      for (int64_t j = 0; j < to.width; ++j)
        out[j * step + c] = c < channels ? x[c * from.channel + j * from.pixel] : T{};
  }
  clear_halo(to, to_image, row, row + 1);
}

// One call: the program's values as images, its constants, the caller's tensors.
template <class T>
class Execution {
 public:
  Execution(const Program& program, const Tensors& inputs, const Tensors& constants, const Tensors& outputs)
      : program_(program), inputs_(inputs), constants_(constants), outputs_(outputs) {
    memory_ = static_cast<char*>(workspace_bytes(Slot::kArena, program.arena_bytes));
  }

  void run() {
    for (const ChunkFields& chunk : program_.chunks)
      for (begin_ = 0; begin_ < program_.images; begin_ += chunk.images) {
        count_ = std::min(chunk.images, program_.images - begin_);
        for (int64_t i = chunk.first; i < chunk.last; ++i) step(program_.steps[static_cast<size_t>(i)]);
      }
  }

 private:
  // The images of this chunk of a value.
  Image<T> image(int64_t index) const {
    if (index < 0) return {};
    const ValueFields& v = program_.value(index);
    T* first = reinterpret_cast<T*>(memory_ + v.offset) + (v.local != 0 ? 0 : begin_ * v.image_step());
    return {first + v.halo * (v.row_step() + v.pixel_step),
            v.height,
            v.width,
            v.channels,
            v.pixel_step,
            v.row_step(),
            v.image_step(),
            v.halo};
  }

  const Tensor& constant(int64_t index, ScalarType dtype, int64_t size) const {
    STD_TORCH_CHECK(index >= 0 && index < static_cast<int64_t>(constants_.size()), "resfuse: no constant ", index);
    const Tensor& found = constants_[static_cast<size_t>(index)];
    STD_TORCH_CHECK(found.scalar_type() == dtype && found.is_contiguous() && found.numel() == size,
                    "resfuse: constant ", index, " must be contiguous, of ", size, " values");
    return found;
  }

  const float* vector(int64_t index, int64_t channels) const {
    return input_pointer<float>(constant(index, ScalarType::Float, round_up(channels, kStoredLanes)));
  }

  const unit_t<T>* weight(int64_t index, int64_t units) const {
    const ScalarType dtype = sizeof(T) == 4 ? ScalarType::Float : ScalarType::BFloat16;
    return reinterpret_cast<const unit_t<T>*>(input_pointer<T>(constant(index, dtype, units * kUnit<T>)));
  }

  void step(const StepFields& s) {
    const auto pool = [&] {
      Window w{};
      std::copy_n(s.pool_kernel, 2, w.kernel);
      std::copy_n(s.pool_stride, 2, w.stride);
      std::copy_n(s.pool_padding, 2, w.padding);
      return w;
    };
    switch (s.kind) {
      case StepKind::kLoad: return load(s);
      case StepKind::kStore: return store(s);
      case StepKind::kConvolution:
        return convolve(s, [&](const DirectConvolution<T>& c) { run_convolution(c, count_); });
      case StepKind::kConvolutionPool:
        return convolve(s, [&](const DirectConvolution<T>& c) {
          run_convolution_pool(c, s.size[0], s.size[1], pool(), image(s.output), count_);
        });
      case StepKind::kWinograd: return winograd(s);
      case StepKind::kMaxPool: return run_max_pool(image(s.input), pool(), image(s.output), count_);
      case StepKind::kGlobalPool: return run_global_pool(image(s.input), image(s.output), count_);
      case StepKind::kMap: {
        const Image<T> in = image(s.input);
        const bool scaled = s.weight >= 0;
        return run_map(in, image(s.residual), scaled ? vector(s.weight, in.channels) : nullptr,
                       scaled ? vector(s.bias, in.channels) : nullptr, s.relu != 0, image(s.output), count_);
      }
    }
  }

  void load(const StepFields& s) {
    const Image<T> to = image(s.output);
    const Tensor& x = inputs_.at(static_cast<size_t>(s.input));
    STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == program_.images && x.size(1) == to.channels &&
                        x.size(2) == to.height && x.size(3) == to.width,
                    "resfuse: an input must have the shape that its program was made for");
    const Strided<const T> from(x, input_pointer<T>(x));
    parallel_tasks(count_ * to.height, count_ * to.height * to.width * to.channels, [&](int64_t task) {
      load_row(from, begin_ + task / to.height, task % to.height, to, task / to.height);
    });
  }

  void store(const StepFields& s) {
    const Image<T> from = image(s.input);
    const Tensor& out = outputs_.at(static_cast<size_t>(s.output));
    const Strided<T> to(out, output_pointer<T>(out));
    parallel_tasks(count_ * from.height, count_ * from.height * from.width * from.channels, [&](int64_t task) {
      const T* x = from.row(task / from.height, task % from.height);
      T* row = to.at(begin_ + task / from.height, task % from.height);
      for (int64_t j = 0; j < from.width; ++j) std::copy_n(x + j * from.pixel_step, from.channels, row + j * to.pixel);
    });
  }

  template <class F>
  void convolve(const StepFields& s, const F& f) {
    const Image<T> in = image(s.input), out = image(s.output);
    STD_TORCH_CHECK(s.groups > 0 && out.channels % s.groups == 0 && s.run % s.groups == 0,
                    "resfuse: groups must divide the channels");
    const Image<T> second = image(s.second);
    const Kernel kernel(s.kernel, s.dilation, s.run, out.channels, s.groups, kUnit<T>, in.row_step, in.pixel_step,
                        second.channels);
    const int64_t size = kernel.windows.strips() * kernel.units * kernel.windows.lanes;
    f(DirectConvolution<T>{in,
                           second,
                           out,
                           image(s.residual),
                           kernel,
                           weight(s.weight, size),
                           vector(s.bias, out.channels),
                           {s.stride[0], s.stride[1]},
                           {s.padding[0], s.padding[1]},
                           {s.second_stride[0], s.second_stride[1]},
                           s.relu != 0});
  }

  void winograd(const StepFields& s) {
    Winograd<T> w{image(s.input), image(s.output), image(s.residual), nullptr, nullptr, s.relu != 0};
    w.weight = weight(s.weight, kPositions * w.panels() * w.units() * kPanel);
    w.bias = vector(s.bias, w.out.channels);
    run_winograd(w, count_);
  }

  const Program& program_;
  const Tensors &inputs_, &constants_, &outputs_;
  char* memory_;
  int64_t begin_ = 0, count_ = 0;
};

RESFUSE_TILES_END
#endif

// A fresh tensor (N, C, H, W) for each four of `sizes`, held against what the steps store.
static Tensors new_outputs(const Program& program, const Tensor& like, const std::vector<int64_t>& sizes) {
  Tensors outputs;
  for (const StepFields& s : program.steps) {
    if (s.kind != StepKind::kStore) continue;
    const ValueFields& v = program.value(s.input);
    const size_t begin = outputs.size() * 4;
    STD_TORCH_CHECK(s.output == static_cast<int64_t>(outputs.size()), "resfuse: outputs are stored in order");
    STD_TORCH_CHECK(begin + 4 <= sizes.size() && sizes[begin] == program.images && sizes[begin + 1] == v.channels &&
                        sizes[begin + 2] == v.height && sizes[begin + 3] == v.width,
                    "resfuse: sizes must be those that the program stores");
    outputs.push_back(torch::stable::empty({program.images, v.channels, v.height, v.width}, like.scalar_type(),
                                           std::nullopt, like.device(), std::nullopt,
                                           torch::headeronly::MemoryFormat::ChannelsLast));
  }
  STD_TORCH_CHECK(outputs.size() * 4 == sizes.size(), "resfuse: sizes must be those that the program stores");
  return outputs;
}

Tensors run_plan(const Tensors& inputs, const Tensors& constants, const std::vector<int64_t>& data,
                 const std::vector<int64_t>& sizes) {
  STD_TORCH_CHECK(!inputs.empty(), "resfuse: a plan needs an input");
  const Tensor& x = inputs[0];
  STD_TORCH_CHECK(tiles_multiply(x.scalar_type()), "resfuse: this machine does not multiply x's dtype");
  for (const Tensor& input : inputs)
    STD_TORCH_CHECK(input.scalar_type() == x.scalar_type() && input.device() == x.device(),
                    "resfuse: inputs must have one dtype and device");
  const Program program(data);
  program.check(x.element_size());
  Tensors outputs = new_outputs(program, x, sizes);
#if RESFUSE_HAS_TILES
  STD_TORCH_CHECK(program.lanes == kLanes, "resfuse: weights packed for vectors of ", program.lanes,
                  " channels do not serve a processor that has vectors of ", kLanes, ": fold the network here");
  with_multiplied_type(x.scalar_type(),
                       [&](auto tag) { Execution<decltype(tag)>(program, inputs, constants, outputs).run(); });
#endif
  return outputs;
}

STABLE_TORCH_LIBRARY_IMPL(resfuse, CPU, m) {
  if (!isa_runs()) return;
  m.impl("run_plan", TORCH_BOX(&run_plan));
}

}  // namespace resfuse::cpu::RESFUSE_ISA
