// The activation kernels in AVX-512 (F, BW, DQ, VL).
#include "cpu/activation_impl.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "common/fp8.h"
#include "cpu/target.h"

#if !defined(__clang__)  // vectors are passed by value between functions of this file alone
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

LM_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define LM_LANES_F16C

namespace lm {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

#include "cpu/activation_kernels.h"

}  // namespace

const ActivationIsa* activation_avx512() { return &kActivations; }

}  // namespace lm

LM_TARGET_END

#else

namespace lm {
const ActivationIsa* activation_avx512() { return nullptr; }
}  // namespace lm

#endif
