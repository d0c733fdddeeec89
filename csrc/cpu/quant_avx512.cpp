// The quant kernels in AVX-512 (F, BW, DQ, VL: every AVX-512 server core).
#include "cpu/quant_impl.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cpu/target.h"

#if !defined(__clang__)  // GCC 12's own header starts its undefined vectors from themselves, and warns of it
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

LM_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")

namespace lm {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

#include "cpu/quant_avx512.h"
#include "cpu/quant_kernels.h"

constexpr QuantKernels kKernels = kernels_of<Avx512>();

}  // namespace

const QuantKernels* quant_avx512() { return &kKernels; }

}  // namespace lm

LM_TARGET_END

#else

namespace lm {
const QuantKernels* quant_avx512() { return nullptr; }
}  // namespace lm

#endif
