"""The package's random map in Triton: the same bits as ``lowmem.ops.philox`` and ``csrc/common/philox.h``.

One call of Philox4x32-10 at counter ``(k // 8, row, 0, child)`` serves the eight elements ``8 * (k // 8) ... + 7`` of a
row; element ``k`` owns the 16-bit half ``k % 2`` of word ``(k % 8) // 2`` and is kept iff that half, unsigned, is at
least ``threshold``. All tiles here are therefore ``[rows, blocks]`` with ``blocks = columns / 8``.

Two things keep the instruction count down. Counters stay ``[rows, 1]`` and ``[1, blocks]`` for as long as a round
depends on one of the two only, so the first two rounds are shared by a whole row or column of a tile. And both halves
of a word are compared at once: see :func:`kept`.
"""

from __future__ import annotations

import triton
import triton.language as tl

_M0 = tl.constexpr(0xD2511F53)
_M1 = tl.constexpr(0xCD9E8D57)
_W0 = tl.constexpr(0x9E3779B9)
_W1 = tl.constexpr(0xBB67AE85)


@triton.jit
def load_key(seed_ptr):
    """The two 32-bit key words of the int64 at ``seed_ptr``."""
    seed = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
    return seed.to(tl.uint32), (seed >> 32).to(tl.uint32)


@triton.jit
def words(key0, key1, row, block, child):
    """The words of counter ``(block, row, 0, child)``; uint32 ``row`` ``[rows, 1]`` and ``block`` ``[1, blocks]``."""
    # the first round on a counter whose word 2 is zero
    p = block.to(tl.uint64) * _M0  # a 64-bit product: the compiler then takes both halves from one instruction
    c0 = row ^ key0
    c1 = tl.zeros_like(c0)
    c2 = (p >> 32).to(tl.uint32) ^ (child ^ key1)
    c3 = p.to(tl.uint32)
    for _ in tl.static_range(9):
        key0 += _W0
        key1 += _W1
        p0 = c0.to(tl.uint64) * _M0
        p1 = c2.to(tl.uint64) * _M1
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ key0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ key1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def threshold_parts(threshold):
    """What :func:`kept` needs of a threshold in [0, 65536] (uint32 scalar): ``(low, top)``.

    With ``c = 65536 - threshold`` a half ``h`` is kept iff ``h + c`` carries out of its 16 bits. ``low`` holds ``c``'s
    lower 15 bits in both halves of a word, ``top`` is all ones where ``c``'s bit 15 is set. ``c = 65536`` (keep all)
    does not fit: there ``low`` forces the carry.
    """
    c = 65536 - threshold
    low = ((c & 0x7FFF) | ((c >> 1) & 0x8000)) * 0x00010001
    top = tl.where((c & 0x18000) != 0, 0xFFFFFFFF, 0).to(tl.uint32)
    return low, top


@triton.jit
def kept(word, low, top):
    """A word whose bits 15 and 31 say whether its lower and upper half are kept; its other bits mean nothing.

    Bit 15 of ``(h & 0x7FFF) + low`` is the carry into bit 15, and the carry out of it is the majority of that, ``h``'s
    bit 15 and ``c``'s bit 15.
    """
    carry = (word & 0x7FFF7FFF) + low
    return (word & carry) | (top & (word | carry))


@triton.jit
def gather_byte(f0, f1, f2, f3):
    """Eight keep bits, in element order, from four words of :func:`kept`; bits above 7 mean nothing."""
    first = (f1 & 0x80008000) | ((f0 & 0x80008000) >> 2)
    last = (f3 & 0x80008000) | ((f2 & 0x80008000) >> 2)
    both = last | (first >> 4)  # words 0 to 3: lower halves at bits 9, 11, 13, 15, upper halves 16 above
    return (both >> 9) | (both >> 24)


@triton.jit
def inside_byte(block, columns):
    """Per block of a row: ones at the bits whose element lies before ``columns``."""
    return ((1 << tl.minimum(tl.maximum(columns - block * 8, 0), 8)) - 1).to(tl.uint32)


@triton.jit
def pair_masks(f0, f1, f2, f3, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """``[ROWS, PAIRS]`` words (``PAIRS = 4 * blocks``): 0xFFFF in each half that is kept, else 0."""
    f = tl.join(tl.join(f0, f2), tl.join(f1, f3)) & 0x80008000  # the last join varies fastest: words 0, 1, 2, 3
    return tl.reshape(f | (f - (f >> 15)), [ROWS, PAIRS])


@triton.jit
def spread(byte, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Bytes ``[ROWS, COLS / 8]`` to int32 ``[ROWS, COLS]``: not 0 where the element's bit is set."""
    bits = byte.to(tl.int32)[:, :, None] & (1 << tl.arange(0, 8))[None, None, :]
    return tl.reshape(bits, [ROWS, COLS])


@triton.jit
def byte_pairs(byte, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """Bytes ``[ROWS, PAIRS / 4]`` (nothing above bit 7) to the words of :func:`pair_masks`."""
    two = (byte.to(tl.uint32)[:, :, None] >> (2 * tl.arange(0, 4)).to(tl.uint32)[None, None, :]) * 0x8001
    return tl.reshape((two & 0x00010001) * 0xFFFF, [ROWS, PAIRS])


@triton.jit
def halves(x, ROWS: tl.constexpr, COLS: tl.constexpr, dtype: tl.constexpr):
    """Words ``[ROWS, COLS / 2]`` to the 16-bit floats ``[ROWS, COLS]`` they hold, the lower half first."""
    lower = x.to(tl.uint16).to(dtype, bitcast=True)
    upper = (x >> 16).to(tl.uint16).to(dtype, bitcast=True)
    return tl.reshape(tl.join(lower, upper), [ROWS, COLS])


@triton.jit
def draw_rows(bits_ptr, seed_ptr, row, drawn, block, rows, columns, stride, threshold, child):
    """Writes bytes ``block`` of the packed keep bits of rows ``row``, which the random map knows as ``drawn``."""
    low, top = threshold_parts(threshold.to(tl.uint32))
    key0, key1 = load_key(seed_ptr)
    child = child.to(tl.uint32)
    w0, w1, w2, w3 = words(key0, key1, drawn.to(tl.uint32)[:, None], block.to(tl.uint32)[None, :], child)
    byte = gather_byte(kept(w0, low, top), kept(w1, low, top), kept(w2, low, top), kept(w3, low, top))
    byte = byte & inside_byte(block, columns)[None, :]
    inside = (row[:, None] < rows) & (block[None, :] < stride)
    tl.store(bits_ptr + row[:, None] * stride + block[None, :], byte.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["threshold", "child"])
def draw_kernel(
    bits_ptr,  # uint8 [rows, stride]
    seed_ptr,  # int64 [1]
    rows,
    columns,
    stride,
    threshold,
    child,
    BM: tl.constexpr,
    BB: tl.constexpr,
):
    """The packed keep bits of a ``[rows, columns]`` mask, drawn. Grid: (row tiles, tiles of BB bytes)."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    block = tl.program_id(1) * BB + tl.arange(0, BB)
    draw_rows(bits_ptr, seed_ptr, row, row, block, rows, columns, stride, threshold, child)
