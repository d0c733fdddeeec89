// The kernels of lowbit_optim_impl.h, written once over a vector type V and included by one source file per instruction
// set inside an unnamed namespace, after the #pragma that turns the instructions on and after common/codec_math.h. No
// std:: here: the linker might keep this file's copy of one for machines that lack the instructions.
//
// Beyond what codec_math.h asks of it, V holds
//   int kWidth (16 or less); F load(const float*); void store(float*, F); F root(F)
//   I load_bytes(const uint8_t*); void store_bytes(uint8_t*, I): kWidth of them, the low bits of each element
//   I load_words(const uint16_t*); void store_words(uint16_t*, I)
//   I minu(I, I), unsigned; uint32_t top(I), largest of elements >= 0; uint32_t bottom(I), least, unsigned
//   void draw(uint64_t seed, int64_t block, uint32_t step, uint16_t* to): kDraw numbers from Philox block `block` on

alignas(64) const float kTreeTables[2][kTreeFloats] = {
#define LM_ROW(s, r)                                                                               \
  tree_constant(s, 8 * (r)), tree_constant(s, 8 * (r) + 1), tree_constant(s, 8 * (r) + 2),         \
      tree_constant(s, 8 * (r) + 3), tree_constant(s, 8 * (r) + 4), tree_constant(s, 8 * (r) + 5), \
      tree_constant(s, 8 * (r) + 6), tree_constant(s, 8 * (r) + 7)
    {LM_ROW(false, 0), LM_ROW(false, 1), LM_ROW(false, 2), LM_ROW(false, 3), LM_ROW(false, 4)},
    {LM_ROW(true, 0), LM_ROW(true, 1), LM_ROW(true, 2), LM_ROW(true, 3), LM_ROW(true, 4)}};
#undef LM_ROW

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ------------------------------------------------------------------------------------------------------------- codecs

template <class V, Codec kCodec, bool kSigned>
void decode_groups(const uint8_t* codes, const float* scale, const uint8_t* span, int64_t group, int64_t n, float* out,
                   const char* ahead) {
  const float* tree = kTreeTables[kSigned];
  uint8_t wide[kLargestGroup];
  for (int64_t start = 0, i = 0; start < n; start += group, ++i) {
    const int64_t count = smaller(group, n - start);
    const uint8_t* from = codes + start;
    if constexpr (kCodec == Codec::kInt4) {
      for (int64_t k = 0; k < count; ++k) wide[k] = codes[(start + k) / 2] >> (k % 2 ? 4 : 0) & 15;
      from = wide;
    }
    const DecodeBy by = decode_by<kCodec, kSigned>(GroupScale{scale[i], with_span(kCodec) ? span[i] : uint8_t{0}});
    int64_t k = 0;
    for (; k + V::kWidth <= count; k += V::kWidth) {
      __builtin_prefetch(ahead + 4 * (start + k), 0, 2);
      V::store(out + start + k, decode<V, kCodec, kSigned>(V::load_bytes(from + k), by, tree));
    }
    if (k < count) {
      uint8_t tail[V::kWidth] = {};
      for (int64_t j = k; j < count; ++j) tail[j - k] = from[j];
      V::store(out + start + k, decode<V, kCodec, kSigned>(V::load_bytes(tail), by, tree));
    }
  }
}

// Three passes over up to a block: magnitudes of all groups, what follows from them, codes. A group's scale is a long
// chain of dependent operations; side by side the chains of several groups overlap.
template <class V, Codec kCodec, bool kSigned>
void encode_groups(const float* in, int64_t group, int64_t n, uint8_t* codes, float* scale, uint8_t* span,
                   const char* ahead) {
  const float* tree = kTreeTables[kSigned];
  uint32_t high[kBlock / kLeastGroup], low[kBlock / kLeastGroup];
  EncodeBy by[kBlock / kLeastGroup];
  const int64_t groups = (n + group - 1) / group;
  for (int64_t i = 0; i < groups; ++i) {
    const float* from = in + i * group;
    const int64_t count = smaller(group, n - i * group);
    auto most = V::seti(0), least = V::seti(-1);
    for (int64_t k = 0; k < count; k += V::kWidth) {
      const auto bits = V::andi(V::bits(V::load(from + k)), V::seti(0x7fffffff));
      most = V::maxi(most, bits);
      if constexpr (with_span(kCodec)) least = V::minu(least, V::subi(bits, V::seti(kLeastNormalBits)));
    }
    high[i] = V::top(most);
    if constexpr (with_span(kCodec)) low[i] = V::bottom(least);
  }
  for (int64_t i = 0; i < groups; ++i) {
    const GroupScale kept = group_scale<kCodec, kSigned>(high[i], with_span(kCodec) ? low[i] : 0u);
    by[i] = encode_by<kCodec, kSigned>(kept);
    scale[i] = kept.scale;
    if constexpr (with_span(kCodec)) span[i] = kept.span;
  }
  uint8_t wide[kLargestGroup];
  for (int64_t i = 0; i < groups; ++i) {
    const int64_t start = i * group, count = smaller(group, n - start);
    const bool whole = kCodec != Codec::kInt4 && count % V::kWidth == 0;
    uint8_t* to = whole ? codes + start : wide;
    if (by[i].alive) {
      const EncodeBy mine = by[i];
      for (int64_t k = 0; k < count; k += V::kWidth) {
        __builtin_prefetch(ahead + 4 * (start + k), 0, 2);
        V::store_bytes(to + k, encode<V, kCodec, kSigned>(V::load(in + start + k), mine, tree));
      }
    } else {
      for (int64_t k = 0; k < count; ++k) to[k] = 0;
    }
    if constexpr (kCodec == Codec::kInt4) {
      for (int64_t k = 0; k < count; k += 2) {
        codes[(start + k) / 2] = static_cast<uint8_t>((wide[k] & 15) | (k + 1 < count ? wide[k + 1] << 4 : 0));
      }
    } else if (!whole) {
      for (int64_t k = 0; k < count; ++k) codes[start + k] = wide[k];
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- update

template <class V>
inline void adam_vector(float* p, const float* g, float* m, float* v, const AdamBy& by) {
  const auto grad = V::mul(V::load(g), V::set(by.grad_scale));
  const auto mean = V::fma(V::set(by.beta1), V::load(m), V::mul(V::set(by.rest1), grad));
  const auto square = V::fma(V::set(by.beta2), V::load(v), V::mul(V::mul(V::set(by.rest2), grad), grad));
  const auto below = V::fma(V::root(square), V::set(by.unbias2), V::set(by.eps));
  const auto ratio = V::div(V::mul(mean, V::set(by.unbias1)), below);
  const auto old = V::load(p);
  V::store(p, V::fma(V::set(-by.lr), V::fma(V::set(by.decay), old, ratio), old));
  V::store(m, mean);
  V::store(v, square);
}

template <class V>
void adam(float* p, const float* g, float* m, float* v, int64_t n, const AdamBy& by) {
  int64_t i = 0;
  for (; i + V::kWidth <= n; i += V::kWidth) adam_vector<V>(p + i, g + i, m + i, v + i, by);
  for (; i < n; ++i) adam_vector<Single>(p + i, g + i, m + i, v + i, by);
}

template <class V>
void widen(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + V::kWidth <= n; i += V::kWidth) {
    V::store(to + i, V::from_bits(V::template shl<16>(V::load_words(from + i))));
  }
  for (; i < n; ++i) to[i] = Single::from_bits(static_cast<int32_t>(static_cast<uint32_t>(from[i]) << 16));
}

template <class V>
inline void join_vector(const uint16_t* p, const int16_t* rest, float* to) {
  const auto low = V::template sra<16>(V::template shl<16>(V::load_words(reinterpret_cast<const uint16_t*>(rest))));
  V::store(to, V::from_bits(V::addi(V::template shl<16>(V::load_words(p)), low)));
}

template <class V>
void join(const uint16_t* p, const int16_t* rest, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + V::kWidth <= n; i += V::kWidth) join_vector<V>(p + i, rest + i, to + i);
  for (; i < n; ++i) join_vector<Single>(p + i, rest + i, to + i);
}

template <class V>
inline void split_vector(const float* from, uint16_t* p, int16_t* rest) {
  const auto bits = V::bits(V::load(from));
  // an arithmetic shift: only the low 16 bits of each element are stored
  V::store_words(p, V::template sra<16>(V::addi(bits, V::seti(0x8000))));
  V::store_words(reinterpret_cast<uint16_t*>(rest),
                 bits);  // bits - (p << 16), of which the low 16 bits are those of bits
}

template <class V>
void split(const float* from, uint16_t* p, int16_t* rest, int64_t n) {
  int64_t i = 0;
  for (; i + V::kWidth <= n; i += V::kWidth) split_vector<V>(from + i, p + i, rest + i);
  for (; i < n; ++i) split_vector<Single>(from + i, p + i, rest + i);
}

template <class V>
inline void dither_vector(const float* from, uint16_t* p, const uint16_t* random) {
  const auto bits = V::bits(V::load(from)), exponent = V::seti(0x7f800000);
  const auto up = V::addi(bits, V::load_words(random));
  const auto huge = V::lessi(V::seti(0x7f7fffff), V::andi(up, exponent));  // would become infinite
  V::store_words(p, V::template sra<16>(V::selecti(huge, bits, up)));
}

template <class V>
void dither(const float* from, uint16_t* p, int64_t n, uint64_t seed, int64_t first, uint32_t step) {
  alignas(64) uint16_t random[kBlock + 8 + V::kDraw];
  const int64_t lead = first % 8;
  for (int64_t done = 0; done < n; done += kBlock) {
    const int64_t count = smaller(kBlock, n - done);
    for (int64_t k = 0; k < count + lead; k += V::kDraw) V::draw(seed, (first + done) / 8 + k / 8, step, random + k);
    int64_t i = 0;
    for (; i + V::kWidth <= count; i += V::kWidth) {
      dither_vector<V>(from + done + i, p + done + i, random + lead + i);
    }
    for (; i < count; ++i) dither_vector<Single>(from + done + i, p + done + i, random + lead + i);
  }
}

template <class V>
double squares(const float* g, int64_t n, bool* finite) {
  auto high = V::seti(0);
  auto sum0 = V::set(0.f), sum1 = V::set(0.f);
  int64_t i = 0;
  for (; i + 2 * V::kWidth <= n; i += 2 * V::kWidth) {
    const auto a = V::load(g + i), b = V::load(g + i + V::kWidth);
    high = V::maxi(high, V::andi(V::bits(a), V::seti(0x7fffffff)));
    high = V::maxi(high, V::andi(V::bits(b), V::seti(0x7fffffff)));
    sum0 = V::fma(a, a, sum0);
    sum1 = V::fma(b, b, sum1);
  }
  float lanes[2 * V::kWidth];
  V::store(lanes, sum0);
  V::store(lanes + V::kWidth, sum1);
  double total = 0.0;
  for (float lane : lanes) total += lane;
  uint32_t largest = V::top(high);
  for (int64_t k = i; k < n; ++k) {
    total += static_cast<double>(g[k]) * g[k];
    const uint32_t bits = static_cast<uint32_t>(Single::bits(g[k])) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  *finite = largest < kInfinityBits;
  // squares that fp32 cannot hold: once more, in double. 0x5e... is 2^62, 0x2c... 2^-39
  if (*finite && (largest > 0x5e800000u || largest < 0x2c000000u)) {
    total = 0.0;
    for (int64_t k = 0; k < n; ++k) total += static_cast<double>(g[k]) * g[k];
  }
  return total;
}

// -------------------------------------------------------------------------------------------------------------- table

#define LM_PAIR(f, codec) {f<V, codec, false>, f<V, codec, true>}
#define LM_ALL(f)                                                                   \
  {{nullptr, nullptr},       LM_PAIR(f, Codec::kE4M3), LM_PAIR(f, Codec::kE4M3Exp), \
   LM_PAIR(f, Codec::kE5M2), LM_PAIR(f, Codec::kDe8),  LM_PAIR(f, Codec::kDe8Exp),  \
   LM_PAIR(f, Codec::kLog8), LM_PAIR(f, Codec::kInt8), LM_PAIR(f, Codec::kInt4)}

template <class V>
constexpr LowbitIsa kernels_of(const char* name) {
  return LowbitIsa{
      name, LM_ALL(decode_groups), LM_ALL(encode_groups), adam<V>, widen<V>, join<V>, split<V>, dither<V>, squares<V>};
}

#undef LM_ALL
#undef LM_PAIR
