// y = x W^T + bias for at most 64 rows of x on the tensor cores, from the packed bytes.
//
// W is the mma's left factor, 16 rows a warp, and x its right one: eight rows of x cost one instruction for each 16 x
// 16 of W. A block owns 64 rows of W and a range of K, 128 elements of it at a time: codes and x arrive through a ring
// of cp.async, scales are decoded one chunk ahead. Weights are rounded to x's dtype once, as a dequantized weight is.
// The order of K inside a product is free, so a lane takes eight neighbours, 8q .. 8q + 7 of 32, as its elements (2q,
// 2q + 1, 2q + 8, 2q + 9) of two products, of W and of x alike: one access each, no exchange.
//
// Where 64-row blocks are too few for the GPU, K is split, and quant_sum_kernel adds the fp32 parts in order.
#pragma once

#include "quant_codes.cuh"
#include "quant_gemv.cuh"

namespace lm {

template <typename T>
struct MmaArgs {
  QuantView w;
  const T* x;     // [experts * m, k], adjacent, on 16 bytes
  T* y;           // [experts * m, n], adjacent
  const T* bias;  // [n] or null
  float* parts;   // [splits, experts * m, n] where splits > 1
  int64_t row0, k;
  int n, m, tiles;  // of eight rows of x
  int chunks_each;  // of a split
};

template <typename C, int kTiles>
struct MmaShape {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = 16 * kWarps, kDepth = 128;
  static constexpr int kStages = kTiles == 1 ? 4 : 3;
  // strides without bank conflicts: of bytes of W, and of elements of x
  static constexpr int kCodeStride = kDepth * C::kBits / 8 + (C::kBits == 3 ? 32 : 16), kXStride = kDepth + 32;
  static constexpr int kGroups = kDepth / 16, kScaleStride = kGroups + 1;  // scales of a row's chunk
  static constexpr int kCodes = kRows * kCodeStride, kScales = kRows * kScaleStride;

  // Elements of a stage's x, and all shared memory, for `tiles` times eight rows of x.
  static LM_HD int x_elements(int tiles) { return tiles * 8 * kXStride; }
  static size_t shared(int tiles) {
    const int scales = sizeof(float) * 2 * kScales * (C::kTable ? 1 : 2);
    return static_cast<size_t>(kStages * (kCodes + 2 * x_elements(tiles)) + scales);
  }
};

// Decodes the scales (and zeros) of 64 rows' groups in [col, col + count).
template <typename T, typename C, typename Shape>
__device__ __forceinline__ void stage_scales(const MmaArgs<T>& p, float* scale_s, float* zero_s, int64_t row0, int n0,
                                             int64_t col, int count) {
#pragma unroll 1
  for (int i = threadIdx.x; i < Shape::kRows * Shape::kGroups; i += Shape::kThreads) {
    const int r = i / Shape::kGroups, g = i % Shape::kGroups;
    const int64_t row = row0 + (n0 + r < p.n ? n0 + r : p.n - 1);
    const Groups groups = groups_from<C>(p.w, row, col);
    if (g > (groups.lead + count - 1) >> groups.log2) continue;
    scale_s[r * Shape::kScaleStride + g] = scale_at(p.w, groups.first + g);
    if (!C::kTable) zero_s[r * Shape::kScaleStride + g] = zero_at(p.w, groups.first + g);
  }
}

// Requests a chunk's codes and x; rows of x beyond m are zeros.
template <typename T, typename C, typename Shape>
__device__ __forceinline__ void request_chunk(const MmaArgs<T>& p, uint8_t* codes_s, T* x_s, int64_t row0, int n0,
                                              int64_t x0, int64_t col, int count) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
  for (int r = warp * 16 + lane / 8; r < warp * 16 + 16; r += 4) {  // eight lanes a row
    const int64_t row = row0 + (n0 + r < p.n ? n0 + r : p.n - 1);
    const uint8_t* run = C::kTable ? p.w.packed : p.w.packed + row * row_bytes(C::kBits, p.w.k);
    stage_codes<C>(codes_s + r * Shape::kCodeStride, run, (C::kTable ? row * p.w.k : 0) + col, count, true, lane % 8,
                   8);
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < p.tiles * Shape::kDepth; i += Shape::kThreads) {
    const int m = i / (Shape::kDepth / 8), e = i % (Shape::kDepth / 8) * 8;
    const bool inside = m < p.m && e < count;
    cp_async16(x_s + m * Shape::kXStride + e, inside ? p.x + (x0 + m) * p.k + col + e : p.x, inside ? 16 : 0);
  }
}

template <typename T, typename C, int kTiles>
__global__ void __launch_bounds__(MmaShape<C, kTiles>::kThreads, kTiles == 1 ? 4 : 3) mma_kernel(const MmaArgs<T> p) {
  using Shape = MmaShape<C, kTiles>;
  LM_SHARED(float, table, [16]);
  LM_DYN_SHARED(uint8_t, base);
  T* x_base = reinterpret_cast<T*>(base + Shape::kStages * Shape::kCodes);
  const int x_stage = Shape::x_elements(p.tiles);
  float* scale_base = reinterpret_cast<float*>(x_base + Shape::kStages * x_stage);
  float* zero_base = scale_base + 2 * Shape::kScales;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
  const int n0 = blockIdx.x * Shape::kRows;
  const int64_t row0 = p.row0 + static_cast<int64_t>(blockIdx.z) * p.n, x0 = static_cast<int64_t>(blockIdx.z) * p.m;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * p.chunks_each * Shape::kDepth;
  const int64_t stop = min(p.k, first + static_cast<int64_t>(p.chunks_each) * Shape::kDepth);
  const int chunks = static_cast<int>((stop - first + Shape::kDepth - 1) / Shape::kDepth);
  auto depth_of = [&](int chunk) {
    const int64_t left = stop - first - static_cast<int64_t>(chunk) * Shape::kDepth;
    return static_cast<int>(left < Shape::kDepth ? left : Shape::kDepth);
  };
  auto request = [&](int chunk) {
    if (chunk < chunks) {
      const int stage = chunk % Shape::kStages;
      request_chunk<T, C, Shape>(p, base + stage * Shape::kCodes, x_base + stage * x_stage, row0, n0, x0,
                                 first + static_cast<int64_t>(chunk) * Shape::kDepth, depth_of(chunk));
    }
    cp_async_commit();
  };
  auto scales = [&](int chunk) {
    if (chunk >= chunks) return;
    stage_scales<T, C, Shape>(p, scale_base + chunk % 2 * Shape::kScales, zero_base + chunk % 2 * Shape::kScales, row0,
                              n0, first + static_cast<int64_t>(chunk) * Shape::kDepth, depth_of(chunk));
  };

  const int mine[2] = {warp * 16 + group, warp * 16 + group + 8};  // rows of the block
  int64_t starts[2];                                               // of their runs
  const uint8_t* runs[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t row = row0 + (n0 + mine[h] < p.n ? n0 + mine[h] : p.n - 1);
    starts[h] = C::kTable ? row * p.w.k : 0;
    runs[h] = C::kTable ? p.w.packed : p.w.packed + row * row_bytes(C::kBits, p.w.k);
  }
  float acc[kTiles][4] = {};
#pragma unroll
  for (int stage = 0; stage < Shape::kStages - 1; ++stage) request(stage);
  fill_table<C>(table, p.w.spec.format);
  scales(0);
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    cp_async_wait<Shape::kStages - 2>();
    __syncthreads();  // this chunk is there for all, and all are done with the last one
    request(chunk + Shape::kStages - 1);
    scales(chunk + 1);
    const int stage = chunk % Shape::kStages, depth = depth_of(chunk);
    const T* x_s = x_base + stage * x_stage + group * Shape::kXStride + quad * 8;
    const float* scale_s = scale_base + chunk % 2 * Shape::kScales;
    const float* zero_s = zero_base + chunk % 2 * Shape::kScales;
    const uint8_t* bytes[2];
    int lead[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t start = starts[h] + first + static_cast<int64_t>(chunk) * Shape::kDepth;
      bytes[h] = base + stage * Shape::kCodes + mine[h] * Shape::kCodeStride +
                 reinterpret_cast<uintptr_t>(runs[h] + row_bytes(C::kBits, start)) % 16;
      lead[h] = !C::kTable && p.w.spec.per_row() ? 0 : static_cast<int>(start & ((1 << p.w.spec.log2_group) - 1));
    }
    const int log2 = !C::kTable && p.w.spec.per_row() ? 30 : p.w.spec.log2_group;
#pragma unroll 1
    for (int e = 0; e < depth; e += 32) {
      uint32_t a[2][4];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int at = e + quad * 8, g = mine[h] * Shape::kScaleStride + ((lead[h] + at) >> log2);
        float v[8];
        units8<C>(bytes[h], at, table, C::kTable ? 0.f : zero_s[g], v);
        const float scale = scale_s[g];
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = mul_rounded(v[i], scale);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          a[i][h] = pack2<T>(v[4 * i], v[4 * i + 1]), a[i][h + 2] = pack2<T>(v[4 * i + 2], v[4 * i + 3]);
        }
      }
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        if (t >= p.tiles) break;
        const uint4 x = *reinterpret_cast<const uint4*>(x_s + t * 8 * Shape::kXStride + e);
        const uint32_t low[2] = {x.x, x.y}, high[2] = {x.z, x.w};
        mma_m16n8k16<T>(acc[t][0], acc[t][1], acc[t][2], acc[t][3], a[0], low);
        mma_m16n8k16<T>(acc[t][0], acc[t][1], acc[t][2], acc[t][3], a[1], high);
      }
    }
  }
  cp_async_wait<0>();  // the groups left are empty
  const int64_t all = static_cast<int64_t>(gridDim.z) * p.m;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int m = 8 * t + 2 * quad + i % 2, n = n0 + mine[i / 2];
      if (m >= p.m || n >= p.n) continue;
      const int64_t at = (x0 + m) * p.n + n;
      if (gridDim.y > 1) {
        p.parts[blockIdx.y * all * p.n + at] = acc[t][i];
      } else {
        p.y[at] = from_float<T>(acc[t][i] + (p.bias ? to_float(p.bias[n]) : 0.f));
      }
    }
  }
}

// y = parts[0] + parts[1] + ... + bias, in this order.
template <typename T>
__global__ void __launch_bounds__(256, 8)
    quant_sum_kernel(const float* parts, T* y, const T* bias, int64_t count, int n, int splits) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= count) return;
  float sum = 0.f;
  for (int s = 0; s < splits; ++s) sum += parts[s * count + i];
  y[i] = from_float<T>(sum + (bias ? to_float(bias[i % n]) : 0.f));
}

// How K is split: about four blocks a multiprocessor, at least four chunks each.
struct MmaPlan {
  int splits, chunks_each;
  int64_t floats;  // of the partial results, 0 without
};

inline MmaPlan mma_plan(int64_t experts, int64_t m, int64_t n, int64_t k) {
  const int64_t chunks = (k + 127) / 128, tiles = (n + 63) / 64 * experts;
  int64_t splits = tiles > 0 ? static_cast<int64_t>(multiprocessors()) * 4 / tiles : 1;
  splits = splits > chunks / 4 ? chunks / 4 : splits;
  splits = splits < 1 ? 1 : splits > 64 ? 64 : splits;
  const int64_t each = chunks > 0 ? (chunks + splits - 1) / splits : 1;
  splits = chunks > 0 ? (chunks + each - 1) / each : 1;
  return MmaPlan{static_cast<int>(splits), static_cast<int>(each), splits > 1 ? splits * experts * m * n : 0};
}

// Whether the kernel serves a weight whose products are `k` deep: rows start at granules of 32.
inline bool mma_serves(const QuantView& w, int64_t k) { return gemv_serves(w, k) && k % 32 == 0; }

template <typename T, typename C, int kTiles>
cudaError_t mma_as(const MmaArgs<T>& p, int experts, const MmaPlan& plan, cudaStream_t stream) {
  using Shape = MmaShape<C, kTiles>;
  const dim3 grid(static_cast<unsigned>((p.n + Shape::kRows - 1) / Shape::kRows), static_cast<unsigned>(plan.splits),
                  static_cast<unsigned>(experts));
  return launch(mma_kernel<T, C, kTiles>, grid, dim3(Shape::kThreads), Shape::shared(p.tiles), stream, p);
}

// Products of `experts` weights of p.n rows each with p.m <= 64 rows of x each; p.parts holds plan.floats.
template <typename T>
cudaError_t mma(MmaArgs<T> p, int experts, const MmaPlan& plan, cudaStream_t stream) {
  if (p.m == 0 || p.n == 0 || experts == 0) return cudaSuccess;
  if (p.m > 64 || experts > 65535 || !mma_serves(p.w, p.k) || reinterpret_cast<uintptr_t>(p.x) % 16) {
    return cudaErrorInvalidValue;
  }
  p.chunks_each = plan.chunks_each, p.tiles = (p.m + 7) / 8;
  const cudaError_t error = for_codes(p.w.spec, [&](auto codes) {
    using C = decltype(codes);
    return p.m <= 8 ? mma_as<T, C, 1>(p, experts, plan, stream) : mma_as<T, C, 8>(p, experts, plan, stream);
  });
  if (error != cudaSuccess || plan.splits == 1) return error;
  const int64_t count = static_cast<int64_t>(experts) * p.m * p.n;
  return launch(quant_sum_kernel<T>, dim3(static_cast<unsigned>((count + 255) / 256)), dim3(256), 0, stream, p.parts,
                p.y, p.bias, count, p.n, plan.splits);
}

}  // namespace lm
