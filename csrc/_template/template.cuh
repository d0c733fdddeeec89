// Family `template` on CUDA devices, the kernel alone: no torch here. Copy to csrc/cuda/<family>.cuh.
//
// The same source is compiled by nvcc, and by a host compiler that runs it on the CPU (tests/cuda_on_cpu). So what goes
// beyond the plain language (shared memory, launches, inline PTX) is used through the names of lm.cuh.
#pragma once

#include <cstdint>

#include "lm.cuh"

namespace lm {

// One thread an element, a grid-stride loop: any size is served by any grid. 64-bit indices: m * row_stride passes
// 2**31.
template <typename T>
__global__ void template_scale_kernel(const T* __restrict__ x, int64_t row_stride, int64_t col_stride,
                                      T* __restrict__ y, int64_t rows, int64_t cols, float alpha) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * cols; i += step) {
    const int64_t m = i / cols, k = i % cols;
    y[i] = from_float<T>(alpha * to_float(x[m * row_stride + k * col_stride]));
  }
}

}  // namespace lm
