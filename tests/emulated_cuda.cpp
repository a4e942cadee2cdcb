// The fibers of emulated_cuda.h, and the few functions of CUDA's runtime that the bindings call.
#include "emulated_cuda.h"

#include <ucontext.h>
#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

namespace emulated {

dim3 thread, block, grid;

namespace {

constexpr int kThreads = 256, kWarp = 32;
constexpr size_t kStack = 256 * 1024;
constexpr size_t kMostShared = 99 * 1024;  // of a block on the smallest GPUs that the kernels run on

enum class State { running, at_block, at_warp, done };

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf point;
  State state;
  bool started;
  int line;
};

Fiber fibers[kThreads];
ucontext_t main_context;
jmp_buf main_point;
uint64_t numbers[kThreads];
const std::function<void()>* body;
int current;
std::mt19937 order(7);
std::mutex one_at_a_time;

[[noreturn]] void fail(const char* what, int line) {
  std::fprintf(stderr, "emulated CUDA: block %u, thread %d, line %d: %s\n", block.x, current, line, what);
  std::abort();
}

void enter() {
  (*body)();
  fibers[current].state = State::done;
  _longjmp(main_point, 1);
}

void resume(int i) {
  current = i;
  thread.x = unsigned(i);
  Fiber& fiber = fibers[i];
  if (_setjmp(main_point)) return;
  if (fiber.started) _longjmp(fiber.point, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = &main_context;
  makecontext(&fiber.start, enter, 0);
  setcontext(&fiber.start);
}

// Lets threads first .. end go on if all wait in `state`; none may have ended, or wait elsewhere.
bool release(int first, int end, State state) {
  for (int i = first; i < end; ++i)
    if (fibers[i].state != state) return false;
  for (int i = first; i < end; ++i) {
    current = i;
    if (fibers[i].line != fibers[first].line) fail("waits elsewhere than the first of its threads", fibers[i].line);
    fibers[i].state = State::running;
  }
  return true;
}

void run_block(size_t shared) {
  std::memset(sslfast::cuda::dynamic_shared, 0xff, shared);
  for (Fiber& fiber : fibers) fiber.state = State::running, fiber.started = false;
  std::vector<int> turns(kThreads);
  std::iota(turns.begin(), turns.end(), 0);
  for (;;) {
    std::shuffle(turns.begin(), turns.end(), order);
    bool moved = false, done = true;
    for (int i : turns)
      if (fibers[i].state == State::running) resume(i), moved = true;
    for (int w = 0; w < kThreads; w += kWarp) moved = release(w, w + kWarp, State::at_warp) || moved;
    moved = release(0, kThreads, State::at_block) || moved;
    for (const Fiber& fiber : fibers) done = done && fiber.state == State::done;
    if (done) return;
    if (!moved)
      for (current = 0; current < kThreads; ++current)
        if (fibers[current].state != State::done) fail("waits for threads that do not come", fibers[current].line);
  }
}

}  // namespace

void meet(bool warp, int line) {
  Fiber& fiber = fibers[current];
  fiber.state = warp ? State::at_warp : State::at_block;
  fiber.line = line;
  if (!_setjmp(fiber.point)) _longjmp(main_point, 1);
}

uint64_t* exchange(bool warp, uint64_t mine, int line) {
  const int first = warp ? current / kWarp * kWarp : 0;
  numbers[current] = mine;
  meet(warp, line);
  return numbers + first;
}

int launches = 0;

void run(dim3 blocks, size_t shared, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  ++launches;
  if (shared > kMostShared || blocks.x < 1 || blocks.y < 1 || blocks.y > 65535) std::abort();
  body = &kernel;
  grid = blocks;
  std::vector<unsigned> turns(blocks.x * blocks.y);
  std::iota(turns.begin(), turns.end(), 0u);
  std::shuffle(turns.begin(), turns.end(), order);
  for (unsigned i : turns) {
    block = dim3(i % blocks.x, i / blocks.x);
    run_block(shared);
  }
}

}  // namespace emulated

extern "C" int emulated_launches() { return emulated::launches; }

namespace sslfast::cuda {

alignas(16) unsigned char dynamic_shared[128 * 1024];

void fill_zero(void* data, size_t bytes, void*) {
  if (bytes) std::memset(data, 0, bytes);
}
void copy(const void* from, void* to, size_t bytes, void*) { std::memcpy(to, from, bytes); }
int set_device(int) { return 0; }

}  // namespace sslfast::cuda
