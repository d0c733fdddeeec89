// What CMake's `kernels` target looks at: the launchers of family lora, instantiated without torch, bring every kernel
// of theirs along. Nothing here is run.
#include "cuda/lora.cuh"

template cudaError_t lm::masked_expand<float>(const lm::ExpandArgs<float>&, cudaStream_t);
template cudaError_t lm::masked_expand<__half>(const lm::ExpandArgs<__half>&, cudaStream_t);
template cudaError_t lm::masked_expand<__nv_bfloat16>(const lm::ExpandArgs<__nv_bfloat16>&, cudaStream_t);

#define LM_LOOK_AT_DY(T)                                                                                        \
  template lm::DyPlan lm::dy_plan<T>(int64_t, int64_t, int64_t);                                                \
  template cudaError_t lm::dy<T>(const lm::DyPlan&, lm::View<const T>, lm::View<const T>, lm::AnyView, int64_t, \
                                 int64_t, int64_t, float, T*, float*, float*, cudaStream_t)
LM_LOOK_AT_DY(float);
LM_LOOK_AT_DY(__half);
LM_LOOK_AT_DY(__nv_bfloat16);
