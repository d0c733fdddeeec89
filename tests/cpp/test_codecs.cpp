// csrc/common/codecs.h: formats against their definitions written out a second way, and the exact cases. No torch. That
// the bits are those of the Python reference is compared in tests/test_codecs.py.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <limits>

#include "common/codecs.h"
#include "common/unbias.h"

namespace {

using lm::Codec;
using lm::one::Scalar;

int failures = 0;

void expect(bool good, const char* what, int line) {
  if (good) return;
  std::fprintf(stderr, "line %d: %s\n", line, what);
  ++failures;
}
#define EXPECT(condition) expect(condition, #condition, __LINE__)

uint32_t bits(float x) { return static_cast<uint32_t>(Scalar::bits(x)); }

// `n` numbers through a codec, as one group.
template <Codec kCodec, bool kSigned>
void round_trip(const float* x, float* y, int n) {
  float tree[lm::kTreeFloats];
  for (int i = 0; i < lm::kTreeFloats; ++i) tree[i] = lm::tree_constant(kSigned, i);
  uint32_t largest = 0, least = 0xffffffffu;
  for (int i = 0; i < n; ++i) {
    const uint32_t size = bits(x[i]) & 0x7fffffffu;
    largest = size > largest ? size : largest;
    least = size - lm::kLeastNormalBits < least ? size - lm::kLeastNormalBits : least;
  }
  const lm::GroupScale group = lm::one::group_scale<kCodec, kSigned>(largest, least);
  const lm::EncodeBy to = lm::one::encode_by<kCodec, kSigned>(group);
  const lm::DecodeBy from = lm::one::decode_by<kCodec, kSigned>(group);
  const int mask = (1 << lm::code_bits(kCodec)) - 1;
  for (int i = 0; i < n; ++i) {
    const int code = to.alive ? lm::one::encode<Scalar, kCodec, kSigned>(x[i], to, tree) & mask : 0;
    y[i] = lm::one::decode<Scalar, kCodec, kSigned>(code, from, tree);
  }
}

double fp8(int code, int mantissa, int bias) {
  const int exponent = code >> mantissa, low = code & ((1 << mantissa) - 1);
  const double share = static_cast<double>(low) / (1 << mantissa);
  return exponent ? std::ldexp(1.0 + share, exponent - bias) : std::ldexp(share, 1 - bias);
}

void every_fp8_value() {
  for (int code = 0; code <= 0x7e; ++code) {
    const auto value = static_cast<float>(fp8(code, 3, 7));
    EXPECT((lm::one::from_fp8<Scalar, 3>(code) == value && lm::one::to_fp8<Scalar, 3>(value) == code));
    if (code < 0x7e) {  // halfway: to the even code
      const auto tie = static_cast<float>((fp8(code, 3, 7) + fp8(code + 1, 3, 7)) / 2);
      EXPECT((lm::one::to_fp8<Scalar, 3>(tie) == (code % 2 ? code + 1 : code)));
    }
  }
  for (int code = 0; code <= 0x7b; ++code) {
    const auto value = static_cast<float>(fp8(code, 2, 15));
    EXPECT((lm::one::from_fp8<Scalar, 2>(code) == value && lm::one::to_fp8<Scalar, 2>(value) == code));
  }
}

template <bool kSigned>
void every_tree_value() {
  float tree[lm::kTreeFloats];
  for (int i = 0; i < lm::kTreeFloats; ++i) tree[i] = lm::tree_constant(kSigned, i);
  const int places = kSigned ? 7 : 8, top = (1 << places) - 1;
  double largest = 0.0;
  for (int pass = 0; pass < 2; ++pass) {
    for (int code = top; code >= 1; --code) {
      int i = 0;
      while (code >> (i + 1)) ++i;
      const double n = std::ldexp(1.0, i), value = std::pow(10.0, i - places + 1) * (0.1 + 0.9 * (code - n + 0.5) / n);
      if (code == top) largest = value;
      const float got = lm::one::from_tree<Scalar>(code, tree);
      EXPECT(std::fabs(got * largest / value - 1.0) < 1e-5);
      EXPECT((lm::one::to_tree<Scalar, kSigned>(got, tree) == code));
    }
  }
  EXPECT(lm::one::from_tree<Scalar>(top, tree) == 1.f && lm::one::from_tree<Scalar>(0, tree) == 0.f);
  EXPECT((lm::one::to_tree<Scalar, kSigned>(0.f, tree) == 0));
}

template <Codec kCodec, bool kSigned>
void exact_cases() {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  float x[32], y[32];
  const float sign = kSigned ? -1.f : 1.f;
  for (float m : {0x1p-100f, 0.7391f, 3.0e38f}) {  // constant groups with zeros
    for (int i = 0; i < 32; ++i) x[i] = i % 5 == 0 ? 0.f : (i % 3 == 0 ? sign * m : m);
    round_trip<kCodec, kSigned>(x, y, 32);
    for (int i = 0; i < 32; ++i) EXPECT(bits(x[i]) == bits(y[i]));
  }
  for (float m : {0.f, 1e-45f, 0x1p-126f, 0x1p-101f}) {  // groups that become zeros
    for (float& one : x) one = m;
    round_trip<kCodec, kSigned>(x, y, 32);
    for (float one : y) EXPECT(bits(one) == 0);
  }
  for (float bad : {inf, nan}) {
    for (int i = 0; i < 32; ++i) x[i] = i == 7 ? bad : 1.f + static_cast<float>(i);
    round_trip<kCodec, kSigned>(x, y, 32);
    for (float one : y) EXPECT(std::isnan(one));
  }
  x[0] = 5.5f;
  round_trip<kCodec, kSigned>(x, y, 1);  // alone, an element is the group's largest
  EXPECT(x[0] == y[0]);
}

template <Codec kCodec>
void both() {
  exact_cases<kCodec, true>();
  exact_cases<kCodec, false>();
}

void logarithm_and_power() {
  for (int e = -126; e < 128; ++e) EXPECT(lm::one::log2_of<Scalar>(std::ldexp(1.f, e)) == static_cast<float>(e));
  for (int e = -120; e <= 0; ++e) EXPECT(lm::one::exp2_of<Scalar>(static_cast<float>(e)) == std::ldexp(1.f, e));
  for (int i = 0; i < 100000; ++i) {
    const float x = std::ldexp(1.f + static_cast<float>(i) / 100000.f, i % 250 - 125);
    EXPECT(std::fabs(lm::one::log2_of<Scalar>(x) - std::log2(static_cast<double>(x))) < 2.5e-5);
    const float t = -120.f * static_cast<float>(i) / 100000.f;
    EXPECT(std::fabs(lm::one::exp2_of<Scalar>(t) / std::exp2(static_cast<double>(t)) - 1.0) < 5e-6);
  }
}

void bias_corrections() {
  for (uint32_t t : {1u, 2u, 10u, 12345u}) {
    const lm::Unbias got = lm::unbias_of(0.9, 0.999, t);
    EXPECT(std::fabs(got.first * -std::expm1(t * std::log(0.9)) - 1.0) < 1e-6);
    EXPECT(std::fabs(static_cast<double>(got.second) * got.second * -std::expm1(t * std::log(0.999)) - 1.0) < 1e-6);
  }
}

}  // namespace

int main() {
  every_fp8_value();
  every_tree_value<true>();
  every_tree_value<false>();
  both<Codec::kE4M3>();
  both<Codec::kE4M3Exp>();
  both<Codec::kE5M2>();
  both<Codec::kDe8>();
  both<Codec::kDe8Exp>();
  both<Codec::kLog8>();
  both<Codec::kInt8>();
  both<Codec::kInt4>();
  logarithm_and_power();
  bias_corrections();
  std::printf(failures ? "%d failures\n" : "codecs: all good\n", failures);
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
