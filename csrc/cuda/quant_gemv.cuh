// y = x W^T + bias for at most eight rows of x, from the packed bytes: bound by reading them once.
//
// A warp owns two rows of W, so that what it loads of x serves both, and walks along them 1024 elements at a time
// through a ring of cp.async of its own: no barrier but the warp's. Products are made in fp32 on the plain units from
// x in any dtype; a group's scale multiplies the sum of eight, not each weight.
#pragma once

#include "quant_codes.cuh"

namespace lm {

struct GemvArgs {
  QuantView w;
  AnyView x;  // [experts * m, k]; any strides, sixteen bytes at a time where `vec`
  void* y;    // [experts * m, n], adjacent, in x's dtype
  const void* bias;
  int64_t row0, k;
  int n, m;
};

struct GemvShape {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = 2, kStages = 3, kChunk = 1024;
  static constexpr int kPasses = kChunk / 256;  // of eight elements a lane
};

__device__ __forceinline__ void store_as(void* to, DType dtype, int64_t i, float v) {
  switch (dtype) {
    case DType::kFloat: static_cast<float*>(to)[i] = v; break;
    case DType::kHalf: static_cast<__half*>(to)[i] = from_float<__half>(v); break;
    case DType::kBFloat16: static_cast<__nv_bfloat16*>(to)[i] = from_float<__nv_bfloat16>(v); break;
  }
}

// Eight elements of x, where there is no other way one at a time.
__device__ __forceinline__ void load_x8(const AnyView& x, int64_t row, int64_t col, float (&v)[8]) {
  if (x.vec) {
    load8_aligned(x, row, col, v);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = load1(x, row, col + i);
  }
}

template <typename C, int kM>
__global__ void __launch_bounds__(GemvShape::kThreads, kM == 1 ? 7 : 4) gemv_kernel(const GemvArgs p) {
  using Shape = GemvShape;
  constexpr int kR = Shape::kRows;
  LM_SHARED(float, table, [16]);
  LM_SHARED(uint8_t, ring, [Shape::kWarps][Shape::kStages][kR][C::template kWindow<Shape::kChunk>]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  fill_table<C>(table, p.w.spec.format);
  __syncthreads();
  const int n0 = (blockIdx.x * Shape::kWarps + warp) * kR;
  if (n0 >= p.n) return;
  const int64_t row0 = p.row0 + static_cast<int64_t>(blockIdx.y) * p.n;
  const int64_t x0 = static_cast<int64_t>(blockIdx.y) * p.m;

  int64_t rows[kR], starts[kR];
  Groups groups[kR];
#pragma unroll
  for (int r = 0; r < kR; ++r) {
    rows[r] = row0 + (n0 + r < p.n ? n0 + r : p.n - 1);
    starts[r] = C::kTable ? rows[r] * p.w.k : 0;
    groups[r] = groups_from<C>(p.w, rows[r], 0);
  }
  const int chunks = static_cast<int>((p.k + Shape::kChunk - 1) / Shape::kChunk);
  auto request = [&](int chunk) {
    if (chunk < chunks) {
      const int64_t col = static_cast<int64_t>(chunk) * Shape::kChunk, left = p.k - col;
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        const uint8_t* run = C::kTable ? p.w.packed : p.w.packed + rows[r] * row_bytes(C::kBits, p.w.k);
        stage_codes<C>(ring[warp][chunk % Shape::kStages][r], run, starts[r] + col,
                       static_cast<int>(left < Shape::kChunk ? left : Shape::kChunk), true, lane, 32);
      }
    }
    cp_async_commit();  // an empty group where nothing is left: the count of groups stays that of chunks
  };

  float acc[kR][kM] = {};
#pragma unroll
  for (int stage = 0; stage < Shape::kStages - 1; ++stage) request(stage);
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    request(chunk + Shape::kStages - 1);
    cp_async_wait<Shape::kStages - 1>();
    __syncwarp();
    const int64_t col0 = static_cast<int64_t>(chunk) * Shape::kChunk;
#pragma unroll
    for (int pass = 0; pass < Shape::kPasses; ++pass) {
      const int e = 256 * pass + 8 * lane;
      const int64_t col = col0 + e;
      if (col >= p.k) break;
      float unit[kR][8], scale[kR];
#pragma unroll
      for (int r = 0; r < kR; ++r) {
        const int64_t group = groups[r].first + ((groups[r].lead + col) >> groups[r].log2);
        const int64_t start = starts[r] + col0;
        const uint8_t* begin = C::kTable ? p.w.packed : p.w.packed + rows[r] * row_bytes(C::kBits, p.w.k);
        begin += row_bytes(C::kBits, start / C::kUnit * C::kUnit);
        const uint8_t* bytes = ring[warp][chunk % Shape::kStages][r] + reinterpret_cast<uintptr_t>(begin) % 16;
        scale[r] = scale_at(p.w, group);
        units8<C>(bytes, static_cast<int>(start % C::kUnit) + e, table, C::kTable ? 0.f : zero_at(p.w, group), unit[r]);
      }
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        if (m >= p.m) break;
        float x[8];
        load_x8(p.x, x0 + m, col, x);
#pragma unroll
        for (int r = 0; r < kR; ++r) {
          float sum = 0.f;
#pragma unroll
          for (int i = 0; i < 8; ++i) sum += unit[r][i] * x[i];
          acc[r][m] += sum * scale[r];
        }
      }
    }
    __syncwarp();  // all lanes are done with the stage that the next round's copies fill
  }
#pragma unroll
  for (int r = 0; r < kR; ++r) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      if (m >= p.m) break;
      float sum = acc[r][m];
#pragma unroll
      for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, by);
      if (lane == 0 && n0 + r < p.n) {
        const float bias = p.bias ? load1(AnyView{p.bias, 0, 1, p.x.dtype, false}, 0, n0 + r) : 0.f;
        store_as(p.y, p.x.dtype, (x0 + m) * p.n + n0 + r, sum + bias);
      }
    }
  }
}

// Whether the kernel serves a weight whose products are `k` deep: windows start at multiples of eight elements, codes
// can be copied sixteen bytes at a time.
inline bool gemv_serves(const QuantView& w, int64_t k) {
  bool served = false;
  for_codes(w.spec, [&](auto codes) {
    served = k > 0 && k == w.k && k % 8 == 0 && copies_wide<decltype(codes)>(w);
    return cudaSuccess;
  });
  return served;
}

// Products of `experts` weights of p.n rows each, one behind the other, with p.m <= 8 rows of x each.
inline cudaError_t gemv(const GemvArgs& p, int experts, cudaStream_t stream) {
  using Shape = GemvShape;
  if (p.m == 0 || p.n == 0 || experts == 0) return cudaSuccess;
  if (p.m > 8 || experts > 65535 || !gemv_serves(p.w, p.k)) return cudaErrorInvalidValue;
  constexpr int kBlockRows = Shape::kWarps * Shape::kRows;
  const dim3 grid(static_cast<unsigned>((p.n + kBlockRows - 1) / kBlockRows), static_cast<unsigned>(experts));
  return for_codes(p.w.spec, [&](auto codes) {
    using C = decltype(codes);
    return launch(p.m == 1 ? gemv_kernel<C, 1> : gemv_kernel<C, 8>, grid, dim3(Shape::kThreads), 0, stream, p);
  });
}

}  // namespace lm
