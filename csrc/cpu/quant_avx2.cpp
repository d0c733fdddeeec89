// The quant kernels in AVX2.
#include "cpu/quant_impl.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cpu/target.h"

LM_TARGET_BEGIN("avx2,fma,f16c")

namespace lm {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

#include "cpu/quant_kernels.h"

inline void write8(float* out, __m256 x) { _mm256_storeu_ps(out, x); }
inline void write8(Half* out, __m256 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
// to nearest, ties to even, by integers; NaN stays NaN
inline void write8(BFloat16* out, __m256 x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7FFF)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i r = _mm256_srli_epi32(_mm256_blendv_epi8(up, _mm256_or_si256(u, _mm256_set1_epi32(0x400000)), nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0xD8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(packed));
}

struct Avx2 {
  template <int kBits, class T>
  static void lookup(const uint8_t* run, int64_t i, int64_t n, const float* table, T* out) {
    const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
    alignas(32) uint8_t codes[32];
    for (int64_t j = 0; j < n; j += 32) {
      if constexpr (kBits == 4) {
        const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(run + (i + j) / 2));
        const __m128i mask = _mm_set1_epi8(15), first = _mm_and_si128(_mm_srli_epi16(b, 4), mask);
        const __m128i second = _mm_and_si128(b, mask);
        _mm_store_si128(reinterpret_cast<__m128i*>(codes), _mm_unpacklo_epi8(first, second));
        _mm_store_si128(reinterpret_cast<__m128i*>(codes + 16), _mm_unpackhi_epi8(first, second));
      } else if constexpr (kBits == 2) {
        const uint8_t* bytes = run + (i + j) / 4;
        for (int b = 0; b < 32; ++b) codes[b] = bytes[b / 4] >> (6 - 2 * (b % 4)) & 3;
      } else {
        // the byte with each element's bit, spread over eight places, then tested bit by bit
        const uint8_t* bytes = run + (i + j) / kGranule * 12;
        const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2,
                                                3, 3, 3, 3, 3, 3, 3, 3);
        const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201ull));
        __m256i code = _mm256_setzero_si256();
        LM_UNROLL for (int p = 0; p < 3; ++p) {
          int32_t word;
          __builtin_memcpy(&word, bytes + 4 * p, sizeof word);
          const __m256i where = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(word), spread), bit);
          const __m256i one =
              _mm256_and_si256(_mm256_cmpeq_epi8(where, bit), _mm256_set1_epi8(static_cast<char>(1 << p)));
          code = _mm256_or_si256(code, one);
        }
        _mm256_store_si256(reinterpret_cast<__m256i*>(codes), code);
      }
      LM_UNROLL for (int v = 0; v < 4; ++v) {
        const __m256i c = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + 8 * v)));
        __m256 x = _mm256_permutevar8x32_ps(low, c);
        if constexpr (kBits == 4) {
          const __m256 y = _mm256_permutevar8x32_ps(high, c);
          x = _mm256_blendv_ps(x, y, _mm256_castsi256_ps(_mm256_slli_epi32(c, 28)));
        }
        write8(out + j + 8 * v, x);
      }
    }
  }
  template <class T>
  static void affine8(const uint8_t* codes, int64_t n, float zero, float scale, T* out) {
    const __m256 z = _mm256_set1_ps(zero), s = _mm256_set1_ps(scale);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      const __m256i c = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i)));
      write8(out + i, _mm256_mul_ps(_mm256_sub_ps(_mm256_cvtepi32_ps(c), z), s));
    }
    for (; i < n; ++i) {
      const float value = static_cast<float>(codes[i]) - zero;
      out[i] = static_cast<T>(value * scale);
    }
  }
};

constexpr QuantKernels kKernels = kernels_of<Avx2>();

}  // namespace

const QuantKernels* quant_avx2() { return &kKernels; }

}  // namespace lm

LM_TARGET_END

#else

namespace lm {
const QuantKernels* quant_avx2() { return nullptr; }
}  // namespace lm

#endif
