// The quant kernels in AVX-512 with the BF16 dot product: products of bf16 activations with codes of 2 to 4 bits, whose
// values are looked up in bf16 and multiplied where they are, in registers or in a tile of the first-level cache.
#include "cpu/quant_impl.h"

#if defined(__x86_64__) && defined(__GNUC__) && (__GNUC__ >= 10 || defined(__clang__))

#include <immintrin.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cpu/target.h"

#if !defined(__clang__)  // GCC 12's own header starts its undefined vectors from themselves, and warns of it
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

LM_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")

namespace lm {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

#include "cpu/quant_avx512.h"
#include "cpu/quant_kernels.h"

constexpr int kChunk = 64;  // elements of W that are looked up at a time, under one scale

bool serves16(const QuantView& w) {
  return w.spec.bits <= 4 && w.k % kChunk == 0 && (w.spec.per_row() || w.spec.log2_group >= 6);
}

// The columns of a chunk in the order of its two vectors of words. Four-bit codes are taken as the even elements, then
// the odd ones, which saves putting them in order; the activations are laid out to match.
template <int kBits>
inline void chunk_codes(const uint8_t* run, int64_t i, __m512i* first, __m512i* second) {
  if constexpr (kBits == 4) {
    const __m512i b = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(run + i / 2)));
    *first = _mm512_srli_epi16(b, 4);
    *second = _mm512_and_si512(b, _mm512_set1_epi16(15));
  } else {
    *first = codes32<kBits>(run, i);
    *second = codes32<kBits>(run, i + 32);
  }
}

// Column of word j (0 to 63) of a chunk.
inline int column_of(int bits, int j) { return bits == 4 ? 2 * (j % 32) + j / 32 : j; }

void pack16(const QuantView& w, const uint16_t* x, int64_t ld, int rows, int padded, int64_t ld_out, uint16_t* out) {
  for (int m = 0; m < padded; ++m) {
    uint16_t* to = out + m * ld_out;
    if (m >= rows) {
      for (int64_t c = 0; c < w.k; ++c) to[c] = 0;
    } else if (w.spec.bits == 4) {
      for (int64_t c = 0; c < w.k; c += kChunk) {
        for (int j = 0; j < kChunk / 2; ++j) {
          to[c + j] = x[m * ld + c + 2 * j];
          to[c + j + kChunk / 2] = x[m * ld + c + 2 * j + 1];
        }
      }
    } else {
      for (int64_t c = 0; c < w.k; ++c) to[c] = x[m * ld + c];
    }
  }
}

inline __m512i words_of(__m512 values) {
  return _mm512_castsi256_si512(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
}

inline __m512bh look_up(__m512i codes, __m512i words) {
  return reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(codes, words));
}

inline __m512bh load_bf16(const uint16_t* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }

// Where one row lies: its run, column 0's place in the run, and the groups before the run.
template <int kBits>
struct Row {
  const uint8_t* run;
  int64_t start, before;

  Row(const QuantView& w, int64_t row)
      : run(w.spec.is_table() ? w.packed : w.packed + row * row_bytes(kBits, w.k)),
        start(w.spec.is_table() ? row * w.k : 0),
        before(w.spec.is_table() ? 0 : row * w.spec.row_groups(w.k)) {}
};

// The codes' values before their scale; zero points, where there are any, are subtracted group by group.
inline __m512 units_of(const QuantView& w) {
  float units[16];
  quant_units(w.spec, units);
  const float middle = w.spec.is_table() || w.zero ? 0.0f : static_cast<float>(1 << (w.spec.bits - 1));
  return _mm512_sub_ps(_mm512_loadu_ps(units), _mm512_set1_ps(middle));
}

template <bool kZero>
inline __m512i scaled(__m512 units, const float* scale, const float* zero) {
  if constexpr (kZero) units = _mm512_sub_ps(units, _mm512_set1_ps(*zero));
  return words_of(_mm512_mul_ps(units, _mm512_set1_ps(*scale)));
}

// NB rows of W, `step` apart, whose groups end at the same columns, by M rows of x. Every sum has two chains.
template <int kBits, int M, int NB, bool kZero>
void dot16_block(const QuantDot& job, int64_t n, int64_t step, __m512 units) {
  const QuantView& w = job.w;
  const int64_t k = w.k;
  const int shift = w.spec.per_row() ? 62 : w.spec.log2_group;
  alignas(64) float buffer[NB][kGroupBatch], zeros[kZero ? NB : 1][kGroupBatch];
  const float* scales[NB];
  const uint8_t* run[NB];
  int64_t before[NB];
  __m512 acc[NB][M][2];
  const Row<kBits> top(w, job.row0 + n);
  LM_UNROLL for (int b = 0; b < NB; ++b) {
    const Row<kBits> row(w, job.row0 + n + b * step);
    run[b] = row.run + row.start * kBits / 8;
    before[b] = row.before + (row.start >> shift);
    LM_UNROLL for (int m = 0; m < M; ++m) acc[b][m][0] = acc[b][m][1] = _mm512_setzero_ps();
  }
  const int64_t lead = top.start - ((top.start >> shift) << shift);  // of the first group, before column 0
  const int64_t groups = k ? ((lead + k - 1) >> shift) + 1 : 0;
  for (int64_t g0 = 0; g0 < groups; g0 += kGroupBatch) {
    const int64_t count = smaller(kGroupBatch, groups - g0);
    for (int b = 0; b < NB; ++b) {
      scales[b] = scales_of(w, before[b] + g0, count, buffer[b]);
      if constexpr (kZero) quant_zeros(w, before[b] + g0, count, zeros[b]);
    }
    for (int64_t g = 0; g < count; ++g) {
      int64_t c = g0 + g == 0 ? 0 : ((g0 + g) << shift) - lead;
      const int64_t end = g0 + g + 1 == groups ? k : ((g0 + g + 1) << shift) - lead;
      __m512i words[NB];
      LM_UNROLL for (int b = 0; b < NB; ++b) words[b] = scaled<kZero>(units, scales[b] + g, zeros[kZero ? b : 0] + g);
      for (; c < end; c += kChunk) {
        LM_UNROLL for (int b = 0; b < NB; ++b) {
          __m512i first, second;
          chunk_codes<kBits>(run[b], c, &first, &second);
          const __m512bh w0 = look_up(first, words[b]), w1 = look_up(second, words[b]);
          LM_UNROLL for (int m = 0; m < M; ++m) {
            const uint16_t* x = job.x16 + m * job.ld_x16 + c;
            acc[b][m][0] = _mm512_dpbf16_ps(acc[b][m][0], w0, load_bf16(x));
            acc[b][m][1] = _mm512_dpbf16_ps(acc[b][m][1], w1, load_bf16(x + 32));
          }
        }
      }
    }
  }
  LM_UNROLL for (int b = 0; b < NB; ++b) {
    LM_UNROLL for (int m = 0; m < M; ++m) {
      if (m < job.rows) {
        job.y[m * job.ld + n + b * step] = _mm512_reduce_add_ps(_mm512_add_ps(acc[b][m][0], acc[b][m][1]));
      }
    }
  }
}

// Whether every row's groups end at the same columns: not where a table format's groups cross rows.
inline bool aligned(const QuantView& w) { return !w.spec.is_table() || w.k % (int64_t{1} << w.spec.log2_group) == 0; }

template <int kBits, int M, bool kZero>
void dot16_rows(const QuantDot& job, int64_t n0, int64_t n1) {
  const __m512 units = units_of(job.w);
  int64_t n = n0;
  if (aligned(job.w)) {
    // four streams through memory, each without a gap: a processor that fetches ahead loses a stream that jumps
    const int64_t step = (n1 - n0) / 4;
    for (; n < n0 + step; ++n) dot16_block<kBits, M, 4, kZero>(job, n, step, units);
    n = n0 + 4 * step;
  }
  for (; n < n1; ++n) dot16_block<kBits, M, 1, kZero>(job, n, 0, units);
}

// More rows of x than accumulators allow at once: a block of W's rows is looked up into the first-level cache, a
// stretch of columns at a time, and multiplied with four rows of x after four. Each of the sums is a vector that waits
// in memory while the others are worked on.
constexpr int kRowsOfW = 4, kRowsOfX = 4, kStretch16 = 2048;
constexpr int kTileLine = kStretch16 + 32;  // off the cache's power-of-two strides

template <int kBits>
inline void look_up_row(const QuantView& w, int64_t n, int64_t col0, int64_t cols, __m512 units, uint16_t* out) {
  const Row<kBits> row(w, n);
  const int shift = w.spec.per_row() ? 62 : w.spec.log2_group;
  const int64_t start = row.start + col0, first = start >> shift, last = (start + cols - 1) >> shift;
  alignas(64) float buffer[kStretch16 / kChunk + 1], zeros[kStretch16 / kChunk + 1];
  const float* scales = scales_of(w, row.before + first, last - first + 1, buffer);
  if (w.zero) quant_zeros(w, row.before + first, last - first + 1, zeros);
  int64_t c = start;
  for (int64_t g = first; g <= last; ++g) {
    const int64_t end = g == last ? start + cols : (g + 1) << shift;
    const __m512i words = w.zero ? scaled<true>(units, scales + g - first, zeros + g - first)
                                 : scaled<false>(units, scales + g - first, nullptr);
    for (; c < end; c += kChunk, out += kChunk) {
      __m512i one, two;
      chunk_codes<kBits>(row.run, c, &one, &two);
      _mm512_store_si512(out, _mm512_permutexvar_epi16(one, words));
      _mm512_store_si512(out + 32, _mm512_permutexvar_epi16(two, words));
    }
  }
}

template <int kBits>
void dot16_tiles(const QuantDot& job, int64_t n0, int64_t n1) {
  alignas(64) uint16_t tile[kRowsOfW * kTileLine];
  alignas(64) float sums[kSmallRows][kRowsOfW][16];
  const __m512 units = units_of(job.w);
  const int64_t k = job.w.k;
  const int64_t step = (n1 - n0 + kRowsOfW - 1) / kRowsOfW;  // streams without gaps, as above
  for (int64_t n = n0; n < n0 + step; ++n) {
    for (int64_t c = 0; c < k; c += kStretch16) {
      const int64_t cols = smaller(kStretch16, k - c);
      // the bytes behind these are asked for while they are multiplied, a line at a time
      const uint8_t* next[kRowsOfW];
      for (int b = 0; b < kRowsOfW; ++b) {
        const int64_t at = job.row0 + smaller(n + b * step, n1 - 1);  // a missing row repeats the last
        look_up_row<kBits>(job.w, at, c, cols, units, tile + b * kTileLine);
        const Row<kBits> row(job.w, at);
        next[b] = row.run + (row.start + c + cols) * kBits / 8;
      }
      const int64_t lines = cols * kBits / 8 / 64;
      for (int m = 0; m < job.padded; m += kRowsOfX) {
        __m512 acc[kRowsOfX][kRowsOfW];
        LM_UNROLL for (int i = 0; i < kRowsOfX; ++i) {
          LM_UNROLL for (int b = 0; b < kRowsOfW; ++b) {
            acc[i][b] = c ? _mm512_load_ps(sums[m + i][b]) : _mm512_setzero_ps();
          }
        }
        const uint16_t* x = job.x16 + m * job.ld_x16 + c;
        for (int64_t j = 0; j < cols; j += 32) {
          if (m == 0 && j / 32 < lines * kRowsOfW) {
            _mm_prefetch(reinterpret_cast<const char*>(next[j / 32 % kRowsOfW] + j / 32 / kRowsOfW * 64), _MM_HINT_T0);
          }
          __m512bh w[kRowsOfW];
          LM_UNROLL for (int b = 0; b < kRowsOfW; ++b) w[b] = load_bf16(tile + b * kTileLine + j);
          LM_UNROLL for (int i = 0; i < kRowsOfX; ++i) {
            const __m512bh one = load_bf16(x + i * job.ld_x16 + j);
            LM_UNROLL for (int b = 0; b < kRowsOfW; ++b) acc[i][b] = _mm512_dpbf16_ps(acc[i][b], w[b], one);
          }
        }
        LM_UNROLL for (int i = 0; i < kRowsOfX; ++i) {
          LM_UNROLL for (int b = 0; b < kRowsOfW; ++b) _mm512_store_ps(sums[m + i][b], acc[i][b]);
        }
      }
    }
    for (int m = 0; m < job.rows; ++m) {
      for (int b = 0; b < kRowsOfW && n + b * step < n1; ++b) {
        job.y[m * job.ld + n + b * step] = _mm512_reduce_add_ps(_mm512_load_ps(sums[m][b]));
      }
    }
  }
}

template <int kBits>
void dot16_bits(const QuantDot& job, int64_t n0, int64_t n1) {
  const bool zero = job.w.zero != nullptr;
  switch (job.padded) {
    case 1: return zero ? dot16_rows<kBits, 1, true>(job, n0, n1) : dot16_rows<kBits, 1, false>(job, n0, n1);
    case 2: return zero ? dot16_rows<kBits, 2, true>(job, n0, n1) : dot16_rows<kBits, 2, false>(job, n0, n1);
    default: return dot16_tiles<kBits>(job, n0, n1);
  }
}

void dot16(const QuantDot& job, int64_t n0, int64_t n1) {
  switch (job.w.spec.bits) {
    case 2: return dot16_bits<2>(job, n0, n1);
    case 3: return dot16_bits<3>(job, n0, n1);
    default: return dot16_bits<4>(job, n0, n1);
  }
}

// ------------------------------------------------------------------------------------------------------ transposed

constexpr int kPairs = 8;                    // pairs of W's rows in a tile
constexpr int kOuterLine = kOuterCols + 16;  // off the cache's power-of-two strides

// The column of lane d of vector v of a tile, as pairs of rows are interleaved.
inline int64_t outer_column(int bits, int v, int d) {
  const int chunk = v / 4, word = 32 * (v % 4 / 2) + 8 * (d / 4) + 4 * (v % 2) + d % 4;
  return kChunk * chunk + column_of(bits, word);
}

// Two rows of W, columns c0 .. c0 + cols - 1, as pairs; the second row may be missing.
template <int kBits>
inline void tile_pair(const QuantView& w, int64_t row, bool second, int64_t c0, int64_t cols, __m512 units,
                      uint16_t* lines, uint32_t* tile) {
  look_up_row<kBits>(w, row, c0, cols, units, lines);
  if (second) look_up_row<kBits>(w, row + 1, c0, cols, units, lines + kOuterCols);
  const __m512i none = _mm512_setzero_si512();
  for (int64_t c = 0; c < cols; c += 32) {
    const __m512i one = _mm512_load_si512(lines + c);
    const __m512i two = second ? _mm512_load_si512(lines + kOuterCols + c) : none;
    _mm512_store_si512(tile + c, _mm512_unpacklo_epi16(one, two));
    _mm512_store_si512(tile + c + 16, _mm512_unpackhi_epi16(one, two));
  }
}

// acc[m][v] += sum over the tile's pairs, for MB rows of dy and 4 vectors.
template <int MB>
inline void outer_tile(const uint32_t* tile, const uint32_t* dy, int64_t ld_dy, int pairs, int vectors, float* acc) {
  for (int v = 0; v < vectors; v += 4) {
    __m512 sum[MB][4];
    LM_UNROLL for (int m = 0; m < MB; ++m) {
      LM_UNROLL for (int j = 0; j < 4; ++j) sum[m][j] = _mm512_load_ps(acc + m * kOuterLine + 16 * (v + j));
    }
    for (int p = 0; p < pairs; ++p) {
      __m512bh w[4];
      LM_UNROLL for (int j = 0; j < 4; ++j) {
        w[j] = reinterpret_cast<__m512bh>(_mm512_load_si512(tile + p * kOuterLine + 16 * (v + j)));
      }
      LM_UNROLL for (int m = 0; m < MB; ++m) {
        const __m512bh factor = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(dy[m * ld_dy + p])));
        LM_UNROLL for (int j = 0; j < 4; ++j) sum[m][j] = _mm512_dpbf16_ps(sum[m][j], factor, w[j]);
      }
    }
    LM_UNROLL for (int m = 0; m < MB; ++m) {
      LM_UNROLL for (int j = 0; j < 4; ++j) _mm512_store_ps(acc + m * kOuterLine + 16 * (v + j), sum[m][j]);
    }
  }
}

template <int kBits>
void outer16_bits(const QuantOuter& job, int64_t c0, int64_t c1) {
  alignas(64) uint32_t tile[kPairs * kOuterLine];
  alignas(64) uint16_t lines[2 * kOuterCols];
  alignas(64) float acc[kSmallRows * kOuterLine];
  const __m512 units = units_of(job.w);
  const int64_t cols = c1 - c0, pairs = (job.n + 1) / 2;
  const int vectors = static_cast<int>(cols / 16);
  for (int i = 0; i < job.padded * kOuterLine; ++i) acc[i] = 0.0f;
  for (int64_t p0 = 0; p0 < pairs; p0 += kPairs) {
    const int count = static_cast<int>(smaller(kPairs, pairs - p0));
    for (int p = 0; p < count; ++p) {
      const int64_t n = 2 * (p0 + p);
      tile_pair<kBits>(job.w, job.row0 + n, n + 1 < job.n, c0, cols, units, lines, tile + p * kOuterLine);
    }
    const uint32_t* dy = job.dy16 + p0;
    if (job.padded == 1) {
      outer_tile<1>(tile, dy, pairs, count, vectors, acc);
    } else if (job.padded == 2) {
      outer_tile<2>(tile, dy, pairs, count, vectors, acc);
    } else {
      for (int m = 0; m < job.padded; m += 4) {
        outer_tile<4>(tile, dy + m * pairs, pairs, count, vectors, acc + m * kOuterLine);
      }
    }
  }
  for (int v = 0; v < vectors; ++v) {
    for (int d = 0; d < 16; ++d) {
      const int64_t c = outer_column(kBits, v, d);
      for (int m = 0; m < job.rows; ++m) job.out[m * job.ld + c] = acc[m * kOuterLine + 16 * v + d];
    }
  }
}

void outer16(const QuantOuter& job, int64_t c0, int64_t c1) {
  switch (job.w.spec.bits) {
    case 2: return outer16_bits<2>(job, c0, c1);
    case 3: return outer16_bits<3>(job, c0, c1);
    default: return outer16_bits<4>(job, c0, c1);
  }
}

constexpr QuantKernels with_bf16() {
  QuantKernels kernels = kernels_of<Avx512>();
  kernels.serves16 = serves16;
  kernels.dot16 = dot16;
  kernels.outer16 = outer16;
  kernels.pack16 = pack16;
  return kernels;
}

constexpr QuantKernels kKernels = with_bf16();

}  // namespace

const QuantKernels* quant_avx512_bf16() { return &kKernels; }

}  // namespace lm

LM_TARGET_END

#else

namespace lm {
const QuantKernels* quant_avx512_bf16() { return nullptr; }
}  // namespace lm

#endif
