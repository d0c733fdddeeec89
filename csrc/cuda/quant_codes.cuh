// What the quant kernels share: packed codes and scales on their way to shared memory, and codes as values.
//
// A run is what csrc/common/intk.h calls one: the whole flat weight for table formats, one row for int formats. Codes
// are staged as they lie, sixteen bytes at a time, and taken apart eight elements at a time: eight neighbours are a
// whole number of bytes in every width (3 bits: one byte of each of a granule's three words) and, from an element that
// 8 divides, share a scale, since groups hold 16 elements or more.
#pragma once

#include "../common/quant.h"
#include "lm.cuh"

namespace lm {

// Codes of `bits` bits that index a table, or integers with a zero point: what a kernel is compiled for.
template <int kBits_, bool kTable_>
struct Codes {
  static constexpr int kBits = kBits_;
  static constexpr bool kTable = kTable_;
  static constexpr int kUnit = kBits == 3 ? kGranule : 8;  // a staged window starts at a multiple of it
  static constexpr int kWord = kBits == 3 ? 1 : kBits;     // eight codes are read at once: bytes that must be aligned

  // Bytes of shared memory for a window of kCount elements, whatever its first byte's place among sixteen.
  template <int kCount>
  static constexpr int kWindow =
      (kBits == 3 ? (kCount / kGranule + 2) * 12 : kCount * kBits / 8 + kBits) / 16 * 16 + 32;
};

// Sixteen entries in sixteen banks: whatever codes the lanes of a warp have, one access serves them. Written out code
// by code: a table indexed at run time would lie in local memory.
template <typename C>
__device__ __forceinline__ void fill_table(float* table, int format) {
  if constexpr (C::kTable) {
    const uint32_t code = threadIdx.x;
    float value = 0.f;
#pragma unroll
    for (uint32_t i = 0; i < 1u << C::kBits; ++i) {
      if (i != code) continue;
      if constexpr (C::kBits == 4) {
        value = format == kNF4 ? nf4_value(i) : fp4_value(i);
      } else {
        value = C::kBits == 3 ? nf3_value(i) : nf2_value(i);
      }
    }
    if (code < 1u << C::kBits) table[code] = value;
  }
}

// Elements [start, start + count) of a run as staged bytes: element start + e lies `first + e` elements behind `lead`.
struct Window {
  int lead, first;
};

// Copies a window to shared memory (by cp.async where `wide`: the weight's first byte lies on 16; the caller commits
// and waits), shared by the `threads` threads of which this is number `thread`. Nothing outside the weight's own bytes
// is read, for what precedes the window within its first sixteen bytes is the weight's as well.
template <typename C>
__device__ __forceinline__ Window stage_codes(uint8_t* to, const uint8_t* run, int64_t start, int count, bool wide,
                                              int thread, int threads) {
  const int64_t from = start / C::kUnit * C::kUnit;
  const uint8_t* begin = run + row_bytes(C::kBits, from);
  const int bytes = static_cast<int>(row_bytes(C::kBits, start + count) - row_bytes(C::kBits, from));
  Window window{0, static_cast<int>(start - from)};
  if (wide) {
    window.lead = static_cast<int>(reinterpret_cast<uintptr_t>(begin) % 16);
    const int all = window.lead + bytes;
    for (int i = 16 * thread; i < all; i += 16 * threads) {
      cp_async16(to + i, begin - window.lead + i, all - i < 16 ? all - i : 16);
    }
  } else {
#pragma unroll 1
    for (int i = thread; i < bytes; i += threads) to[i] = begin[i];
  }
  return window;
}

// The codes of elements e .. e + 7 (e a multiple of 8) of a window that starts at `bytes`, aligned to kWord.
template <typename C>
__device__ __forceinline__ void codes8(const uint8_t* bytes, int e, uint32_t (&code)[8]) {
  if constexpr (C::kBits == 8) {
    const uint2 both = *reinterpret_cast<const uint2*>(bytes + e);
#pragma unroll
    for (int i = 0; i < 8; ++i) code[i] = (i < 4 ? both.x : both.y) >> (8 * (i % 4)) & 255u;
  } else if constexpr (C::kBits == 4) {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(bytes + e / 2);
#pragma unroll
    for (int i = 0; i < 8; ++i) code[i] = word >> (8 * (i / 2) + 4 - 4 * (i % 2)) & 15u;
  } else if constexpr (C::kBits == 2) {
    const uint32_t word = *reinterpret_cast<const uint16_t*>(bytes + e / 4);
#pragma unroll
    for (int i = 0; i < 8; ++i) code[i] = word >> (8 * (i / 4) + 6 - 2 * (i % 4)) & 3u;
  } else {
    const uint8_t* plane = bytes + e / kGranule * 12 + e % kGranule / 8;
    const uint32_t low = plane[0], middle = plane[4], high = plane[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) code[i] = (low >> i & 1u) | (middle >> i & 1u) << 1 | (high >> i & 1u) << 2;
  }
}

// A code's value over its scale. 2**23 + code is exact, and so is the difference.
template <typename C>
__device__ __forceinline__ float unit_of(uint32_t code, const float* table, float zero) {
  if constexpr (C::kTable) {
    return table[code];
  } else {
    return (__uint_as_float(0x4B000000u | code) - 8388608.f) - zero;
  }
}

template <typename C>
__device__ __forceinline__ void units8(const uint8_t* bytes, int e, const float* table, float zero, float (&v)[8]) {
  uint32_t code[8];
  codes8<C>(bytes, e, code);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = unit_of<C>(code[i], table, zero);
}

// Scale and zero of group `i` of the weight.
__device__ __forceinline__ float zero_at(const QuantView& w, int64_t i) {
  return w.zero ? load_as_float(w.zero, w.zero_dtype, i) : static_cast<float>(1 << (w.spec.bits - 1));
}

// Groups by shifts: element start + e of a run is in group first + ((lead + e) >> log2) of the weight.
struct Groups {
  int64_t first;
  int lead, log2;
};

template <typename C>
__device__ __forceinline__ Groups groups_from(const QuantView& w, int64_t row, int64_t col) {
  const bool per_row = !C::kTable && w.spec.per_row();
  const int64_t at = C::kTable ? row * w.k + col : col;
  const int log2 = per_row ? 30 : w.spec.log2_group;
  return Groups{group_of(w, row, col), per_row ? 0 : static_cast<int>(at & ((int64_t{1} << log2) - 1)), log2};
}

// Whether sixteen bytes may be copied at once, with eight codes aligned in shared memory.
template <typename C>
bool copies_wide(const QuantView& w) {
  return reinterpret_cast<uintptr_t>(w.packed) % 16 == 0 && (C::kTable || row_bytes(C::kBits, w.k) % C::kWord == 0);
}

// Calls f(Codes<bits, table>) for the weight's format.
template <typename F>
cudaError_t for_codes(const QuantSpec& spec, F f) {
  switch (spec.format) {
    case kNF4:
    case kFP4: return f(Codes<4, true>{});
    case kNF3: return f(Codes<3, true>{});
    case kNF2: return f(Codes<2, true>{});
    case kInt8: return f(Codes<8, false>{});
    case kInt4: return f(Codes<4, false>{});
    case kInt3: return f(Codes<3, false>{});
    case kInt2: return f(Codes<2, false>{});
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace lm
