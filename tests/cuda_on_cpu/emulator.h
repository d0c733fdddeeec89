// Runs CUDA kernels on the host: one fiber per thread, block by block, in a chosen order. README.md says what is
// served.
//
// Threads run one at a time until they meet: at a block's barrier, or at a warp operation among the lanes of its mask.
// Whatever a kernel leaves to chance between two meetings is therefore decided by the order, and shows when it changes.
#pragma once

#include <cuda_runtime_api.h>  // dim3, uint3, cudaStream_t: types only, nothing of the runtime is linked

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

namespace emu {

// A kernel did what no kernel may do. Thrown from the launch, after all its threads are gone.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A place in a kernel's source. As a default argument it is the caller's place.
struct Site {
  const char* file = nullptr;
  int line = 0;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return Site{file, line};
  }
};

struct Settings {
  int order = 0;            // 0: threads and blocks ascending; 1: both descending; else: shuffled by this seed
  int multiprocessors = 2;  // what launchers see
  double seconds = 120;     // of processor time, for one launch: a kernel that spins is stopped
};
Settings& settings();

// ------------------------------------------------------------------------------------------- called by the launch

void run_grid(dim3 grid, dim3 block, size_t dynamic_shared, const std::function<void()>& kernel);

// ------------------------------------------------------------------------------------------- called by a thread

[[noreturn]] void fail(const std::string& what);  // ends the launch with an Error that names the thread

enum class Barrier { kPlain, kCount, kAnd, kOr };
int block_barrier(Barrier kind, int value, Site site);

// What the lanes of `mask` do together: `slot` is this lane's input and output. The last lane to arrive calls
// `act(slots, mask)`; slots of lanes outside the mask are null.
using Act = void (*)(void** slots, uint32_t mask);
void warp_meet(uint32_t mask, const char* operation, void* slot, Act act, Site site);

int lane();

void* static_shared(const void* key, size_t bytes, size_t alignment);
void* dynamic_shared();
bool is_shared(const void* p, size_t bytes);

void async_copy16(void* shared, const void* global, int bytes, Site site);
void async_commit();
void async_wait(int pending);

}  // namespace emu
