// The quant kernels, written once over a vector type and included by one source file per instruction set inside an
// unnamed namespace, after the #pragma that turns the instructions on. No std:: templates here: the linker might keep
// this file's copy of one for machines that lack the instructions.
//
// A vector type V holds
//   void lookup<kBits, T>(const uint8_t* run, int64_t i, int64_t n, const float* table, T* out)
//        elements i .. i + n - 1 of a run through a table of scaled values; i and n are multiples of 32
//   void affine8<T>(const uint8_t* codes, int64_t n, float zero, float scale, T* out)      8-bit codes, any n
// Loops over arrays of a fixed length are left to the compiler, which turns them into vectors.

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Scales first .. first + count - 1 in fp32: where they lie, or in `buffer`.
inline const float* scales_of(const QuantView& w, int64_t first, int64_t count, float* buffer) {
  if (w.spec.scale_bits == 0 && w.float_dtype == kFloat32) return static_cast<const float*>(w.scale) + first;
  quant_scales(w, first, count, buffer);
  return buffer;
}

// Scales and zeros of one stretch of groups, read in batches.
struct Groups {
  float buffer[kGroupBatch], zeros[kGroupBatch];
  const float* scales = nullptr;
  int64_t first = 0, count = 0;

  void at(const QuantView& w, int64_t group, int64_t last) {
    if (group >= first && group < first + count) return;
    first = group;
    count = smaller(kGroupBatch, last + 1 - group);
    scales = scales_of(w, first, count, buffer);
    quant_zeros(w, first, count, zeros);
  }
};

template <class T>
inline T rounded(float value) {
  return static_cast<T>(value);
}

template <int kBits, class T>
inline void lookup_some(const uint8_t* run, int64_t i, int64_t n, const float* table, T* out) {
  for (int64_t j = 0; j < n; ++j) out[j] = rounded<T>(table[code_at<kBits>(run, i + j)]);
}

// Columns of one row. A run is the row, or for table formats the whole weight; groups end at multiples of the group
// size within the run.
template <class V, int kBits, class T>
void dequantize_bits(const QuantView& w, int64_t row, int64_t col0, int64_t cols, T* out) {
  const bool flat = w.spec.is_table(), per_row = w.spec.per_row();
  const int shift = w.spec.log2_group;
  const uint8_t* run = flat ? w.packed : w.packed + row * row_bytes(kBits, w.k);
  const int64_t before = flat ? 0 : row * w.spec.row_groups(w.k);  // groups before the run
  const int64_t start = (flat ? row * w.k : 0) + col0, stop = start + cols;
  if (cols <= 0) return;
  const int64_t last = before + (per_row ? 0 : (stop - 1) >> shift);
  float units[16], table[16];
  if (kBits < 8) quant_units(w.spec, units);
  Groups groups;
  for (int64_t i = start; i < stop;) {
    const int64_t group = before + (per_row ? 0 : i >> shift);
    const int64_t end = per_row ? stop : smaller(stop, ((i >> shift) + 1) << shift);
    groups.at(w, group, last);
    const float scale = groups.scales[group - groups.first], zero = groups.zeros[group - groups.first];
    T* to = out + (i - start);
    if constexpr (kBits == 8) {
      V::template affine8<T>(run + i, end - i, zero, scale, to);
    } else {
      for (int c = 0; c < 16; ++c) {  // subtracted, then multiplied: no fused form of that exists
        const float value = units[c] - zero;
        table[c] = value * scale;
      }
      const int64_t head = smaller(end, (i + 31) & ~int64_t{31}), body = head + ((end - head) & ~int64_t{31});
      lookup_some<kBits, T>(run, i, head - i, table, to);
      if (body > head) V::template lookup<kBits, T>(run, head, body - head, table, to + (head - i));
      lookup_some<kBits, T>(run, body, end - body, table, to + (body - i));
    }
    i = end;
  }
}

template <class V, class T>
void dequantize_row(const QuantView& w, int64_t row, int64_t col0, int64_t cols, void* out) {
  T* to = static_cast<T*>(out);
  switch (w.spec.bits) {
    case 2: return dequantize_bits<V, 2, T>(w, row, col0, cols, to);
    case 3: return dequantize_bits<V, 3, T>(w, row, col0, cols, to);
    case 4: return dequantize_bits<V, 4, T>(w, row, col0, cols, to);
    default: return dequantize_bits<V, 8, T>(w, row, col0, cols, to);
  }
}

constexpr int kLanes = 32;      // partial sums of a dot product
constexpr int kStretch = 1024;  // columns of W that dot dequantizes at a time: 4 KiB, in the first-level cache

// Any layout and any type of x: a stretch of a row is dequantized to fp32 and multiplied with each row of x.
template <class V>
void dot_rows(const QuantDot& job, int64_t n0, int64_t n1) {
  alignas(64) float w[kStretch];
  alignas(64) float sums[kSmallRows][kLanes];
  const int64_t k = job.w.k;
  for (int64_t n = n0; n < n1; ++n) {
    for (int m = 0; m < job.rows; ++m) {
      for (int l = 0; l < kLanes; ++l) sums[m][l] = 0.0f;
    }
    for (int64_t c = 0; c < k; c += kStretch) {
      const int64_t cols = smaller(kStretch, k - c), whole = cols & ~int64_t{kLanes - 1};
      dequantize_row<V, float>(job.w, job.row0 + n, c, cols, w);
      for (int m = 0; m < job.rows; ++m) {
        const float* x = job.x + m * k + c;
        alignas(64) float part[kLanes];
        for (int l = 0; l < kLanes; ++l) part[l] = sums[m][l];
        for (int64_t j = 0; j < whole; j += kLanes) {
          for (int l = 0; l < kLanes; ++l) part[l] += x[j + l] * w[j + l];
        }
        for (int64_t j = whole; j < cols; ++j) part[j - whole] += x[j] * w[j];
        for (int l = 0; l < kLanes; ++l) sums[m][l] = part[l];
      }
    }
    for (int m = 0; m < job.rows; ++m) {
      for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int l = 0; l < width; ++l) sums[m][l] += sums[m][l + width];
      }
      job.y[m * job.ld + n] = sums[m][0];
    }
  }
}

// out[m, :] += dy[m, n] * W[n, :], over a block of columns that stays in the cache.
template <class V>
void outer_rows(const QuantOuter& job, int64_t c0, int64_t c1) {
  alignas(64) float w[kOuterCols];
  const int64_t cols = c1 - c0;
  for (int m = 0; m < job.rows; ++m) {
    for (int64_t c = 0; c < cols; ++c) job.out[m * job.ld + c] = 0.0f;
  }
  for (int64_t n = 0; n < job.n; ++n) {
    dequantize_row<V, float>(job.w, job.row0 + n, c0, cols, w);
    for (int m = 0; m < job.rows; ++m) {
      const float factor = job.dy[m * job.n + n];
      float* out = job.out + m * job.ld;
      for (int64_t c = 0; c < cols; ++c) out[c] += factor * w[c];
    }
  }
}

// ---------------------------------------------------------------------------------------------------------- quantize

constexpr int kBlock = 64;  // elements that the quantizer encodes at a time

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) { return static_cast<float>(x); }
inline float widen(Half x) { return static_cast<float>(x); }

inline uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

template <class T>
inline void read_block(const T* w, int n, float* x) {
  if (n == kBlock) {
    for (int i = 0; i < kBlock; ++i) x[i] = widen(w[i]);
  } else {
    for (int i = 0; i < kBlock; ++i) x[i] = i < n ? widen(w[i]) : 0.0f;
  }
}

// The largest magnitude as bits, in which NaN is above infinity: one that is not finite reaches the scale.
inline uint32_t largest(const float* x, uint32_t so_far) {
  uint32_t best[kBlock / 4];
  for (int i = 0; i < kBlock / 4; ++i) best[i] = so_far;
  for (int part = 0; part < 4; ++part) {
    for (int i = 0; i < kBlock / 4; ++i) {
      const uint32_t magnitude = bits_of(x[part * (kBlock / 4) + i]) & 0x7FFFFFFFu;
      best[i] = best[i] > magnitude ? best[i] : magnitude;
    }
  }
  for (int i = 0; i < kBlock / 4; ++i) so_far = so_far > best[i] ? so_far : best[i];
  return so_far;
}

// Codes of a block into place; `at` is the index of the first in the run. Whole bytes (granules) are written at once.
inline void put_block(int bits, uint8_t* run, int64_t at, const uint8_t* codes, int n) {
  if (bits == 4 && n % 2 == 0 && at % 2 == 0) {
    for (int i = 0; i < n / 2; ++i) run[at / 2 + i] = static_cast<uint8_t>(codes[2 * i] << 4 | codes[2 * i + 1]);
  } else if (bits == 2 && n % 4 == 0 && at % 4 == 0) {
    for (int i = 0; i < n / 4; ++i) {
      run[at / 4 + i] =
          static_cast<uint8_t>(codes[4 * i] << 6 | codes[4 * i + 1] << 4 | codes[4 * i + 2] << 2 | codes[4 * i + 3]);
    }
  } else if (bits == 3 && n % kGranule == 0 && at % kGranule == 0) {
    for (int i = 0; i < n; i += kGranule) {
      uint32_t words[3] = {0, 0, 0};
      for (int j = 0; j < kGranule; ++j) {
        for (int p = 0; p < 3; ++p) words[p] |= (codes[i + j] >> p & 1u) << j;
      }
      uint8_t* bytes = run + (at + i) / kGranule * 12;
      for (int b = 0; b < 12; ++b) bytes[b] = static_cast<uint8_t>(words[b / 4] >> (8 * (b % 4)));
    }
  } else if (bits == 8) {
    for (int i = 0; i < n; ++i) run[at + i] = codes[i];
  } else {
    for (int i = 0; i < n; ++i) put_code(bits, run, at + i, codes[i]);
  }
}

inline void store_scale(void* scale, int dtype, int64_t i, float value, float* stored) {
  if (dtype == kFloat32) {
    static_cast<float*>(scale)[i] = *stored = value;
  } else if (dtype == kBFloat16) {
    const BFloat16 narrow = static_cast<BFloat16>(value);
    static_cast<BFloat16*>(scale)[i] = narrow;
    *stored = static_cast<float>(narrow);
  } else {
    const Half narrow = static_cast<Half>(value);
    static_cast<Half*>(scale)[i] = narrow;
    *stored = static_cast<float>(narrow);
  }
}

// Table formats, groups begin .. end - 1 of the flat weight. A code counts the midpoints below the scaled element, in
// the order of the values.
template <class V, class T>
void quantize_table(const QuantizeArgs& args, int64_t begin, int64_t end) {
  const T* w = static_cast<const T*>(args.w);
  const int64_t size = int64_t{1} << args.spec.log2_group, total = args.rows * args.k;
  const int levels = 1 << args.spec.bits;
  float units[16], middle[16];
  uint8_t order[16];
  quant_units(args.spec, units);
  for (int i = 0; i < levels; ++i) order[i] = static_cast<uint8_t>(i);
  for (int i = 1; i < levels; ++i) {  // stable: of two zeros the smaller code comes first
    for (int j = i; j > 0 && units[order[j]] < units[order[j - 1]]; --j) {
      const uint8_t other = order[j];
      order[j] = order[j - 1];
      order[j - 1] = other;
    }
  }
  for (int i = 0; i + 1 < levels; ++i) middle[i] = (units[order[i]] + units[order[i + 1]]) / 2.0f;
  const bool sorted = args.spec.format != kFP4;
  alignas(64) float x[kBlock];
  alignas(64) int32_t count[kBlock];
  alignas(64) uint8_t codes[kBlock];
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group * size, last = smaller(first + size, total);
    uint32_t magnitude = 0;
    for (int64_t i = first; i < last; i += kBlock) {
      read_block(w + i, static_cast<int>(smaller(kBlock, last - i)), x);
      magnitude = largest(x, magnitude);
    }
    const bool whole = last - first == size;  // a short last group is divided, as bitsandbytes does
    float absmax = float_of_bits(magnitude);
    if (!whole && absmax < 1e-38f) absmax = 1e-38f;
    const float factor = 1.0f / (absmax < 1e-38f ? 1e-38f : absmax);
    float stored;
    store_scale(args.scale, args.float_dtype, group, absmax, &stored);
    for (int64_t i = first; i < last; i += kBlock) {
      const int n = static_cast<int>(smaller(kBlock, last - i));
      if (size > kBlock || !whole) read_block(w + i, n, x);
      for (int j = 0; j < kBlock; ++j) {
        x[j] = whole ? x[j] * factor : x[j] / absmax;
        count[j] = 0;
      }
      for (int t = 0; t + 1 < levels; ++t) {
        const float bound = middle[t];
        for (int j = 0; j < kBlock; ++j) count[j] += x[j] > bound ? 1 : 0;
      }
      if (sorted) {
        for (int j = 0; j < kBlock; ++j) codes[j] = static_cast<uint8_t>(count[j]);
      } else {
        for (int j = 0; j < kBlock; ++j) codes[j] = order[count[j]];
      }
      put_block(args.spec.bits, args.packed, i, codes, n);
    }
  }
}

// Int formats, rows begin .. end - 1.
template <class V, class T>
void quantize_affine(const QuantizeArgs& args, int64_t begin, int64_t end) {
  const T* w = static_cast<const T*>(args.w);
  const int64_t groups = args.spec.row_groups(args.k), size = args.spec.per_row() ? args.k : args.k / groups;
  const int bits = args.spec.bits;
  const float top = static_cast<float>((1 << bits) - 1), middle = static_cast<float>(1 << (bits - 1));
  const int64_t bytes = row_bytes(bits, args.k);
  constexpr float kRound = 12582912.0f;  // 1.5 * 2**23: adding it rounds to an integer, ties to even
  alignas(64) float x[kBlock];
  alignas(64) uint8_t codes[kBlock];
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t group = 0; group < groups; ++group) {
      const T* from = w + row * args.k + group * size;
      uint32_t magnitude = 0;
      float low = 0.0f, high = 0.0f;
      for (int64_t i = 0; i < size; i += kBlock) {
        read_block(from + i, static_cast<int>(smaller(kBlock, size - i)), x);
        magnitude = largest(x, magnitude);
        if (args.zero) {
          float lows[16], highs[16];
          for (int j = 0; j < 16; ++j) lows[j] = highs[j] = 0.0f;
          for (int part = 0; part < kBlock; part += 16) {
            for (int j = 0; j < 16; ++j) {
              lows[j] = x[part + j] < lows[j] ? x[part + j] : lows[j];
              highs[j] = x[part + j] > highs[j] ? x[part + j] : highs[j];
            }
          }
          for (int j = 0; j < 16; ++j) {
            low = lows[j] < low ? lows[j] : low;
            high = highs[j] > high ? highs[j] : high;
          }
        }
      }
      const float absmax = float_of_bits(magnitude);
      const bool finite = magnitude < 0x7F800000u;
      const int64_t at = row * groups + group;
      float scale;
      store_scale(args.scale, args.float_dtype, at,
                  !finite     ? absmax
                  : args.zero ? (high - low) / top
                              : absmax / (middle - 1.0f),
                  &scale);
      const float divisor = scale == 0.0f ? 1.0f : scale;
      float zero = middle;
      if (args.zero) {
        zero = finite ? -low / divisor : 0.0f;
        zero = zero < top ? (zero + kRound) - kRound : top;
        args.zero[at] = static_cast<uint8_t>(zero);
      }
      for (int64_t i = 0; i < size; i += kBlock) {
        const int n = static_cast<int>(smaller(kBlock, size - i));
        if (size > kBlock) read_block(from + i, n, x);
        for (int j = 0; j < kBlock; ++j) {
          float code = x[j] / divisor;
          code = code < 512.0f ? code : 512.0f;  // also NaN, whose group is refused later
          code = code > -512.0f ? code : -512.0f;
          code = (code + kRound) - kRound + zero;
          code = code > 0.0f ? code : 0.0f;
          codes[j] = static_cast<uint8_t>(code < top ? code : top);
        }
        put_block(bits, args.packed + row * bytes, group * size + i, codes, n);
      }
    }
  }
}

template <class V>
void quantize_groups(const QuantizeArgs& args, int64_t begin, int64_t end) {
  const bool table = args.spec.is_table();
  switch (args.type) {
    case kOutFloat:
      return table ? quantize_table<V, float>(args, begin, end) : quantize_affine<V, float>(args, begin, end);
    case kOutBFloat16:
      return table ? quantize_table<V, BFloat16>(args, begin, end) : quantize_affine<V, BFloat16>(args, begin, end);
    default: return table ? quantize_table<V, Half>(args, begin, end) : quantize_affine<V, Half>(args, begin, end);
  }
}

template <class V>
constexpr QuantKernels kernels_of() {
  return QuantKernels{{dequantize_row<V, float>, dequantize_row<V, BFloat16>, dequantize_row<V, Half>},
                      dot_rows<V>,
                      outer_rows<V>,
                      quantize_groups<V>,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};
}
