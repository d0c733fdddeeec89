// The lora kernels, written once over a vector type and included by one source file per instruction set
// (lora_plain.cpp, lora_avx2.cpp, lora_avx512.cpp, lora_avx512_bf16.cpp) inside an unnamed namespace, after the
// #pragma that turns the instructions on. No std:: templates here: the linker might keep this file's copy of one for
// machines that lack the instructions.
//
// A vector type V holds: E (element of tiles and panels), C (accumulator), kPair (neighbours in an element), kWidth
// (rows of its widest micro-kernel), kVectors (vectors of a panel) and
//   Vec zero(), load(const C*), add(Vec, Vec); void store(C*, Vec)
//   B panel(const E*, int v)              vector v of a panel's 16 columns
//   Vec madd(Vec, const E*, B)            adds broadcast(element) * panel
//   void tile_rows(E*, const T*, bits, n) up to 32 elements of a row, masked, neighbours in the columns paired
//   void tile_cols(E*, const T* row0, const T* row1 | null, bits0, bits1, n)   neighbours in the rows paired
//   void finish(T*, const Vec*, alpha, bits, n, accumulate)   two panels' sums of one row, up to 32 results:
//                         accumulate ? old + keep * alpha * sum : keep * alpha * sum
//   void draw(seed, row, child, threshold, word, words, cols, uint32_t*)
// Sums run in an order that depends on the shape alone, so any number of threads gives the same bits.

// Rows and columns of a tile: 32 rows, 1 KiB of each.
constexpr int kTileRows = 32;
template <class V>
constexpr int kTileElements = 1024 / sizeof(typename V::E);
template <class V>
constexpr int kTileCols = kTileElements<V> * V::kPair;
template <class V>
constexpr int kTileStride = kTileElements<V> + 64 / sizeof(typename V::E);  // off the cache's power-of-two strides

// c[i][0..15] = (fresh ? 0 : c) + sum_t a[i * RS + t * KS] * b[t][0..15] for MR rows i. The sum starts from zero and is
// added at the end: over many tiles that is a blocked sum, whose error grows far slower than a running one's.
template <class V, int MR, int RS, int KS>
__attribute__((noinline)) void micro(int64_t steps, const typename V::E* a, const typename V::E* b, typename V::C* c,
                                     int64_t ldc, bool fresh) {
  typename V::Vec acc[MR][V::kVectors];
  LM_UNROLL for (int i = 0; i < MR; ++i) { LM_UNROLL for (int v = 0; v < V::kVectors; ++v) acc[i][v] = V::zero(); }
  for (int64_t t = 0; t < steps; ++t) {
    typename V::B bv[V::kVectors];
    LM_UNROLL for (int v = 0; v < V::kVectors; ++v) bv[v] = V::panel(b, v);
    LM_UNROLL for (int i = 0; i < MR; ++i) {
      LM_UNROLL for (int v = 0; v < V::kVectors; ++v) acc[i][v] = V::madd(acc[i][v], a + i * RS, bv[v]);
    }
    a += KS;
    b += kPanel;
  }
  LM_UNROLL for (int i = 0; i < MR; ++i) {
    LM_UNROLL for (int v = 0; v < V::kVectors; ++v) {
      typename V::C* at = c + i * ldc + v * (kPanel / V::kVectors);
      V::store(at, fresh ? acc[i][v] : V::add(V::load(at), acc[i][v]));
    }
  }
}

// Any number of rows, by halving the micro-kernel.
template <class V, int MR, int RS, int KS>
void micro_rows(int64_t rows, int64_t steps, const typename V::E* a, const typename V::E* b, typename V::C* c,
                int64_t ldc, bool fresh) {
  for (; rows >= MR; rows -= MR, a += MR * RS, c += MR * ldc) micro<V, MR, RS, KS>(steps, a, b, c, ldc, fresh);
  if constexpr (MR > 1) {
    if (rows > 0) micro_rows<V, MR / 2, RS, KS>(rows, steps, a, b, c, ldc, fresh);
  }
}

// The keep bits of row `row`, words word0 .. word0 + words - 1: saved ones (in row `at`), or drawn into `scratch`.
template <class V>
inline const uint32_t* keep_bits(const Drop& drop, int64_t row, int64_t at, int64_t word0, int64_t words,
                                 uint32_t* scratch) {
  if (drop.mask) return drop.mask + at * drop.words + word0;
  V::draw(drop.seed, static_cast<uint32_t>(row), drop.child, drop.threshold, word0, words, drop.cols, scratch);
  return scratch;
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class V, class T>
inline void tile_row(typename V::E* dst, const T* src, const uint32_t* bits, int64_t cols) {
  for (int64_t c = 0; c < cols; c += 32) {
    V::tile_rows(dst + c / V::kPair, src + c, bits ? bits[c / 32] : ~0u, static_cast<int>(smaller(32, cols - c)));
  }
}

template <class V, class T>
void dot(const DotArgs& args, int64_t row0, int64_t row1) {
  using E = typename V::E;
  using C = typename V::C;
  constexpr int kRows = V::kWidth;
  const int64_t steps = (args.cols + V::kPair - 1) / V::kPair, padded = (args.rank + kPanel - 1) / kPanel * kPanel;
  alignas(64) E tile[kRows * kTileStride<V>];
  alignas(64) C acc[kRows * kRankBlock];
  uint32_t scratch[kTileCols<V> / 32];
  for (int64_t m = row0; m < row1; m += kRows) {
    const int64_t rows = smaller(kRows, row1 - m);
    if (args.cols == 0) {
      for (int64_t i = 0; i < rows * padded; ++i) acc[i] = 0;
    }
    for (int64_t c = 0; c < args.cols; c += kTileCols<V>) {
      const int64_t cols = smaller(kTileCols<V>, args.cols - c), words = (cols + 31) / 32;
      for (int64_t i = 0; i < rows; ++i) {
        const uint32_t* bits = nullptr;
        const int64_t at = row_at(args.index, m + i);
        if (args.drop.active) {
          bits = keep_bits<V>(args.drop, m + i, at, c / 32, words, scratch);
          if (args.save) {
            uint32_t* save = args.save + at * args.drop.words + c / 32;
            for (int64_t w = 0; w < words; ++w) save[w] = bits[w];
          }
        }
        tile_row<V>(tile + i * kTileStride<V>, static_cast<const T*>(args.x) + at * args.ld + c, bits, cols);
      }
      for (int64_t q = 0; q < padded; q += kPanel) {
        micro_rows<V, V::kWidth, kTileStride<V>, 1>(
            rows, (cols + V::kPair - 1) / V::kPair, tile,
            static_cast<const E*>(args.panels) + q * steps + c / V::kPair * kPanel, acc + q, padded, c == 0);
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      T* out = static_cast<T*>(args.out) + (m + i) * args.ld_out;
      for (int64_t j = 0; j < args.rank; j += 32) {
        typename V::Vec sums[2 * V::kVectors];
        for (int v = 0; v < 2 * V::kVectors; ++v) {
          const int64_t at = j + v * (kPanel / V::kVectors);
          sums[v] = at < padded ? V::load(acc + i * padded + at) : V::zero();
        }
        V::finish(out + j, sums, static_cast<C>(args.alpha), ~0u, static_cast<int>(smaller(32, args.rank - j)), false);
      }
    }
  }
}

template <class V, class T>
void pass(const PassArgs& args, int64_t row0, int64_t row1, int64_t col0, int64_t col1) {
  using E = typename V::E;
  using C = typename V::C;
  constexpr int kStride = kTileStride<V>;
  constexpr int kColsStride = kTileCols<V> + (V::kPair == 1 ? kStride - kTileElements<V> : 0);
  alignas(64) E by_rows[kTileRows * kStride];
  // with pairs, the sum over rows needs a tile of its own; without, both sums read one
  alignas(64) E by_pairs[V::kPair == 1 ? 1 : kTileRows / V::kPair * kColsStride];
  uint32_t scratch[2][kTileCols<V> / 32];
  const bool both = args.panels != nullptr;
  for (int64_t m = row0; m < row1; m += kTileRows) {
    const int64_t rows = smaller(kTileRows, row1 - m);
    for (int64_t c = col0; c < col1; c += kTileCols<V>) {
      const int64_t cols = smaller(kTileCols<V>, col1 - c), words = (cols + 31) / 32;
      for (int64_t i = 0; i < rows; i += V::kPair) {
        const T* src[2] = {nullptr, nullptr};
        const uint32_t* bits[2] = {nullptr, nullptr};
        const int used = i + V::kPair <= rows ? V::kPair : 1;
        for (int k = 0; k < used; ++k) {
          const int64_t at = row_at(args.index, m + i + k);
          src[k] = static_cast<const T*>(args.y) + at * args.ld + c;
          if (args.drop.active) bits[k] = keep_bits<V>(args.drop, m + i + k, at, c / 32, words, scratch[k]);
          if (V::kPair == 1 || both) tile_row<V>(by_rows + (i + k) * kStride, src[k], bits[k], cols);
        }
        if constexpr (V::kPair > 1) {
          for (int64_t k = 0; k < cols; k += 32) {
            V::tile_cols(by_pairs + i / 2 * kColsStride + k, src[0] + k, src[1] ? src[1] + k : nullptr,
                         bits[0] ? bits[0][k / 32] : ~0u, bits[1] ? bits[1][k / 32] : ~0u,
                         static_cast<int>(smaller(32, cols - k)));
          }
        }
      }
      const E* columns = V::kPair == 1 ? by_rows : by_pairs;
      for (int64_t q = 0; q < args.rank_pad; q += kPanel) {
        if (both) {
          micro_rows<V, V::kWidth, kStride, 1>(
              rows, (cols + V::kPair - 1) / V::kPair, by_rows,
              static_cast<const E*>(args.panels) + q * args.steps + c / V::kPair * kPanel,
              static_cast<C*>(args.dot) + m * args.rank_pad + q, args.rank_pad, c == col0);
        }
        micro_rows<V, V::kWidth, 1, kColsStride>(
            cols, (rows + V::kPair - 1) / V::kPair, columns,
            static_cast<const E*>(args.thin) + q * args.thin_steps + m / V::kPair * kPanel,
            static_cast<C*>(args.outer) + c * args.rank_pad + q, args.rank_pad, m == row0);
      }
    }
  }
}

// MR rows by two panels (32 columns) of a rank-r product, finished in registers: the sums never go to memory.
// Row i of d is at a[i] with step MS, panels at b and b + next, results at out[i] + c, their keep bits *bits[i].
template <class V, class T, int MR, int MS>
__attribute__((noinline)) void update(int64_t steps, const typename V::E* a, const typename V::E* b, int64_t next,
                                      T* const* out, int64_t c, typename V::C alpha, const uint32_t* const* bits, int n,
                                      bool accumulate) {
  constexpr int kAll = 2 * V::kVectors;
  typename V::Vec acc[MR][kAll];
  LM_UNROLL for (int i = 0; i < MR; ++i) { LM_UNROLL for (int v = 0; v < kAll; ++v) acc[i][v] = V::zero(); }
  for (int64_t t = 0; t < steps; ++t) {
    typename V::B bv[kAll];
    LM_UNROLL for (int v = 0; v < V::kVectors; ++v) {
      bv[v] = V::panel(b, v);
      bv[V::kVectors + v] = V::panel(b + next, v);
    }
    LM_UNROLL for (int i = 0; i < MR; ++i) {
      LM_UNROLL for (int v = 0; v < kAll; ++v) acc[i][v] = V::madd(acc[i][v], a + i, bv[v]);
    }
    a += MS;
    b += kPanel;
  }
  LM_UNROLL for (int i = 0; i < MR; ++i) V::finish(out[i] + c, acc[i], alpha, *bits[i], n, accumulate);
}

template <class V, class T, int MR, int MS>
void update_rows(int64_t rows, int64_t steps, const typename V::E* a, const typename V::E* b, int64_t next,
                 T* const* out, int64_t c, typename V::C alpha, const uint32_t* const* bits, int n, bool accumulate) {
  for (; rows >= MR; rows -= MR, a += MR, out += MR, bits += MR) {
    update<V, T, MR, MS>(steps, a, b, next, out, c, alpha, bits, n, accumulate);
  }
  if constexpr (MR > 1) {
    if (rows > 0) update_rows<V, T, MR / 2, MS>(rows, steps, a, b, next, out, c, alpha, bits, n, accumulate);
  }
}

template <class V, class T>
void expand(const ExpandArgs& args, int64_t row0, int64_t row1, int64_t col0, int64_t col1) {
  using E = typename V::E;
  constexpr int kRows = V::kWidth / 2, kWords = 32;
  static const uint32_t kAllBits = ~0u;
  const int64_t steps = (args.rank + V::kPair - 1) / V::kPair;
  alignas(64) E line[kTileElements<V>];
  alignas(64) E few[kRows * kRankBlock / V::kPair];
  // d of the block's rows, [step][row]
  E* rows_of_d = args.rank <= kRankBlock ? few : static_cast<E*>(malloc(steps * kRows * sizeof(E)));
  uint32_t scratch[kRows][kWords];
  const uint32_t* bits[kRows];
  T* out[kRows];
  for (int64_t m = row0; m < row1; m += kRows) {
    const int64_t rows = smaller(kRows, row1 - m);
    for (int64_t i = 0; i < rows; ++i) {
      out[i] = static_cast<T*>(args.out) + row_at(args.index, m + i) * args.ld_out;
      const T* d = static_cast<const T*>(args.d) + (m + i) * args.ld_d;
      for (int64_t t0 = 0; t0 < steps; t0 += kTileElements<V>) {
        const int64_t t1 = smaller(kTileElements<V>, steps - t0);
        tile_row<V>(line, d + t0 * V::kPair, nullptr, smaller(kTileCols<V>, args.rank - t0 * V::kPair));
        for (int64_t t = 0; t < t1; ++t) rows_of_d[(t0 + t) * kRows + i] = line[t];
      }
    }
    for (int64_t c0 = col0; c0 < col1; c0 += 32 * kWords) {
      const int64_t end = smaller(c0 + 32 * kWords, col1);
      for (int64_t i = 0; i < rows; ++i) {
        bits[i] = args.drop.active ? keep_bits<V>(args.drop, m + i, row_at(args.index, m + i), c0 / 32,
                                                  (end - c0 + 31) / 32, scratch[i])
                                   : &kAllBits;
      }
      for (int64_t c = c0; c < end; c += 32) {
        const E* b = static_cast<const E*>(args.panels) + c * steps;
        const int n = static_cast<int>(smaller(32, end - c));
        update_rows<V, T, kRows, kRows>(rows, steps, rows_of_d, b, kPanel * steps, out, c,
                                        static_cast<typename V::C>(args.alpha), bits, n, args.accumulate);
        for (int64_t i = 0; args.drop.active && i < rows; ++i) ++bits[i];
      }
    }
  }
  if (rows_of_d != few) free(rows_of_d);
}

template <class V, class T>
constexpr LoraKernels kernels_of(Element element) {
  return LoraKernels{element, dot<V, T>, pass<V, T>, expand<V, T>};
}
