"""The number formats of 8-bit (and 4-bit) states and saved tensors, in plain torch: what every backend reproduces.

A tensor is taken flat, in groups of ``group_size`` neighbours (the last group may be short). A group keeps one fp32
``scale``, its largest magnitude M; formats whose curve adapts keep one byte ``span`` beside it; every element keeps one
code (``int4``: two codes a byte, the first in the low half). With ``c`` the code's magnitude and ``sgn`` its sign:

============  ======================================================================  ===========  ==================
codec         decoded value                                                           span         code
============  ======================================================================  ===========  ==================
``e4m3``      ``sgn M e4m3(c) / 448``                                                 none         sign, magnitude
``e5m2``      ``sgn M e5m2(c) / 57344``                                               none         sign, magnitude
``e4m3+exp``  ``sgn M (e4m3(c) / 448) ** (1 / k)``                                    16 k         sign, magnitude
``de8``       ``sgn M tree(c)``                                                       none         sign, magnitude
``de8+exp``   ``sgn M tree(c) ** (1 / k)``                                            16 k         sign, magnitude
``log8``      ``sgn M 2 ** (-(L - c) R / (L - 1))``, ``c = 0``: zero                  2 R          sign, magnitude
``int8``      ``M c / 127`` (unsigned ``M c / 255``)                                  none         two's complement
``int4``      ``M c / 7`` (unsigned ``M c / 15``)                                     none         two's complement
============  ======================================================================  ===========  ==================

* ``+exp`` is COAT's dynamic range expansion (arXiv 2410.19313): ``k = D / log2(M / m)`` rounded down to 1/16, where
  ``m`` is the group's least nonzero magnitude, by value, and ``2**D`` the range of the format; ``k`` is at most 255/16.
* ``de8`` is the dynamic exponent format of 8-bit optimizers (Dettmers et al., arXiv 2110.02861): with ``i`` the place
  of the code's leading bit of ``B``, ``tree(c) = 10 ** (i - B + 1) (0.1 + 0.9 (c - 2**i + 0.5) / 2**i)``, normalised so
  that the largest is 1: ``M`` and ``-M`` are exact, where the original has one 1.0 and no -1.0.
* ``log8`` places ``L`` levels (127 signed, 255 unsigned) evenly in ``log2``, from M down over R octaves. ``2 R`` is
  ``2 log2(M / m)`` rounded up, at most 240 (signed: 48). Below the last level signed values nearer to 0 become 0;
  unsigned ones become the last level, since a second moment must not vanish.
* ``e4m3`` to ``int4`` round to nearest, ties to even; ``de8`` to nearest; ``log8`` to nearest in ``log2``.

``signed=False`` (second moments) drops the sign: the bit goes to the magnitude in ``de8``, ``log8``, ``int8`` and
``int4``, and is left unused in the FP8 formats.

Exact for all formats: zeros stay (positive) zeros, in any lane and whatever else is in the group; a group of ``+-M``
and zeros comes back bit for bit; a group without a magnitude of at least 2**-100 becomes zeros (scale 0); a group
that holds NaN or infinity decodes to NaN everywhere (scale NaN), the others are untouched. Magnitudes below 2**-126
(subnormal) count as zero where a logarithm is taken (``+exp``, ``log8``).

The arithmetic is fp32 in a fixed order, fused multiply-adds where written, and two polynomials for the logarithm and
the power: no library function, so ``csrc/common/codecs.h`` has the same bits on every processor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CODECS = ("e4m3", "e4m3+exp", "e5m2", "de8", "de8+exp", "log8", "int8", "int4")
"""Names in the order of ``enum Codec`` of ``csrc/common/codecs.h``, where fp32 stands before them as 0."""

GROUP_SIZES = (16, 32, 64, 128, 256, 512)
WITH_SPAN = ("e4m3+exp", "de8+exp", "log8")
"""Codecs that keep a span byte a group."""

_LEAST_SCALE = 2.0**-100
_LEAST_EXPONENT = -120.0
_LOG8_SPAN = {True: 48, False: 240}

# ---------------------------------------------------------------------------------------------------- fp32, bit for bit


def _row(values: str) -> list[float]:
    return [float.fromhex(v) for v in values.split()]


_LOG2 = _row("0x1.712178p+0 -0x1.6b0ea4p-1 0x1.a99458p-2 -0x1.8c70c0p-3 0x1.71db5cp-5")
_EXP2 = _row("0x1.62e012p-1 0x1.ebfbc6p-3 0x1.ca719cp-5 0x1.3c1b90p-7")


def fma(a: Tensor | float, b: Tensor | float, c: Tensor | float) -> Tensor:
    """``a * b + c`` rounded once to fp32. The product is exact in float64; its sum is rounded to odd there, after which
    the second rounding cannot be wrong."""
    a, b, c = (torch.as_tensor(v, dtype=torch.float32).double() for v in (a, b, c))
    product = a * b
    total = product + c
    rest = total - product
    error = (product - (total - rest)) + (c - rest)
    bits = total.view(torch.int64)
    away = torch.where((error > 0) == (total > 0), 1, -1)
    fix = ((error > 0) | (error < 0)) & (bits & 1 == 0)
    return torch.where(fix, bits + away, bits).view(torch.float64).float()


def divide(a: float, b: Tensor) -> Tensor:
    """``a / b`` in one rounding: torch takes a number over a tensor as the number times the reciprocal."""
    return torch.full_like(b, a) / b


def log2(x: Tensor) -> Tensor:
    """The package's ``log2`` of normal positive fp32 numbers: error below 1.6e-5, exact at powers of two."""
    bits = x.view(torch.int32)
    exponent = (bits >> 23) - 127
    u = (bits - (exponent << 23)).view(torch.float32) - 1.0
    q: Any = torch.full_like(u, _LOG2[4])
    for c in _LOG2[3::-1]:
        q = fma(u, q, c)
    return fma(u, q, exponent.float())


def exp2(t: Tensor) -> Tensor:
    """The package's ``2 ** t`` for fp32 ``t`` in [-120, 0]: relative error below 5e-6, exact at whole numbers."""
    n = t.round()
    f = t - n
    q: Any = torch.full_like(f, _EXP2[3])
    for c in _EXP2[2::-1]:
        q = fma(f, q, c)
    return (fma(f, q, 1.0).view(torch.int32) + (n.to(torch.int32) << 23)).view(torch.float32)


# -------------------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Tree:
    """de8's constants by the place ``i`` of the leading bit: value ``fma(c, slope, base)``, code ``fma(y, bins,
    first)`` rounded down, first magnitude ``least`` that belongs to ``i``."""

    base: list[float]
    slope: list[float]
    bins: list[float]
    first: list[float]
    least: list[float]


TREE = {
    True: Tree(
        _row(
            "-0x1.7a7884p-22 -0x1.849bbep-18 -0x1.226678p-14 -0x1.88b34cp-11 "
            "-0x1.fd7020p-8 -0x1.443314p-4 -0x1.98dffap-1"
        ),
        _row("0x1.e69af2p-21 0x1.3020d8p-18 0x1.7c290ep-16 0x1.db3350p-14 0x1.290012p-11 0x1.734018p-9 0x1.d0101ep-7"),
        _row("0x1.0d5c2ap+20 0x1.aef9dcp+17 0x1.58c7e4p+15 0x1.13d31cp+13 0x1.b951c8p+10 0x1.610e38p+8 0x1.1a71c8p+6"),
        _row("0x1.c71c72p-1 0x1.c71c72p+0 0x1.c71c72p+1 0x1.c71c72p+2 0x1.c71c72p+3 0x1.c71c72p+4 0x1.c71c72p+5"),
        _row("0x1.295eb0p-22 0x1.00d1c8p-19 0x1.e9fc06p-17 0x1.02b862p-13 0x1.25b346p-10 0x1.5c9016p-7 0x1.a81a1ap-4"),
    ),
    False: Tree(
        _row(
            "-0x1.2db55ap-25 -0x1.35ca36p-21 -0x1.cf004ep-18 -0x1.390d4cp-14 "
            "-0x1.961cd0p-11 -0x1.0271d0p-7 -0x1.45f226p-4 -0x1.993d1ep-1"
        ),
        _row(
            "0x1.83e92ap-24 0x1.e4e376p-22 0x1.2f0e2ap-19 0x1.7ad1b4p-17 "
            "0x1.d98620p-15 0x1.27f3d4p-12 0x1.71f0cap-10 0x1.ce6cfcp-8"
        ),
        _row(
            "0x1.51e462p+23 0x1.0e504ep+21 0x1.b0807cp+18 0x1.5a0064p+16 "
            "0x1.14cd1cp+14 0x1.bae1c8p+11 0x1.624e38p+9 0x1.1b71c8p+7"
        ),
        _row(
            "0x1.c71c72p-1 0x1.c71c72p+0 0x1.c71c72p+1 0x1.c71c72p+2 "
            "0x1.c71c72p+3 0x1.c71c72p+4 0x1.c71c72p+5 0x1.c71c72p+6"
        ),
        _row(
            "0x1.da1cfcp-26 0x1.99761ep-23 0x1.869acap-20 0x1.9c7df2p-17 "
            "0x1.d44336p-14 0x1.15ddd2p-10 0x1.5215a6p-7 0x1.a0d34ep-4"
        ),
    ),
}
"""By ``signed``: seven or eight places. The constants are those of the formula above, rounded to fp32."""

# 16 D: the exponent range that expansion spreads a group over, in sixteenths of an octave
_EXPANSION = {("e4m3+exp", True): 16 * 16.6147098541, ("e4m3+exp", False): 16 * 16.6147098541}
_EXPANSION |= {("de8+exp", True): 16 * 20.7838853169, ("de8+exp", False): 16 * 24.1109123212}
_TOP = {"e4m3": 448.0, "e4m3+exp": 448.0, "e5m2": 57344.0, "de8": 1.0, "de8+exp": 1.0}


def top(codec: str, signed: bool) -> float:
    """The number that a group's largest magnitude is scaled to before it is rounded."""
    if codec in ("int8", "int4"):
        return {("int8", True): 127.0, ("int8", False): 255.0, ("int4", True): 7.0, ("int4", False): 15.0}[
            codec, signed
        ]
    return _TOP[codec]


# ------------------------------------------------------------------------------------------------ magnitudes and codes


def _to_fp8(y: Tensor, mantissa: int) -> Tensor:
    """Magnitudes to e4m3 (3 mantissa bits) or e5m2 (2), ties to even: the code without its sign."""
    bias, drop = (7, 20) if mantissa == 3 else (15, 21)
    bits = y.view(torch.int32)
    normal = ((bits + ((1 << (drop - 1)) - 1) + ((bits >> drop) & 1)) >> drop) - ((127 - bias) << mantissa)
    magic = 2.0 ** (23 - (bias - 1 + mantissa))  # its unit in the last place is the format's smallest number
    small = (y + magic).view(torch.int32) - torch.tensor(magic).view(torch.int32)
    return torch.where(y < 2.0 ** (1 - bias), small, normal)


def _from_fp8(code: Tensor, mantissa: int) -> Tensor:
    bias, drop = (7, 20) if mantissa == 3 else (15, 21)
    normal = ((code << drop) + ((127 - bias) << 23)).view(torch.float32)
    return torch.where(code < 1 << mantissa, code.float() * 2.0 ** -(bias - 1 + mantissa), normal)


def _to_tree(y: Tensor, signed: bool) -> Tensor:
    tree = TREE[signed]
    place = torch.stack([y >= least for least in tree.least]).sum(0) - 1
    at = place.clamp(min=0)
    code = fma(y, torch.tensor(tree.bins)[at].to(y.device), torch.tensor(tree.first)[at].to(y.device)).to(torch.int32)
    code = torch.minimum(code.clamp(min=1), (2 << at).to(torch.int32) - 1)
    return torch.where(place < 0, 0, code)


def _from_tree(code: Tensor, signed: bool) -> Tensor:
    tree = TREE[signed]
    value = code.float()
    at = (value.view(torch.int32) >> 23).sub(127).clamp(min=0).long()
    decoded = fma(value, torch.tensor(tree.slope)[at].to(code.device), torch.tensor(tree.base)[at].to(code.device))
    return torch.where(code == 0, 0.0, decoded)


def _levels(signed: bool) -> int:
    return 127 if signed else 255


def _base(codec: str) -> str:
    return codec.removesuffix("+exp")


def _round(y: Tensor, codec: str, signed: bool) -> Tensor:
    """Scaled magnitudes (at most the codec's top) to codes without sign."""
    if codec == "de8":
        return _to_tree(y, signed)
    return _to_fp8(y, 3 if codec == "e4m3" else 2)


def _value(code: Tensor, codec: str, signed: bool) -> Tensor:
    if codec == "de8":
        return _from_tree(code, signed)
    return _from_fp8(code, 3 if codec == "e4m3" else 2)


# --------------------------------------------------------------------------------------------------------- the codecs


def groups_of(numel: int, group_size: int) -> int:
    """How many groups ``numel`` elements make."""
    return -(-numel // group_size)


def _scales(x: Tensor, codec: str, signed: bool) -> tuple[Tensor, Tensor]:
    """Scale (fp32) and span (uint8; zeros where the codec has none) of each row of ``x [groups, group_size]``."""
    bits = x.view(torch.int32) & 0x7FFFFFFF
    largest = bits.amax(1)
    scale = largest.view(torch.float32)
    dead = scale < _LEAST_SCALE
    broken = largest >= 0x7F800000
    span = torch.zeros_like(largest)
    if codec in WITH_SPAN:
        least = torch.where(bits < 0x00800000, 0x7F7FFFFF, bits).amin(1)
        off = dead | broken
        one = torch.ones_like(scale)
        octaves = log2(torch.where(off, one, scale)) - log2(torch.where(off, one, least.view(torch.float32)))
        if codec == "log8":
            span = (2.0 * octaves).ceil().clamp(max=_LOG8_SPAN[signed])
        else:
            sixteenths = torch.tensor(_EXPANSION[codec, signed], dtype=torch.float32, device=x.device)
            flat = octaves <= sixteenths / 255.0
            span = torch.where(flat, 255.0, sixteenths / torch.where(flat, 1.0, octaves)).trunc().clamp(min=1, max=255)
        span = torch.where(off, 0.0, span)
    scale = torch.where(dead, 0.0, scale)
    return torch.where(broken, torch.nan, scale), span.to(torch.uint8)


def _codes(x: Tensor, scale: Tensor, span: Tensor, codec: str, signed: bool) -> Tensor:
    alive = (scale > 0)[:, None]  # neither zero nor NaN
    m = torch.where(alive, scale[:, None], 1.0)
    x = torch.where(alive, x, 0.0)
    if codec in ("int8", "int4"):
        limit = top(codec, signed)
        value = (x if signed else x.abs()) * divide(limit, m)
        return value.clamp(-limit, limit).round().to(torch.int32)
    size = x.abs()
    if codec in WITH_SPAN:
        ok = size >= 2.0**-126
        distance = log2(torch.where(ok, size, 1.0)) - log2(m)
        width = span[:, None].float()
        if codec == "log8":
            levels = _levels(signed)
            per_octave = torch.where(width > 0, divide(2.0 * (levels - 1), width), 0.0)
            code = levels + (distance * per_octave).round().to(torch.int32)
            if signed:  # an octave below the last level is half of it: what lies beyond is nearer to zero
                ok = ok & (code >= 1 - per_octave.round().to(torch.int32))
            code = code.clamp(min=1)
        else:
            t = torch.maximum(distance * (width * 0.0625), torch.tensor(_LEAST_EXPONENT))
            code = _round(exp2(t) * top(codec, signed), _base(codec), signed)
        code = torch.where(ok, code, 0)
    else:
        limit = top(codec, signed)
        code = _round((size * divide(limit, m)).clamp(max=limit), codec, signed)
    return torch.where((x < 0) & (code > 0), code + 128, code) if signed else code


def encode_reference(x: Tensor, codec: str, group_size: int, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``lowmem::group_encode``: ``(codes, scale, span)`` of ``x`` (any shape, floating), see :func:`group_encode`."""
    flat = x.detach().reshape(-1).float()
    n, groups = flat.numel(), groups_of(flat.numel(), group_size)
    padded = torch.zeros(groups * group_size, dtype=torch.float32, device=x.device)
    padded[:n] = flat
    rows = padded.view(groups, group_size)
    if groups == 0:
        scale, span, code = rows.new_empty(0), rows.new_empty(0, dtype=torch.uint8), rows.to(torch.int32)
    else:
        scale, span = _scales(rows, codec, signed)
        code = _codes(rows, scale, span, codec, signed)
    if codec not in WITH_SPAN:
        span = span.new_empty(0)
    code = code.reshape(-1)[:n]
    if codec == "int4":
        code = torch.nn.functional.pad(code & 15, (0, n % 2)).view(-1, 2)
        return (code[:, 0] | code[:, 1] << 4).to(torch.uint8), scale, span
    return (code & 255).to(torch.uint8).view(x.shape), scale, span


def decode_reference(
    codes: Tensor, scale: Tensor, span: Tensor, numel: int, codec: str, group_size: int, signed: bool
) -> Tensor:
    """``lowmem::group_decode``: fp32 ``[numel]``, see :func:`group_decode`."""
    groups = groups_of(numel, group_size)
    flat = codes.reshape(-1)
    if codec == "int4":
        flat = torch.stack((flat & 15, flat >> 4), 1).view(-1)[:numel]
    padded = torch.zeros(groups * group_size, dtype=torch.int32, device=codes.device)
    padded[:numel] = flat
    code = padded.view(groups, group_size)
    if groups == 0:
        return scale.new_empty(0)
    m = scale[:, None]
    if codec in ("int8", "int4"):
        wrap = 128 if codec == "int8" else 8
        number = torch.where(code >= wrap, code - 2 * wrap, code) if signed else code
        value = number.float() * (1.0 / torch.tensor(top(codec, signed)))
        return (value * m).view(-1)[:numel]
    wide = not signed and codec in ("de8", "de8+exp", "log8")
    magnitude = code if wide else code & 127
    if codec == "log8":
        levels, width = _levels(signed), span[:, None].float()
        value = exp2((magnitude - levels).float() * (width / (2.0 * (levels - 1))))
    elif codec in WITH_SPAN:
        number = _value(magnitude, _base(codec), signed)
        distance = log2(torch.where(magnitude > 0, number, 1.0)) - log2(torch.tensor(top(codec, signed)))
        root = divide(16.0, span[:, None].clamp(min=1).float())
        value = exp2(torch.maximum(distance * root, torch.tensor(_LEAST_EXPONENT)))
    else:
        value = _value(magnitude, codec, signed) * (1.0 / torch.tensor(top(codec, signed)))
    value = torch.where(magnitude == 0, 0.0, value) * m
    if signed:
        value = torch.where(code >= 128, -value, value)
    return value.view(-1)[:numel]
