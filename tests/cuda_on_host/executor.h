// A block of a CUDA kernel on the host: its threads are fibers, and a barrier is where each of them gives way.
//
// Threads run one after the other, from one barrier to the next, in an order that the seed permutes: what a thread
// reads without a barrier was, in some order, not written yet. Shared memory begins as NaN, in every block, and is as
// large as the launch says. Threads that do not all meet at the same barrier, or lanes of a warp at the same shuffle,
// are an error.
#pragma once

#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fibers.h"

namespace cuda_on_host {

constexpr int kWarp = 32;
constexpr unsigned char kPoison = 0xff;  // the bytes of a NaN in every floating format

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

enum class Wait { kNothing, kBarrier, kShuffle, kEnd };

struct Thread {
  Fiber fiber;
  unsigned index;
  Wait wait = Wait::kNothing;
  int line = 0;      // of the barrier or shuffle
  int shuffles = 0;  // so far: two in a row use two slots, for a lane may be one ahead of another
  uint64_t slots[2] = {};

  Thread(void (*entry)(), unsigned index) : fiber(entry), index(index) {}
};

class Executor {
 public:
  static Executor& instance() {
    static Executor executor;
    return executor;
  }

  // The order of threads and blocks: 0 ascending, 1 descending, else at random.
  void set_seed(unsigned seed) { seed_ = seed, random_.seed(seed); }

  void launch(Index grid, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel) {
    if (threads == 0 || threads % kWarp != 0) throw std::runtime_error("cuda_on_host: a block must be whole warps");
    kernel_ = &kernel, grid_ = grid, block_ = {threads};
    while (threads_.size() < threads) threads_.emplace_back(new Thread(&enter, unsigned(threads_.size())));
    count_ = threads;
    for (const size_t block : order(size_t{grid.x} * grid.y * grid.z)) {
      block_index_ = {unsigned(block % grid.x), unsigned(block / grid.x % grid.y), unsigned(block / grid.x / grid.y)};
      std::vector<unsigned char> memory(shared_bytes, kPoison);
      shared_ = memory.data();
      run_block();
    }
  }

  void* shared_memory() const { return shared_; }
  const Index& grid() const { return grid_; }
  const Index& block() const { return block_; }
  const Index& block_index() const { return block_index_; }
  unsigned thread_index() const { return current_->index; }

  void barrier(int line) { wait(Wait::kBarrier, line); }

  // Every lane's value, once all have come; the lane that is asked for, or itself where there is none.
  template <class T>
  T shuffle(T value, unsigned lane, int line) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "a slot's size");
    Thread& self = *current_;
    const int slot = self.shuffles++ % 2;
    std::memcpy(&self.slots[slot], &value, sizeof value);
    wait(Wait::kShuffle, line);
    const unsigned first = self.index / kWarp * kWarp;
    const Thread& source = lane < kWarp ? *threads_[first + lane] : self;
    std::memcpy(&value, &source.slots[slot], sizeof value);
    return value;
  }

 private:
  static void enter() {
    Executor& executor = instance();
    executor.current_->fiber.arrive();
    for (;;) {
      (*executor.kernel_)();
      executor.wait(Wait::kEnd, 0);
    }
  }

  void wait(Wait what, int line) {
    Thread& self = *current_;
    self.wait = what, self.line = line;
    self.fiber.give_way();
  }

  std::vector<size_t> order(size_t count) {
    std::vector<size_t> order(count);
    std::iota(order.begin(), order.end(), size_t{0});
    if (seed_ == 1) std::reverse(order.begin(), order.end());
    if (seed_ > 1) std::shuffle(order.begin(), order.end(), random_);
    return order;
  }

  void run_block() {
    for (size_t i = 0; i < count_; ++i) threads_[i]->wait = Wait::kNothing, threads_[i]->shuffles = 0;
    while (!all(0, count_, Wait::kEnd)) {
      for (const size_t i : order(count_)) {
        current_ = threads_[i].get();
        if (current_->wait == Wait::kNothing) current_->fiber.resume();
      }
      release();
    }
  }

  bool all(size_t begin, size_t end, Wait what) const {
    return std::all_of(threads_.begin() + begin, threads_.begin() + end, [&](const auto& thread) {
      return thread->wait == what && thread->line == threads_[begin]->line;
    });
  }

  // Every thread waits: let those go on whose partners have all come.
  void release() {
    if (all(0, count_, Wait::kEnd)) return;
    if (all(0, count_, Wait::kBarrier)) return go_on(0, count_);
    bool shuffled = false;
    for (size_t warp = 0; warp < count_; warp += kWarp)
      if (all(warp, warp + kWarp, Wait::kShuffle)) go_on(warp, warp + kWarp), shuffled = true;
    if (!shuffled) fail();
  }

  void go_on(size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) threads_[i]->wait = Wait::kNothing;
  }

  void fail() {
    std::string message = "cuda_on_host: threads diverge:";
    const char* names[] = {"", " at the barrier of line ", " at the shuffle of line ", " has ended at "};
    for (size_t i = 0; i < count_; ++i) {
      const Thread& thread = *threads_[i];
      if (i > 0 && thread.wait == threads_[i - 1]->wait && thread.line == threads_[i - 1]->line) continue;
      message += " from thread " + std::to_string(i) + names[int(thread.wait)] + std::to_string(thread.line) + ";";
    }
    for (auto& thread : threads_) thread->fiber.restart(&enter);
    throw std::runtime_error(message);
  }

  std::vector<std::unique_ptr<Thread>> threads_;
  const std::function<void()>* kernel_ = nullptr;
  Thread* current_ = nullptr;
  void* shared_ = nullptr;
  size_t count_ = 0;
  Index grid_, block_, block_index_;
  unsigned seed_ = 0;
  std::mt19937 random_;
};

}  // namespace cuda_on_host
