// Philox in AVX-512: included after the target pragma, inside an unnamed namespace.

// Eight counters a vector, one in the low half of each 64-bit lane (the high halves hold rubbish that no product
// reads). Counters are ordered so that two interleaving steps leave 32 neighbouring 16-bit numbers in a vector:
// take(w, first, second) gets those of the 32 columns of word w and of word w + 1, for w = 0, 2, ... below words.
template <class Take>
inline void halves512(uint64_t seed, uint32_t row, uint32_t child, int64_t word, int64_t words, const Take& take) {
  const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  uint64_t keys[10][2];
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
    keys[round][0] = k0;
    keys[round][1] = k1;
  }
  // Only the first counter word varies within a row: round 0 multiplies by it alone, and one product of round 1 is a
  // constant of the row.
  const uint64_t fixed = static_cast<uint64_t>(kPhiloxM0) * (row ^ static_cast<uint32_t>(keys[0][0]));
  const __m512i first2 = _mm512_set1_epi64(child ^ keys[0][1]);
  const __m512i second2 = _mm512_set1_epi64((fixed >> 32) ^ keys[1][1]), second3 = _mm512_set1_epi64(fixed);
  for (int64_t w = 0; w < words; w += 2) {
    __m512i c3 = _mm512_mul_epu32(m0, _mm512_add_epi64(_mm512_set1_epi64(4 * (word + w)), order));
    __m512i c2 = _mm512_xor_si512(_mm512_srli_epi64(c3, 32), first2);
    __m512i c1 = _mm512_mul_epu32(m1, c2);
    __m512i c0 = _mm512_xor_si512(_mm512_srli_epi64(c1, 32), _mm512_set1_epi64(keys[1][0]));
    c2 = _mm512_xor_si512(c3, second2);
    c3 = second3;
    LM_UNROLL for (int round = 2; round < 10; ++round) {
      const __m512i p0 = _mm512_mul_epu32(m0, c0), p1 = _mm512_mul_epu32(m1, c2);
      c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, _mm512_set1_epi64(keys[round][0]), 0x96);
      c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, _mm512_set1_epi64(keys[round][1]), 0x96);
      c1 = p1;
      c3 = p0;
    }
    const __m512i w01 = _mm512_mask_shuffle_epi32(c0, 0xAAAA, c1, _MM_PERM_CCAA);
    const __m512i w23 = _mm512_mask_shuffle_epi32(c2, 0xAAAA, c3, _MM_PERM_CCAA);
    take(w, _mm512_unpacklo_epi64(w01, w23), _mm512_unpackhi_epi64(w01, w23));
  }
}
