// Family `lora` on CUDA devices: the kernels, without torch (raw pointers, sizes, a stream).
#pragma once

#include "lora_dy.cuh"
#include "lora_expand.cuh"
