#include "emulator.h"

#include <sys/mman.h>
#include <sys/time.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "fiber.h"
#include "guarded.h"

#if defined(__x86_64__)
asm(R"(
  .text
  .globl emu_switch_stack
  .hidden emu_switch_stack
  .type emu_switch_stack, @function
emu_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size emu_switch_stack, .-emu_switch_stack
)");
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emu {
namespace {

constexpr size_t kPage = 4096, kStackBytes = 128 * 1024;
constexpr size_t kStaticLimit = 48 * 1024, kDynamicLimit = 227 * 1024;  // of sm_90; sm_80 has 163 KiB
constexpr size_t kRedZone = 64;
constexpr int kPoison = 0xFF;  // NaN in every float format, -1 in every integer

enum class State { kRunnable, kBarrier, kWarp, kDone };

struct Copy {
  void* to;
  const void* from;
  int bytes;
  Site site;
};

struct Thread {
  Context context;
  State state = State::kRunnable;
  Site site;
  Barrier barrier = Barrier::kPlain;
  int value = 0;
  uint32_t mask = 0;  // of the warp operation it waits for
  const char* operation = "";
  void* slot = nullptr;
  std::vector<Copy> copies;
  std::vector<size_t> groups;  // copies that each committed group ends with
};

struct StaticSlot {
  const void* key;
  size_t offset, bytes;
};

struct Machine {
  Settings settings;
  Context scheduler;
  std::vector<Thread> threads;
  std::vector<char*> stacks;
  const std::function<void()>* kernel = nullptr;
  int count = 0, current = -1, arrived = 0;
  bool inside = false;  // a thread is running, not the scheduler
  std::string error;
  const Copy* copying = nullptr;
  // shared memory
  char *static_arena = nullptr, *dynamic_pages = nullptr, *dynamic_end = nullptr, *dynamic_base = nullptr;
  size_t static_used = 0, dynamic_bytes = 0;
  std::vector<StaticSlot> statics;
  // faults
  sigjmp_buf on_fault;
  char* signal_stack = nullptr;
  volatile sig_atomic_t fault_signal = 0, fault_write = 0;
  void* volatile fault_address = nullptr;
};

Machine& machine() {
  static Machine m;
  return m;
}

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

char* map(size_t bytes, int protection) {
  void* p = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw Error("the emulator could not map " + std::to_string(bytes) + " bytes");
  return static_cast<char*>(p);
}

std::string text(const Site& site) {
  if (site.file == nullptr) return "an unknown place";
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

bool same(const Site& a, const Site& b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

std::string where() {
  char line[160];
  std::snprintf(line, sizeof line, "block (%u, %u, %u), thread (%u, %u, %u): ", blockIdx.x, blockIdx.y, blockIdx.z,
                threadIdx.x, threadIdx.y, threadIdx.z);
  return line;
}

// "threads 0-31 <doing>, threads 32-63 <doing>", equal neighbours together.
std::string groups(const std::function<std::string(const Thread&, bool)>& doing) {
  const Machine& m = machine();
  std::string out, last;
  int first = 0;
  auto flush = [&](int end) {
    if (end == first || last.empty()) return;
    const bool many = end - first > 1;
    out += (out.empty() ? "" : "; ") + std::string(many ? "threads " : "thread ") + std::to_string(first) +
           (many ? "-" + std::to_string(end - 1) : "") + " " + doing(m.threads[static_cast<size_t>(first)], many);
  };
  for (int i = 0; i < m.count; ++i) {
    std::string now = doing(m.threads[static_cast<size_t>(i)], false);
    if (now == last) continue;
    flush(i);
    first = i;
    last = std::move(now);
    if (out.size() > 600) return out + "; ...";
  }
  flush(m.count);
  return out;
}

std::string doing(const Thread& t, bool many) {
  const std::string wait = many ? "wait " : "waits ";
  switch (t.state) {
    case State::kBarrier: return wait + "at the barrier of " + text(t.site);
    case State::kWarp: {
      char mask[16];
      std::snprintf(mask, sizeof mask, "0x%08x", t.mask);
      return wait + "in " + t.operation + " at " + text(t.site) + " for the lanes of mask " + mask;
    }
    case State::kDone: return many ? "have returned" : "has returned";
    default: return many ? "run" : "runs";
  }
}

void leave() {  // the running thread hands over to the scheduler
  Machine& m = machine();
  m.inside = false;
  switch_context(m.threads[m.current].context, m.scheduler);
}

void thread_main() {
  Machine& m = machine();
  (*m.kernel)();
  Thread& t = m.threads[m.current];
  if (!t.copies.empty())
    fail("the thread returned with cp.async copies that it never waited for, the first from " + text(t.copies[0].site));
  t.state = State::kDone;
  leave();
}

void set_position(int thread) {
  Machine& m = machine();
  m.current = thread;
  threadIdx.x = static_cast<unsigned>(thread) % blockDim.x;
  threadIdx.y = static_cast<unsigned>(thread) / blockDim.x % blockDim.y;
  threadIdx.z = static_cast<unsigned>(thread) / blockDim.x / blockDim.y;
}

// The order in which `count` things take their turns.
std::vector<int64_t> turns(int64_t count, int order, uint64_t salt) {
  std::vector<int64_t> list(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) list[static_cast<size_t>(i)] = order == 1 ? count - 1 - i : i;
  if (order > 1)
    std::shuffle(list.begin(), list.end(), std::mt19937_64(static_cast<uint64_t>(order) * 0x9E3779B97F4A7C15u + salt));
  return list;
}

void check_red_zones() {
  Machine& m = machine();
  for (const StaticSlot& slot : m.statics) {
    const char* zone = m.static_arena + slot.offset + slot.bytes;
    for (size_t i = 0; i < kRedZone; ++i) {
      if (static_cast<unsigned char>(zone[i]) != kPoison) {
        throw Error(where() + "wrote up to " + std::to_string(i + 1) +
                    " bytes past the end of a static shared array of " + std::to_string(slot.bytes) + " bytes");
      }
    }
  }
  for (const char* p = m.dynamic_base + m.dynamic_bytes; p < m.dynamic_end; ++p) {
    if (static_cast<unsigned char>(*p) != kPoison) {
      throw Error(where() + "wrote past the end of the dynamic shared memory of " + std::to_string(m.dynamic_bytes) +
                  " bytes");
    }
  }
}

void prepare_block() {
  Machine& m = machine();
  std::memset(m.static_arena, kPoison, kStaticLimit + 64 * (kRedZone + 128));
  std::memset(m.dynamic_pages, kPoison, static_cast<size_t>(m.dynamic_end - m.dynamic_pages));
  m.statics.clear();
  m.static_used = 0;
  m.arrived = 0;
  for (int i = 0; i < m.count; ++i) {
    Thread& t = m.threads[static_cast<size_t>(i)];
    t.state = State::kRunnable;
    t.copies.clear();
    t.groups.clear();
    make_context(t.context, m.stacks[static_cast<size_t>(i)], kStackBytes, thread_main);
  }
}

void run_block(const std::vector<int64_t>& order) {
  Machine& m = machine();
  prepare_block();
  for (bool moved = true; moved;) {
    moved = false;
    for (const int64_t i : order) {
      Thread& t = m.threads[static_cast<size_t>(i)];
      if (t.state != State::kRunnable) continue;
      moved = true;
      set_position(static_cast<int>(i));
      m.inside = true;
      switch_context(m.scheduler, t.context);
      if (!m.error.empty()) throw Error(m.error);
    }
  }
  const bool all_done = std::all_of(m.threads.begin(), m.threads.begin() + m.count,
                                    [](const Thread& t) { return t.state == State::kDone; });
  if (!all_done) {
    char line[80];
    std::snprintf(line, sizeof line, "block (%u, %u, %u): ", blockIdx.x, blockIdx.y, blockIdx.z);
    throw Error(std::string(line) + "its threads wait for each other and never meet: " + groups(doing));
  }
  check_red_zones();
}

// ------------------------------------------------------------------------------------------------------------ faults

void on_signal(int signal, siginfo_t* info, void* context) {
  Machine& m = machine();
  if (!m.inside) {  // not a kernel's doing: the default action, so that the real culprit is seen
    if (signal == SIGVTALRM) return;
    std::signal(signal, SIG_DFL);
    raise(signal);
    return;
  }
  m.fault_signal = signal;
  m.fault_address = info->si_addr;
  m.fault_write = 0;
#if defined(__x86_64__) && defined(REG_ERR)
  m.fault_write = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_ERR] & 2 ? 1 : 0;
#else
  (void)context;
#endif
  siglongjmp(m.on_fault, 1);
}

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGVTALRM};

struct Handlers {  // ours while a grid runs, the former ones afterwards
  struct sigaction before[5];
  stack_t stack_before;
  Handlers() {
    Machine& m = machine();
    if (m.signal_stack == nullptr) m.signal_stack = map(1 << 16, PROT_READ | PROT_WRITE);
    stack_t stack{};
    stack.ss_sp = m.signal_stack;
    stack.ss_size = 1 << 16;
    sigaltstack(&stack, &stack_before);
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigfillset(&action.sa_mask);
    for (int i = 0; i < 5; ++i) sigaction(kSignals[i], &action, &before[i]);
    alarm_after(m.settings.seconds);
  }
  ~Handlers() {
    alarm_after(0);
    for (int i = 0; i < 5; ++i) sigaction(kSignals[i], &before[i], nullptr);
    sigaltstack(&stack_before, nullptr);
    machine().inside = false;
  }
  static void alarm_after(double seconds) {
    itimerval timer{};
    timer.it_value.tv_sec = static_cast<time_t>(seconds);
    timer.it_value.tv_usec = static_cast<suseconds_t>((seconds - static_cast<double>(timer.it_value.tv_sec)) * 1e6);
    setitimer(ITIMER_VIRTUAL, &timer, nullptr);
  }
};

std::string fault_text() {
  Machine& m = machine();
  char address[32];
  std::snprintf(address, sizeof address, "%p", m.fault_address);
  switch (m.fault_signal) {
    case SIGVTALRM:
      return where() + "still at work after " + std::to_string(static_cast<int>(m.settings.seconds)) +
             " s: does it spin?";
    case SIGFPE: return where() + "integer division by zero";
    case SIGILL: return where() + "illegal instruction";
    default: break;
  }
  std::string near = describe_address(m.fault_address);
  const char* p = static_cast<const char*>(static_cast<void*>(m.fault_address));
  if (near.empty() && p >= m.dynamic_end && p < m.dynamic_end + kPage)
    near = "past the end of the dynamic shared memory";
  std::string what =
      where() + (m.fault_write ? "wrote " : "read ") + (near.empty() ? "memory that is no argument" : near);
  if (m.copying != nullptr) what += ", in the cp.async of " + text(m.copying->site);
  return what + " (address " + address + ")";
}

void allocate(int count, size_t dynamic_shared) {
  Machine& m = machine();
  if (m.static_arena == nullptr) {
    m.static_arena = map(round_up(kStaticLimit + 64 * (kRedZone + 128), kPage), PROT_READ | PROT_WRITE);
    const size_t pages = round_up(kDynamicLimit + 128, kPage);
    m.dynamic_pages = map(pages + kPage, PROT_READ | PROT_WRITE);
    m.dynamic_end = m.dynamic_pages + pages;
    mprotect(m.dynamic_end, kPage, PROT_NONE);
  }
  m.dynamic_bytes = dynamic_shared;
  m.dynamic_base =
      reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(m.dynamic_end) - dynamic_shared) & ~uintptr_t{127});
  while (static_cast<int>(m.stacks.size()) < count) {
    char* stack = map(kPage + kStackBytes, PROT_READ | PROT_WRITE);
    mprotect(stack, kPage, PROT_NONE);
    m.stacks.push_back(stack + kPage);
  }
  if (static_cast<int>(m.threads.size()) < count) m.threads.resize(static_cast<size_t>(count));
}

}  // namespace

Settings& settings() { return machine().settings; }

void run_grid(dim3 grid, dim3 block, size_t dynamic_shared, const std::function<void()>& kernel) {
  Machine& m = machine();
  const int64_t count = static_cast<int64_t>(block.x) * block.y * block.z;
  const int64_t blocks = static_cast<int64_t>(grid.x) * grid.y * grid.z;
  if (count < 1 || count > 1024)
    throw Error("launch: expected 1 to 1024 threads a block, got " + std::to_string(count));
  if (blocks < 1 || grid.y > 65535 || grid.z > 65535 || grid.x > 0x7FFFFFFFu) {
    throw Error("launch: expected a grid of 1 to 2^31 - 1, 65535 and 65535 blocks, got " + std::to_string(grid.x) +
                ", " + std::to_string(grid.y) + ", " + std::to_string(grid.z));
  }
  if (dynamic_shared > kDynamicLimit)
    throw Error("launch: expected at most 227 KiB of dynamic shared memory, got " + std::to_string(dynamic_shared));
  allocate(static_cast<int>(count), dynamic_shared);
  m.count = static_cast<int>(count);
  m.kernel = &kernel;
  m.error.clear();
  m.copying = nullptr;
  blockDim = block;
  gridDim = grid;
  const std::vector<int64_t> block_order = turns(blocks, m.settings.order, 0);
  const Handlers handlers;
  if (sigsetjmp(m.on_fault, 1) != 0) {
    m.inside = false;
    throw Error(fault_text());
  }
  for (const int64_t b : block_order) {
    blockIdx.x = static_cast<unsigned>(b % grid.x);
    blockIdx.y = static_cast<unsigned>(b / grid.x % grid.y);
    blockIdx.z = static_cast<unsigned>(b / grid.x / grid.y);
    run_block(turns(count, m.settings.order, static_cast<uint64_t>(b) + 1));
  }
}

void fail(const std::string& what) {
  Machine& m = machine();
  m.error = where() + what;
  if (!m.inside) {  // in a launcher or a binding, where no scheduler could take over
    std::fprintf(stderr, "emulator, outside any kernel: %s\n", what.c_str());
    std::abort();
  }
  leave();
  std::abort();  // nobody comes back to a thread that has failed
}

int block_barrier(Barrier kind, int value, Site site) {
  Machine& m = machine();
  Thread& t = m.threads[static_cast<size_t>(m.current)];
  t.state = State::kBarrier;
  t.site = site;
  t.barrier = kind;
  t.value = value;
  if (++m.arrived < m.count) {
    leave();
    return t.value;
  }
  int total = 0;
  for (int i = 0; i < m.count; ++i) {
    const Thread& other = m.threads[static_cast<size_t>(i)];
    if (!same(other.site, site) || other.barrier != kind)
      fail("the block's threads met at different barriers: " + groups(doing));
    total += other.value != 0;
  }
  const int result = kind == Barrier::kCount ? total : kind == Barrier::kAnd ? total == m.count : total > 0;
  for (int i = 0; i < m.count; ++i) {
    m.threads[static_cast<size_t>(i)].state = State::kRunnable;
    m.threads[static_cast<size_t>(i)].value = result;
  }
  m.arrived = 0;
  leave();  // the order, not the arrival, says who goes on first
  return result;
}

int lane() { return machine().current % 32; }

void warp_meet(uint32_t mask, const char* operation, void* slot, Act act, Site site) {
  Machine& m = machine();
  const int first = m.current / 32 * 32;
  Thread& t = m.threads[static_cast<size_t>(m.current)];
  if ((mask >> (m.current - first) & 1u) == 0)
    fail(std::string(operation) + " at " + text(site) + ": the lane is not in its own mask");
  t.state = State::kWarp;
  t.site = site;
  t.operation = operation;
  t.mask = mask;
  t.slot = slot;
  void* slots[32] = {};
  bool complete = true;
  for (int i = 0; i < 32 && complete; ++i) {
    if ((mask >> i & 1u) == 0) continue;
    if (first + i >= m.count)
      fail(std::string(operation) + " at " + text(site) + ": the mask names lane " + std::to_string(i) +
           ", which the block does not have");
    const Thread& other = m.threads[static_cast<size_t>(first + i)];
    complete = other.state == State::kWarp && other.mask == mask && same(other.site, site) &&
               std::strcmp(other.operation, operation) == 0;
    slots[i] = other.slot;
  }
  if (complete) {
    act(slots, mask);
    for (int i = 0; i < 32; ++i) {
      if (mask >> i & 1u) m.threads[static_cast<size_t>(first + i)].state = State::kRunnable;
    }
  }
  leave();
}

void* static_shared(const void* key, size_t bytes, size_t alignment) {
  Machine& m = machine();
  for (const StaticSlot& slot : m.statics) {
    if (slot.key == key) return m.static_arena + slot.offset;
  }
  const size_t offset = round_up(m.static_used, std::max<size_t>(alignment, 128));
  size_t total = bytes;
  for (const StaticSlot& slot : m.statics) total += slot.bytes;
  if (total > kStaticLimit) fail("more than 48 KiB of static shared memory: " + std::to_string(total) + " bytes");
  if (m.statics.size() == 64) fail("more than 64 static shared arrays");
  m.statics.push_back(StaticSlot{key, offset, bytes});
  m.static_used = offset + bytes + kRedZone;
  return m.static_arena + offset;
}

void* dynamic_shared() {
  if (machine().dynamic_bytes == 0) fail("the launch gave no dynamic shared memory");
  return machine().dynamic_base;
}

bool is_shared(const void* p, size_t bytes) {
  const Machine& m = machine();
  const auto* at = static_cast<const char*>(p);
  if (at >= m.dynamic_base && at + bytes <= m.dynamic_base + m.dynamic_bytes) return true;
  for (const StaticSlot& slot : m.statics) {
    const char* base = m.static_arena + slot.offset;
    if (at >= base && at + bytes <= base + slot.bytes) return true;
  }
  return false;
}

void async_copy16(void* shared, const void* global, int bytes, Site site) {
  const std::string name = "cp.async of " + text(site) + ": ";
  if (!is_shared(shared, 16)) fail(name + "the destination is not in shared memory");
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) fail(name + "the destination is not on 16 bytes");
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) fail(name + "the source is not on 16 bytes");
  if (bytes < 0 || bytes > 16) fail(name + "expected 0 to 16 bytes, got " + std::to_string(bytes));
  // from here to the wait the place holds neither the old nor the new: NaN shows whoever reads it too late or too early
  std::memset(shared, kPoison, 16);
  Machine& m = machine();
  m.threads[static_cast<size_t>(m.current)].copies.push_back(Copy{shared, global, bytes, site});
}

void async_commit() {
  Machine& m = machine();
  Thread& t = m.threads[static_cast<size_t>(m.current)];
  t.groups.push_back(t.copies.size());
}

void async_wait(int pending) {
  Machine& m = machine();
  Thread& t = m.threads[static_cast<size_t>(m.current)];
  if (static_cast<int>(t.groups.size()) <= pending) return;
  const size_t finished = t.groups.size() - static_cast<size_t>(pending), count = t.groups[finished - 1];
  for (size_t i = 0; i < count; ++i) {
    m.copying = &t.copies[i];
    char bytes[16] = {};
    std::memcpy(bytes, t.copies[i].from, static_cast<size_t>(t.copies[i].bytes));
    std::memcpy(t.copies[i].to, bytes, 16);
  }
  m.copying = nullptr;
  t.copies.erase(t.copies.begin(), t.copies.begin() + static_cast<std::ptrdiff_t>(count));
  t.groups.erase(t.groups.begin(), t.groups.begin() + static_cast<std::ptrdiff_t>(finished));
  for (size_t& end : t.groups) end -= count;
}

}  // namespace emu

// -fsanitize=alignment reports here: no sanitizer library is linked, the report becomes the launch's error.
namespace {
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
struct TypeMismatch {
  SourceLocation place;
  const void* type;
  unsigned char log_alignment, kind;
};
}  // namespace

extern "C" __attribute__((visibility("default"))) void __ubsan_handle_type_mismatch_v1_abort(TypeMismatch* data,
                                                                                             uintptr_t pointer) {
  char what[256];
  const char* slash = std::strrchr(data->place.file, '/');
  std::snprintf(what, sizeof what, "misaligned %s at %s:%u: address 0x%zx is not a multiple of %d",
                data->kind == 0   ? "load"
                : data->kind == 1 ? "store"
                                  : "access",
                slash ? slash + 1 : data->place.file, data->place.line, static_cast<size_t>(pointer),
                1 << data->log_alignment);
  emu::fail(what);
}
