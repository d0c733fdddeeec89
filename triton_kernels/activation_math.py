"""Pieces of the activation kernels: f and f', FP8 groups, packed codes. Formulas: lowmem/ops/activation.py and
csrc/common/fp8.h, whose bits these make."""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = tl.constexpr(128)


@triton.jit
def tanh(x):
    """By its series near zero, where the quotient cancels."""
    z = x * x
    odd = ((((-0.00886323553 * z + 0.0218694885) * z - 0.0539682540) * z + 0.133333333) * z - 0.333333333) * z
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.35, x + x * odd, tl.where(x < 0, -far, far))


@triton.jit
def sigmoid_pair(z):
    """``sigmoid(z)`` and ``sigmoid(-z)``."""
    e = tl.exp(-tl.abs(z))
    near = 1.0 / (1.0 + e)
    far = e * near
    return tl.where(z < 0, far, near), tl.where(z < 0, near, far)


@triton.jit
def evaluate(x, KIND: tl.constexpr):
    """``f(x)`` and ``f'(x)``; KIND 0 silu, 1 gelu, 2 gelu_tanh. NaN stays NaN."""
    c = tl.where(x > 100.0, 100.0, tl.where(x < -100.0, -100.0, x))
    if KIND == 0:
        s, t = sigmoid_pair(c)
        return x * s, s + c * s * t
    elif KIND == 1:
        p = 0.5 + 0.5 * tl.erf(c * 0.7071067811865476)
        return x * p, p + c * 0.3989422804014327 * tl.exp(-0.5 * c * c)
    else:
        s, t = sigmoid_pair(1.5957691216057308 * (c + 0.044715 * c * c * c))
        return x * s, s + c * s * t * 1.5957691216057308 * (1.0 + 0.134145 * c * c)


@triton.jit
def scale_byte(largest):
    """The byte of a group's scale for its largest finite magnitude, int32."""
    u = largest.to(tl.int32, bitcast=True)
    e = (u >> 23) - 135 + ((u & 0x7FFFFF) > 0x600000).to(tl.int32)
    return tl.maximum(e, -126) + 127


@triton.jit
def encode(x):
    """E4M3 codes (uint8) of fp32 numbers that are at most 448 in magnitude, or not finite (NaN's code)."""
    u = x.to(tl.uint32, bitcast=True)
    m = u & 0x7FFFFFFF
    small = (m.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    normal = ((m + 0x7FFFF + ((m >> 20) & 1)) >> 20) - 960
    code = tl.where(m < 0x3C800000, small, normal) | ((u >> 24) & 0x80)
    return tl.where(m >= 0x7F800000, 0x7F, code).to(tl.uint8)


@triton.jit
def decode(code):
    """fp32 numbers of E4M3 codes."""
    c = code.to(tl.uint32)
    m = c & 0x7F
    value = tl.where(m < 8, m.to(tl.float32) * 0.001953125, ((m + 960) << 20).to(tl.float32, bitcast=True))
    value = tl.where(m == 0x7F, float("nan"), value)
    return tl.where(c >= 0x80, -value, value)


@triton.jit
def store_packed(x, packed_ptr, row, k0, M, K, BLOCK: tl.constexpr):
    """Columns ``k0 ... k0 + BLOCK`` of a row in FP8 groups, into the flat buffer of a matrix ``[M, K]``; ``x`` fp32 is
    0 beyond K; BLOCK and k0 are multiples of 128."""
    at = tl.arange(0, BLOCK)
    groups = tl.cdiv(K, GROUP)
    magnitude = tl.abs(x)
    finite = magnitude < float("inf")  # false for NaN
    wide = tl.reshape(tl.where(finite, magnitude, 0.0), [BLOCK // GROUP, GROUP])
    byte = scale_byte(tl.max(wide, 1))
    inverse = ((254 - byte) << 23).to(tl.float32, bitcast=True)
    scaled = tl.reshape(tl.reshape(x, [BLOCK // GROUP, GROUP]) * inverse[:, None], [BLOCK])
    code = tl.where(finite, encode(scaled), 0x7F).to(tl.uint8)
    tl.store(packed_ptr + row * K + k0 + at, code, mask=k0 + at < K)
    g = k0 // GROUP + tl.arange(0, BLOCK // GROUP)
    tl.store(packed_ptr + M.to(tl.int64) * K + row * groups + g, byte.to(tl.uint8), mask=g < groups)


@triton.jit
def load_packed(packed_ptr, row, k0, M, K, BLOCK: tl.constexpr):
    """What :func:`store_packed` stored, fp32; 0 beyond K."""
    at = tl.arange(0, BLOCK)
    groups = tl.cdiv(K, GROUP)
    code = tl.load(packed_ptr + row * K + k0 + at, mask=k0 + at < K, other=0)
    g = k0 // GROUP + tl.arange(0, BLOCK // GROUP)
    byte = tl.load(packed_ptr + M.to(tl.int64) * K + row * groups + g, mask=g < groups, other=1).to(tl.int32)
    scale = (byte << 23).to(tl.float32, bitcast=True)
    return tl.reshape(tl.reshape(decode(code), [BLOCK // GROUP, GROUP]) * scale[:, None], [BLOCK])


@triton.jit
def load_row(ptr, row, stride, k0, K, BLOCK: tl.constexpr):
    """Columns ``k0 ... k0 + BLOCK`` of a row in fp32, 0 beyond K."""
    at = k0 + tl.arange(0, BLOCK)
    return tl.load(ptr + row * stride + at, mask=at < K, other=0.0).to(tl.float32)


@triton.jit
def store_row(value, ptr, row, stride, k0, K, BLOCK: tl.constexpr):
    """The opposite of :func:`load_row`."""
    at = k0 + tl.arange(0, BLOCK)
    tl.store(ptr + row * stride + at, value.to(ptr.dtype.element_ty), mask=at < K)


@triton.jit
def store_codes(code, ptr, row, stride, k0, columns, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """int32 codes of ``BITS`` bits, packed into bytes ``[M, stride]``; ``columns`` bytes a row are stored."""
    EACH: tl.constexpr = 8 // BITS
    shifts = tl.arange(0, EACH) * BITS
    byte = tl.sum(tl.reshape(code, [BLOCK // EACH, EACH]) << shifts[None, :], 1)
    at = k0 // EACH + tl.arange(0, BLOCK // EACH)
    tl.store(ptr + row * stride + at, byte.to(tl.uint8), mask=at < columns)


@triton.jit
def load_codes(ptr, row, stride, k0, columns, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The codes that :func:`store_codes` stored, int32."""
    EACH: tl.constexpr = 8 // BITS
    shifts = tl.arange(0, EACH) * BITS
    at = k0 // EACH + tl.arange(0, BLOCK // EACH)
    byte = tl.load(ptr + row * stride + at, mask=at < columns, other=0).to(tl.int32)
    return tl.reshape((byte[:, None] >> shifts[None, :]) & ((1 << BITS) - 1), [BLOCK])
