// The lora kernels in portable C++: the level of every machine without AVX2, and the one to read. The compiler
// vectorises the short loops with what the architecture always has (SSE2, NEON).
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdlib>

#include "common/philox.h"
#include "cpu/lora_impl.h"
#include "cpu/target.h"

namespace lm {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

#include "cpu/lora_kernels.h"

template <class Number>
struct Plain {
  using E = Number;
  using C = Number;
  struct Vec {
    Number v[4];
  };
  using B = Vec;
  static constexpr int kPair = 1, kWidth = 2, kVectors = 4;

  static Vec zero() { return Vec{}; }
  static Vec load(const C* c) {
    Vec x;
    for (int i = 0; i < 4; ++i) x.v[i] = c[i];
    return x;
  }
  static void store(C* c, Vec x) {
    for (int i = 0; i < 4; ++i) c[i] = x.v[i];
  }
  static Vec add(Vec x, Vec y) {
    for (int i = 0; i < 4; ++i) x.v[i] += y.v[i];
    return x;
  }
  static B panel(const E* b, int v) { return load(b + 4 * v); }
  static Vec madd(Vec acc, const E* a, B b) {
    for (int i = 0; i < 4; ++i) acc.v[i] += *a * b.v[i];
    return acc;
  }
  template <class T>
  static void tile_rows(E* dst, const T* src, uint32_t bits, int n) {
    for (int i = 0; i < 32; ++i) dst[i] = i < n && (bits >> i & 1u) ? static_cast<E>(src[i]) : E(0);
  }
  template <class T>
  static void finish(T* dst, const Vec* sums, C alpha, uint32_t bits, int n, bool accumulate) {
    for (int i = 0; i < n; ++i) {
      const bool keep = bits >> i & 1u;
      const C value = alpha * sums[i / 4].v[i % 4];
      if (!accumulate) {
        dst[i] = static_cast<T>(keep ? value : C(0));
      } else if (keep) {
        dst[i] = static_cast<T>(static_cast<C>(dst[i]) + value);
      }
    }
  }
  static void draw(uint64_t seed, uint32_t row, uint32_t child, uint32_t threshold, int64_t word, int64_t words,
                   int64_t cols, uint32_t* out) {
    for (int64_t w = 0; w < words; ++w) {
      out[w] = keep_word(seed, static_cast<uint32_t>(word + w), row, child, threshold, cols);
    }
  }
};

constexpr LoraIsa kIsa = {
    "plain",
    {kernels_of<Plain<float>, float>(kElementFloat), kernels_of<Plain<double>, double>(kElementDouble),
     kernels_of<Plain<float>, BFloat16>(kElementFloat), kernels_of<Plain<float>, Half>(kElementFloat)}};

}  // namespace

const LoraIsa* lora_plain() { return &kIsa; }

}  // namespace lm
