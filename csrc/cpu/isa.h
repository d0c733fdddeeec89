// Which instruction set a family's CPU kernels are taken for: the best that the processor has, or LOWMEM_CPU_ISA.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace lm {

constexpr int kIsaLevels = 4;
constexpr const char* kIsaNames[kIsaLevels] = {"plain", "avx2", "avx512", "avx512_bf16"};

inline bool cpu_has(int level) {
  if (level == 0) return true;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (level == 1) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (level == 2) return avx512;
#if __GNUC__ >= 10 || defined(__clang__)
  return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
#endif
  return false;
}

// The kernels of `tables`, one a level, null where there are none: those of the best level that the processor has, or
// of the one that LOWMEM_CPU_ISA names. A family without kernels of that level gives those of the next lower one.
template <class Kernels>
const Kernels* choose_isa(const Kernels* const (&tables)[kIsaLevels]) {
  const char* wanted = std::getenv("LOWMEM_CPU_ISA");
  const bool forced = wanted && *wanted;
  const Kernels *best = nullptr, *found = nullptr;
  for (int level = 0; level < kIsaLevels; ++level) {
    if (!cpu_has(level)) continue;
    if (tables[level]) best = tables[level];
    if (!forced || std::strcmp(kIsaNames[level], wanted) == 0) found = best;
  }
  if (!found) {
    throw std::runtime_error(
        std::string(
            "lowmem: LOWMEM_CPU_ISA: expected one of plain, avx2, avx512 or avx512_bf16 that this processor has, "
            "got ") +
        wanted);
  }
  return found;
}

}  // namespace lm
