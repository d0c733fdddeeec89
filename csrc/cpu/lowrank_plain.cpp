// The lowrank kernels in plain C++: every dtype, any machine.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "common/philox.h"
#include "cpu/lowrank_impl.h"

namespace lm {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

BFloat16 round_stochastic(float x, uint32_t bits) {
  uint32_t raw;
  std::memcpy(&raw, &x, 4);
  if ((raw & 0x7F800000u) == 0x7F800000u) return static_cast<BFloat16>(x);  // infinity and NaN stay
  return BFloat16(static_cast<uint16_t>((raw + bits) >> 16), BFloat16::from_bits());
}

template <class W, class X>
void axpy(const AxpyArgs& a, int64_t row0, int64_t row1) {
  using C = Sum<W>;
  const C alpha = static_cast<C>(a.alpha), decay = static_cast<C>(a.decay);
  for (int64_t row = row0; row < row1; ++row) {
    W* w = static_cast<W*>(a.w) + row * a.ld_w;
    const X* x = static_cast<const X*>(a.x) + row * a.ld_x;
    Philox4 drawn{};
    for (int64_t c = 0; c < a.cols; ++c) {
      const C value = decay * static_cast<C>(w[c]) + alpha * static_cast<C>(x[c]);
      if constexpr (std::is_same_v<W, BFloat16>) {
        if (a.stochastic) {
          if (c % 8 == 0) {
            drawn = philox4x32_10(a.seed, static_cast<uint32_t>(c / 8), static_cast<uint32_t>(a.first_row + row), 0u,
                                  kRoundingChild);
          }
          w[c] = round_stochastic(value, (drawn.w[c % 8 / 2] >> (16 * (c % 2))) & 0xFFFFu);
          continue;
        }
      }
      w[c] = static_cast<W>(value);
    }
  }
}

template <class R>
void adam(const AdamArgs& a, int64_t begin, int64_t end) {
  using C = Sum<R>;
  C* m = static_cast<C*>(a.m);
  C* v = static_cast<C*>(a.v);
  const R* r = static_cast<const R*>(a.r);
  R* n = static_cast<R*>(a.n);
  const C b1 = static_cast<C>(a.beta1), b2 = static_cast<C>(a.beta2), eps = static_cast<C>(a.eps);
  const C c1 = static_cast<C>(1 - a.beta1), c2 = static_cast<C>(1 - a.beta2);
  const C bias1 = static_cast<C>(a.bias1), bias2 = static_cast<C>(a.bias2);
  for (int64_t i = begin; i < end; ++i) {
    const C x = static_cast<C>(r[i]);
    m[i] = b1 * m[i] + c1 * x;
    v[i] = b2 * v[i] + c2 * x * x;
    n[i] = static_cast<R>((m[i] / bias1) / (std::sqrt(v[i] / bias2) + eps));
  }
}

constexpr LowrankKernels kKernels = {
    {{axpy<float, float>, axpy<float, float>},
     {axpy<double, double>, axpy<double, float>},
     {axpy<BFloat16, BFloat16>, axpy<BFloat16, float>},
     {axpy<Half, Half>, axpy<Half, float>}},
    {adam<float>, adam<double>, adam<BFloat16>, adam<Half>},
};

}  // namespace

const LowrankKernels& lowrank_plain() { return kKernels; }

}  // namespace lm
