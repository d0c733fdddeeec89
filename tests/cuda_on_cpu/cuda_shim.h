// The names of CUDA C++ that a host compiler lacks, with the meaning they have on the device. What a warp or a block
// does together goes through the emulator; the rest is arithmetic.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator.h"

#if !defined(__launch_bounds__)
#define __launch_bounds__(...)
#endif

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// -------------------------------------------------------------------------------------------------------- barriers

inline void __syncthreads(emu::Site site = emu::Site::here()) { emu::block_barrier(emu::Barrier::kPlain, 0, site); }
inline int __syncthreads_count(int v, emu::Site site = emu::Site::here()) {
  return emu::block_barrier(emu::Barrier::kCount, v != 0, site);
}
inline int __syncthreads_and(int v, emu::Site site = emu::Site::here()) {
  return emu::block_barrier(emu::Barrier::kAnd, v != 0, site);
}
inline int __syncthreads_or(int v, emu::Site site = emu::Site::here()) {
  return emu::block_barrier(emu::Barrier::kOr, v != 0, site);
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, emu::Site site = emu::Site::here()) {
  emu::warp_meet(mask, "__syncwarp", nullptr, [](void**, uint32_t) {}, site);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// ------------------------------------------------------------------------------------------------ shuffles and votes

namespace emu {

template <typename T>
struct Shuffle {
  T value, result;
  int source;  // a lane, of the whole warp
};

template <typename T>
T shuffle(uint32_t mask, T value, int source, const char* operation, Site site) {
  Shuffle<T> mine{value, value, source};
  warp_meet(
      mask, operation, &mine,
      [](void** slots, uint32_t lanes) {
        for (int i = 0; i < 32; ++i) {
          if (slots[i] == nullptr) continue;
          auto* me = static_cast<Shuffle<T>*>(slots[i]);
          if ((lanes >> me->source & 1u) == 0) {  // undefined on the device: made visible here
            std::memset(static_cast<void*>(&me->result), 0xFF, sizeof(T));
          } else {
            me->result = static_cast<Shuffle<T>*>(slots[me->source])->value;
          }
        }
      },
      site);
  return mine.result;
}

}  // namespace emu

template <typename T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32, emu::Site site = emu::Site::here()) {
  const int first = emu::lane() / width * width;
  return emu::shuffle(mask, v, first + (source & (width - 1)), "__shfl_sync", site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, emu::Site site = emu::Site::here()) {
  const int lane = emu::lane(), to = lane ^ bits;
  return emu::shuffle(mask, v, to < (lane / width + 1) * width ? to : lane, "__shfl_xor_sync", site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32, emu::Site site = emu::Site::here()) {
  const int lane = emu::lane(), to = lane - static_cast<int>(by);
  return emu::shuffle(mask, v, to >= lane / width * width ? to : lane, "__shfl_up_sync", site);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32, emu::Site site = emu::Site::here()) {
  const int lane = emu::lane(), to = lane + static_cast<int>(by);
  return emu::shuffle(mask, v, to < (lane / width + 1) * width ? to : lane, "__shfl_down_sync", site);
}

namespace emu {

inline uint32_t ballot(uint32_t mask, int predicate, const char* operation, Site site) {
  struct Vote {
    bool yes;
    uint32_t result;
  } mine{predicate != 0, 0};
  warp_meet(
      mask, operation, &mine,
      [](void** slots, uint32_t) {
        uint32_t all = 0;
        for (int i = 0; i < 32; ++i) all |= static_cast<uint32_t>(slots[i] && static_cast<Vote*>(slots[i])->yes) << i;
        for (int i = 0; i < 32; ++i) {
          if (slots[i]) static_cast<Vote*>(slots[i])->result = all;
        }
      },
      site);
  return mine.result;
}

}  // namespace emu

inline unsigned __ballot_sync(unsigned mask, int p, emu::Site site = emu::Site::here()) {
  return emu::ballot(mask, p, "__ballot_sync", site);
}
inline int __any_sync(unsigned mask, int p, emu::Site site = emu::Site::here()) {
  return emu::ballot(mask, p, "__any_sync", site) != 0;
}
inline int __all_sync(unsigned mask, int p, emu::Site site = emu::Site::here()) {
  return emu::ballot(mask, p, "__all_sync", site) == mask;
}

// --------------------------------------------------------------------------------------------------------- atomics
// Threads run one at a time, so plain code is atomic. What depends on the order of the additions changes with it.

#define EMU_ATOMIC(name, expression)       \
  template <typename T>                    \
  T name(T* at, std::common_type_t<T> v) { \
    const T old = *at;                     \
    *at = static_cast<T>(expression);      \
    return old;                            \
  }
EMU_ATOMIC(atomicAdd, old + v)
EMU_ATOMIC(atomicSub, old - v)
EMU_ATOMIC(atomicExch, v)
EMU_ATOMIC(atomicMin, v < old ? v : old)
EMU_ATOMIC(atomicMax, old < v ? v : old)
EMU_ATOMIC(atomicAnd, old& v)
EMU_ATOMIC(atomicOr, old | v)
EMU_ATOMIC(atomicXor, old ^ v)
#undef EMU_ATOMIC

template <typename T>
T atomicCAS(T* at, std::common_type_t<T> expected, std::common_type_t<T> v) {
  const T old = *at;
  if (old == expected) *at = v;
  return old;
}

// ------------------------------------------------------------------------------------------------------ arithmetic

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using C = std::common_type_t<A, B>;
  return static_cast<C>(b) < static_cast<C>(a) ? static_cast<C>(b) : static_cast<C>(a);
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using C = std::common_type_t<A, B>;
  return static_cast<C>(a) < static_cast<C>(b) ? static_cast<C>(b) : static_cast<C>(a);
}

namespace emu {
template <typename To, typename From>
To bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &v, sizeof to);
  return to;
}
}  // namespace emu

inline unsigned __float_as_uint(float v) { return emu::bits<unsigned>(v); }
inline int __float_as_int(float v) { return emu::bits<int>(v); }
inline float __uint_as_float(unsigned v) { return emu::bits<float>(v); }
inline float __int_as_float(int v) { return emu::bits<float>(v); }

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline unsigned __brev(unsigned v) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (v >> i & 1u) << (31 - i);
  return r;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned select) {
  const uint64_t both = static_cast<uint64_t>(y) << 32 | x;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned s = select >> (4 * i) & 0xFu;
    unsigned byte = static_cast<unsigned>(both >> (8 * (s & 7u))) & 0xFFu;
    if (s & 8u) byte = byte & 0x80u ? 0xFFu : 0u;  // the sign, replicated
    r |= byte << (8 * i);
  }
  return r;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (by & 31u) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (by & 31u));
}

// The device's are approximations, to two units in the last place or so; these round correctly.
inline float rsqrtf(float v) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(v))); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float v) { return 1.f / v; }
inline float __saturatef(float v) { return v > 0.f ? (v < 1.f ? v : 1.f) : 0.f; }

template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
void __stcs(T* p, T v) {
  *p = v;
}
