"""The memory-bound kernels of the ``lora`` family: shrink, the dY pass, dA, the masked expand, and the ordered reduce.

Conventions: rows have a stride, columns are contiguous; row indices are 64-bit before they meet a stride; a tile's
tail is filled with zeros, never with memory beside the view. Shrink draws its dropout mask in registers; the kernels of
the backward pass read packed bits (drawn on a product's accumulator a mask costs four times as much, because a thread
holds two of a block's eight elements there). No sum uses atomics: a kernel whose reduction is split writes one partial
result per part, and :func:`reduce_kernel` adds them in order, so that every run gives the same bits.

What a program does with its rows is a device function (``..._rows``), which takes the rows' numbers: the kernels here
count them through, those of ``lora_multi_kernels`` look them up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .philox import (
    byte_pairs,
    gather_byte,
    halves,
    inside_byte,
    kept,
    load_key,
    pair_masks,
    spread,
    threshold_parts,
    words,
)


@triton.jit
def load_rank_rows(ptr, stride, r0, R, columns, COLS, dtype: tl.constexpr, BR: tl.constexpr):
    """``[BR, columns]`` of a matrix ``[R, COLS]`` from row ``r0``, zero beyond it, in ``dtype``."""
    rows = r0 + tl.arange(0, BR)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(ptrs, mask=(rows[:, None] < R) & (columns[None, :] < COLS), other=0.0).to(dtype)


@triton.jit
def load_tile(ptr, rows, stride, ROWS, columns, COLS, EVEN: tl.constexpr):
    """``[rows, columns]`` of a matrix ``[ROWS, COLS]``, zero beyond it. ``EVEN``: no column lies beyond."""
    ptrs = ptr + rows[:, None] * stride + columns[None, :]
    if EVEN:
        return tl.load(ptrs, mask=rows[:, None] < ROWS, other=0.0)
    else:
        return tl.load(ptrs, mask=(rows[:, None] < ROWS) & (columns[None, :] < COLS), other=0.0)


@triton.jit
def load_mask_byte(mask_ptr, rows, stride_mask, ROWS, blocks, COLS, EVEN: tl.constexpr):
    """Bytes ``[rows, blocks]`` of packed keep bits, zero beyond ``[ROWS, COLS / 8]``."""
    inside = rows[:, None] < ROWS
    if not EVEN:
        inside = inside & (blocks[None, :] * 8 < COLS)
    return tl.load(mask_ptr + rows[:, None] * stride_mask + blocks[None, :], mask=inside, other=0).to(tl.uint32)


@triton.jit
def shrink_rows(
    x_ptr, a_ptr, bits_ptr, seed_ptr, row, drawn, start, stop, r0, M, K, R, stride_x, stride_a, stride_bits, threshold,
    child, DROP: tl.constexpr, SAVE: tl.constexpr, PAIRS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``drop(x)[row, start:stop] a[r0:, start:stop]^T``, fp32 ``[BM, BR]``, and keep bits to memory. Rows from M on lie
    beyond; ``drawn`` is what the random map takes for a row's number."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if DROP:
        low, top = threshold_parts(threshold.to(tl.uint32))
        key0, key1 = load_key(seed_ptr)
        child = child.to(tl.uint32)
    acc = tl.zeros([BM, BR], tl.float32)
    for k in range(start, stop, BK):
        column = k + tl.arange(0, BK)
        a = load_rank_rows(a_ptr, stride_a, r0, R, column, K, dtype, BR)
        if DROP:
            block = k // 8 + tl.arange(0, BK // 8)
            w0, w1, w2, w3 = words(key0, key1, drawn.to(tl.uint32)[:, None], block.to(tl.uint32)[None, :], child)
            w0, w1, w2, w3 = kept(w0, low, top), kept(w1, low, top), kept(w2, low, top), kept(w3, low, top)
            if SAVE or not PAIRS:
                byte = gather_byte(w0, w1, w2, w3)
            if PAIRS:
                pair = k // 2 + tl.arange(0, BK // 2)
                words_ptr = x_ptr.to(tl.pointer_type(tl.uint32))
                x2 = load_tile(words_ptr, row, stride_x // 2, M, pair, K // 2, EVEN)
                x = halves(x2 & pair_masks(w0, w1, w2, w3, BM, BK // 2), BM, BK, dtype)
            else:
                x = load_tile(x_ptr, row, stride_x, M, column, K, EVEN)
                x = tl.where(spread(byte, BM, BK) != 0, x, 0.0)
            if SAVE:
                if not EVEN:  # bits beyond K are zero
                    byte = byte & inside_byte(block, K)[None, :]
                inside = (row[:, None] < M) & (block[None, :] < stride_bits)
                if r0 == 0:
                    tl.store(bits_ptr + row[:, None] * stride_bits + block[None, :], byte.to(tl.uint8), mask=inside)
        else:
            x = load_tile(x_ptr, row, stride_x, M, column, K, EVEN)
        acc = tl.dot(x, tl.trans(a), acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["threshold", "child", "scale"])
def shrink_kernel(
    x_ptr,  # [M, K]
    a_ptr,  # [R, K]
    out_ptr,  # [parts, M, R]
    bits_ptr,  # uint8 [M, stride_bits]
    seed_ptr,  # int64 [1]
    M,
    K,
    R,
    stride_x,
    stride_a,
    stride_bits,
    chunk,  # columns of one part, a multiple of BK
    scale,
    threshold,
    child,
    DROP: tl.constexpr,
    SAVE: tl.constexpr,  # write the packed keep bits
    PAIRS: tl.constexpr,  # x is 16-bit, K even and rows 4-byte aligned: masked two elements at a time
    EVEN: tl.constexpr,  # BK divides K
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """``out[part] = scale * drop(x)[:, part] a[:, part]^T``, and keep bits. Grid: (row tiles, parts, rank tiles)."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    part = tl.program_id(1)
    r0 = tl.program_id(2) * BR
    start = part * chunk
    acc = shrink_rows(
        x_ptr, a_ptr, bits_ptr, seed_ptr, row, row, start, tl.minimum(start + chunk, K), r0, M, K, R, stride_x,
        stride_a, stride_bits, threshold, child, DROP, SAVE, PAIRS, EVEN, PRECISION, BM, BK, BR,
    )  # fmt: skip
    rank = r0 + tl.arange(0, BR)
    ptrs = out_ptr + (part.to(tl.int64) * M + row[:, None]) * R + rank[None, :]
    tl.store(ptrs, (acc * scale).to(out_ptr.dtype.element_ty), mask=(row[:, None] < M) & (rank[None, :] < R))


@triton.jit
def load_rank_columns(b_ptr, stride_b, column, N, rank, R, dtype: tl.constexpr):
    """``[column, rank]`` of a matrix ``[N, R]``, zero beyond it, in ``dtype``."""
    in_b = (column[:, None] < N) & (rank[None, :] < R)
    return tl.load(b_ptr + column.to(tl.int64)[:, None] * stride_b + rank[None, :], mask=in_b, other=0.0).to(dtype)


@triton.jit
def dy_rows(
    dy_ptr, s_ptr, ds_ptr, b, acc, row, column, rank, M, N, R, stride_dy, stride_s, stride_ds, scale,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc + dy[row, column]^T s[row, rank]``, and ``scale * dy b`` to memory. Rows from M on lie beyond."""
    in_s = (row[:, None] < M) & (rank[None, :] < R)
    dy = load_tile(dy_ptr, row, stride_dy, M, column, N, EVEN)
    s = tl.load(s_ptr + row[:, None] * stride_s + rank[None, :], mask=in_s, other=0.0)
    ds = tl.dot(dy, b, input_precision=PRECISION) * scale
    tl.store(ds_ptr + row[:, None] * stride_ds + rank[None, :], ds.to(ds_ptr.dtype.element_ty), mask=in_s)
    return tl.dot(tl.trans(dy), s, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["scale"])
def dy_kernel(
    dy_ptr,  # [M, N]
    b_ptr,  # [N, R]
    s_ptr,  # [M, R]
    ds_ptr,  # [column tiles, M, R]
    db_ptr,  # [parts, N, R]
    M,
    N,
    R,
    stride_dy,
    stride_b,
    stride_s,
    chunk,  # rows of one part, a multiple of BM
    scale,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    """One read of dy for both ``ds[column tile] = scale * dy b`` and ``db[part] = dy^T s``.

    Grid: (column tiles, parts of the rows, rank tiles). A program owns BN columns of dy over its rows: the gradient
    of its rows of b stays in registers, and each row tile's share of ds leaves at once.
    """
    part = tl.program_id(1)
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    rank = tl.program_id(2) * BR + tl.arange(0, BR)
    in_b = (column[:, None] < N) & (rank[None, :] < R)
    wide = column.to(tl.int64)[:, None]
    b = load_rank_columns(b_ptr, stride_b, column, N, rank, R, dy_ptr.dtype.element_ty)
    ds_ptr += tl.program_id(0).to(tl.int64) * M * R
    acc = tl.zeros([BN, BR], tl.float32)
    start = part * chunk
    for m in range(start, tl.minimum(start + chunk, M), BM):
        row = m + tl.arange(0, BM).to(tl.int64)
        acc = dy_rows(
            dy_ptr, s_ptr, ds_ptr, b, acc, row, column, rank, M, N, R, stride_dy, stride_s, R, scale, EVEN, PRECISION
        )
    tl.store(db_ptr + (part.to(tl.int64) * N + wide) * R + rank[None, :], acc, mask=in_b)


@triton.jit
def da_rows(
    ds_ptr, x_ptr, mask_ptr, acc, row, k, rank, M, K, R, stride_ds, stride_x, stride_mask, DROP: tl.constexpr,
    PAIRS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``acc + (mask * x)[row, k:]^T ds[row, rank]``. Rows from M on lie beyond."""
    column = k + tl.arange(0, BK)
    block = k // 8 + tl.arange(0, BK // 8)
    in_ds = (row[:, None] < M) & (rank[None, :] < R)
    ds = tl.load(ds_ptr + row[:, None] * stride_ds + rank[None, :], mask=in_ds, other=0.0)
    if DROP:
        byte = load_mask_byte(mask_ptr, row, stride_mask, M, block, K, EVEN)
    if DROP and PAIRS:
        pair = k // 2 + tl.arange(0, BK // 2)
        x2 = load_tile(x_ptr.to(tl.pointer_type(tl.uint32)), row, stride_x // 2, M, pair, K // 2, EVEN)
        x = halves(x2 & byte_pairs(byte, BM, BK // 2), BM, BK, x_ptr.dtype.element_ty)
    else:
        x = load_tile(x_ptr, row, stride_x, M, column, K, EVEN)
        if DROP:
            x = tl.where(spread(byte, BM, BK) != 0, x, 0.0)
    return tl.dot(tl.trans(x), ds, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["scale"])
def da_kernel(
    ds_ptr,  # [M, R]
    x_ptr,  # [M, K]
    mask_ptr,  # uint8 [M, stride_mask]
    out_ptr,  # fp32 [parts, R, K]
    M,
    K,
    R,
    stride_ds,
    stride_x,
    stride_mask,
    chunk,  # rows of one part, a multiple of BM
    scale,
    DROP: tl.constexpr,
    PAIRS: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """``out[part] = scale * ds^T (mask * x)`` over the part's rows. Grid: (column tiles, parts, rank tiles)."""
    k = tl.program_id(0) * BK
    part = tl.program_id(1)
    rank = tl.program_id(2) * BR + tl.arange(0, BR)
    acc = tl.zeros([BK, BR], tl.float32)
    start = part * chunk
    for m in range(start, tl.minimum(start + chunk, M), BM):
        row = m + tl.arange(0, BM).to(tl.int64)
        acc = da_rows(
            ds_ptr, x_ptr, mask_ptr, acc, row, k, rank, M, K, R, stride_ds, stride_x, stride_mask,
            DROP, PAIRS, EVEN, PRECISION, BM, BK,
        )  # fmt: skip
    column = k + tl.arange(0, BK)
    ptrs = out_ptr + (part.to(tl.int64) * R + rank[None, :]) * K + column[:, None]
    tl.store(ptrs, acc * scale, mask=(column[:, None] < K) & (rank[None, :] < R))


@triton.jit
def masked_expand_rows(
    out_ptr, ds_ptr, a_ptr, mask_ptr, row, k, M, K, R, stride_out, stride_ds, stride_a, stride_mask, scale,
    DROP: tl.constexpr, ACCUMULATE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """``out = ACCUMULATE * out + mask * (ds a) * scale`` on rows ``row`` and columns from k. Rows from M on lie
    beyond."""
    column = k + tl.arange(0, BK)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    acc = tl.zeros([BM, BK], tl.float32)
    for r0 in range(0, R, BR):
        rank = r0 + tl.arange(0, BR)
        in_ds = (row[:, None] < M) & (rank[None, :] < R)
        ds = tl.load(ds_ptr + row[:, None] * stride_ds + rank[None, :], mask=in_ds, other=0.0)
        a = load_rank_rows(a_ptr, stride_a, r0, R, column, K, dtype, BR)
        acc = tl.dot(ds, a, acc, input_precision=PRECISION)
    acc *= scale
    if DROP:
        byte = load_mask_byte(mask_ptr, row, stride_mask, M, k // 8 + tl.arange(0, BK // 8), K, EVEN)
        acc = tl.where(spread(byte, BM, BK) != 0, acc, 0.0)
    ptrs = out_ptr + row[:, None] * stride_out + column[None, :]
    inside = (row[:, None] < M) & (column[None, :] < K)
    if ACCUMULATE:
        acc += tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
    tl.store(ptrs, acc.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["scale"])
def masked_expand_kernel(
    out_ptr,  # [M, K], written
    ds_ptr,  # [M, R]
    a_ptr,  # [R, K]
    mask_ptr,  # uint8 [M, stride_mask]
    M,
    K,
    R,
    stride_out,
    stride_ds,
    stride_a,
    stride_mask,
    scale,
    DROP: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """``out = ACCUMULATE * out + mask * (ds a) * scale``. Grid: (row tiles, column tiles)."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    masked_expand_rows(
        out_ptr, ds_ptr, a_ptr, mask_ptr, row, tl.program_id(1) * BK, M, K, R, stride_out, stride_ds, stride_a,
        stride_mask, scale, DROP, ACCUMULATE, EVEN, PRECISION, BM, BK, BR,
    )  # fmt: skip


@triton.jit
def reduce_kernel(parts_ptr, out_ptr, size, parts, scale, BLOCK: tl.constexpr):
    """``out = scale * (parts[0] + parts[1] + ...)``, elementwise and in this order; each part holds ``size`` values."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, parts):
        acc += tl.load(parts_ptr + index, mask=index < size, other=0.0)
        parts_ptr += size
    tl.store(out_ptr + index, (acc * scale).to(out_ptr.dtype.element_ty), mask=index < size)
