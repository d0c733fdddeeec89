// LM_HD marks a function that is compiled for the host and, under nvcc, for the device. Headers of csrc/common hold
// nothing that needs torch, so that CUDA kernels, CPU kernels and the host emulator share one definition.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LM_HD __host__ __device__ __forceinline__
#else
#define LM_HD inline
#endif
