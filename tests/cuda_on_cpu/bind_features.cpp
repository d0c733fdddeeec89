// Small kernels, one for each part of the served subset, with results that plain Python can foretell.
#include <vector>

#include "binding.h"

namespace py = pybind11;

namespace {

using emu::Argument;

// Sums of 32 x threads values: shuffles inside warps, static shared memory across them.
__global__ void block_sums(const float* in, float* out, int64_t count) {
  LM_SHARED(float, sums, [32]);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  float v = i < count ? in[i] : 0.f;
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.f;
    for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) total += sums[w];
    out[blockIdx.x] = total;
  }
}

// For lane i of one warp: shuffles, votes, population counts, in columns.
__global__ void warp_row(const int* in, int* out) {
  const int lane = threadIdx.x, v = in[lane];
  const unsigned all = 0xFFFFFFFFu, odd = 0xAAAAAAAAu;
  int* row = out + lane * 10;
  row[0] = __shfl_sync(all, v, (lane + 5) % 32);
  row[1] = __shfl_up_sync(all, v, 3);
  row[2] = __shfl_down_sync(all, v, 3, 16);
  row[3] = __shfl_xor_sync(all, v, 9);
  row[4] = static_cast<int>(__ballot_sync(all, v > 0));
  row[5] = __any_sync(all, v == in[7]);
  row[6] = __all_sync(all, v > -1000);
  row[7] = lane % 2 ? __shfl_xor_sync(odd, v, 2) : -1;
  row[8] = __popc(static_cast<unsigned>(v));
  row[9] = __syncthreads_count(v > 0);
}

__global__ void histogram(const int* in, int* out, int count) {
  LM_DYN_SHARED(int, bins);
  for (int i = threadIdx.x; i < 16; i += blockDim.x) bins[i] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x)
    atomicAdd(&bins[in[i] & 15], 1);
  __syncthreads();
  for (int i = threadIdx.x; i < 16; i += blockDim.x) atomicAdd(&out[i], bins[i]);
}

// c = a b with a 16x16, b 16x8 in bf16: cp.async, ldmatrix (b transposed) and one mma.
__global__ void one_mma(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) {
  LM_SHARED(__nv_bfloat16, a_s, [16 * 16]);
  LM_SHARED(__nv_bfloat16, b_s, [16 * 16]);  // two tiles of eight columns, the second all zeros
  const int lane = threadIdx.x;
  lm::cp_async16(a_s + lane * 8, a + lane * 8, 16);
  lm::cp_async16(b_s + lane * 8, lane % 2 ? b : b + lane / 2 * 8, lane % 2 ? 0 : 16);
  lm::cp_async_commit();
  lm::cp_async_wait<0>();
  __syncwarp();
  uint32_t left[4], right[4];
  lm::ldmatrix_x4(left, a_s + lane % 16 * 16 + lane / 16 * 8);
  lm::ldmatrix_x4_trans(right, b_s + lane % 16 * 16 + lane / 16 * 8);
  float d[4] = {};
  const uint32_t first[2] = {right[0], right[1]};
  lm::mma_m16n8k16<__nv_bfloat16>(d[0], d[1], d[2], d[3], left, first);
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

}  // namespace

LM_BIND(m) {
  m.def("block_sums", [](const py::tuple& in_from, const py::tuple& out_from, int threads) {
    Argument in("in", in_from, false), out("out", out_from, true);
    lm::launch(block_sums, dim3(static_cast<unsigned>(out.cols())), dim3(threads), 0, nullptr,
               static_cast<const float*>(in.data()), static_cast<float*>(out.data()), in.cols());
    return out.result();
  });
  m.def("warp_row", [](const py::tuple& in_from, const py::tuple& out_from) {
    Argument in("in", in_from, false), out("out", out_from, true);
    lm::launch(warp_row, dim3(1), dim3(32), 0, nullptr, static_cast<const int*>(in.data()),
               static_cast<int*>(out.data()));
    return out.result();
  });
  m.def("histogram", [](const py::tuple& in_from, const py::tuple& out_from, int blocks, int threads) {
    Argument in("in", in_from, false), out("out", out_from, true);
    lm::launch(histogram, dim3(blocks), dim3(threads), 16 * sizeof(int), nullptr, static_cast<const int*>(in.data()),
               static_cast<int*>(out.data()), static_cast<int>(in.cols()));
    return out.result();
  });
  m.def("one_mma", [](const py::tuple& a_from, const py::tuple& b_from, const py::tuple& c_from) {
    Argument a("a", a_from, false), b("b", b_from, false), c("c", c_from, true);
    lm::launch(one_mma, dim3(1), dim3(32), 0, nullptr, static_cast<const __nv_bfloat16*>(a.data()),
               static_cast<const __nv_bfloat16*>(b.data()), static_cast<float*>(c.data()));
    return c.result();
  });
  m.def("byte_perm", [](unsigned x, unsigned y, unsigned s) { return __byte_perm(x, y, s); });
  m.def("umulhi", [](unsigned x, unsigned y) { return __umulhi(x, y); });
}
