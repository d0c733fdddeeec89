"""The Triton kernels of the ``quant`` family: dequantization, the gradient of scales and zeros, the LR-QAT weight.

A *run* is what ``docs/quant.md`` calls one: the whole flat weight for table formats, one row for int formats. Codes are
unpacked from whole bytes: eight neighbours are a whole number of bytes in every width, so a tile's bytes are loaded
once, side by side, and spread over the elements in registers. Tiles that do not start on such eight (``ALIGNED``
False) gather a byte for each element instead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .lora_gemm import tile_of
from .lora_kernels import load_tile


@triton.jit
def spread8(per8, ROWS: tl.constexpr, COLS: tl.constexpr):
    """``[ROWS, COLS / 8]`` to ``[ROWS, COLS]``: each value for eight neighbours."""
    return tl.reshape(tl.broadcast_to(per8[:, :, None], [ROWS, COLS // 8, 8]), [ROWS, COLS])


@triton.jit
def bits8(plane, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Bytes ``[ROWS, COLS / 8]`` to their bits ``[ROWS, COLS]``, the lowest first."""
    return tl.reshape(plane[:, :, None] >> tl.arange(0, 8)[None, None, :] & 1, [ROWS, COLS])


@triton.jit
def load_codes(
    packed_ptr,
    start,
    element,
    inside,
    BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """int32 codes ``[ROWS, COLS]``, 0 outside. Row i's run starts at byte ``start[i]``; its elements of the tile are
    ``element[i] .. element[i] + COLS - 1``, of which the first ``inside[i]`` exist. ALIGNED: 8 divides element."""
    column = tl.arange(0, COLS)
    if not ALIGNED:
        i = element[:, None] + column[None, :]
        there = column[None, :] < inside[:, None]
        if BITS == 3:
            at = packed_ptr + start[:, None] + i // 32 * 12 + i % 32 // 8
            shift = (i % 8).to(tl.int32)
            low = tl.load(at, mask=there, other=0).to(tl.int32) >> shift & 1
            middle = tl.load(at + 4, mask=there, other=0).to(tl.int32) >> shift & 1
            high = tl.load(at + 8, mask=there, other=0).to(tl.int32) >> shift & 1
            return low | middle << 1 | high << 2
        else:
            per: tl.constexpr = 8 // BITS
            byte = tl.load(packed_ptr + start[:, None] + i // per, mask=there, other=0).to(tl.int32)
            return byte >> (8 - BITS - BITS * (i % per)).to(tl.int32) & ((1 << BITS) - 1)
    elif BITS == 3:
        eight = element[:, None] // 8 + tl.arange(0, COLS // 8)[None, :]
        there = tl.arange(0, COLS // 8)[None, :] * 8 < inside[:, None]
        at = packed_ptr + start[:, None] + eight // 4 * 12 + eight % 4
        low = bits8(tl.load(at, mask=there, other=0).to(tl.int32), ROWS, COLS)
        middle = bits8(tl.load(at + 4, mask=there, other=0).to(tl.int32), ROWS, COLS)
        high = bits8(tl.load(at + 8, mask=there, other=0).to(tl.int32), ROWS, COLS)
        return low | middle << 1 | high << 2
    else:
        per: tl.constexpr = 8 // BITS
        part = tl.arange(0, COLS // per)[None, :]
        at = packed_ptr + start[:, None] + element[:, None] // per + part
        byte = tl.load(at, mask=part * per < inside[:, None], other=0).to(tl.int32)
        if BITS == 4:
            byte = tl.interleave(byte >> 4, byte & 15)
        elif BITS == 2:
            byte = tl.interleave(tl.interleave(byte >> 6, byte >> 2 & 3), tl.interleave(byte >> 4 & 3, byte & 3))
        return byte


@triton.jit
def load_scales(
    scale_ptr,
    code_ptr,
    absmax_ptr,
    offset_ptr,
    group,
    there,
    SCALE_BITS: tl.constexpr,
    scale_group,
    OFFSETS: tl.constexpr,
):
    """The scales of groups ``group`` (any shape), fp32."""
    if SCALE_BITS == 0:
        return tl.load(scale_ptr + group, mask=there, other=0.0).to(tl.float32)
    else:
        if SCALE_BITS == 3:
            at = scale_ptr + group // 32 * 12 + group % 32 // 8
            shift = (group % 8).to(tl.int32)
            u = tl.load(at, mask=there, other=0).to(tl.int32) >> shift & 1
            u = u | (tl.load(at + 4, mask=there, other=0).to(tl.int32) >> shift & 1) << 1
            u = u | (tl.load(at + 8, mask=there, other=0).to(tl.int32) >> shift & 1) << 2
        else:
            per: tl.constexpr = 8 // SCALE_BITS
            u = tl.load(scale_ptr + group // per, mask=there, other=0).to(tl.int32)
            u = u >> (8 - SCALE_BITS - SCALE_BITS * (group % per)).to(tl.int32) & ((1 << SCALE_BITS) - 1)
        block = group // scale_group
        absmax = tl.load(absmax_ptr + block, mask=there, other=0.0).to(tl.float32)
        offset = tl.load(offset_ptr + (block if OFFSETS else block * 0), mask=there, other=0.0).to(tl.float32)
        return tl.load(code_ptr + u) * absmax + offset


@triton.jit
def units(code, table_ptr, zero, TABLE: tl.constexpr):
    """Values over their scales: ``table[code]``, or ``code - zero``."""
    if TABLE:
        return tl.load(table_ptr + code)
    else:
        return code.to(tl.float32) - zero


@triton.jit
def load_zeros(zero_ptr, group, there, ZEROS: tl.constexpr, BITS: tl.constexpr):
    """The zeros of ``group``, fp32; the middle code where there are none."""
    if ZEROS:
        return tl.load(zero_ptr + group, mask=there, other=0).to(tl.float32)
    else:
        return tl.zeros(group.shape, tl.float32) + (1 << (BITS - 1))


@triton.jit
def dequantize_kernel(
    out_ptr,  # [rows, cols]
    packed_ptr,
    table_ptr,  # fp32 [2**BITS]
    scale_ptr,
    zero_ptr,
    code_ptr,
    absmax_ptr,
    offset_ptr,
    rows,
    cols,
    k,
    row0,
    col0,
    stride_row,
    stride_col,
    row_bytes,
    group_size,
    row_groups,
    scale_group,
    TABLE: tl.constexpr,
    BITS: tl.constexpr,
    PER_ROW: tl.constexpr,  # one scale a row
    ZEROS: tl.constexpr,
    SCALE_BITS: tl.constexpr,
    OFFSETS: tl.constexpr,  # one offset a block of scales
    ALIGNED: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """``out[i, j] = W[row0 + i, col0 + j]``. Grid: (column tiles, row tiles)."""
    i = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    j = tl.program_id(0).to(tl.int64) * BK
    row = row0 + i
    inside = tl.where(i < rows, tl.minimum(cols - j, BK), 0)
    element = row * 0 + col0 + j
    if TABLE:
        element += row * k
        start = row * 0
    else:
        start = row * row_bytes
    code = load_codes(packed_ptr, start, element, inside, BITS, ALIGNED, BM, BK)
    # scales by eight neighbours, or by element
    step: tl.constexpr = 8 if ALIGNED else 1
    at = tl.arange(0, BK // step) * step
    there = at[None, :] < inside[:, None]
    if PER_ROW:
        group = row[:, None] + at[None, :] * 0
    elif TABLE:
        group = (element[:, None] + at[None, :]) // group_size
    else:
        group = row[:, None] * row_groups + (col0 + j + at[None, :]) // group_size
    scale = load_scales(scale_ptr, code_ptr, absmax_ptr, offset_ptr, group, there, SCALE_BITS, scale_group, OFFSETS)
    zero = load_zeros(zero_ptr, group, there, ZEROS, BITS)
    if ALIGNED:
        scale = spread8(scale, BM, BK)
        zero = spread8(zero, BM, BK)
    value = units(code, table_ptr, zero, TABLE) * scale
    column = tl.arange(0, BK)
    ptrs = out_ptr + i[:, None] * stride_row + (j + column[None, :]) * stride_col
    tl.store(ptrs, value.to(out_ptr.dtype.element_ty), mask=column[None, :] < inside[:, None])


@triton.jit
def scale_grad_kernel(
    dy_ptr,  # [M, N]
    x_ptr,  # [M, K]
    packed_ptr,
    table_ptr,  # fp32 [2**BITS]
    zero_ptr,
    ds_ptr,  # fp32 [parts, N, spans]
    dw_ptr,  # fp32 [parts, N, spans]
    M,
    N,
    K,
    row0,
    stride_dy,
    stride_x,
    row_bytes,
    group_size,
    row_groups,
    spans,
    chunk,  # rows of x in a part, a multiple of BM
    TABLE: tl.constexpr,
    BITS: tl.constexpr,
    PER_ROW: tl.constexpr,
    ZEROS: tl.constexpr,  # sums of dW leave as well
    SPAN: tl.constexpr,  # columns of one sum: a group's, or BK of them
    EVEN: tl.constexpr,  # BN divides N, and BK divides K
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """With ``dW = dy^T x``: sums over SPAN columns of ``dW * (W / scale)``, and of dW, for the part's rows of x. dW
    lives on the accumulator alone. Grid: (tiles of W, parts)."""
    part = tl.program_id(1)
    tile_n, tile_k = tile_of(tl.program_id(0), N, K, BN, BK, GROUP)
    n = tile_n.to(tl.int64) * BN + tl.arange(0, BN)
    k0 = tile_k.to(tl.int64) * BK
    k = k0 + tl.arange(0, BK)
    acc = tl.zeros([BN, BK], tl.float32)
    start = part * chunk
    for m in range(start, tl.minimum(start + chunk, M), BM):
        row = m + tl.arange(0, BM).to(tl.int64)
        dy = load_tile(dy_ptr, row, stride_dy, M, n, N, EVEN)
        x = load_tile(x_ptr, row, stride_x, M, k, K, EVEN)
        acc = tl.dot(tl.trans(dy), x, acc, input_precision=PRECISION)
    inside = tl.where(n < N, tl.minimum(K - k0, BK), 0)
    wide = row0 + n
    element = wide * 0 + k0
    run = wide * row_bytes
    if TABLE:
        element += wide * K
        run = wide * 0
    code = load_codes(packed_ptr, run, element, inside, BITS, True, BN, BK)
    eight = tl.arange(0, BK // 8) * 8
    group = wide[:, None] + eight[None, :] * 0
    if not PER_ROW and not TABLE:
        group = wide[:, None] * row_groups + (k0 + eight[None, :]) // group_size
    zero = load_zeros(zero_ptr, group, eight[None, :] < inside[:, None], ZEROS, BITS)
    unit = units(code, table_ptr, spread8(zero, BN, BK), TABLE)
    sums = tl.sum(tl.reshape(acc * unit, [BN, BK // SPAN, SPAN]), 2)
    span = k0 // SPAN + tl.arange(0, BK // SPAN)
    to = (part.to(tl.int64) * N + n)[:, None] * spans + span[None, :]
    there = (n[:, None] < N) & (span[None, :] < spans)
    tl.store(ds_ptr + to, sums, mask=there)
    if ZEROS:
        tl.store(dw_ptr + to, tl.sum(tl.reshape(acc, [BN, BK // SPAN, SPAN]), 2), mask=there)
