// csrc/common/philox.h against published vectors and against the definition written out a second way. No torch.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>

#include "common/philox.h"

namespace {

int failures = 0;

void expect(bool good, const char* what, int line) {
  if (good) return;
  std::fprintf(stderr, "line %d: %s\n", line, what);
  ++failures;
}
#define EXPECT(condition) expect(condition, #condition, __LINE__)

bool equal(const lm::Philox4& got, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return got.w[0] == a && got.w[1] == b && got.w[2] == c && got.w[3] == d;
}

// The three philox4x32-10 vectors that Random123 publishes (kat_vectors): zeros, ones, digits of pi.
void known_answers() {
  EXPECT(equal(lm::philox4x32_10(0, 0, 0, 0, 0), 0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u));
  const uint32_t all = 0xffffffffu;
  EXPECT(equal(lm::philox4x32_10(~0ull, all, all, all, all), 0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu));
  EXPECT(equal(lm::philox4x32_10(0x299f31d0a4093822ull, 0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u),
               0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u));
}

// keep_word against single elements: half k % 2 of word (k % 8) / 2 of block k / 8, spare bits zero.
void packed_words() {
  const uint64_t seed = 0x0123456789abcdefull;
  for (int64_t cols : {1, 7, 31, 32, 33, 64, 100}) {
    for (uint32_t threshold : {0u, 1u, 6554u, 32768u, 65535u, 65536u}) {
      for (uint32_t word = 0; word < (cols + 31) / 32; ++word) {
        uint32_t want = 0;
        for (uint32_t bit = 0; bit < 32; ++bit) {
          const uint32_t k = 32 * word + bit;
          if (k >= cols) continue;
          const lm::Philox4 block = lm::philox4x32_10(seed, k / 8, 5, 0, 3);
          const uint32_t half = (block.w[(k % 8) / 2] >> (16 * (k % 2))) & 0xffffu;
          want |= static_cast<uint32_t>(half >= threshold) << bit;
        }
        EXPECT(lm::keep_word(seed, word, 5, 3, threshold, cols) == want);
      }
    }
  }
}

void thresholds() {
  EXPECT(lm::keep_threshold(0.0) == 0 && lm::keep_threshold(1.0) == 65536);
  EXPECT(lm::keep_threshold(-0.5) == 0 && lm::keep_threshold(2.0) == 65536 && lm::keep_threshold(std::nan("")) == 0);
  EXPECT(lm::keep_threshold(0.1) == 6554 && lm::keep_threshold(0.5) == 32768);
  EXPECT(lm::keep_threshold(0.5 / 65536) == 0 && lm::keep_threshold(1.5 / 65536) == 2);  // ties to even
  EXPECT(lm::inv_keep(0) == 1.0 && lm::inv_keep(32768) == 2.0 && lm::inv_keep(65536) == 0.0);
}

}  // namespace

int main() {
  known_answers();
  packed_words();
  thresholds();
  std::printf(failures ? "%d failures\n" : "philox: all good\n", failures);
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
