// The lowbit_optim kernels in AVX-512 (F, BW, DQ, VL: every AVX-512 server core).
#include <cstdlib>

#include "common/philox.h"
#include "cpu/lowbit_optim_impl.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#include "cpu/target.h"

#if !defined(__clang__)  // GCC 12's own header starts its undefined vectors from themselves, and warns of it
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

LM_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

namespace lm {
namespace {

#include "common/codec_math.h"
// each needs the one before it
#include "cpu/lowbit_optim_single.h"

struct Wide512 {
  using F = __m512;
  using I = __m512i;
  using M = __mmask16;
  static constexpr int kWidth = 16, kDraw = 64;

  static F set(float v) { return _mm512_set1_ps(v); }
  static I seti(int32_t v) { return _mm512_set1_epi32(v); }
  static F from_bits(I v) { return _mm512_castsi512_ps(v); }
  static I bits(F v) { return _mm512_castps_si512(v); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F root(F a) { return _mm512_sqrt_ps(a); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm512_min_ps(b, a); }  // as Scalar: the first where one is NaN
  static F max(F a, F b) { return _mm512_max_ps(b, a); }
  static I addi(I a, I b) { return _mm512_add_epi32(a, b); }
  static I subi(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I andi(I a, I b) { return _mm512_and_si512(a, b); }
  static I ori(I a, I b) { return _mm512_or_si512(a, b); }
  template <int n>
  static I shl(I a) {
    return _mm512_slli_epi32(a, n);
  }
  template <int n>
  static I sra(I a) {
    return _mm512_srai_epi32(a, n);
  }
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  static I to_int(F v) { return _mm512_cvtps_epi32(v); }
  static I trunc(F v) { return _mm512_cvttps_epi32(v); }
  static M less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static M lessi(I a, I b) { return _mm512_cmplt_epi32_mask(a, b); }
  static F select(M m, F a, F b) { return _mm512_mask_blend_ps(m, b, a); }
  static I selecti(M m, I a, I b) { return _mm512_mask_blend_epi32(m, b, a); }
  static F lookup(const float* table, I i) {
    return _mm512_permutexvar_ps(i, _mm512_castps256_ps512(_mm256_loadu_ps(table)));
  }
  static I maxi(I a, I b) { return _mm512_max_epi32(a, b); }
  static M both(M a, M b) { return _kand_mask16(a, b); }
  static F exponent(F x) { return _mm512_getexp_ps(x); }
  static F mantissa(F x) { return _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src); }
  static F whole(F v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F times_power(F p, F n) { return _mm512_scalef_ps(p, n); }

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static I load_bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store_bytes(uint8_t* p, I v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v)); }
  static I load_words(const uint16_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store_words(uint16_t* p, I v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v));
  }
  static I minu(I a, I b) { return _mm512_min_epu32(a, b); }
  static uint32_t top(I v) { return static_cast<uint32_t>(_mm512_reduce_max_epi32(v)); }
  static uint32_t bottom(I v) { return _mm512_reduce_min_epu32(v); }

  // Eight counters, one in the low half of each 64-bit lane, placed so that the last interleave leaves their words in
  // order.
  static void draw(uint64_t seed, int64_t block, uint32_t step, uint16_t* to) {
    const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
    const __m512i at = _mm512_add_epi64(_mm512_set1_epi64(block), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7));
    const __m512i low = _mm512_set1_epi64(0xffffffffll);
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    __m512i c0 = _mm512_and_si512(at, low), c1 = _mm512_srli_epi64(at, 32);
    __m512i c2 = _mm512_set1_epi64(step), c3 = _mm512_setzero_si512();
    for (int round = 0; round < 10; ++round) {
      const __m512i p0 = _mm512_mul_epu32(m0, c0), p1 = _mm512_mul_epu32(m1, c2);
      c0 = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(p1, 32), c1), _mm512_set1_epi64(k0));
      c2 = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(p0, 32), c3), _mm512_set1_epi64(k1));
      c1 = p1;  // their high halves hold more: only the low ones count
      c3 = p0;
      k0 += kPhiloxW0;
      k1 += kPhiloxW1;
    }
    const __m512i w01 = _mm512_mask_blend_epi32(0xAAAA, c0, _mm512_slli_epi64(c1, 32));
    const __m512i w23 = _mm512_mask_blend_epi32(0xAAAA, c2, _mm512_slli_epi64(c3, 32));
    _mm512_storeu_si512(to, _mm512_unpacklo_epi64(w01, w23));
    _mm512_storeu_si512(to + 32, _mm512_unpackhi_epi64(w01, w23));
  }
};

#include "cpu/lowbit_optim_kernels.h"

constexpr LowbitIsa kIsa = kernels_of<Wide512>("avx512");

}  // namespace

const LowbitIsa* lowbit_avx512() { return &kIsa; }

}  // namespace lm

LM_TARGET_END

#else

namespace lm {
const LowbitIsa* lowbit_avx512() { return nullptr; }
}  // namespace lm

#endif
