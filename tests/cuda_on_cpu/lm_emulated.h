// The host's definitions of what csrc/cuda/lm.cuh declares for nvcc: the same names, the semantics of PTX.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cuda_shim.h"

// A place in the block's arena instead of a static variable, which would keep the last block's values.
#define LM_GRID_CONSTANT
#define LM_SHARED(type, name, dims) \
  using name##_array = type dims;   \
  static const char name##_key = 0; \
  name##_array& name = *static_cast<name##_array*>(::emu::static_shared(&name##_key, sizeof(name##_array), 16))

#define LM_DYN_SHARED(type, name) type* name = static_cast<type*>(::emu::dynamic_shared())

namespace lm {

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                   const Args&... args) {
  emu::run_grid(grid, block, shared_bytes, [&] { kernel(static_cast<Params>(args)...); });
  return cudaSuccess;
}

inline int multiprocessors() { return emu::settings().multiprocessors; }

inline void cp_async16(void* shared, const void* global, int bytes, emu::Site site = emu::Site::here()) {
  emu::async_copy16(shared, global, bytes, site);
}
inline void cp_async_commit() { emu::async_commit(); }
template <int kPending>
void cp_async_wait() {
  emu::async_wait(kPending);
}

namespace emulated {

struct LoadMatrix {
  const unsigned char* row;
  uint32_t* result;
};

// Element (row, col) of matrix m: the 16 bits at the address that lane 8 m + row gave.
inline uint16_t matrix_element(void** slots, int m, int row, int col) {
  uint16_t v;
  std::memcpy(&v, static_cast<LoadMatrix*>(slots[8 * m + row])->row + 2 * col, 2);
  return v;
}

template <bool kTransposed>
void load_matrices(uint32_t (&r)[4], const void* row, emu::Site site) {
  constexpr const char* kName = kTransposed ? "ldmatrix.trans" : "ldmatrix";
  if (!emu::is_shared(row, 16)) emu::fail(std::string(kName) + ": the row is not in shared memory");
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emu::fail(std::string(kName) + ": the row is not on 16 bytes");
  LoadMatrix mine{static_cast<const unsigned char*>(row), r};
  emu::warp_meet(
      0xFFFFFFFFu, kName, &mine,
      [](void** slots, uint32_t) {
        uint32_t all[32][4];
        for (int lane = 0; lane < 32; ++lane) {
          for (int m = 0; m < 4; ++m) {
            uint32_t pair[2];
            for (int i = 0; i < 2; ++i) {
              const int outer = lane / 4, inner = lane % 4 * 2 + i;
              pair[i] = kTransposed ? matrix_element(slots, m, inner, outer) : matrix_element(slots, m, outer, inner);
            }
            all[lane][m] = pair[0] | pair[1] << 16;
          }
        }
        for (int lane = 0; lane < 32; ++lane) {
          std::memcpy(static_cast<LoadMatrix*>(slots[lane])->result, all[lane], sizeof all[lane]);
        }
      },
      site);
}

template <typename T>
struct Mma {
  float* d[4];
  const uint32_t *a, *b;
};

template <typename T>
float half_of(uint32_t pair, int i) {
  const auto bits = static_cast<uint16_t>(pair >> (16 * i));
  const T v = *reinterpret_cast<const T*>(&bits);
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(v);
  } else {
    return __bfloat162float(v);
  }
}

template <typename T>
void multiply(void** slots, uint32_t) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* me = static_cast<const Mma<T>*>(slots[lane]);
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < 2; ++i) {
      a[g][2 * q + i] = half_of<T>(me->a[0], i);
      a[g + 8][2 * q + i] = half_of<T>(me->a[1], i);
      a[g][2 * q + 8 + i] = half_of<T>(me->a[2], i);
      a[g + 8][2 * q + 8 + i] = half_of<T>(me->a[3], i);
      b[2 * q + i][g] = half_of<T>(me->b[0], i);
      b[2 * q + 8 + i][g] = half_of<T>(me->b[1], i);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto* me = static_cast<Mma<T>*>(slots[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
      float sum = *me->d[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][col];
      *me->d[i] = sum;
    }
  }
}

}  // namespace emulated

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, emu::Site site = emu::Site::here()) {
  emulated::load_matrices<false>(r, row, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, emu::Site site = emu::Site::here()) {
  emulated::load_matrices<true>(r, row, site);
}

template <typename T>
void mma_m16n8k16(float& d0, float& d1, float& d2, float& d3, const uint32_t (&a)[4], const uint32_t (&b)[2],
                  emu::Site site = emu::Site::here()) {
  emulated::Mma<T> mine{{&d0, &d1, &d2, &d3}, a, b};
  emu::warp_meet(0xFFFFFFFFu, "mma.m16n8k16", &mine, emulated::multiply<T>, site);
}

}  // namespace lm
