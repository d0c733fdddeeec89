// The lora kernels in AVX-512 (F, BW, DQ, VL: every AVX-512 server core). fp32 sums for fp32, bf16 and fp16; fp64 for
// fp64.
#include "cpu/lora_impl.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdlib>

#include "common/philox.h"
#include "cpu/target.h"

#if !defined(__clang__)  // GCC 12's own header starts its undefined vectors from themselves, and warns of it
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

LM_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

namespace lm {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

#include "cpu/lora_avx512.h"
#include "cpu/lora_kernels.h"

constexpr LoraIsa kIsa = {"avx512",
                          {kernels_of<Float512, float>(kElementFloat), kernels_of<Double512, double>(kElementDouble),
                           kernels_of<Float512, BFloat16>(kElementFloat), kernels_of<Float512, Half>(kElementFloat)}};

}  // namespace

const LoraIsa* lora_avx512() { return &kIsa; }

}  // namespace lm

LM_TARGET_END

#else

namespace lm {
const LoraIsa* lora_avx512() { return nullptr; }
}  // namespace lm

#endif
