// A block of GPU threads as fibers of one CPU thread, resumed in random order.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <vector>

namespace flute {

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "emulation: %s\n", what);
  exit(2);
}

struct Copy {
  uint32_t to;
  const void* from;
  bool valid;
};

struct Fiber {
  int index = 0;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  unsigned exchanges = 0;
  std::vector<Copy> copies;
  std::deque<std::vector<Copy>> groups;
};

struct Barrier {
  int size = 0;
  std::vector<int> waiting;
};

// The one block that runs.
struct Block {
  static constexpr int kStack = 256 * 1024;
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps;
  Barrier all;
  std::vector<int> runnable;
  int running = -1, finished = 0;
  ucontext_t scheduler;
  std::function<void()> program;
  std::mt19937 random;
};
inline Block block_state;

inline Fiber& current_fiber() {
  return block_state.fibers[block_state.running];
}

inline void wait_at(Barrier& barrier) {
  Block& block = block_state;
  barrier.waiting.push_back(block.running);
  if (static_cast<int>(barrier.waiting.size()) == barrier.size) {
    for (const int i : barrier.waiting) block.runnable.push_back(i);
    barrier.waiting.clear();
  }
  swapcontext(&current_fiber().context, &block.scheduler);
}
inline void warp_barrier() {
  wait_at(block_state.warps[current_fiber().index / 32]);
}
inline void block_barrier() {
  wait_at(block_state.all);
}

inline void fiber_main() {
  block_state.program();
  block_state.finished++;
  swapcontext(&current_fiber().context, &block_state.scheduler);
}

inline void run_block(int threads, std::function<void()> program) {
  Block& block = block_state;
  block.fibers.resize(threads);
  block.warps.assign(threads / 32, {32, {}});
  block.all = {threads, {}};
  block.runnable.clear();
  block.finished = 0;
  block.program = std::move(program);
  for (int i = 0; i < threads; i++) {
    Fiber& fiber = block.fibers[i];
    fiber.index = i, fiber.exchanges = 0;
    fiber.copies.clear(), fiber.groups.clear();
    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(Block::kStack);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Block::kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
    block.runnable.push_back(i);
  }
  while (!block.runnable.empty()) {
    const size_t pick = block.random() % block.runnable.size();
    block.running = block.runnable[pick];
    block.runnable[pick] = block.runnable.back();
    block.runnable.pop_back();
    swapcontext(&block.scheduler, &current_fiber().context);
  }
  if (block.finished != threads) fail("threads wait at different barriers");
}

}  // namespace flute
