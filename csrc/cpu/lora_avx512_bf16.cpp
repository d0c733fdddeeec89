// The lora kernels in AVX-512 with the BF16 dot product: bf16 operands go in as pairs of neighbours of the summed
// dimension, sums are fp32. The other types are those of lora_avx512.cpp.
#include "cpu/lora_impl.h"

#if defined(__x86_64__) && defined(__GNUC__) && (__GNUC__ >= 10 || defined(__clang__))

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

LM_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")

namespace lm {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

#include "cpu/lora_avx512.h"
#include "cpu/lora_kernels.h"

struct Pair512 {
  using E = uint32_t;
  using C = float;
  using Vec = __m512;
  using B = __m512i;
  static constexpr int kPair = 2, kWidth = 16, kVectors = 1;

  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec load(const C* c) { return _mm512_loadu_ps(c); }
  static void store(C* c, Vec v) { _mm512_storeu_ps(c, v); }
  static Vec add(Vec x, Vec y) { return _mm512_add_ps(x, y); }
  static B panel(const E* b, int) { return _mm512_loadu_si512(b); }
  static Vec madd(Vec acc, const E* a, B b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32(static_cast<int>(*a)), (__m512bh)b);
  }
  static void tile_rows(E* dst, const BFloat16* src, uint32_t bits, int n) {
    _mm512_storeu_si512(dst, _mm512_maskz_loadu_epi16(bits & low_bits(n), src));
  }
  static void tile_cols(E* dst, const BFloat16* row0, const BFloat16* row1, uint32_t bits0, uint32_t bits1, int n) {
    const __m512i even = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                          37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i x0 = _mm512_maskz_loadu_epi16(bits0 & low_bits(n), row0);
    const __m512i x1 = row1 ? _mm512_maskz_loadu_epi16(bits1 & low_bits(n), row1) : _mm512_setzero_si512();
    _mm512_storeu_si512(dst, _mm512_permutex2var_epi16(x0, even, x1));
    const __m512i upper = _mm512_add_epi16(even, _mm512_set1_epi16(16));
    _mm512_storeu_si512(dst + 16, _mm512_permutex2var_epi16(x0, upper, x1));
  }
  static void finish(BFloat16* dst, const Vec* sums, C alpha, uint32_t bits, int n, bool accumulate) {
    const __m512 scale = _mm512_set1_ps(alpha);
    const __mmask32 valid = low_bits(n), keep = bits & valid;
    if (accumulate) {
      const __m512i old = _mm512_maskz_loadu_epi16(valid, dst);
      const __m512i low = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(old)), 16);
      const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(old, 1)), 16);
      const __m512 x0 = _mm512_fmadd_ps(scale, sums[0], _mm512_castsi512_ps(low));
      const __m512 x1 = _mm512_fmadd_ps(scale, sums[1], _mm512_castsi512_ps(high));
      // dropped elements keep their bits
      put(dst, valid, (__m512i)_mm512_mask_cvtne2ps_pbh((__m512bh)old, keep, x1, x0));
    } else {
      const __m512 x0 = _mm512_mul_ps(scale, sums[0]), x1 = _mm512_mul_ps(scale, sums[1]);
      put(dst, valid, (__m512i)_mm512_maskz_cvtne2ps_pbh(keep, x1, x0));
    }
  }
  static void put(BFloat16* dst, __mmask32 valid, __m512i x) {
    if (valid == ~0u) {
      _mm512_storeu_si512(dst, x);
    } else {
      _mm512_mask_storeu_epi16(dst, valid, x);
    }
  }
  static void draw(uint64_t seed, uint32_t row, uint32_t child, uint32_t threshold, int64_t word, int64_t words,
                   int64_t cols, uint32_t* out) {
    draw512(seed, row, child, threshold, word, words, cols, out);
  }
};

constexpr LoraIsa kIsa = {"avx512_bf16",
                          {kernels_of<Float512, float>(kElementFloat), kernels_of<Double512, double>(kElementDouble),
                           kernels_of<Pair512, BFloat16>(kElementPair), kernels_of<Float512, Half>(kElementFloat)}};

}  // namespace

const LoraIsa* lora_avx512_bf16() { return &kIsa; }

}  // namespace lm

LM_TARGET_END

#else

namespace lm {
const LoraIsa* lora_avx512_bf16() { return nullptr; }
}  // namespace lm

#endif
