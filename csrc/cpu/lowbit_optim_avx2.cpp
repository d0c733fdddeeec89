// The lowbit_optim kernels in AVX2 with FMA.
#include <cstdlib>

#include "common/philox.h"
#include "cpu/lowbit_optim_impl.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#include "cpu/target.h"

LM_TARGET_BEGIN("avx2,fma,f16c")

namespace lm {
namespace {

#include "common/codec_math.h"
// each needs the one before it
#include "cpu/lowbit_optim_single.h"

struct Wide256 {
  using F = __m256;
  using I = __m256i;
  using M = __m256i;
  static constexpr int kWidth = 8, kDraw = 32;

  static F set(float v) { return _mm256_set1_ps(v); }
  static I seti(int32_t v) { return _mm256_set1_epi32(v); }
  static F from_bits(I v) { return _mm256_castsi256_ps(v); }
  static I bits(F v) { return _mm256_castps_si256(v); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F root(F a) { return _mm256_sqrt_ps(a); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm256_min_ps(b, a); }  // as Scalar: the first where one is NaN
  static F max(F a, F b) { return _mm256_max_ps(b, a); }
  static I addi(I a, I b) { return _mm256_add_epi32(a, b); }
  static I subi(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I andi(I a, I b) { return _mm256_and_si256(a, b); }
  static I ori(I a, I b) { return _mm256_or_si256(a, b); }
  template <int n>
  static I shl(I a) {
    return _mm256_slli_epi32(a, n);
  }
  template <int n>
  static I sra(I a) {
    return _mm256_srai_epi32(a, n);
  }
  static F to_float(I v) { return _mm256_cvtepi32_ps(v); }
  static I to_int(F v) { return _mm256_cvtps_epi32(v); }
  static I trunc(F v) { return _mm256_cvttps_epi32(v); }
  static M less(F a, F b) { return _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
  static M lessi(I a, I b) { return _mm256_cmpgt_epi32(b, a); }
  static F select(M m, F a, F b) { return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(m)); }
  static I selecti(M m, I a, I b) { return _mm256_blendv_epi8(b, a, m); }
  static F lookup(const float* table, I i) { return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), i); }
  static I maxi(I a, I b) { return _mm256_max_epi32(a, b); }
  static M both(M a, M b) { return _mm256_and_si256(a, b); }
  static F exponent(F x) { return to_float(subi(_mm256_srai_epi32(bits(x), 23), seti(127))); }
  static F mantissa(F x) { return from_bits(ori(andi(bits(x), seti(0x007fffff)), seti(0x3f800000))); }
  static F whole(F v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F times_power(F p, F n) { return from_bits(addi(bits(p), shl<23>(_mm256_cvttps_epi32(n)))); }

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static I load_bytes(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static void store_bytes(uint8_t* p, I v) {
    const I low = _mm256_and_si256(v, _mm256_set1_epi32(0xff));
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
  }
  static I load_words(const uint16_t* p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store_words(uint16_t* p, I v) {
    const I low = _mm256_and_si256(v, _mm256_set1_epi32(0xffff));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
  }
  static I minu(I a, I b) { return _mm256_min_epu32(a, b); }
  static uint32_t top(I v) {
    uint32_t lanes[8], most = 0;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), v);
    for (uint32_t lane : lanes) most = lane > most ? lane : most;
    return most;
  }
  static uint32_t bottom(I v) {
    uint32_t lanes[8], least = 0xffffffffu;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), v);
    for (uint32_t lane : lanes) least = lane < least ? lane : least;
    return least;
  }

  // Four counters, one in the low half of each 64-bit lane, placed so that the last interleave leaves their words in
  // order.
  static void draw(uint64_t seed, int64_t block, uint32_t step, uint16_t* to) {
    const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
    const __m256i at = _mm256_add_epi64(_mm256_set1_epi64x(block), _mm256_setr_epi64x(0, 2, 1, 3));
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    __m256i c0 = _mm256_and_si256(at, _mm256_set1_epi64x(0xffffffffll)), c1 = _mm256_srli_epi64(at, 32);
    __m256i c2 = _mm256_set1_epi64x(step), c3 = _mm256_setzero_si256();
    for (int round = 0; round < 10; ++round) {
      const __m256i p0 = _mm256_mul_epu32(m0, c0), p1 = _mm256_mul_epu32(m1, c2);
      c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1), _mm256_set1_epi64x(k0));
      c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3), _mm256_set1_epi64x(k1));
      c1 = p1;
      c3 = p0;
      k0 += kPhiloxW0;
      k1 += kPhiloxW1;
    }
    const __m256i w01 = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
    const __m256i w23 = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_unpacklo_epi64(w01, w23));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16), _mm256_unpackhi_epi64(w01, w23));
  }
};

#include "cpu/lowbit_optim_kernels.h"

constexpr LowbitIsa kIsa = kernels_of<Wide256>("avx2");

}  // namespace

const LowbitIsa* lowbit_avx2() { return &kIsa; }

}  // namespace lm

LM_TARGET_END

#else

namespace lm {
const LowbitIsa* lowbit_avx2() { return nullptr; }
}  // namespace lm

#endif
