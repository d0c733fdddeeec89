// The lowrank kernels in AVX-512 (F, BW, DQ, VL), for fp32 and 16-bit floats; fp64 stays with the plain ones.
#include "cpu/lowrank_impl.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdlib>
#include <type_traits>

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

template <class W, class X>
struct Row {
  W* w;
  const X* x;
  int64_t cols;
  __m512 alpha, decay;

  __mmask16 valid(int64_t c) const {
    return static_cast<__mmask16>(c >= cols ? 0 : low_bits(int(cols - c < 16 ? cols - c : 16)));
  }
  __m512 value(int64_t c, __mmask16 bits) const {
    return _mm512_add_ps(_mm512_mul_ps(decay, read16(w + c, bits)), _mm512_mul_ps(alpha, read16(x + c, bits)));
  }
  void nearest(int64_t c) const {
    const __mmask16 bits = valid(c);
    write16(w + c, bits, value(c, bits));
  }
  // 16 numbers of 16 bits are added below the last bit that bf16 keeps, the rest is cut off; infinity and NaN stay.
  void stochastic(int64_t c, __m256i numbers) const {
    const __mmask16 bits = valid(c);
    const __m512 x = value(c, bits);
    const __m512i raw = _mm512_castps_si512(x);
    const __mmask16 special = _mm512_fpclass_ps_mask(x, 0x99);  // quiet and signalling NaN, both infinities
    const __m512i moved = _mm512_add_epi32(raw, _mm512_cvtepu16_epi32(numbers));
    const __m512i quiet =
        _mm512_mask_or_epi32(raw, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), raw, _mm512_set1_epi32(0x400000));
    const __m512i kept = _mm512_mask_blend_epi32(special, moved, quiet);
    _mm256_mask_storeu_epi16(w + c, bits, _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
  }
  void operator()(int64_t word, __m512i first, __m512i second) const {  // 64 columns
    stochastic(32 * word, _mm512_castsi512_si256(first));
    stochastic(32 * word + 16, _mm512_extracti64x4_epi64(first, 1));
    stochastic(32 * word + 32, _mm512_castsi512_si256(second));
    stochastic(32 * word + 48, _mm512_extracti64x4_epi64(second, 1));
  }
};

template <class W, class X>
void axpy(const AxpyArgs& a, int64_t row0, int64_t row1) {
  const __m512 alpha = _mm512_set1_ps(static_cast<float>(a.alpha)), decay = _mm512_set1_ps(static_cast<float>(a.decay));
  for (int64_t i = row0; i < row1; ++i) {
    const Row<W, X> row{static_cast<W*>(a.w) + i * a.ld_w, static_cast<const X*>(a.x) + i * a.ld_x, a.cols, alpha,
                        decay};
    if constexpr (std::is_same_v<W, BFloat16>) {
      if (a.stochastic) {
        halves512(a.seed, static_cast<uint32_t>(a.first_row + i), kRoundingChild, 0, (a.cols + 31) / 32, row);
        continue;
      }
    }
    for (int64_t c = 0; c < a.cols; c += 16) row.nearest(c);
  }
}

template <class R>
void adam(const AdamArgs& a, int64_t begin, int64_t end) {
  float* m = static_cast<float*>(a.m);
  float* v = static_cast<float*>(a.v);
  const R* r = static_cast<const R*>(a.r);
  R* n = static_cast<R*>(a.n);
  const __m512 b1 = _mm512_set1_ps(static_cast<float>(a.beta1)), b2 = _mm512_set1_ps(static_cast<float>(a.beta2));
  const __m512 c1 = _mm512_set1_ps(static_cast<float>(1 - a.beta1)),
               c2 = _mm512_set1_ps(static_cast<float>(1 - a.beta2));
  const __m512 bias1 = _mm512_set1_ps(static_cast<float>(a.bias1)), bias2 = _mm512_set1_ps(static_cast<float>(a.bias2));
  const __m512 eps = _mm512_set1_ps(static_cast<float>(a.eps));
  for (int64_t i = begin; i < end; i += 16) {
    const __mmask16 bits = static_cast<__mmask16>(low_bits(int(end - i < 16 ? end - i : 16)));
    const __m512 x = read16(r + i, bits);
    const __m512 mi = _mm512_add_ps(_mm512_mul_ps(b1, read16(m + i, bits)), _mm512_mul_ps(c1, x));
    const __m512 vi = _mm512_add_ps(_mm512_mul_ps(b2, read16(v + i, bits)), _mm512_mul_ps(_mm512_mul_ps(c2, x), x));
    write16(m + i, bits, mi);
    write16(v + i, bits, vi);
    const __m512 root = _mm512_add_ps(_mm512_sqrt_ps(_mm512_div_ps(vi, bias2)), eps);
    write16(n + i, bits, _mm512_div_ps(_mm512_div_ps(mi, bias1), root));
  }
}

constexpr LowrankKernels kKernels = {
    {{axpy<float, float>, axpy<float, float>},
     {nullptr, nullptr},
     {axpy<BFloat16, BFloat16>, axpy<BFloat16, float>},
     {axpy<Half, Half>, axpy<Half, float>}},
    {adam<float>, nullptr, adam<BFloat16>, adam<Half>},
};

}  // namespace

const LowrankKernels* lowrank_avx512() { return &kKernels; }

}  // namespace lm

LM_TARGET_END

#else

namespace lm {
const LowrankKernels* lowrank_avx512() { return nullptr; }
}  // namespace lm

#endif
