// What CMake's `kernels` target and the compile tests look at: the launcher of family lowbit_optim, without torch,
// brings every kernel of its along. Nothing here is run.
#include "cuda/lowbit_optim.cuh"

cudaError_t look_at_the_step(lm::AdamTable& table, const lm::AdamOptions& options, cudaStream_t stream) {
  return lm::lowbit_adamw(table, options, stream);
}
