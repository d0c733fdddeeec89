// Packing of the thin operands (A, B, S, dS; any floating dtype, any strides) into panels, and the ordered sums of the
// partial results. Included by lora.cpp alone; the compiler's baseline instructions are enough here.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#include "cpu/lora_impl.h"

namespace lm {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int pair_of(Element element) { return element == kElementPair ? 2 : 1; }
inline int64_t element_size(Element element) { return element == kElementDouble ? 8 : 4; }

// A matrix of the thin kind: value (k, j) at data[k * sk + j * sj]; k is the summed dimension.
struct Thin {
  const void* data;
  Dtype dtype;
  int64_t depth, columns;  // extents of k and j
  int64_t sk, sj;
};

// An element of type `Element` from value (k, j), rounded to R first.
template <class Element, class R>
struct Packer {
  using E = Element;
  template <class T>
  static E make(const T* p, int64_t, bool) {
    return static_cast<E>(static_cast<R>(*p));
  }
};

// The bits of x in bf16, to nearest even; no branch, so that loops over it vectorise.
inline uint32_t bf16_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  const uint32_t rounded = (u + 0x7FFFu + (u >> 16 & 1u)) >> 16, quiet = (u >> 16) | 0x40u;
  return (u & 0x7FFFFFFFu) > 0x7F800000u ? quiet : rounded;
}

// A pair from values (k, j) and (k + 1, j).
struct PairPacker {
  using E = uint32_t;
  static uint32_t bits(BFloat16 value) { return value.x; }
  template <class T>
  static uint32_t bits(T value) {
    return bf16_bits(static_cast<float>(value));
  }
  template <class T>
  static E make(const T* p, int64_t sk, bool both) {
    return bits(p[0]) | (both ? bits(p[sk]) << 16 : 0u);
  }
};

template <class P, int kPair, class T>
void pack_steps(const Thin& m, typename P::E* dst, int64_t t0, int64_t t1) {
  const T* src = static_cast<const T*>(m.data);
  const int64_t steps = ceil_div(m.depth, kPair);
  constexpr int64_t kBlock = 32;  // steps at a time: 2 to 4 KiB of panel stay in the first-level cache
  const int64_t count = ceil_div(m.columns, 2 * kPanel) * 2;
  for (int64_t q = 0; q < count; ++q) {
    const int64_t used = m.columns - q * kPanel < kPanel ? m.columns - q * kPanel : kPanel;
    if (m.sj == 1 && used == kPanel) {  // the panel's columns are neighbours in memory
      const T* p = src + t0 * kPair * m.sk + q * kPanel;
      typename P::E* out = dst + (q * steps + t0) * kPanel;
      for (int64_t t = t0; t < t1; ++t, out += kPanel, p += kPair * m.sk) {
        const bool both = (t + 1) * kPair <= m.depth;
        if (both) {
          for (int64_t j = 0; j < kPanel; ++j) out[j] = P::make(p + j, m.sk, true);
        } else {
          for (int64_t j = 0; j < kPanel; ++j) out[j] = P::make(p + j, m.sk, false);
        }
      }
      continue;
    }
    for (int64_t tb = t0; tb < t1; tb += kBlock) {
      const int64_t te = tb + kBlock < t1 ? tb + kBlock : t1;
      for (int64_t j = 0; j < kPanel; ++j) {
        typename P::E* out = dst + (q * steps + tb) * kPanel + j;
        if (j >= used) {
          for (int64_t t = tb; t < te; ++t, out += kPanel) *out = 0;
          continue;
        }
        const T* p = src + tb * kPair * m.sk + (q * kPanel + j) * m.sj;
        const int64_t whole = te * kPair <= m.depth ? te : te - 1;
        if (m.sk == 1) {  // the common case, apart: with a constant step a pair is one load
          for (int64_t t = tb; t < whole; ++t, out += kPanel, p += kPair) *out = P::make(p, 1, true);
        } else {
          for (int64_t t = tb; t < whole; ++t, out += kPanel, p += kPair * m.sk) *out = P::make(p, m.sk, true);
        }
        if (whole < te) *out = P::make(p, m.sk, false);
      }
    }
  }
}

template <class P, int kPair>
void pack_from(const Thin& m, void* dst, int64_t t0, int64_t t1) {
  typename P::E* out = static_cast<typename P::E*>(dst);
  switch (m.dtype) {
    case kFloat32: return pack_steps<P, kPair, float>(m, out, t0, t1);
    case kFloat64: return pack_steps<P, kPair, double>(m, out, t0, t1);
    case kBFloat16: return pack_steps<P, kPair, BFloat16>(m, out, t0, t1);
    default: return pack_steps<P, kPair, Half>(m, out, t0, t1);
  }
}

// Steps t0 .. t1 - 1 of every panel of `m`, rounded to `round` first.
inline void pack(Element element, Dtype round, const Thin& m, void* dst, int64_t t0, int64_t t1) {
  if (element == kElementPair) return pack_from<PairPacker, 2>(m, dst, t0, t1);
  switch (round) {
    case kFloat64: return pack_from<Packer<double, double>, 1>(m, dst, t0, t1);
    case kBFloat16: return pack_from<Packer<float, BFloat16>, 1>(m, dst, t0, t1);
    case kFloat16: return pack_from<Packer<float, Half>, 1>(m, dst, t0, t1);
    default: return pack_from<Packer<float, float>, 1>(m, dst, t0, t1);
  }
}

// out[i, j] = alpha * sum_chunk parts[chunk][i][j], chunks in order, for rows i0 .. i1 - 1 of stride `ld`. `transposed`
// writes out[j, i].
template <class C, class T>
void sum_parts(const C* parts, int64_t chunks, int64_t rows, int64_t rank_pad, int64_t rank, C alpha, T* out,
               int64_t ld, bool transposed, int64_t i0, int64_t i1) {
  constexpr int64_t kBlock = 64;
  C total[kBlock][kPanel];
  for (int64_t i = i0; i < i1; i += kBlock) {
    const int64_t count = i1 - i < kBlock ? i1 - i : kBlock;
    for (int64_t j = 0; j < rank; j += kPanel) {
      const int64_t used = rank - j < kPanel ? rank - j : kPanel;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        for (int64_t k = 0; k < count; ++k) {
          const C* part = parts + (chunk * rows + i + k) * rank_pad + j;
          for (int64_t c = 0; c < kPanel; ++c) total[k][c] = chunk ? total[k][c] + part[c] : part[c];
        }
      }
      if (transposed) {
        for (int64_t c = 0; c < used; ++c) {
          T* row = out + (j + c) * ld + i;
          for (int64_t k = 0; k < count; ++k) row[k] = static_cast<T>(alpha * total[k][c]);
        }
      } else {
        for (int64_t k = 0; k < count; ++k) {
          T* row = out + (i + k) * ld + j;
          for (int64_t c = 0; c < used; ++c) row[c] = static_cast<T>(alpha * total[k][c]);
        }
      }
    }
  }
}

}  // namespace lm
