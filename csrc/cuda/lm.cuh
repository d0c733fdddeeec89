// What the kernels of this folder use of CUDA beyond the plain language, under names that a host compiler can serve
// too: shared memory, launches, inline PTX. nvcc compiles the definitions below; with LM_EMULATE, tests/cuda_on_cpu
// puts its own lm_emulated.h in their place and runs the same kernels on the CPU. No kernel holds asm or <<<>>> of its
// own.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>  // before the 16-bit headers, which use its functions on the host
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../common/host_device.h"

#if defined(LM_EMULATE)

#include "lm_emulated.h"

#else

#include <cuda_runtime.h>

// A kernel's argument that is indexed at run time: stays where the launch put it.
#define LM_GRID_CONSTANT __grid_constant__

// LM_SHARED(float, tile, [32][33]); one static shared array.
#define LM_SHARED(type, name, dims) __shared__ __align__(16) type name dims

// LM_DYN_SHARED(float, base); the launch's dynamic shared memory; one in a kernel.
#define LM_DYN_SHARED(type, name)                                    \
  extern __shared__ __align__(16) unsigned char lm_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(lm_dynamic_shared)

namespace lm {

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   const Args&... args) {
  if (shared_bytes > 48 * 1024) {  // beyond that a kernel has to ask
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Params>(args)...);
  return cudaPeekAtLastError();
}

// Multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
  return count > 0 ? count : 1;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes to shared memory behind the thread's back; only the first `bytes` (0..16) are read, the rest are
// zeros.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most `kPending` of this thread's latest groups are under way; other threads need a barrier after it.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements from shared memory: lane i gives the address of row i % 8 of matrix i / 8 (16
// bytes), and receives of each matrix elements (lane / 4, 2 * (lane % 4)) and the next one; transposed: (2 * (lane %
// 4), lane / 4) and the one below.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a * b on the tensor cores: a 16x16, b 16x8, d 16x8 in fp32. With g = lane / 4 and q = lane % 4 a lane holds
//   a[0]: (g, 2q..)   a[1]: (g + 8, 2q..)   a[2]: (g, 2q + 8..)   a[3]: (g + 8, 2q + 8..)      pairs along a row
//   b[0]: (2q.., g)   b[1]: (2q + 8.., g)                                                      pairs along a column
//   d0, d1: (g, 2q), (g, 2q + 1)            d2, d3: the same of row g + 8
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float& d0, float& d1, float& d2, float& d3, const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float& d0, float& d1, float& d2, float& d3,
                                                            const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float& d0, float& d1, float& d2, float& d3, const uint32_t (&a)[4],
                                                     const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace lm

#endif  // LM_EMULATE

namespace lm {

// ---------------------------------------------------------------------------------------------- elements and vectors

enum class DType : int { kFloat, kHalf, kBFloat16 };

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

// Two neighbours in one 32-bit register, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}
template <>
__device__ __forceinline__ uint32_t pack2<__half>(float low, float high) {
  const __half2 v = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}

template <typename T>
__device__ __forceinline__ float2 unpack2(uint32_t v);
template <>
__device__ __forceinline__ float2 unpack2<__nv_bfloat16>(uint32_t v) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&v));
}
template <>
__device__ __forceinline__ float2 unpack2<__half>(uint32_t v) {
  return __half22float2(*reinterpret_cast<const __half2*>(&v));
}

// A matrix in global memory with any strides. `vec`: columns are adjacent and every row starts on 16 bytes.
template <typename T>
struct View {
  T* data;
  int64_t row_stride, col_stride;
  bool vec;

  LM_HD T* at(int64_t row, int64_t col) const { return data + row * row_stride + col * col_stride; }
};

// Whether the kernels may take a matrix of `item`-byte elements sixteen bytes at a time.
inline bool vectors_fit(const void* data, int64_t row_stride, int64_t col_stride, size_t item) {
  return col_stride == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
         row_stride * static_cast<int64_t>(item) % 16 == 0;
}

template <typename T>
View<T> make_view(T* data, int64_t row_stride, int64_t col_stride) {
  return View<T>{data, row_stride, col_stride, vectors_fit(data, row_stride, col_stride, sizeof(T))};
}

// The same with the element type known only at run time: an adapter's matrix, read once a tile.
struct AnyView {
  const void* data;
  int64_t row_stride, col_stride;
  DType dtype;
  bool vec;

  template <typename T>
  LM_HD View<const T> as() const {
    return View<const T>{static_cast<const T*>(data), row_stride, col_stride, vec};
  }
};

inline AnyView make_view(const void* data, DType dtype, int64_t row_stride, int64_t col_stride) {
  const size_t item = dtype == DType::kFloat ? 4 : 2;
  return AnyView{data, row_stride, col_stride, dtype, vectors_fit(data, row_stride, col_stride, item)};
}

// Eight neighbours of a row as they lie in memory: half the registers of eight floats for a 16-bit type.
template <typename T>
struct alignas(16) Raw8 {
  uint32_t w[2 * sizeof(T)];

  __device__ __forceinline__ void to_floats(float (&v)[8]) const {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = __uint_as_float(w[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack2<T>(w[i]);
        v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
      }
    }
  }
};

// These take 16 bytes at a time: m.vec must hold, `col` be a multiple of 8, and all eight columns be there.
template <typename T>
__device__ __forceinline__ Raw8<std::remove_const_t<T>> load_raw8(const View<T>& m, int64_t row, int64_t col) {
  Raw8<std::remove_const_t<T>> raw;
  const auto* from = reinterpret_cast<const uint4*>(m.at(row, col));
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) {
    const uint4 piece = from[i];
    raw.w[4 * i] = piece.x, raw.w[4 * i + 1] = piece.y, raw.w[4 * i + 2] = piece.z, raw.w[4 * i + 3] = piece.w;
  }
  return raw;
}

__device__ __forceinline__ void load8_aligned(const AnyView& m, int64_t row, int64_t col, float (&v)[8]) {
  switch (m.dtype) {  // the same for all threads
    case DType::kFloat: load_raw8(m.as<float>(), row, col).to_floats(v); break;
    case DType::kHalf: load_raw8(m.as<__half>(), row, col).to_floats(v); break;
    case DType::kBFloat16: load_raw8(m.as<__nv_bfloat16>(), row, col).to_floats(v); break;
  }
}

template <typename T>
__device__ __forceinline__ void store8(const View<T>& m, int64_t row, int64_t col, const float (&v)[8]) {
  auto* to = reinterpret_cast<uint4*>(m.at(row, col));
  if constexpr (sizeof(T) == 4) {
    to[0] = make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
    to[1] = make_uint4(__float_as_uint(v[4]), __float_as_uint(v[5]), __float_as_uint(v[6]), __float_as_uint(v[7]));
  } else {
    to[0] = make_uint4(pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3]), pack2<T>(v[4], v[5]), pack2<T>(v[6], v[7]));
  }
}

// Two neighbours, the first at a multiple of two elements.
template <typename T>
__device__ __forceinline__ void store2(T* to, float first, float second) {
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float2*>(to) = make_float2(first, second);
  } else {
    *reinterpret_cast<uint32_t*>(to) = pack2<T>(first, second);
  }
}

__device__ __forceinline__ float load1(const AnyView& m, int64_t row, int64_t col) {
  switch (m.dtype) {
    case DType::kHalf: return to_float(*m.as<__half>().at(row, col));
    case DType::kBFloat16: return to_float(*m.as<__nv_bfloat16>().at(row, col));
    default: return *m.as<float>().at(row, col);
  }
}

}  // namespace lm
