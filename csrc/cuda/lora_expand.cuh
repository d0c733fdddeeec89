// out = accumulate * out + mask o (ds a) / (1 - p): the rank-r update of dx (and of y, without a mask). Bound by
// memory: it reads out once (or not at all), writes it once, and takes the product from tensor cores on the way.
//
// A block owns 32 x 128 tiles of out and walks down its column. Warp w holds columns 32w .. 32w + 31; in it, with
// g = lane / 4 and q = lane % 4, a lane holds eight neighbours, 8q .. 8q + 7, of rows g, g + 8, g + 16, g + 24: 16
// bytes of a 16-bit row at once, one Philox block, one byte of a packed mask. The mma's column order does not give that
// by itself, so column 8q + 2j + e of `a` is staged as column 2q + e of the warp's j-th 8-wide tile.
#pragma once

#include "../common/philox.h"
#include "lm.cuh"

namespace lm {

enum class Keep : int { kAll, kBits, kSeed };

template <typename T>
struct ExpandArgs {
  View<T> out;
  View<const T> ds;      // [rows, r]
  AnyView a;             // [r, cols]
  const uint32_t* mask;  // Keep::kBits: [rows, ceil(cols / 32)]
  int64_t mask_stride;
  const int64_t* seed;  // Keep::kSeed: on the device, so that drawing it costs no synchronisation
  int64_t rows;
  int cols, r;
  uint32_t threshold, child;
  float inv_keep;
  bool accumulate;
};

template <typename T>
struct ExpandShape {
  static constexpr int kThreads = 128, kRows = 32, kCols = 128;
  static constexpr int kStep = sizeof(T) == 4 ? 4 : 16;   // the product's unit along r
  static constexpr int kRank = sizeof(T) == 4 ? 32 : 64;  // ranks staged at once
  static constexpr int kPad = 16 / sizeof(T);             // one 16-byte column: no bank conflicts
  static constexpr int kAStride = kCols + kPad, kDsStride = kRank + kPad;
};

// Where column `e` of eight neighbours lies in a staged row of `a`, from the place of the first one.
template <typename T>
__device__ __forceinline__ int staged_column(int e) {
  return sizeof(T) == 4 ? e : e / 2 * 8 + e % 2;
}

// Stages ranks [r0, r0 + depth) of a's 128 columns, converted to T, zeros outside; depth is a multiple of kStep. Loops
// are kept rolled: they are short, and unrolled they would take registers from the tile in flight.
template <typename T>
__device__ __forceinline__ void stage_a(const ExpandArgs<T>& p, T* a_s, int col0, int r0, int depth) {
  using Shape = ExpandShape<T>;
#pragma unroll 1
  for (int i = threadIdx.x; i < depth * (Shape::kCols / 8); i += Shape::kThreads) {
    const int k = i / (Shape::kCols / 8), chunk = i % (Shape::kCols / 8);
    const int col = col0 + chunk * 8;
    T* to = a_s + k * Shape::kAStride + (sizeof(T) == 4 ? chunk * 8 : chunk / 4 * 32 + chunk % 4 * 2);
    if (p.a.vec && r0 + k < p.r && col + 8 <= p.cols) {
      float v[8];
      load8_aligned(p.a, r0 + k, col, v);
#pragma unroll
      for (int e = 0; e < 8; e += 2) store2(to + staged_column<T>(e), v[e], v[e + 1]);
    } else {
#pragma unroll 1
      for (int e = 0; e < 8; ++e) {
        const bool inside = r0 + k < p.r && col + e < p.cols;
        to[staged_column<T>(e)] = from_float<T>(inside ? load1(p.a, r0 + k, col + e) : 0.f);
      }
    }
  }
}

// Stages rows [row0, row0 + 32) of ds, the same ranks.
template <typename T>
__device__ __forceinline__ void stage_ds(const ExpandArgs<T>& p, T* ds_s, int64_t row0, int r0, int depth) {
  using Shape = ExpandShape<T>;
  const int chunks = (depth + 7) / 8;
#pragma unroll 1
  for (int i = threadIdx.x; i < Shape::kRows * chunks; i += Shape::kThreads) {
    const int row = i / chunks, k = i % chunks * 8;
    const bool inside = row0 + row < p.rows;
    T* to = ds_s + row * Shape::kDsStride + k;
    if (p.ds.vec && inside && r0 + k + 8 <= p.r) {
      *reinterpret_cast<Raw8<T>*>(to) = load_raw8(p.ds, row0 + row, r0 + k);
    } else {
#pragma unroll 1
      for (int e = 0; e < 8; ++e) {
        to[e] = inside && r0 + k + e < p.r ? *p.ds.at(row0 + row, r0 + k + e) : from_float<T>(0.f);
      }
    }
  }
}

// acc[i][e] += sum over the staged ranks of ds[8 i + g] * a[.., 8 q + e]
template <typename T>
__device__ __forceinline__ void tile_product(float (&acc)[4][8], const T* a_s, const T* ds_s, int depth, int warp,
                                             int lane) {
  using Shape = ExpandShape<T>;
  if constexpr (sizeof(T) == 4) {
    const float* a = a_s + warp * 32 + lane % 4 * 8;
    const float* d = ds_s + lane / 4 * Shape::kDsStride;
    for (int k = 0; k < depth; k += 4) {
      float4 left[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) left[i] = *reinterpret_cast<const float4*>(d + 8 * i * Shape::kDsStride + k);
#pragma unroll
      for (int kk = 0; kk < 4; ++kk) {
        const float4 low = *reinterpret_cast<const float4*>(a + (k + kk) * Shape::kAStride);
        const float4 high = *reinterpret_cast<const float4*>(a + (k + kk) * Shape::kAStride + 4);
        const float right[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float x = kk == 0 ? left[i].x : kk == 1 ? left[i].y : kk == 2 ? left[i].z : left[i].w;
#pragma unroll
          for (int e = 0; e < 8; ++e) acc[i][e] += x * right[e];
        }
      }
    }
  } else {
#pragma unroll 1
    for (int k = 0; k < depth; k += 16) {
      uint32_t right[4][2];
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        uint32_t r[4];
        ldmatrix_x4_trans(r, a_s + (k + lane % 16) * Shape::kAStride + warp * 32 + (j + lane / 16) * 8);
        right[j][0] = r[0], right[j][1] = r[1], right[j + 1][0] = r[2], right[j + 1][1] = r[3];
      }
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        uint32_t left[4];
        ldmatrix_x4(left, ds_s + (i * 8 + lane % 16) * Shape::kDsStride + k + lane / 16 * 8);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          mma_m16n8k16<T>(acc[i][2 * j], acc[i][2 * j + 1], acc[i + 1][2 * j], acc[i + 1][2 * j + 1], left, right[j]);
        }
      }
    }
  }
}

// The keep bits of the eight columns from `col` on.
template <Keep kKeep, typename T>
__device__ __forceinline__ uint32_t keep8(const ExpandArgs<T>& p, int64_t row, int col) {
  if constexpr (kKeep == Keep::kBits) {
    return p.mask[row * p.mask_stride + col / 32] >> (col % 32) & 0xFFu;
  } else if constexpr (kKeep == Keep::kSeed) {
    const auto seed = static_cast<uint64_t>(*p.seed);  // from the cache each time: held, it would cost two registers
    return keep_bits8(seed, static_cast<uint32_t>(col / 8), static_cast<uint32_t>(row), p.child, p.threshold);
  } else {
    return 0xFFu;
  }
}

// The row's end, and matrices whose rows do not start on 16 bytes: one element at a time.
template <typename T>
__device__ __forceinline__ void add_ragged(const View<T>& out, int64_t row, int col, int cols, bool accumulate,
                                           const float (&v)[8]) {
  T* at = out.at(row, col);
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    if (col + e >= cols) break;
    *at = from_float<T>(accumulate ? to_float(*at) + v[e] : v[e]);
    at += out.col_stride;
  }
}

template <typename T, Keep kKeep>
__global__ void __launch_bounds__(ExpandShape<T>::kThreads, sizeof(T) == 4 ? 4 : 5)
    masked_expand_kernel(const ExpandArgs<T> p) {
  using Shape = ExpandShape<T>;
  LM_SHARED(T, a_s, [Shape::kRank * Shape::kAStride]);
  LM_SHARED(T, ds_s, [Shape::kRows * Shape::kDsStride]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
  const int col0 = blockIdx.x * Shape::kCols, col = col0 + warp * 32 + lane % 4 * 8;
  const int64_t tiles = (p.rows + Shape::kRows - 1) / Shape::kRows;
  const bool whole = p.out.vec && col + 8 <= p.cols;
  bool staged = false;

  for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
    const int64_t row0 = tile * Shape::kRows;
    Raw8<T> old[4];
    if (p.accumulate) {  // on its way while the product is made
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = row0 + 8 * i + g;
        if (whole && row < p.rows) old[i] = load_raw8(p.out, row, col);
      }
    }
    float acc[4][8] = {};
    for (int r0 = 0; r0 < p.r; r0 += Shape::kRank) {
      const int left = min(p.r - r0, Shape::kRank);
      const int depth = (left + Shape::kStep - 1) / Shape::kStep * Shape::kStep;
      if (staged) __syncthreads();  // everyone is done with the last tiles
      if (!staged || p.r > Shape::kRank) stage_a(p, a_s, col0, r0, depth);
      stage_ds(p, ds_s, row0, r0, depth);
      staged = true;
      __syncthreads();
      tile_product(acc, a_s, ds_s, depth, warp, lane);
    }
    if (col >= p.cols) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = row0 + 8 * i + g;
      if (row >= p.rows) break;
      const uint32_t keep = keep8<kKeep>(p, row, col);
#pragma unroll
      for (int e = 0; e < 8; ++e) acc[i][e] = keep >> e & 1u ? acc[i][e] * p.inv_keep : 0.f;  // 0 * inf would be no 0
      if (whole) {
        float before[8] = {};
        if (p.accumulate) old[i].to_floats(before);
#pragma unroll
        for (int e = 0; e < 8; ++e) acc[i][e] += before[e];
        store8(p.out, row, col, acc[i]);
      } else {
        add_ragged(p.out, row, col, p.cols, p.accumulate, acc[i]);
      }
    }
  }
}

template <typename T, Keep kKeep>
cudaError_t masked_expand_as(const ExpandArgs<T>& p, cudaStream_t stream) {
  using Shape = ExpandShape<T>;
  const int64_t columns = (p.cols - 1) / Shape::kCols + 1, tiles = (p.rows + Shape::kRows - 1) / Shape::kRows;
  // about four rounds of blocks: enough to even out, few enough that staging `a` once a block costs nothing
  const int64_t wanted = static_cast<int64_t>(multiprocessors()) * 20;
  const int64_t tiles_per_block = (tiles * columns + wanted - 1) / wanted;
  int64_t down = (tiles + tiles_per_block - 1) / tiles_per_block;
  down = down < 65535 ? down : 65535;
  const dim3 grid(static_cast<unsigned>(columns), static_cast<unsigned>(down));
  return launch(masked_expand_kernel<T, kKeep>, grid, dim3(Shape::kThreads), 0, stream, p);
}

// Launches the kernel; nothing to do where out is empty. `mask` wins over `seed`; neither is read where threshold is 0.
template <typename T>
cudaError_t masked_expand(const ExpandArgs<T>& p, cudaStream_t stream) {
  if (p.rows == 0 || p.cols == 0) return cudaSuccess;
  if (p.threshold == 0) return masked_expand_as<T, Keep::kAll>(p, stream);
  if (p.mask != nullptr) return masked_expand_as<T, Keep::kBits>(p, stream);
  return masked_expand_as<T, Keep::kSeed>(p, stream);
}

}  // namespace lm
