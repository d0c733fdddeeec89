// The arithmetic of codecs.h over a vector type V, so that single numbers and vectors share one definition. No include
// guard: included by codecs.h for single numbers, and by a file with vector instructions inside its own unnamed
// namespace after the #pragma that turns them on. No std:: here: the linker might keep that file's copy of a function.
//
// V holds: F (floats), I (32-bit integers), M (a mask), and on them
//   F set(float); I seti(int32_t); F from_bits(I); I bits(F); F add sub mul div min max(F, F), fma(a, b, c) = a * b + c
//   I addi subi andi ori(I, I), shl<n>(I), sra<n>(I); F to_float(I); I to_int(F), nearest even; I trunc(F)
//   M less(F, F), lessi(I, I); F select(M, F, F); I selecti(M, I, I): the first where the mask is set
//   F lookup(const float table[8], I); I maxi(I, I); M both(M, M)
//   F exponent(F) and F mantissa(F) of positive normal numbers: x = mantissa * 2^exponent, mantissa in [1, 2)
//   F whole(F), nearest even; F times_power(F p, F n): p * 2^n, both normal
// A product that a sum follows is written fma or kept from being fused: builds use -ffp-contract=off, and on the device
// the functions below round each operation.

struct Scalar {
  using F = float;
  using I = int32_t;
  using M = bool;

  static LM_HD F set(float v) { return v; }
  static LM_HD I seti(int32_t v) { return v; }
#if defined(__CUDA_ARCH__)
  static LM_HD F from_bits(I v) { return __int_as_float(v); }
  static LM_HD I bits(F v) { return __float_as_int(v); }
  static LM_HD F add(F a, F b) { return __fadd_rn(a, b); }
  static LM_HD F sub(F a, F b) { return __fsub_rn(a, b); }
  static LM_HD F mul(F a, F b) { return __fmul_rn(a, b); }
  static LM_HD F div(F a, F b) { return __fdiv_rn(a, b); }
  static LM_HD F root(F a) { return __fsqrt_rn(a); }
  static LM_HD F fma(F a, F b, F c) { return __fmaf_rn(a, b, c); }
  static LM_HD I to_int(F v) { return __float2int_rn(v); }
#else
  static LM_HD F from_bits(I v) {
    F f;
    memcpy(&f, &v, sizeof f);
    return f;
  }
  static LM_HD I bits(F v) {
    I i;
    memcpy(&i, &v, sizeof i);
    return i;
  }
  static LM_HD F add(F a, F b) { return a + b; }
  static LM_HD F sub(F a, F b) { return a - b; }
  static LM_HD F mul(F a, F b) { return a * b; }
  static LM_HD F div(F a, F b) { return a / b; }
  static LM_HD F root(F a) { return sqrtf(a); }
  static LM_HD F fma(F a, F b, F c) { return fmaf(a, b, c); }
  static LM_HD I to_int(F v) { return static_cast<I>(rintf(v)); }
#endif
  static LM_HD F min(F a, F b) { return b < a ? b : a; }
  static LM_HD F max(F a, F b) { return a < b ? b : a; }
  static LM_HD I addi(I a, I b) { return static_cast<I>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b)); }
  static LM_HD I subi(I a, I b) { return static_cast<I>(static_cast<uint32_t>(a) - static_cast<uint32_t>(b)); }
  static LM_HD I andi(I a, I b) { return a & b; }
  static LM_HD I ori(I a, I b) { return a | b; }
  template <int n>
  static LM_HD I shl(I a) {
    return static_cast<I>(static_cast<uint32_t>(a) << n);
  }
  template <int n>
  static LM_HD I sra(I a) {
    return a >> n;
  }
  static LM_HD F to_float(I v) { return static_cast<F>(v); }
  static LM_HD I trunc(F v) { return static_cast<I>(v); }
  static LM_HD M less(F a, F b) { return a < b; }
  static LM_HD M lessi(I a, I b) { return a < b; }
  static LM_HD F select(M m, F a, F b) { return m ? a : b; }
  static LM_HD I selecti(M m, I a, I b) { return m ? a : b; }
  static LM_HD F lookup(const float* table, I i) { return table[i]; }
  static LM_HD I maxi(I a, I b) { return a < b ? b : a; }
  static LM_HD M both(M a, M b) { return a && b; }
  static LM_HD F exponent(F x) { return static_cast<F>((bits(x) >> 23) - 127); }
  static LM_HD F mantissa(F x) { return from_bits((bits(x) & 0x007fffff) | 0x3f800000); }
  static LM_HD F whole(F v) { return rintf(v); }
  static LM_HD F times_power(F p, F n) { return from_bits(addi(bits(p), shl<23>(trunc(n)))); }
};

// ------------------------------------------------------------------------------------------------ logarithm and power

// log2 of normal positive numbers, to 1.6e-5; exact at powers of two.
template <class V>
LM_HD typename V::F log2_of(typename V::F x) {
  const auto u = V::sub(V::mantissa(x), V::set(1.f));
  auto q = V::set(0x1.71db5cp-5f);
  q = V::fma(u, q, V::set(-0x1.8c70c0p-3f));
  q = V::fma(u, q, V::set(0x1.a99458p-2f));
  q = V::fma(u, q, V::set(-0x1.6b0ea4p-1f));
  q = V::fma(u, q, V::set(0x1.712178p+0f));
  return V::fma(u, q, V::exponent(x));
}

// 2 ** t for t in [-120, 0], to 5e-6; exact at whole numbers.
template <class V>
LM_HD typename V::F exp2_of(typename V::F t) {
  const auto n = V::whole(t);
  const auto f = V::sub(t, n);
  auto q = V::set(0x1.3c1b90p-7f);
  q = V::fma(f, q, V::set(0x1.ca719cp-5f));
  q = V::fma(f, q, V::set(0x1.ebfbc6p-3f));
  q = V::fma(f, q, V::set(0x1.62e012p-1f));
  return V::times_power(V::fma(f, q, V::set(1.f)), n);
}

// -------------------------------------------------------------------------------------------- magnitudes and codes

// A scaled magnitude to the FP8 format with kMantissa bits, ties to even; the code without its sign.
template <class V, int kMantissa>
LM_HD typename V::I to_fp8(typename V::F y) {
  constexpr int kBias = kMantissa == 3 ? 7 : 15, kDrop = 23 - kMantissa, kLeast = kBias - 1 + kMantissa;
  const auto bits = V::bits(y);
  const auto odd = V::andi(V::template sra<kDrop>(bits), V::seti(1));
  const auto up = V::addi(V::addi(bits, V::seti((1 << (kDrop - 1)) - 1)), odd);
  const auto normal = V::subi(V::template sra<kDrop>(up), V::seti((127 - kBias) << kMantissa));
  constexpr float kMagic = static_cast<float>(1 << (23 - kLeast));  // its last place is the smallest number
  const auto small = V::subi(V::bits(V::add(y, V::set(kMagic))), V::seti((127 + 23 - kLeast) << 23));
  return V::selecti(V::less(y, V::set(kMantissa == 3 ? 0x1p-6f : 0x1p-14f)), small, normal);
}

template <class V, int kMantissa>
LM_HD typename V::F from_fp8(typename V::I code) {
  constexpr int kBias = kMantissa == 3 ? 7 : 15, kDrop = 23 - kMantissa;
  const auto normal = V::from_bits(V::addi(V::template shl<kDrop>(code), V::seti((127 - kBias) << 23)));
  const auto small = V::mul(V::to_float(code), V::set(kMantissa == 3 ? 0x1p-9f : 0x1p-16f));
  return V::select(V::lessi(code, V::seti(1 << kMantissa)), small, normal);
}

template <class V, bool kSigned>
LM_HD typename V::I to_tree(typename V::F y, const float* tree) {
  auto place = V::seti(-1);
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int i = 0; i < (kSigned ? 7 : 8); ++i) {
    place = V::selecti(V::less(y, V::set(tree[8 * kTreeLeast + i])), place, V::seti(i));
  }
  const auto none = V::lessi(place, V::seti(0));
  const auto at = V::selecti(none, V::seti(0), place);
  const auto raw = V::fma(y, V::lookup(tree + 8 * kTreeBins, at), V::lookup(tree + 8 * kTreeFirst, at));
  const auto last = V::sub(V::from_bits(V::template shl<23>(V::addi(at, V::seti(128)))), V::set(1.f));  // 2 << at, - 1
  const auto code = V::trunc(V::min(V::max(raw, V::set(1.f)), last));
  return V::selecti(none, V::seti(0), code);
}

template <class V>
LM_HD typename V::F from_tree(typename V::I code, const float* tree) {
  const auto value = V::to_float(code);
  const auto none = V::lessi(code, V::seti(1));
  const auto at = V::selecti(none, V::seti(0), V::subi(V::template sra<23>(V::bits(value)), V::seti(127)));
  const auto got = V::fma(value, V::lookup(tree + 8 * kTreeSlope, at), V::lookup(tree + 8 * kTreeBase, at));
  return V::select(none, V::set(0.f), got);
}

template <class V, Codec kCodec, bool kSigned>
LM_HD typename V::I to_code(typename V::F y, const float* tree) {
  if constexpr (is_tree(kCodec)) {
    return to_tree<V, kSigned>(y, tree);
  } else {
    return to_fp8<V, kCodec == Codec::kE5M2 ? 2 : 3>(y);
  }
}

template <class V, Codec kCodec>
LM_HD typename V::F from_code(typename V::I code, const float* tree) {
  if constexpr (is_tree(kCodec)) {
    return from_tree<V>(code, tree);
  } else {
    return from_fp8<V, kCodec == Codec::kE5M2 ? 2 : 3>(code);
  }
}

// -------------------------------------------------------------------------------------------------------- per group

// `largest`: bits of the group's largest magnitude. `least`: bits of the least that is at least 2**-126, minus those of
// 2**-126 (0xffffffff where there is none): a minimum over unsigned(bits - kLeastNormalBits).
template <Codec kCodec, bool kSigned>
LM_HD GroupScale group_scale(uint32_t largest, uint32_t least) {
  GroupScale group{Scalar::from_bits(static_cast<int32_t>(largest)), 0};
  if (largest >= kInfinityBits) return GroupScale{Scalar::from_bits(0x7fc00000), 0};
  if (largest < kLeastScaleBits) return GroupScale{0.f, 0};
  if constexpr (with_span(kCodec)) {
    const float low = Scalar::from_bits(static_cast<int32_t>(least + kLeastNormalBits));
    const float octaves = Scalar::sub(log2_of<Scalar>(group.scale), log2_of<Scalar>(low));
    if constexpr (kCodec == Codec::kLog8) {
      const float twice = Scalar::mul(2.f, octaves);
      int up = Scalar::trunc(twice);
      up += static_cast<float>(up) < twice ? 1 : 0;
      group.span = static_cast<uint8_t>(up < log8_widest(kSigned) ? up : log8_widest(kSigned));
    } else {
      constexpr float kSixteenths = expansion_of(kCodec, kSigned);
      if (octaves <= kSixteenths / 255.f) {
        group.span = 255;
      } else {
        const int k = Scalar::trunc(Scalar::div(kSixteenths, octaves));
        group.span = static_cast<uint8_t>(k < 1 ? 1 : k > 255 ? 255 : k);
      }
    }
  }
  return group;
}

template <Codec kCodec, bool kSigned>
LM_HD EncodeBy encode_by(GroupScale group) {
  EncodeBy by{0.f, 0.f, 0, group.scale > 0.f};
  if (!by.alive) return by;
  if constexpr (with_span(kCodec)) {
    const float span = static_cast<float>(group.span);
    by.log_scale = log2_of<Scalar>(group.scale);
    if constexpr (kCodec == Codec::kLog8) {
      by.mul = group.span ? Scalar::div(2.f * (levels_of(kSigned) - 1), span) : 0.f;
      // an octave below the last level is half of it: what lies beyond is nearer to zero
      by.last = -Scalar::to_int(by.mul);
    } else {
      by.mul = Scalar::mul(span, 0.0625f);
    }
  } else {
    by.mul = Scalar::div(top_of(kCodec, kSigned), group.scale);
  }
  return by;
}

template <Codec kCodec, bool kSigned>
LM_HD DecodeBy decode_by(GroupScale group) {
  DecodeBy by{0.f, group.scale};
  if constexpr (kCodec == Codec::kLog8) {
    by.mul = Scalar::mul(static_cast<float>(group.span), 1.f);
    by.mul = Scalar::div(by.mul, 2.f * (levels_of(kSigned) - 1));
  } else if constexpr (is_expanded(kCodec)) {
    by.mul = Scalar::div(16.f, static_cast<float>(group.span > 1 ? group.span : 1));
  } else {
    by.mul = 1.f / top_of(kCodec, kSigned);
  }
  return by;
}

// ------------------------------------------------------------------------------------------------------- per element

// The code of x in the low bits (eight, or four of int4); those above are unspecified. `by.alive` must hold.
template <class V, Codec kCodec, bool kSigned>
LM_HD typename V::I encode(typename V::F x, const EncodeBy& by, const float* tree) {
  const auto bits = V::bits(x), size_bits = V::andi(bits, V::seti(0x7fffffff));
  const auto size = V::from_bits(size_bits);
  if constexpr (kCodec == Codec::kInt8 || kCodec == Codec::kInt4) {
    constexpr float kTop = top_of(kCodec, kSigned);
    const auto y = V::mul(kSigned ? x : size, V::set(by.mul));
    return V::to_int(V::max(V::min(y, V::set(kTop)), V::set(-kTop)));
  }
  auto code = V::seti(0);
  if constexpr (with_span(kCodec)) {
    // numbers that are not normal give anything here, and code 0 below
    auto ok = V::lessi(V::seti(kLeastNormalBits - 1), size_bits);
    const auto distance = V::sub(log2_of<V>(size), V::set(by.log_scale));
    if constexpr (kCodec == Codec::kLog8) {
      code = V::addi(V::to_int(V::mul(distance, V::set(by.mul))), V::seti(levels_of(kSigned)));
      if constexpr (kSigned) ok = V::both(ok, V::lessi(V::seti(by.last), code));
      code = V::maxi(code, V::seti(1));
    } else {
      const auto t = V::max(V::mul(distance, V::set(by.mul)), V::set(-120.f));
      code = to_code<V, kCodec, kSigned>(V::mul(exp2_of<V>(t), V::set(top_of(kCodec, kSigned))), tree);
      if constexpr (kSigned) ok = V::both(ok, V::lessi(V::seti(0), code));
    }
    if constexpr (kSigned) code = V::ori(code, V::andi(V::template sra<24>(bits), V::seti(0x80)));
    return V::selecti(ok, code, V::seti(0));
  } else {
    constexpr float kTop = top_of(kCodec, kSigned);
    code = to_code<V, kCodec, kSigned>(V::min(V::mul(size, V::set(by.mul)), V::set(kTop)), tree);
    if constexpr (kSigned) {
      const auto sign = V::andi(V::template sra<24>(bits), V::seti(0x80));
      code = V::selecti(V::lessi(V::seti(0), code), V::ori(code, sign), code);
    }
    return code;
  }
}

// The value of a code (only its own bits set, the others 0).
template <class V, Codec kCodec, bool kSigned>
LM_HD typename V::F decode(typename V::I code, const DecodeBy& by, const float* tree) {
  const auto scale = V::set(by.scale);
  if constexpr (kCodec == Codec::kInt8 || kCodec == Codec::kInt4) {
    constexpr int kUnused = 32 - code_bits(kCodec);
    auto number = code;
    if constexpr (kSigned) number = V::template sra<kUnused>(V::template shl<kUnused>(code));
    return V::mul(V::mul(V::to_float(number), V::set(by.mul)), scale);
  }
  constexpr bool kWide = !kSigned && (is_tree(kCodec) || kCodec == Codec::kLog8);
  const auto magnitude = kWide ? code : V::andi(code, V::seti(0x7f));
  auto value = V::set(0.f);
  if constexpr (kCodec == Codec::kLog8) {
    value = exp2_of<V>(V::mul(V::to_float(V::subi(magnitude, V::seti(levels_of(kSigned)))), V::set(by.mul)));
  } else if constexpr (is_expanded(kCodec)) {
    const auto distance =
        V::sub(log2_of<V>(from_code<V, kCodec>(magnitude, tree)), V::set(log2_of<Scalar>(top_of(kCodec, kSigned))));
    value = exp2_of<V>(V::max(V::mul(distance, V::set(by.mul)), V::set(-120.f)));
  } else {
    value = V::mul(from_code<V, kCodec>(magnitude, tree), V::set(by.mul));
  }
  value = V::mul(V::select(V::lessi(magnitude, V::seti(1)), V::set(0.f), value), scale);
  if constexpr (kSigned) {
    value = V::from_bits(V::ori(V::bits(value), V::template shl<24>(V::andi(code, V::seti(0x80)))));
  }
  return value;
}
