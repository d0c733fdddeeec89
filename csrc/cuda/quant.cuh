// Family `quant` on CUDA devices: the kernels, without torch (raw pointers, sizes, a stream).
#pragma once

#include "quant_dequantize.cuh"
#include "quant_gemv.cuh"
#include "quant_mma.cuh"
