// Kernels with one mistake each, and their sound twins (kSound): what the rig must catch, and must not complain about.
#pragma once

#include "cuda/lm.cuh"

namespace broken {

constexpr int kThreads = 64;

// out[i] = in[reversed i] through shared memory. The mistake: no barrier between writing and reading.
template <bool kSound>
__global__ void missing_barrier(const float* in, float* out) {
  LM_SHARED(float, tile, [kThreads]);
  tile[threadIdx.x] = in[threadIdx.x];
  if (kSound) __syncthreads();
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

// The mistake: threads beyond the data leave before a barrier that the others wait at.
template <bool kSound>
__global__ void early_return(const float* in, float* out, int count) {
  LM_SHARED(float, tile, [kThreads]);
  const int i = threadIdx.x;
  if (!kSound && i >= count) return;
  tile[i] = i < count ? in[i] : 0.f;
  __syncthreads();
  if (i < count) out[i] = tile[count - 1 - i];
}

// The mistake: two halves of the block wait at two barriers.
template <bool kSound>
__global__ void divergent_barrier(const float* in, float* out) {
  LM_SHARED(float, tile, [kThreads]);
  const int i = threadIdx.x;
  tile[i] = in[i];
  if (kSound) {
    __syncthreads();
  } else if (i < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[i] = tile[kThreads - 1 - i];
}

// The mistake: <= where < is meant, in what is written (kRead false) or in what is read.
template <bool kSound, bool kRead>
__global__ void off_by_one(const float* in, float* out, int count) {
  const int i = threadIdx.x;
  const int limit = kSound ? count : count + 1;
  if (i < (kRead ? count : limit)) out[i] = 1.f;
  if (kRead && i == 0) {
    float sum = 0.f;
    for (int k = 0; k < limit; ++k) sum += in[k];
    out[0] = sum;
  }
}

// out[row, col] = row. The mistake: the offset in 32 bits (through unsigned, so that it wraps instead of being
// undefined).
template <bool kSound>
__global__ void narrow_offset(float* out, int rows, int cols, int64_t stride) {
  for (int row = 0; row < rows; ++row) {
    const int64_t offset =
        kSound ? row * stride : static_cast<int32_t>(static_cast<uint32_t>(row) * static_cast<uint32_t>(stride));
    if (static_cast<int>(threadIdx.x) < cols) out[offset + threadIdx.x] = static_cast<float>(row);
  }
}

// The mistake: the copy is committed and nobody waits (for the last group; the wait leaves one under way).
template <bool kSound>
__global__ void missing_wait(const float* in, float* out) {
  LM_SHARED(float, tile, [4 * kThreads]);
  lm::cp_async16(tile + 4 * threadIdx.x, in + 4 * threadIdx.x, 16);
  lm::cp_async_commit();
  if (kSound) {
    lm::cp_async_wait<0>();
  } else {
    lm::cp_async_wait<1>();
  }
  __syncthreads();
  for (int i = 0; i < 4; ++i) out[i * kThreads + threadIdx.x] = tile[i * kThreads + threadIdx.x];
  if (!kSound) lm::cp_async_wait<0>();  // too late
}

// A pipeline of two stages. The mistake: the next tile's copies go into the stage that others still read.
template <bool kSound>
__global__ void overwritten_stage(const float* in, float* out, int tiles) {
  LM_SHARED(float, ring, [2 * 4 * kThreads]);
  auto fetch = [&](int t) {
    if (t < tiles) {
      lm::cp_async16(ring + t % 2 * 4 * kThreads + 4 * threadIdx.x, in + (t * kThreads + threadIdx.x) * 4, 16);
    }
    lm::cp_async_commit();
  };
  fetch(0);
  float sum = 0.f;
  for (int t = 0; t < tiles; ++t) {
    fetch(t + 1);
    lm::cp_async_wait<1>();
    __syncthreads();
    for (int i = 0; i < 4; ++i) sum += ring[t % 2 * 4 * kThreads + (4 * threadIdx.x + i + 7) % (4 * kThreads)];
    if (kSound) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

// The mistake: a sum in shared memory that only the first block sets to zero.
template <bool kSound>
__global__ void stale_shared(const float* in, float* out) {
  LM_SHARED(float, sum, [1]);
  if (threadIdx.x == 0 && (kSound || blockIdx.x == 0)) sum[0] = 0.f;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kThreads; ++i) sum[0] += in[blockIdx.x * kThreads + i];
  }
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = sum[0];
}

// The mistake: additions in the order of arrival, so that fp32 sums differ from run to run.
template <bool kSound>
__global__ void racing_sum(const float* in, float* out, int count) {
  if (kSound) {
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      float sum = 0.f;
      for (int i = 0; i < count; ++i) sum += in[i];
      out[0] = sum;
    }
    return;
  }
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) atomicAdd(out, in[i]);
}

// The mistake: sixteen bytes at once from an address that is a multiple of four.
template <bool kSound>
__global__ void misaligned(const float* in, float* out) {
  const float4 v = *reinterpret_cast<const float4*>(in + 4 * threadIdx.x + (kSound ? 0 : 1));
  out[threadIdx.x] = v.x + v.y + v.z + v.w;
}

// The mistake: a shuffle that names lanes which are elsewhere.
template <bool kSound>
__global__ void absent_lanes(const float* in, float* out) {
  const int i = threadIdx.x;
  float v = in[i];
  if (i % 32 < 16) v += __shfl_xor_sync(kSound ? 0x0000FFFFu : 0xFFFFFFFFu, v, 8);
  out[i] = v;
}

// The mistake: one element too many in shared memory, static or dynamic.
template <bool kSound>
__global__ void shared_overrun(const float* in, float* out) {
  LM_DYN_SHARED(float, tile);
  LM_SHARED(float, fixed, [kThreads]);
  tile[threadIdx.x + (kSound ? 0 : 1)] = in[threadIdx.x];
  fixed[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x] + fixed[threadIdx.x];
}

template <bool kSound>
__global__ void static_overrun(const float* in, float* out) {
  LM_SHARED(float, fixed, [kThreads]);
  fixed[threadIdx.x] = in[threadIdx.x];
  float* p = fixed;
  if (!kSound && threadIdx.x == 0) p[kThreads] = 1.f;
  __syncthreads();
  out[threadIdx.x] = fixed[kThreads - 1 - threadIdx.x];
}

// The mistake: waiting for another thread without a barrier. Nothing may spin in these kernels.
template <bool kSound>
__global__ void spinning(const float* in, float* out) {
  LM_SHARED(int, flag, [1]);
  if (threadIdx.x == 0) flag[0] = 0;
  __syncthreads();
  volatile int* seen = flag;
  if (kSound || threadIdx.x != 0) {
    *seen = 1;
  } else {
    while (*seen == 0) {
    }
  }
  out[threadIdx.x] = in[threadIdx.x];
}

}  // namespace broken
