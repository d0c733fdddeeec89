// The lowbit_optim kernels without vector instructions: any processor.
#include <cstdlib>

#include "common/philox.h"
#include "cpu/lowbit_optim_impl.h"

namespace lm {
namespace {

#include "common/codec_math.h"
// each needs the one before it
#include "cpu/lowbit_optim_single.h"

// and the loops need that
#include "cpu/lowbit_optim_kernels.h"

constexpr LowbitIsa kIsa = kernels_of<Single>("plain");

}  // namespace

const LowbitIsa* lowbit_plain() { return &kIsa; }

}  // namespace lm
