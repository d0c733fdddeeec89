// Stacks that change places: one per emulated thread. On x86-64 a switch is sixteen instructions (the callee-saved
// registers go to the old stack and come from the new one); elsewhere ucontext does the same, slower.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emu {

#if defined(__x86_64__)

struct Context {
  void* stack_pointer = nullptr;
};

extern "C" void emu_switch_stack(void** save, void* load);

inline void switch_context(Context& from, const Context& to) {
  emu_switch_stack(&from.stack_pointer, to.stack_pointer);
}

// A context that runs `entry` (which never returns) on [stack, stack + bytes).
inline void make_context(Context& context, void* stack, size_t bytes, void (*entry)()) {
  auto* top = reinterpret_cast<uint64_t*>((reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15});
  top -= 2;  // entry's address at a multiple of 16, as a call would leave it
  top[0] = reinterpret_cast<uint64_t>(entry);
  top[1] = 0;
  top -= 6;  // rbp rbx r12 r13 r14 r15
  for (int i = 0; i < 6; ++i) top[i] = 0;
  context.stack_pointer = top;
}

#else

struct Context {
  ucontext_t context;
};

inline void switch_context(Context& from, const Context& to) { swapcontext(&from.context, &to.context); }

inline void make_context(Context& context, void* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = bytes;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}

#endif

}  // namespace emu
