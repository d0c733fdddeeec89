// The lowbit_optim kernels on CUDA devices. Formulas and the order of the arithmetic: lowmem/ops/lowbit_optim.py and
// codecs.py, whose bits these reproduce.
//
// A thread owns 16 neighbours: 16 bytes of codes, 32 of bf16, 64 of fp32. group / 16 neighbouring lanes own a group and
// find its magnitudes by shuffles. A block owns 4096 elements of one tensor; the tensors of a launch lie in its
// arguments.
#pragma once

#include "../common/codecs.h"
#include "../common/philox.h"
#include "../common/unbias.h"
#include "lm.cuh"

namespace lm {

using one::Scalar;

constexpr int kOwn = 16, kStepThreads = 256, kStepBlock = kOwn * kStepThreads;
constexpr int kStepTensors = 288;  // of one launch: what fits the 32 764 bytes of a kernel's arguments

struct AdamTensor {
  void* p;
  const void* g;
  int16_t* rest;  // null: none
  void *m, *v;    // codes, or fp32 moments
  float *m_scale, *v_scale;
  uint8_t *m_span, *v_span;
  const float* step;
  const int64_t* seed;
  int64_t numel, offset;
  uint32_t first_block;
  bool wide_p, wide_g, plain_m, plain_v;  // fp32 weights, gradients, moments
};

struct AdamTable {
  AdamTensor tensor[kStepTensors];
  int count;
};

struct AdamOptions {
  double beta1, beta2;
  float eps, decay, sign;
  const float *lr, *grad_scale, *found_inf;  // the last two may be null
  int group;
  Codec m, v;
  float tree[2][kTreeFloats];
};

// ---------------------------------------------------------------------------------------------- sixteen at a time

template <typename T>
__device__ __forceinline__ bool aligned16(const T* p) {
  return (reinterpret_cast<uintptr_t>(p) & 15u) == 0;
}

// `count` (0 to 16) 32-bit words, 0 behind them.
__device__ __forceinline__ void load16(const float* from, int count, float (&to)[kOwn]) {
  if (count == kOwn && aligned16(from)) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 piece = reinterpret_cast<const uint4*>(from)[i];
      to[4 * i] = __uint_as_float(piece.x), to[4 * i + 1] = __uint_as_float(piece.y);
      to[4 * i + 2] = __uint_as_float(piece.z), to[4 * i + 3] = __uint_as_float(piece.w);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) to[i] = i < count ? from[i] : 0.f;
  }
}

__device__ __forceinline__ void store16(float* to, int count, const float (&from)[kOwn]) {
  if (count == kOwn && aligned16(to)) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      reinterpret_cast<uint4*>(to)[i] = make_uint4(__float_as_uint(from[4 * i]), __float_as_uint(from[4 * i + 1]),
                                                   __float_as_uint(from[4 * i + 2]), __float_as_uint(from[4 * i + 3]));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (i < count) to[i] = from[i];
    }
  }
}

// `count` 16-bit words, two to a register.
__device__ __forceinline__ void load16(const uint16_t* from, int count, uint32_t (&to)[8]) {
  if (count == kOwn && aligned16(from)) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 piece = reinterpret_cast<const uint4*>(from)[i];
      to[4 * i] = piece.x, to[4 * i + 1] = piece.y, to[4 * i + 2] = piece.z, to[4 * i + 3] = piece.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      to[i] = 2 * i < count ? from[2 * i] : 0u;
      to[i] |= 2 * i + 1 < count ? static_cast<uint32_t>(from[2 * i + 1]) << 16 : 0u;
    }
  }
}

__device__ __forceinline__ void store16(uint16_t* to, int count, const uint32_t (&from)[8]) {
  if (count == kOwn && aligned16(to)) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      reinterpret_cast<uint4*>(to)[i] = make_uint4(from[4 * i], from[4 * i + 1], from[4 * i + 2], from[4 * i + 3]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (i < count) to[i] = static_cast<uint16_t>(from[i / 2] >> (16 * (i % 2)));
    }
  }
}

// The codes of 16 elements, four to a register (int4: eight).
template <Codec kCodec>
__device__ __forceinline__ void load_codes(const uint8_t* from, int count, uint32_t (&to)[4]) {
  constexpr int kBytes = kCodec == Codec::kInt4 ? 8 : 16;
  const int bytes = kCodec == Codec::kInt4 ? (count + 1) / 2 : count;
  if (kBytes == 16 && bytes == 16 && aligned16(from)) {
    const uint4 piece = *reinterpret_cast<const uint4*>(from);
    to[0] = piece.x, to[1] = piece.y, to[2] = piece.z, to[3] = piece.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = 0;
#pragma unroll
    for (int i = 0; i < kBytes; ++i) {
      if (i < bytes) to[i / 4] |= static_cast<uint32_t>(from[i]) << (8 * (i % 4));
    }
  }
}

template <Codec kCodec>
__device__ __forceinline__ void store_codes(uint8_t* to, int count, const uint32_t (&from)[4]) {
  constexpr int kBytes = kCodec == Codec::kInt4 ? 8 : 16;
  const int bytes = kCodec == Codec::kInt4 ? (count + 1) / 2 : count;
  if (kBytes == 16 && bytes == 16 && aligned16(to)) {
    *reinterpret_cast<uint4*>(to) = make_uint4(from[0], from[1], from[2], from[3]);
  } else {
#pragma unroll
    for (int i = 0; i < kBytes; ++i) {
      if (i < bytes) to[i] = static_cast<uint8_t>(from[i / 4] >> (8 * (i % 4)));
    }
  }
}

template <Codec kCodec>
__device__ __forceinline__ int64_t code_offset(int64_t element) {
  return kCodec == Codec::kInt4 ? element / 2 : element;
}

template <Codec kCodec, bool kSigned>
__device__ __forceinline__ void decode16(const uint8_t* codes, const float* scale, const uint8_t* span, int64_t element,
                                         int count, int group, const float* tree, float (&x)[kOwn]) {
  constexpr int kBits = code_bits(kCodec), kEach = 32 / kBits;
  uint32_t words[4] = {0, 0, 0, 0};
  DecodeBy by{0.f, 0.f};
  if (count > 0) {
    load_codes<kCodec>(codes + code_offset<kCodec>(element), count, words);
    const int64_t i = element / group;
    by = one::decode_by<kCodec, kSigned>(GroupScale{scale[i], with_span(kCodec) ? span[i] : uint8_t{0}});
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const auto code = static_cast<int32_t>(words[i / kEach] >> (kBits * (i % kEach)) & ((1u << kBits) - 1u));
    x[i] = one::decode<Scalar, kCodec, kSigned>(code, by, tree);
  }
}

// Every lane of the warp must be here: elements behind the tensor's end are zeros.
template <Codec kCodec, bool kSigned>
__device__ __forceinline__ void encode16(const float (&x)[kOwn], uint8_t* codes, float* scale, uint8_t* span,
                                         int64_t element, int count, int group, const float* tree) {
  uint32_t largest = 0, least = 0xffffffffu;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const uint32_t bits = __float_as_uint(x[i]) & 0x7fffffffu;
    largest = max(largest, bits);
    if constexpr (with_span(kCodec)) least = min(least, bits - kLeastNormalBits);
  }
  for (int lanes = group / kOwn / 2; lanes > 0; lanes /= 2) {
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
    if constexpr (with_span(kCodec)) least = min(least, __shfl_xor_sync(0xffffffffu, least, lanes));
  }
  if (count == 0) return;
  const GroupScale kept = one::group_scale<kCodec, kSigned>(largest, least);
  const EncodeBy by = one::encode_by<kCodec, kSigned>(kept);
  constexpr int kBits = code_bits(kCodec), kEach = 32 / kBits;
  uint32_t words[4] = {0, 0, 0, 0};
  if (by.alive) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const auto code = static_cast<uint32_t>(one::encode<Scalar, kCodec, kSigned>(x[i], by, tree));
      words[i / kEach] |= (i < count ? code & ((1u << kBits) - 1u) : 0u) << (kBits * (i % kEach));
    }
  }
  store_codes<kCodec>(codes + code_offset<kCodec>(element), count, words);
  if (element % group == 0) {
    scale[element / group] = kept.scale;
    if constexpr (with_span(kCodec)) span[element / group] = kept.span;
  }
}

// f(constant) for the codec of the launch: one that was compiled in, or any by a branch that all threads take together.
template <Codec kCodec>
struct Fixed {
  static constexpr Codec value = kCodec;
};

template <Codec kCompiled, class F>
__device__ __forceinline__ void with_codec(Codec codec, const F& f) {
  if constexpr (kCompiled != Codec::kFp32) {
    f(Fixed<kCompiled>{});
  } else {
    switch (codec) {
      case Codec::kE4M3: f(Fixed<Codec::kE4M3>{}); break;
      case Codec::kE4M3Exp: f(Fixed<Codec::kE4M3Exp>{}); break;
      case Codec::kE5M2: f(Fixed<Codec::kE5M2>{}); break;
      case Codec::kDe8: f(Fixed<Codec::kDe8>{}); break;
      case Codec::kDe8Exp: f(Fixed<Codec::kDe8Exp>{}); break;
      case Codec::kLog8: f(Fixed<Codec::kLog8>{}); break;
      case Codec::kInt8: f(Fixed<Codec::kInt8>{}); break;
      default: f(Fixed<Codec::kInt4>{}); break;
    }
  }
}

// ---------------------------------------------------------------------------------------------------------- weights

__device__ __forceinline__ uint32_t half_of(const Philox4& r, int i) {
  const uint32_t low = i & 2 ? r.w[1] : r.w[0], high = i & 2 ? r.w[3] : r.w[2], word = i & 4 ? high : low;
  return i & 1 ? word >> 16 : word & 0xffffu;
}

__device__ __forceinline__ uint32_t dithered(float x, uint32_t random) {
  const uint32_t bits = __float_as_uint(x), up = bits + random;
  return ((up & kInfinityBits) == kInfinityBits ? bits : up) >> 16;
}

__device__ __forceinline__ void dither16(const float (&x)[kOwn], uint64_t seed, int64_t element, uint32_t step,
                                         uint32_t (&to)[8]) {
  const auto at = static_cast<uint64_t>(element);
  if (at % 8 == 0) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const uint64_t block = at / 8 + b;
      const Philox4 r = philox4x32_10(seed, static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), step, 0);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        to[4 * b + i] = dithered(x[8 * b + 2 * i], r.w[i] & 0xffffu) | dithered(x[8 * b + 2 * i + 1], r.w[i] >> 16)
                                                                           << 16;
      }
    }
  } else {  // a shard that starts inside a block
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      uint32_t pair = 0;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const uint64_t e = at + 2 * i + k, block = e / 8;
        const Philox4 r =
            philox4x32_10(seed, static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), step, 0);
        pair |= dithered(x[2 * i + k], half_of(r, static_cast<int>(e % 8))) << (16 * k);
      }
      to[i] = pair;
    }
  }
}

__device__ __forceinline__ void load_weights(const AdamTensor& t, int64_t element, int count, float (&p)[kOwn]) {
  if (t.wide_p) {
    load16(static_cast<const float*>(t.p) + element, count, p);
    return;
  }
  uint32_t high[8], low[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  load16(static_cast<const uint16_t*>(t.p) + element, count, high);
  if (t.rest) load16(reinterpret_cast<const uint16_t*>(t.rest) + element, count, low);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const uint32_t top = i % 2 ? high[i / 2] & 0xffff0000u : high[i / 2] << 16;
    const auto rest = static_cast<int16_t>(low[i / 2] >> (16 * (i % 2)));
    p[i] = __uint_as_float(top + static_cast<uint32_t>(static_cast<int32_t>(rest)));
  }
}

__device__ __forceinline__ void store_weights(const AdamTensor& t, int64_t element, int count, const float (&p)[kOwn]) {
  if (t.wide_p) {
    store16(static_cast<float*>(t.p) + element, count, p);
    return;
  }
  uint32_t high[8];
  if (t.rest) {
    uint32_t low[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t a = __float_as_uint(p[2 * i]), b = __float_as_uint(p[2 * i + 1]);
      high[i] = (a + 0x8000u) >> 16 | ((b + 0x8000u) & 0xffff0000u);
      low[i] = (a & 0xffffu) | b << 16;  // bits - (high << 16), of which 16 bits are kept
    }
    store16(reinterpret_cast<uint16_t*>(t.rest) + element, count, low);
  } else {
    dither16(p, static_cast<uint64_t>(*t.seed), t.offset + element, static_cast<uint32_t>(*t.step), high);
  }
  store16(static_cast<uint16_t*>(t.p) + element, count, high);
}

// ------------------------------------------------------------------------------------------------------------- step

// The tensor that block `block` belongs to.
template <class Table>
__device__ __forceinline__ int tensor_of(const Table& table, uint32_t block) {
  int low = 0, high = table.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.tensor[middle].first_block <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// kM, kV: the codecs, or kFp32 for any (options.m, options.v).
template <Codec kM, Codec kV>
__global__ void __launch_bounds__(kStepThreads)
    lowbit_adamw_kernel(const LM_GRID_CONSTANT AdamTable table, const LM_GRID_CONSTANT AdamOptions options) {
  LM_SHARED(float, trees, [2][kTreeFloats]);
  LM_SHARED(float, shared_unbias, [2]);
  if (options.found_inf && *options.found_inf != 0.f) return;  // the same for all threads
  const AdamTensor& t = table.tensor[tensor_of(table, blockIdx.x)];
  const int tid = static_cast<int>(threadIdx.x);
  if (tid < 2 * kTreeFloats)
    trees[tid / kTreeFloats][tid % kTreeFloats] = options.tree[tid / kTreeFloats][tid % kTreeFloats];
  if (tid == kStepThreads - 1) {
    const Unbias unbias = unbias_of(options.beta1, options.beta2, static_cast<uint32_t>(*t.step));
    shared_unbias[0] = unbias.first;
    shared_unbias[1] = unbias.second;
  }
  const int64_t element = static_cast<int64_t>(blockIdx.x - t.first_block) * kStepBlock + tid * kOwn;
  const int64_t left = t.numel - element;
  const int count = left >= kOwn ? kOwn : left > 0 ? static_cast<int>(left) : 0;
  float p[kOwn], g[kOwn], m[kOwn], v[kOwn];
  load_weights(t, element, count, p);
  if (t.wide_g) {
    load16(static_cast<const float*>(t.g) + element, count, g);
  } else {
    uint32_t words[8];
    load16(static_cast<const uint16_t*>(t.g) + element, count, words);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) g[i] = __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
  }
  __syncthreads();
  if (t.plain_m) {
    load16(static_cast<const float*>(t.m) + element, count, m);
  } else {
    with_codec<kM>(options.m, [&](auto codec) {
      decode16<decltype(codec)::value, true>(static_cast<const uint8_t*>(t.m), t.m_scale, t.m_span, element, count,
                                             options.group, trees[1], m);
    });
  }
  if (t.plain_v) {
    load16(static_cast<const float*>(t.v) + element, count, v);
  } else {
    with_codec<kV>(options.v, [&](auto codec) {
      decode16<decltype(codec)::value, false>(static_cast<const uint8_t*>(t.v), t.v_scale, t.v_span, element, count,
                                              options.group, trees[0], v);
    });
  }
  const float lr = -*options.lr, beta1 = static_cast<float>(options.beta1), beta2 = static_cast<float>(options.beta2);
  const float rest1 = static_cast<float>(1.0 - options.beta1), rest2 = static_cast<float>(1.0 - options.beta2);
  const float scale = options.grad_scale ? Scalar::mul(options.sign, *options.grad_scale) : options.sign;
  const float unbias1 = shared_unbias[0], unbias2 = shared_unbias[1];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const float grad = Scalar::mul(g[i], scale);
    m[i] = Scalar::fma(beta1, m[i], Scalar::mul(rest1, grad));
    v[i] = Scalar::fma(beta2, v[i], Scalar::mul(Scalar::mul(rest2, grad), grad));
    const float below = Scalar::fma(Scalar::root(v[i]), unbias2, options.eps);
    const float ratio = Scalar::div(Scalar::mul(m[i], unbias1), below);
    p[i] = Scalar::fma(lr, Scalar::fma(options.decay, p[i], ratio), p[i]);
    if (i >= count) m[i] = v[i] = 0.f;  // 0 / 0 with eps 0
  }
  if (count > 0) store_weights(t, element, count, p);
  if (t.plain_m) {
    store16(static_cast<float*>(t.m) + element, count, m);
  } else {
    with_codec<kM>(options.m, [&](auto codec) {
      encode16<decltype(codec)::value, true>(m, static_cast<uint8_t*>(t.m), t.m_scale, t.m_span, element, count,
                                             options.group, trees[1]);
    });
  }
  if (t.plain_v) {
    store16(static_cast<float*>(t.v) + element, count, v);
  } else {
    with_codec<kV>(options.v, [&](auto codec) {
      encode16<decltype(codec)::value, false>(v, static_cast<uint8_t*>(t.v), t.v_scale, t.v_span, element, count,
                                              options.group, trees[0]);
    });
  }
}

static_assert(sizeof(AdamTable) + sizeof(AdamOptions) <= 32764, "the arguments of a kernel");

inline void fill_trees(AdamOptions& options) {
  for (int s = 0; s < 2; ++s) {
    for (int i = 0; i < kTreeFloats; ++i) options.tree[s][i] = tree_constant(s == 1, i);
  }
}

// The table's tensors, whose first_block this sets; the pairs that are compiled in run without a branch.
inline cudaError_t lowbit_adamw(AdamTable& table, const AdamOptions& options, cudaStream_t stream) {
  int64_t blocks = 0;
  for (int i = 0; i < table.count; ++i) {
    table.tensor[i].first_block = static_cast<uint32_t>(blocks);
    blocks += (table.tensor[i].numel + kStepBlock - 1) / kStepBlock;
  }
  if (blocks == 0) return cudaSuccess;
  auto* kernel = lowbit_adamw_kernel<Codec::kFp32, Codec::kFp32>;
  if (options.m == Codec::kDe8 && options.v == Codec::kLog8) kernel = lowbit_adamw_kernel<Codec::kDe8, Codec::kLog8>;
  if (options.m == Codec::kLog8 && options.v == Codec::kLog8) kernel = lowbit_adamw_kernel<Codec::kLog8, Codec::kLog8>;
  if (options.m == Codec::kE4M3Exp && options.v == Codec::kE4M3Exp) {
    kernel = lowbit_adamw_kernel<Codec::kE4M3Exp, Codec::kE4M3Exp>;
  }
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kStepThreads), 0, stream, table, options);
}

}  // namespace lm
