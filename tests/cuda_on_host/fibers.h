// Fibers: functions that run on stacks of their own and give way when they want to, on one thread of the host.
//
// AddressSanitizer is told of every change of stack, or it would take a fiber's frames for an overflow.
#pragma once

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#if !defined(__SANITIZE_ADDRESS__)
#error "compile with -fsanitize=address: without it a kernel that leaves its memory goes unnoticed"
#endif

namespace cuda_on_host {

// Where a stack was left. A change of stack saves the registers that a callee keeps, and nothing else: it is a few
// instructions, where swapcontext is a system call.
#if defined(__x86_64__)
using Context = void*;

extern "C" void cuda_on_host_switch(Context* from, Context to);
asm(R"(
  .text
  .weak cuda_on_host_switch
  .hidden cuda_on_host_switch
cuda_on_host_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

inline void switch_stack(Context* from, Context* to) { cuda_on_host_switch(from, *to); }

inline void prepare(Context* context, char* stack, size_t size, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(stack + size) - 1;  // as a call leaves it: 8 bytes off a multiple of 16
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  *context = top;
}
#else
}  // namespace cuda_on_host
#include <ucontext.h>
namespace cuda_on_host {
using Context = ucontext_t;

inline void switch_stack(Context* from, Context* to) { swapcontext(from, to); }

inline void prepare(Context* context, char* stack, size_t size, void (*entry)()) {
  getcontext(context);
  context->uc_stack = {stack, 0, size};
  makecontext(context, entry, 0);
}
#endif

// A fiber calls its entry, which never returns: resume() runs it until it gives way.
class Fiber {
 public:
  explicit Fiber(void (*entry)()) : stack_(new char[kStackBytes]) { restart(entry); }

  void restart(void (*entry)()) {
    __asan_unpoison_memory_region(stack_.get(), kStackBytes);  // of frames that were never left
    prepare(&context_, stack_.get(), kStackBytes, entry);
    fresh_ = true;
  }
  void resume() {
    void* fake = nullptr;
    fresh_ = false;
    __sanitizer_start_switch_fiber(&fake, stack_.get(), kStackBytes);
    switch_stack(&caller_, &context_);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
  }
  // What an entry calls first, on its own stack.
  void arrive() { __sanitizer_finish_switch_fiber(nullptr, &caller_stack_, &caller_bytes_); }
  void give_way() {
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, caller_stack_, caller_bytes_);
    switch_stack(&context_, &caller_);
    __sanitizer_finish_switch_fiber(fake, &caller_stack_, &caller_bytes_);
  }
  bool fresh() const { return fresh_; }

 private:
  static constexpr size_t kStackBytes = 65536;
  std::unique_ptr<char[]> stack_;
  Context context_, caller_;
  const void* caller_stack_ = nullptr;
  size_t caller_bytes_ = 0;
  bool fresh_ = true;
};

}  // namespace cuda_on_host
