// Vector types of the AVX-512 levels: included after the #pragma GCC target line, inside an unnamed namespace.

#include "cpu/philox_avx512.h"

struct KeepBits512 {
  __m512i limit;
  int64_t words;
  uint32_t* out;
  void operator()(int64_t w, __m512i first, __m512i second) const {
    out[w] = _mm512_cmpge_epu16_mask(first, limit);
    if (w + 1 < words) out[w + 1] = _mm512_cmpge_epu16_mask(second, limit);
  }
};

inline void draw512(uint64_t seed, uint32_t row, uint32_t child, uint32_t threshold, int64_t word, int64_t words,
                    int64_t cols, uint32_t* out) {
  if (threshold >= kKeepNone) {
    for (int64_t w = 0; w < words; ++w) out[w] = 0;
    return;
  }
  halves512(seed, row, child, word, words, KeepBits512{_mm512_set1_epi16(static_cast<short>(threshold)), words, out});
  const int64_t left = cols - 32 * (word + words - 1);
  if (left < 32) out[words - 1] &= (1u << left) - 1u;
}

inline uint32_t low_bits(int n) { return n >= 32 ? ~0u : (1u << n) - 1u; }

// Sixteen numbers of any source type to fp32; those whose bit is 0 are not read and become 0.
inline __m512 read16(const float* src, __mmask16 bits) { return _mm512_maskz_loadu_ps(bits, src); }
inline __m512 read16(const BFloat16* src, __mmask16 bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(bits, src)), 16));
}
inline __m512 read16(const Half* src, __mmask16 bits) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(bits, src)); }

// Round to nearest even and store where the bit is 1. By integers for bf16: the conversion instruction drops
// subnormals.
inline void write16(float* dst, __mmask16 bits, __m512 x) { _mm512_mask_storeu_ps(dst, bits, x); }
inline void write16(BFloat16* dst, __mmask16 bits, __m512 x) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7FFF)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000));
  _mm256_mask_storeu_epi16(dst, bits, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
inline void write16(Half* dst, __mmask16 bits, __m512 x) {
  _mm256_mask_storeu_epi16(dst, bits, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

struct Float512 {
  using E = float;
  using C = float;
  using Vec = __m512;
  using B = __m512;
  static constexpr int kPair = 1, kWidth = 16, kVectors = 1;

  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec load(const C* c) { return _mm512_loadu_ps(c); }
  static void store(C* c, Vec v) { _mm512_storeu_ps(c, v); }
  static Vec add(Vec x, Vec y) { return _mm512_add_ps(x, y); }
  static B panel(const E* b, int) { return _mm512_loadu_ps(b); }
  static Vec madd(Vec acc, const E* a, B b) { return _mm512_fmadd_ps(_mm512_set1_ps(*a), b, acc); }
  template <class T>
  static void tile_rows(E* dst, const T* src, uint32_t bits, int n) {
    bits &= low_bits(n);
    _mm512_storeu_ps(dst, read16(src, static_cast<__mmask16>(bits)));
    _mm512_storeu_ps(dst + 16, read16(src + 16, static_cast<__mmask16>(bits >> 16)));
  }
  template <class T>
  static void finish(T* dst, const Vec* sums, C alpha, uint32_t bits, int n, bool accumulate) {
    for (int i = 0; i < n; i += 16, bits >>= 16) {
      const __mmask16 valid = static_cast<__mmask16>(low_bits(n - i)), keep = static_cast<__mmask16>(bits & valid);
      const __m512 x = _mm512_maskz_mul_ps(keep, _mm512_set1_ps(alpha), sums[i / 16]);
      // dropped elements of an accumulated result are not touched
      if (accumulate) {
        write16(dst + i, keep, _mm512_add_ps(read16(dst + i, keep), x));
      } else {
        write16(dst + i, valid, x);
      }
    }
  }
  static void draw(uint64_t seed, uint32_t row, uint32_t child, uint32_t threshold, int64_t word, int64_t words,
                   int64_t cols, uint32_t* out) {
    draw512(seed, row, child, threshold, word, words, cols, out);
  }
};

struct Double512 {
  using E = double;
  using C = double;
  using Vec = __m512d;
  using B = __m512d;
  static constexpr int kPair = 1, kWidth = 8, kVectors = 2;

  static Vec zero() { return _mm512_setzero_pd(); }
  static Vec load(const C* c) { return _mm512_loadu_pd(c); }
  static void store(C* c, Vec v) { _mm512_storeu_pd(c, v); }
  static Vec add(Vec x, Vec y) { return _mm512_add_pd(x, y); }
  static B panel(const E* b, int v) { return _mm512_loadu_pd(b + 8 * v); }
  static Vec madd(Vec acc, const E* a, B b) { return _mm512_fmadd_pd(_mm512_set1_pd(*a), b, acc); }
  static void tile_rows(E* dst, const double* src, uint32_t bits, int n) {
    bits &= low_bits(n);
    for (int i = 0; i < 32; i += 8) {
      _mm512_storeu_pd(dst + i, _mm512_maskz_loadu_pd(static_cast<__mmask8>(bits >> i), src + i));
    }
  }
  static void finish(double* dst, const Vec* sums, C alpha, uint32_t bits, int n, bool accumulate) {
    for (int i = 0; i < n; i += 8, bits >>= 8) {
      const __mmask8 valid = static_cast<__mmask8>(low_bits(n - i)), keep = static_cast<__mmask8>(bits) & valid;
      const __m512d x = _mm512_maskz_mul_pd(keep, _mm512_set1_pd(alpha), sums[i / 8]);
      if (accumulate) {
        _mm512_mask_storeu_pd(dst + i, keep, _mm512_add_pd(_mm512_maskz_loadu_pd(keep, dst + i), x));
      } else {
        _mm512_mask_storeu_pd(dst + i, valid, x);
      }
    }
  }
  static void draw(uint64_t seed, uint32_t row, uint32_t child, uint32_t threshold, int64_t word, int64_t words,
                   int64_t cols, uint32_t* out) {
    draw512(seed, row, child, threshold, word, words, cols, out);
  }
};
