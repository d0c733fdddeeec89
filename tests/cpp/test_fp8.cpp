// csrc/common/fp8.h against the values of E4M3 written out a second way, every code and every tie. No torch.
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <limits>

#include "common/fp8.h"

namespace {

int failures = 0;

void expect(bool good, const char* what, int line) {
  if (good) return;
  std::fprintf(stderr, "line %d: %s\n", line, what);
  ++failures;
}
#define EXPECT(condition) expect(condition, #condition, __LINE__)

// The value of a code by the format's own words: sign, four bits of exponent with bias 7, three of mantissa.
double value(uint32_t code) {
  const int exponent = static_cast<int>(code >> 3 & 15u), mantissa = static_cast<int>(code & 7u);
  const double size = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return code & 0x80u ? -size : size;
}

void every_code() {
  for (uint32_t code = 0; code < 256; ++code) {
    if ((code & 0x7Fu) == lm::kFp8Nan) {
      EXPECT(std::isnan(lm::e4m3_to_float(code)));
      continue;
    }
    EXPECT(lm::e4m3_to_float(code) == value(code));
    EXPECT(lm::e4m3_from_float(static_cast<float>(value(code))) == code);
  }
  EXPECT(lm::e4m3_to_float(0x7Eu) == 448.0f);
}

void rounding() {
  for (uint32_t code = 0; code < 0x7Eu; ++code) {
    const float low = static_cast<float>(value(code)), high = static_cast<float>(value(code + 1));
    const float middle = 0.5f * (low + high);  // exact
    EXPECT(lm::e4m3_from_float(middle) == code + (code & 1u));
    EXPECT(lm::e4m3_from_float(std::nextafter(middle, low)) == code);
    EXPECT(lm::e4m3_from_float(std::nextafter(middle, high)) == code + 1);
    EXPECT(lm::e4m3_from_float(-middle) == (0x80u | (code + (code & 1u))));
  }
  EXPECT(lm::e4m3_from_float(std::numeric_limits<float>::denorm_min()) == 0);
  EXPECT(lm::e4m3_from_float(std::numeric_limits<float>::quiet_NaN()) == lm::kFp8Nan);
}

void scales() {
  EXPECT(lm::fp8_scale_byte(448.0f) == 127u);
  EXPECT(lm::fp8_scale_byte(std::nextafter(448.0f, 449.0f)) == 128u);
  EXPECT(lm::fp8_scale_byte(224.0f) == 126u);
  EXPECT(lm::fp8_scale_byte(0.0f) == 1u);
  for (float x = std::numeric_limits<float>::denorm_min(); std::isfinite(x); x *= 1.37f) {
    const uint32_t byte = lm::fp8_scale_byte(x);
    EXPECT(byte >= 1u && byte <= 254u - 7u);
    EXPECT(static_cast<double>(lm::fp8_scale(byte)) * lm::fp8_inverse_scale(byte) == 1.0);
    EXPECT(static_cast<double>(x) <= 448.0 * lm::fp8_scale(byte));
    EXPECT(byte == 1u || static_cast<double>(x) > 224.0 * lm::fp8_scale(byte));  // the smallest that will do
    if (x < 1e-44f) x *= 2.0f;
  }
}

}  // namespace

int main() {
  every_code();
  rounding();
  scales();
  if (failures == 0) std::puts("fp8: good");
  return failures ? 1 : 0;
}
