// The lora kernels in AVX2 with FMA and F16C.
#include "cpu/lora_impl.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdlib>

#include "common/philox.h"
#include "cpu/target.h"

LM_TARGET_BEGIN("avx2,fma,f16c")

namespace lm {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

#include "cpu/lora_kernels.h"

// Four counters a vector, one in the low half of each 64-bit lane; see draw512 in lora_avx512.h.
void draw256(uint64_t seed, uint32_t row, uint32_t child, uint32_t threshold, int64_t word, int64_t words, int64_t cols,
             uint32_t* out) {
  if (threshold >= kKeepNone) {
    for (int64_t w = 0; w < words; ++w) out[w] = 0;
    return;
  }
  const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
  const __m256i order = _mm256_setr_epi64x(0, 2, 1, 3);
  const __m256i limit = _mm256_set1_epi16(static_cast<short>(threshold));
  const uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int64_t w = 0; w < words; ++w) {
    uint32_t k0 = key0, k1 = key1;
    __m256i c0 = _mm256_add_epi64(_mm256_set1_epi64x(4 * (word + w)), order);
    __m256i c1 = _mm256_set1_epi64x(row), c2 = _mm256_setzero_si256(), c3 = _mm256_set1_epi64x(child);
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
    // lane j: counter j (low vector: elements 0..15) and counter 2 + j (high vector: elements 16..31)
    const __m256i low = _mm256_unpacklo_epi64(w01, w23), high = _mm256_unpackhi_epi64(w01, w23);
    const __m256i keep_low = _mm256_cmpeq_epi16(_mm256_max_epu16(low, limit), low);
    const __m256i keep_high = _mm256_cmpeq_epi16(_mm256_max_epu16(high, limit), high);
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(keep_low, keep_high), 0xD8);
    out[w] = static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
  }
  const int64_t left = cols - 32 * (word + words - 1);
  if (left < 32) out[words - 1] &= (1u << left) - 1u;
}

inline uint32_t low_bits(int n) { return n >= 32 ? ~0u : (1u << n) - 1u; }

// Eight lanes of all ones where the bit is 1.
inline __m256i lanes(uint32_t bits) {
  const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), each), each);
}

inline __m256 read8(const float* src) { return _mm256_loadu_ps(src); }
inline __m256 read8(const BFloat16* src) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
inline __m256 read8(const Half* src) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src))); }

inline void write8(float* dst, __m256 x) { _mm256_storeu_ps(dst, x); }
inline void write8(BFloat16* dst, __m256 x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7FFF)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0xD8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), _mm256_castsi256_si128(packed));
}
inline void write8(Half* dst, __m256 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

struct Float256 {
  using E = float;
  using C = float;
  using Vec = __m256;
  using B = __m256;
  static constexpr int kPair = 1, kWidth = 4, kVectors = 2;

  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec load(const C* c) { return _mm256_loadu_ps(c); }
  static void store(C* c, Vec v) { _mm256_storeu_ps(c, v); }
  static Vec add(Vec x, Vec y) { return _mm256_add_ps(x, y); }
  static B panel(const E* b, int v) { return _mm256_loadu_ps(b + 8 * v); }
  static Vec madd(Vec acc, const E* a, B b) { return _mm256_fmadd_ps(_mm256_broadcast_ss(a), b, acc); }
  template <class T>
  static void tile_rows(E* dst, const T* src, uint32_t bits, int n) {
    for (int i = 0; i < 32; i += 8, bits >>= 8) {
      if (n - i >= 8) {
        _mm256_storeu_ps(dst + i, _mm256_and_ps(read8(src + i), _mm256_castsi256_ps(lanes(bits))));
      } else {
        for (int k = i; k < i + 8; ++k) dst[k] = k < n && (bits >> (k - i) & 1u) ? static_cast<float>(src[k]) : 0.0f;
      }
    }
  }
  template <class T>
  static void finish(T* dst, const Vec* sums, C alpha, uint32_t bits, int n, bool accumulate) {
    for (int i = 0; i < n; i += 8, bits >>= 8) {
      const int used = n - i < 8 ? n - i : 8;
      T part[8] = {};
      T* at = dst + i;
      if (used < 8) {
        for (int k = 0; k < used; ++k) part[k] = dst[i + k];
        at = part;
      }
      const __m256 keep = _mm256_castsi256_ps(lanes(bits));
      __m256 x = _mm256_and_ps(_mm256_mul_ps(_mm256_set1_ps(alpha), sums[i / 8]), keep);
      if (accumulate) {
        const __m256 old = read8(at);
        x = _mm256_blendv_ps(old, _mm256_add_ps(old, x), keep);
      }
      write8(at, x);
      for (int k = 0; used < 8 && k < used; ++k) dst[i + k] = part[k];
    }
  }
  static void draw(uint64_t seed, uint32_t row, uint32_t child, uint32_t threshold, int64_t word, int64_t words,
                   int64_t cols, uint32_t* out) {
    draw256(seed, row, child, threshold, word, words, cols, out);
  }
};

struct Double256 {
  using E = double;
  using C = double;
  using Vec = __m256d;
  using B = __m256d;
  static constexpr int kPair = 1, kWidth = 2, kVectors = 4;

  static Vec zero() { return _mm256_setzero_pd(); }
  static Vec load(const C* c) { return _mm256_loadu_pd(c); }
  static void store(C* c, Vec v) { _mm256_storeu_pd(c, v); }
  static Vec add(Vec x, Vec y) { return _mm256_add_pd(x, y); }
  static B panel(const E* b, int v) { return _mm256_loadu_pd(b + 4 * v); }
  static Vec madd(Vec acc, const E* a, B b) { return _mm256_fmadd_pd(_mm256_broadcast_sd(a), b, acc); }
  static void tile_rows(E* dst, const double* src, uint32_t bits, int n) {
    for (int i = 0; i < 32; ++i) dst[i] = i < n && (bits >> i & 1u) ? src[i] : 0.0;
  }
  static void finish(double* dst, const Vec* sums, C alpha, uint32_t bits, int n, bool accumulate) {
    alignas(32) double values[32];
    for (int v = 0; v < 8; ++v) _mm256_store_pd(values + 4 * v, _mm256_mul_pd(_mm256_set1_pd(alpha), sums[v]));
    for (int i = 0; i < n; ++i) {
      const bool keep = bits >> i & 1u;
      if (!accumulate) {
        dst[i] = keep ? values[i] : 0.0;
      } else if (keep) {
        dst[i] += values[i];
      }
    }
  }
  static void draw(uint64_t seed, uint32_t row, uint32_t child, uint32_t threshold, int64_t word, int64_t words,
                   int64_t cols, uint32_t* out) {
    draw256(seed, row, child, threshold, word, words, cols, out);
  }
};

constexpr LoraIsa kIsa = {"avx2",
                          {kernels_of<Float256, float>(kElementFloat), kernels_of<Double256, double>(kElementDouble),
                           kernels_of<Float256, BFloat16>(kElementFloat), kernels_of<Float256, Half>(kElementFloat)}};

}  // namespace

const LoraIsa* lora_avx2() { return &kIsa; }

}  // namespace lm

LM_TARGET_END

#else

namespace lm {
const LoraIsa* lora_avx2() { return nullptr; }
}  // namespace lm

#endif
