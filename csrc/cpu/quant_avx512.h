// Vector type of the AVX-512 levels: included after the #pragma GCC target line, inside an unnamed namespace.

// The codes of 32 elements as 16-bit words, in order. i is a multiple of 32.
template <int kBits>
inline __m512i codes32(const uint8_t* run, int64_t i) {
  if constexpr (kBits == 4) {
    const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(run + i / 2)));
    // the byte's high half to the low word, its low half to the high word
    return _mm512_or_si512(_mm512_srli_epi32(b, 4),
                           _mm512_and_si512(_mm512_slli_epi32(b, 16), _mm512_set1_epi32(0x000F0000)));
  } else if constexpr (kBits == 2) {
    const __m512i b = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(run + i / 4)));
    const __m512i first = _mm512_or_si512(
        _mm512_srli_epi64(b, 6), _mm512_and_si512(_mm512_slli_epi64(b, 12), _mm512_set1_epi64(0x0000000000030000ll)));
    const __m512i second =
        _mm512_or_si512(_mm512_and_si512(_mm512_slli_epi64(b, 30), _mm512_set1_epi64(0x0000000300000000ll)),
                        _mm512_and_si512(_mm512_slli_epi64(b, 48), _mm512_set1_epi64(0x0003000000000000ll)));
    return _mm512_or_si512(first, second);
  } else {
    uint32_t words[3];
    __builtin_memcpy(words, run + i / kGranule * 12, sizeof words);
    return _mm512_or_si512(_mm512_or_si512(_mm512_maskz_set1_epi16(words[0], 1), _mm512_maskz_set1_epi16(words[1], 2)),
                           _mm512_maskz_set1_epi16(words[2], 4));
  }
}

// To nearest, ties to even, by integers: the conversion instruction drops subnormals. NaN stays NaN.
inline __m256i bf16_of(__m512 x) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7FFF)), odd);
  up = _mm512_mask_or_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), u, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
}
inline __m256i half_of(__m512 x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline __m256i narrow16(__m512 x, const BFloat16*) { return bf16_of(x); }
inline __m256i narrow16(__m512 x, const Half*) { return half_of(x); }

struct Avx512 {
  template <int kBits, class T>
  static void lookup(const uint8_t* run, int64_t i, int64_t n, const float* table, T* out) {
    const __m512 values = _mm512_loadu_ps(table);
    if constexpr (sizeof(T) == 4) {
      for (int64_t j = 0; j < n; j += 32) {
        const __m512i codes = codes32<kBits>(run, i + j);
        const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(codes));
        const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(codes, 1));
        _mm512_storeu_ps(out + j, _mm512_permutexvar_ps(low, values));
        _mm512_storeu_ps(out + j + 16, _mm512_permutexvar_ps(high, values));
      }
    } else {
      // sixteen words are enough: no code is above 15
      const __m512i words = _mm512_castsi256_si512(narrow16(values, out));
      for (int64_t j = 0; j < n; j += 32) {
        _mm512_storeu_si512(out + j, _mm512_permutexvar_epi16(codes32<kBits>(run, i + j), words));
      }
    }
  }
  template <class T>
  static void affine8(const uint8_t* codes, int64_t n, float zero, float scale, T* out) {
    const __m512 z = _mm512_set1_ps(zero), s = _mm512_set1_ps(scale);
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 valid = n - i >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << (n - i)) - 1u);
      const __m512i c = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(valid, codes + i));
      const __m512 x = _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(c), z), s);
      if constexpr (sizeof(T) == 4) {
        _mm512_mask_storeu_ps(out + i, valid, x);
      } else {
        _mm256_mask_storeu_epi16(out + i, valid, narrow16(x, out));
      }
    }
  }
};
