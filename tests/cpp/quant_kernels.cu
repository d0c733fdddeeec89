// What CMake's `kernels` target looks at: the launchers of family quant, instantiated without torch, bring every kernel
// of theirs along. Nothing here is run. fp16 differs from bf16 by the opcodes of conversions and products: it is left
// out.
#include "cuda/quant.cuh"

#define LM_LOOK_AT_DEQUANTIZE(T)                                                                                       \
  template cudaError_t lm::dequantize<T>(const lm::QuantView&, const lm::View<T>&, int64_t, int64_t, int64_t, int64_t, \
                                         cudaStream_t)
LM_LOOK_AT_DEQUANTIZE(float);
LM_LOOK_AT_DEQUANTIZE(__nv_bfloat16);
template cudaError_t lm::mma<__nv_bfloat16>(lm::MmaArgs<__nv_bfloat16>, int, const lm::MmaPlan&, cudaStream_t);

cudaError_t look_at_gemv(const lm::GemvArgs& p) { return lm::gemv(p, 1, nullptr); }
