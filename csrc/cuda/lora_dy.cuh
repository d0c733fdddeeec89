// dS = scale * dy B and dB = dy^T S in one read of dy, bit for bit repeatable.
//
// A grid of blocks owns dy in two dimensions: `panels` of columns times `slabs` of rows. A block keeps dB of its panel
// in registers while it walks down its slab, sixteen rows at a time, and finishes dS of each sixteen rows over its
// columns. Both leave as fp32 partials (dS one per panel, dB one per slab), which dy_reduce_kernel adds in a fixed
// order. Inside a block every warp owns columns of the panel: dB needs no exchange, and dS one sum over the eight
// warps, which alternates between two buffers so that one barrier per sixteen rows is enough. dy arrives through a ring
// of cp.async.
#pragma once

#include "lm.cuh"

namespace lm {

template <typename T>
struct DyArgs {
  View<const T> dy;  // [rows, cols]
  View<const T> s;   // [rows, r], from the first rank of this pass on
  AnyView b;         // [cols, r], likewise
  float* ds_part;    // [panels, rows, R]
  float* db_part;    // [slabs, cols, R]
  int64_t rows, cols, slab_rows;
  int r;  // of this pass, at most R
};

template <typename T, int R>
struct DyShape {
  static constexpr int kWarps = 8, kThreads = 32 * kWarps, kRows = 16, kStages = 4;
  static constexpr bool kTensorCores = sizeof(T) == 2;
  static constexpr int kWarpCols = kTensorCores && R <= 32 ? 64 : 32, kPanel = kWarps * kWarpCols;
  static constexpr int kChunk = 16 / sizeof(T), kRowChunks = kPanel / kChunk;  // 16-byte pieces
  static constexpr int kSStride = R + kChunk, kRedStride = R + 8;              // free of bank conflicts
  static constexpr int kDyTile = kRows * kPanel, kSTile = kRows * kSStride;    // elements of one stage
  static constexpr int kRedWarp = kRows * kRedStride, kRed = kWarps * kRedWarp;
  static constexpr int kBElements = kTensorCores ? 0 : kPanel * R;
  static constexpr size_t kShared = sizeof(T) * (kStages * (kDyTile + kSTile) + kBElements) + sizeof(float) * 2 * kRed;

  static_assert(kShared <= 163 * 1024, "a block must fit on sm_80");
  static_assert(R > 16 || 2 * (kShared + 1024) <= 227 * 1024, "two blocks must fit on sm_90");

  // Where piece `chunk` of a row lies: pieces change places within groups of eight, so that eight rows of one column,
  // or eight columns of one row, are in different banks.
  static __device__ __forceinline__ int at(int row, int chunk) { return row * kPanel + (chunk ^ (row & 7)) * kChunk; }
};

// Sixteen bytes of a row to shared memory, zeros from column `cols` on; `live` false gives zeros alone.
template <typename T>
__device__ __forceinline__ void stage16(T* to, const View<const T>& m, int64_t row, int64_t col, int64_t cols,
                                        bool live) {
  constexpr int kChunk = 16 / sizeof(T);
  if (m.vec) {
    const int64_t left = live ? cols - col : 0;
    const int count = left >= kChunk ? kChunk : left > 0 ? static_cast<int>(left) : 0;
    cp_async16(to, count > 0 ? m.at(row, col) : m.data, count * static_cast<int>(sizeof(T)));
    return;
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) to[i] = live && col + i < cols ? *m.at(row, col + i) : from_float<T>(0.f);
}

template <typename T, int R>
__device__ __forceinline__ void stage_tile(const DyArgs<T>& p, T* dy_s, T* s_s, int64_t row0, int64_t row_end,
                                           int64_t col0) {
  using Shape = DyShape<T, R>;
  for (int i = threadIdx.x; i < Shape::kRows * Shape::kRowChunks; i += Shape::kThreads) {
    const int row = i / Shape::kRowChunks, chunk = i % Shape::kRowChunks;
    stage16(dy_s + Shape::at(row, chunk), p.dy, row0 + row, col0 + chunk * Shape::kChunk, p.cols, row0 + row < row_end);
  }
  constexpr int kSChunks = R / Shape::kChunk;
  for (int i = threadIdx.x; i < Shape::kRows * kSChunks; i += Shape::kThreads) {
    const int row = i / kSChunks, chunk = i % kSChunks;
    stage16(s_s + row * Shape::kSStride + chunk * Shape::kChunk, p.s, row0 + row, chunk * Shape::kChunk, p.r,
            row0 + row < row_end);
  }
}

// A warp's share of the two products. 16-bit types: tensor cores, B's and dB's fragments in registers throughout.
template <typename T, int R, bool kTensorCores>
struct DyWarp {
  using Shape = DyShape<T, R>;
  static constexpr int kSteps = Shape::kWarpCols / 16, kRanks = R / 8;
  uint32_t b[kSteps][kRanks][2];
  float db[kSteps][kRanks][4];
  int warp, lane;

  __device__ __forceinline__ void load_b(const DyArgs<T>& p, T*, int64_t col0) {
    const int64_t first = col0 + warp * Shape::kWarpCols + lane % 4 * 2;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int n = 0; n < kRanks; ++n) {
        const int rank = n * 8 + lane / 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t col = first + step * 16 + half * 8;
          const float x = rank < p.r && col < p.cols ? load1(p.b, col, rank) : 0.f;
          const float y = rank < p.r && col + 1 < p.cols ? load1(p.b, col + 1, rank) : 0.f;
          b[step][n][half] = pack2<T>(x, y);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) db[step][n][i] = 0.f;
      }
    }
  }

  // Adds the tile's dy^T S onto db and writes this warp's part of dy B to `red` [16, kRedStride].
  __device__ __forceinline__ void tile(const T* dy_s, const T* s_s, const T*, float* red) {
    uint32_t s[kRanks][2];
#pragma unroll
    for (int n = 0; n < kRanks; n += 2) {
      uint32_t r[4];
      ldmatrix_x4_trans(r, s_s + lane % 16 * Shape::kSStride + (n + lane / 16) * 8);
      s[n][0] = r[0], s[n][1] = r[1], s[n + 1][0] = r[2], s[n + 1][1] = r[3];
    }
    float ds[kRanks][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int chunk = (warp * Shape::kWarpCols + step * 16) / 8;
      uint32_t rows[4], cols[4];
      ldmatrix_x4(rows, dy_s + Shape::at(lane % 16, chunk + lane / 16));
      ldmatrix_x4_trans(cols, dy_s + Shape::at(lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2));
#pragma unroll
      for (int n = 0; n < kRanks; ++n) {
        mma_m16n8k16<T>(ds[n][0], ds[n][1], ds[n][2], ds[n][3], rows, b[step][n]);
        mma_m16n8k16<T>(db[step][n][0], db[step][n][1], db[step][n][2], db[step][n][3], cols, s[n]);
      }
    }
#pragma unroll
    for (int n = 0; n < kRanks; ++n) {
      float* to = red + lane / 4 * Shape::kRedStride + n * 8 + lane % 4 * 2;
      *reinterpret_cast<float2*>(to) = make_float2(ds[n][0], ds[n][1]);
      *reinterpret_cast<float2*>(to + 8 * Shape::kRedStride) = make_float2(ds[n][2], ds[n][3]);
    }
  }

  __device__ __forceinline__ void store_db(float* part, int64_t col0, int64_t cols) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t col = col0 + warp * Shape::kWarpCols + step * 16 + half * 8 + lane / 4;
        if (col >= cols) continue;
#pragma unroll
        for (int n = 0; n < kRanks; ++n) {
          *reinterpret_cast<float2*>(part + col * R + n * 8 + lane % 4 * 2) =
              make_float2(db[step][n][2 * half], db[step][n][2 * half + 1]);
        }
      }
    }
  }
};

// fp32: plain multiply-adds. A lane holds 4 columns x 4 ranks of dB, and makes 2 rows x 4 ranks of dS; B is in shared
// memory, each warp its own columns.
template <int R>
struct DyWarp<float, R, false> {
  using Shape = DyShape<float, R>;
  static_assert(R == 16 && Shape::kWarpCols == 32, "the lanes' shares are laid out for 32 columns and 16 ranks");
  float db[4][4];
  int warp, lane;

  __device__ __forceinline__ void load_b(const DyArgs<float>& p, float* b_s, int64_t col0) {
    for (int i = lane; i < Shape::kWarpCols * R; i += 32) {
      const int64_t col = col0 + warp * Shape::kWarpCols + i / R;
      b_s[warp * Shape::kWarpCols * R + i] = i % R < p.r && col < p.cols ? load1(p.b, col, i % R) : 0.f;
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) db[i / 4][i % 4] = 0.f;
  }

  static __device__ __forceinline__ void load4(const float* from, float (&v)[4]) {
    const float4 all = *reinterpret_cast<const float4*>(from);
    v[0] = all.x, v[1] = all.y, v[2] = all.z, v[3] = all.w;
  }

  __device__ __forceinline__ void tile(const float* dy_s, const float* s_s, const float* b_s, float* red) {
    const int chunk0 = warp * Shape::kWarpCols / 4, rank = lane / 8 * 4;
    const float* b = b_s + warp * Shape::kWarpCols * R + rank;
    float ds[2][4] = {};
#pragma unroll
    for (int c = 0; c < Shape::kWarpCols / 4; ++c) {
      float x[2][4];
      load4(dy_s + Shape::at(lane % 8, chunk0 + c), x[0]);
      load4(dy_s + Shape::at(lane % 8 + 8, chunk0 + c), x[1]);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float y[4];
        load4(b + (c * 4 + k) * R, y);
#pragma unroll
        for (int i = 0; i < 8; ++i) ds[i / 4][i % 4] += x[i / 4][k] * y[i % 4];
      }
    }
    *reinterpret_cast<float4*>(red + lane % 8 * Shape::kRedStride + rank) =
        make_float4(ds[0][0], ds[0][1], ds[0][2], ds[0][3]);
    *reinterpret_cast<float4*>(red + (lane % 8 + 8) * Shape::kRedStride + rank) =
        make_float4(ds[1][0], ds[1][1], ds[1][2], ds[1][3]);
#pragma unroll
    for (int row = 0; row < Shape::kRows; ++row) {
      float x[4], y[4];
      load4(dy_s + Shape::at(row, chunk0 + lane % 8), x);
      load4(s_s + row * Shape::kSStride + rank, y);
#pragma unroll
      for (int i = 0; i < 16; ++i) db[i / 4][i % 4] += x[i / 4] * y[i % 4];
    }
  }

  __device__ __forceinline__ void store_db(float* part, int64_t col0, int64_t cols) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t col = col0 + warp * Shape::kWarpCols + lane % 8 * 4 + i;
      if (col >= cols) continue;
      *reinterpret_cast<float4*>(part + col * R + lane / 8 * 4) = make_float4(db[i][0], db[i][1], db[i][2], db[i][3]);
    }
  }
};

// Adds the warps' parts of sixteen rows of dS, in the warps' order, and writes them.
template <typename T, int R>
__device__ __forceinline__ void finish_rows(const float* red, float* part, int64_t row0, int64_t row_end) {
  using Shape = DyShape<T, R>;
#pragma unroll
  for (int i = threadIdx.x; i < Shape::kRows * R; i += Shape::kThreads) {
    const int row = i / R, rank = i % R;
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < Shape::kWarps; ++w) sum += red[w * Shape::kRedWarp + row * Shape::kRedStride + rank];
    if (row0 + row < row_end) part[(row0 + row) * R + rank] = sum;
  }
}

template <typename T, int R>
__global__ void __launch_bounds__(DyShape<T, R>::kThreads, R <= 16 ? 2 : 1) dy_kernel(const DyArgs<T> p) {
  using Shape = DyShape<T, R>;
  LM_DYN_SHARED(float, shared);
  float* red = shared;  // two buffers
  T* dy_s = reinterpret_cast<T*>(shared + 2 * Shape::kRed);
  T* s_s = dy_s + Shape::kStages * Shape::kDyTile;
  T* b_s = s_s + Shape::kStages * Shape::kSTile;
  const int64_t col0 = static_cast<int64_t>(blockIdx.x) * Shape::kPanel;
  const int64_t row_begin = static_cast<int64_t>(blockIdx.y) * p.slab_rows;
  const int64_t row_end = p.rows < row_begin + p.slab_rows ? p.rows : row_begin + p.slab_rows;
  const int tiles = static_cast<int>((row_end - row_begin + Shape::kRows - 1) / Shape::kRows);
  float* ds_part = p.ds_part + static_cast<int64_t>(blockIdx.x) * p.rows * R;

  auto stage = [&](int t) {
    const int slot = t % Shape::kStages;
    if (t < tiles) {
      stage_tile<T, R>(p, dy_s + slot * Shape::kDyTile, s_s + slot * Shape::kSTile,
                       row_begin + static_cast<int64_t>(t) * Shape::kRows, row_end, col0);
    }
    cp_async_commit();  // an empty group too: the wait below counts them
  };
  for (int t = 0; t < Shape::kStages - 1; ++t) stage(t);
  DyWarp<T, R, Shape::kTensorCores> mine;
  mine.warp = threadIdx.x / 32, mine.lane = threadIdx.x % 32;
  mine.load_b(p, b_s, col0);

  for (int t = 0; t < tiles; ++t) {
    cp_async_wait<Shape::kStages - 2>();
    __syncthreads();                // tile t is there, and everyone is done with tile t - 1
    stage(t + Shape::kStages - 1);  // into the place of tile t - 1
    const int slot = t % Shape::kStages;
    mine.tile(dy_s + slot * Shape::kDyTile, s_s + slot * Shape::kSTile, b_s,
              red + t % 2 * Shape::kRed + mine.warp * Shape::kRedWarp);
    if (t > 0) {
      finish_rows<T, R>(red + (t + 1) % 2 * Shape::kRed, ds_part,
                        row_begin + static_cast<int64_t>(t - 1) * Shape::kRows, row_end);
    }
  }
  __syncthreads();
  finish_rows<T, R>(red + (tiles + 1) % 2 * Shape::kRed, ds_part,
                    row_begin + static_cast<int64_t>(tiles - 1) * Shape::kRows, row_end);
  mine.store_db(p.db_part + static_cast<int64_t>(blockIdx.y) * p.cols * R, col0, p.cols);
}

// One sum over partials: out[row, i] = scale * sum_k part[k, row, i], k ascending; zeros where there are no partials.
template <typename T>
struct SumJob {
  const float* part;  // [parts, rows, width]
  T* out;             // [rows, >= r], adjacent columns
  int64_t rows, out_stride;
  int parts, width, r;
  float scale;
};

template <typename T>
__device__ __forceinline__ void ordered_sum(const SumJob<T>& job) {
  const int64_t groups = job.width / 4, count = job.rows * groups;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const int64_t row = i / groups;
    const int rank = static_cast<int>(i % groups) * 4;
    const float4* from = reinterpret_cast<const float4*>(job.part) + i;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
    for (int k = 0; k < job.parts; ++k) {
      const float4 v = from[k * count];
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    const float v[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (rank + e < job.r) job.out[row * job.out_stride + rank + e] = from_float<T>(v[e] * job.scale);
    }
  }
}

// Both results in one launch: blocks with blockIdx.y 0 add up dS, the others dB.
template <typename T>
__global__ void __launch_bounds__(256) dy_reduce_kernel(const SumJob<T> ds, const SumJob<float> db) {
  if (blockIdx.y == 0) {
    ordered_sum(ds);
  } else {
    ordered_sum(db);
  }
}

// How a problem is cut. It depends on the device (its number of multiprocessors), never on chance.
struct DyPlan {
  int width;  // ranks of one pass, padded
  int64_t panels, slabs, slab_rows;
  int64_t ds_floats, db_floats;  // of the workspace
};

template <typename T, int R>
DyPlan dy_plan_as(int64_t rows, int64_t cols) {
  using Shape = DyShape<T, R>;
  DyPlan plan{};
  plan.width = R;
  plan.panels = (cols + Shape::kPanel - 1) / Shape::kPanel;
  const int64_t blocks = static_cast<int64_t>(multiprocessors()) * (R <= 16 ? 2 : 1);  // one round of them
  int64_t slabs = plan.panels > 0 ? blocks / plan.panels : 1;
  slabs = slabs < 1 ? 1 : slabs > 65535 ? 65535 : slabs;
  constexpr int64_t kLeast = 4 * Shape::kRows;  // fewer rows do not pay for a block's start
  plan.slab_rows = (rows + slabs - 1) / slabs;
  plan.slab_rows = (plan.slab_rows + Shape::kRows - 1) / Shape::kRows * Shape::kRows;
  plan.slab_rows = plan.slab_rows < kLeast ? kLeast : plan.slab_rows;
  plan.slabs = (rows + plan.slab_rows - 1) / plan.slab_rows;
  plan.ds_floats = plan.panels * rows * R;
  plan.db_floats = plan.slabs * cols * R;
  return plan;
}

template <typename T>
DyPlan dy_plan(int64_t rows, int64_t cols, int64_t r) {
  if constexpr (sizeof(T) == 2) {
    if (r > 32) return dy_plan_as<T, 64>(rows, cols);
    if (r > 16) return dy_plan_as<T, 32>(rows, cols);
  }
  return dy_plan_as<T, 16>(rows, cols);
}

template <typename T, int R>
cudaError_t dy_pass_as(const DyArgs<T>& p, const DyPlan& plan, cudaStream_t stream) {
  using Shape = DyShape<T, R>;
  const dim3 grid(static_cast<unsigned>(plan.panels), static_cast<unsigned>(plan.slabs));
  return launch(dy_kernel<T, R>, grid, dim3(Shape::kThreads), Shape::kShared, stream, p);
}

// dS [rows, r] in T and dB [cols, r] in fp32, both with adjacent columns. `workspace` holds plan.ds_floats +
// plan.db_floats floats on 16 bytes. Ranks beyond the plan's width take further passes over dy, on the same workspace.
template <typename T>
cudaError_t dy(const DyPlan& plan, View<const T> dy, View<const T> s, AnyView b, int64_t rows, int64_t cols, int64_t r,
               float scale, T* ds, float* db, float* workspace, cudaStream_t stream) {
  DyArgs<T> p{dy, s, b, workspace, workspace + plan.ds_floats, rows, cols, plan.slab_rows, 0};
  const size_t b_bytes = b.dtype == DType::kFloat ? 4 : 2;
  for (int64_t r0 = 0; r0 < r; r0 += plan.width) {
    p.r = static_cast<int>(r - r0 < plan.width ? r - r0 : plan.width);
    p.s.data = s.data + r0 * s.col_stride;
    p.b.data = static_cast<const char*>(b.data) + r0 * b.col_stride * static_cast<int64_t>(b_bytes);
    cudaError_t error = cudaSuccess;
    if (rows > 0 && cols > 0) {
      if constexpr (sizeof(T) == 2) {
        error = plan.width == 64   ? dy_pass_as<T, 64>(p, plan, stream)
                : plan.width == 32 ? dy_pass_as<T, 32>(p, plan, stream)
                                   : dy_pass_as<T, 16>(p, plan, stream);
      } else {
        error = dy_pass_as<T, 16>(p, plan, stream);
      }
    }
    if (error != cudaSuccess) return error;
    const int panels = rows > 0 ? static_cast<int>(plan.panels) : 0,
              slabs = cols > 0 ? static_cast<int>(plan.slabs) : 0;
    const SumJob<T> ds_job{p.ds_part, ds + r0, rows, r, panels, plan.width, p.r, scale};
    const SumJob<float> db_job{p.db_part, db + r0, cols, r, slabs, plan.width, p.r, 1.f};
    const int64_t count = (rows > cols ? rows : cols) * (plan.width / 4), blocks = (count + 255) / 256;
    if (blocks == 0) return cudaSuccess;
    const dim3 grid(static_cast<unsigned>(blocks < 65536 ? blocks : 65536), 2);
    error = launch(dy_reduce_kernel<T>, grid, dim3(256), 0, stream, ds_job, db_job);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace lm
