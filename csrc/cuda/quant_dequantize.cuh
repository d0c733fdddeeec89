// out[i, j] = W[row0 + i, col0 + j], any block of a packed weight into a matrix of any strides, in one launch: nested
// scales are decoded on the way. Bound by memory: it reads the codes once and writes out once.
//
// A block owns up to 8192 neighbours of one row (of the whole matrix, where rows lie end to end). It stages their codes
// by 16-byte cp.async, and decodes their scales into shared memory meanwhile, one group a thread; then each thread
// takes eight elements four times and stores 16 bytes of a 16-bit type, neighbours beside neighbours. Blocks hide each
// other's latency: none has a loop over tiles.
#pragma once

#include "quant_codes.cuh"

namespace lm {

template <typename T>
struct DequantizeArgs {
  QuantView w;
  View<T> out;
  int64_t row0, col0, cols;
  unsigned tiles;  // of a row
  bool wide;       // copies_wide
};

struct DequantizeShape {
  static constexpr int kThreads = 256, kPasses = 4, kElements = 8 * kPasses;  // the last two of a thread
  static constexpr int kTile = kThreads * kElements, kGroups = kTile / 16 + 1;
};

template <typename T, typename C>
__global__ void __launch_bounds__(DequantizeShape::kThreads, 6) dequantize_kernel(const DequantizeArgs<T> p) {
  using Shape = DequantizeShape;
  LM_SHARED(float, table, [16]);
  LM_SHARED(uint8_t, staged, [C::template kWindow<Shape::kTile>]);
  LM_SHARED(float, scale_s, [Shape::kGroups]);
  LM_SHARED(float, zero_s, [C::kTable ? 1 : Shape::kGroups]);
  const int thread = threadIdx.x, threads = blockDim.x;
  const unsigned i = blockIdx.x / p.tiles;
  const int64_t out_col = static_cast<int64_t>(blockIdx.x - i * p.tiles) * (threads * Shape::kElements);
  const int64_t left = p.cols - out_col, row = p.row0 + i, col = p.col0 + out_col;
  const int count = static_cast<int>(left < threads * Shape::kElements ? left : threads * Shape::kElements);

  const uint8_t* run = C::kTable ? p.w.packed : p.w.packed + row * row_bytes(C::kBits, p.w.k);
  const int64_t start = C::kTable ? row * p.w.k + col : col;
  const Window window = stage_codes<C>(staged, run, start, count, p.wide, thread, threads);
  cp_async_commit();
  fill_table<C>(table, p.w.spec.format);
  const Groups groups = groups_from<C>(p.w, row, col);
  const int last = (groups.lead + count - 1) >> groups.log2;
  for (int g = thread; g <= last; g += threads) {
    scale_s[g] = scale_at(p.w, groups.first + g);
    if (!C::kTable) zero_s[g] = zero_at(p.w, groups.first + g);
  }
  cp_async_wait<0>();
  __syncthreads();

  const uint8_t* bytes = staged + window.lead;
  const bool whole = p.out.vec && window.first % 8 == 0;
#pragma unroll
  for (int pass = 0; pass < Shape::kPasses; ++pass) {
    const int e = 8 * (pass * threads + thread);
    if (e >= count) break;
    if (whole && e + 8 <= count) {
      const int g = (groups.lead + e) >> groups.log2;
      float v[8];
      units8<C>(bytes, window.first + e, table, C::kTable ? 0.f : zero_s[g], v);
      const float scale = scale_s[g];
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = mul_rounded(v[j], scale);
      store8(p.out, i, out_col + e, v);
    } else {  // the end of a row, and places that eight elements do not share
      const int stop = count - e < 8 ? count - e : 8;
#pragma unroll 1
      for (int j = 0; j < stop; ++j) {
        const int g = (groups.lead + e + j) >> groups.log2;
        const uint32_t code = code_at<C::kBits>(bytes, window.first + e + j);
        const float unit = unit_of<C>(code, table, C::kTable ? 0.f : zero_s[g]);
        *p.out.at(i, out_col + e + j) = from_float<T>(mul_rounded(unit, scale_s[g]));
      }
    }
  }
}

template <typename T, typename C>
cudaError_t dequantize_as(DequantizeArgs<T> p, int64_t rows, cudaStream_t stream) {
  using Shape = DequantizeShape;
  p.wide = copies_wide<C>(p.w);
  const bool bytes_end_with_rows = C::kTable || row_bytes(C::kBits, p.w.k) * 8 == p.w.k * C::kBits;
  const bool one_by_one = p.col0 == 0 && p.cols == p.w.k && p.out.row_stride == p.cols && p.out.col_stride == 1;
  if (rows > 1 && one_by_one && bytes_end_with_rows && !(!C::kTable && p.w.spec.per_row())) {  // rows end to end: one
    p.col0 = p.row0 * p.w.k, p.row0 = 0;
    p.cols *= rows, p.w.k = p.col0 + p.cols;
    rows = 1;
    p.out = make_view(p.out.data, p.cols, int64_t{1});
    p.out.vec = reinterpret_cast<uintptr_t>(p.out.data) % 16 == 0;
  }
  const int64_t threads_of_a_row = (p.cols + Shape::kElements - 1) / Shape::kElements;
  const int warps =
      threads_of_a_row >= Shape::kThreads ? Shape::kThreads / 32 : static_cast<int>(threads_of_a_row + 31) / 32;
  const int64_t width = int64_t{warps} * 32 * Shape::kElements, tiles = (p.cols + width - 1) / width;
  constexpr int64_t kMostBlocks = INT64_C(0x7FFFFFFF);
  if (tiles > kMostBlocks) return cudaErrorInvalidValue;
  p.tiles = static_cast<unsigned>(tiles);
  for (int64_t at = 0; at < rows;) {  // one launch, unless there are more rows than a grid has blocks
    const int64_t most = kMostBlocks / tiles, now = rows - at < most ? rows - at : most;
    const cudaError_t error = launch(dequantize_kernel<T, C>, dim3(static_cast<unsigned>(now * tiles)),
                                     dim3(static_cast<unsigned>(warps * 32)), 0, stream, p);
    if (error != cudaSuccess) return error;
    at += now, p.row0 += now, p.out.data += now * p.out.row_stride;
  }
  return cudaSuccess;
}

// out [rows, cols] from row row0 and column col0 of w on; nothing to do where it is empty.
template <typename T>
cudaError_t dequantize(const QuantView& w, const View<T>& out, int64_t rows, int64_t cols, int64_t row0, int64_t col0,
                       cudaStream_t stream) {
  if (rows == 0 || cols == 0) return cudaSuccess;
  const DequantizeArgs<T> p{w, out, row0, col0, cols, 0, false};
  return for_codes(w.spec, [&](auto codes) { return dequantize_as<T, decltype(codes)>(p, rows, stream); });
}

}  // namespace lm
