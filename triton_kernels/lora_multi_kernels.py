"""The kernels of the ``lora`` family over a batch of many adapters: one launch of each serves all of them.

A program finds its rows in a *block table*, made on the device by :func:`blocks_kernel`: entry ``b`` names an adapter
and the first of up to STEP positions of its segment, or -1 beyond the last block. The number of entries is bounded by
the shapes, ``ceil(M / STEP) + J``, so that no grid depends on a value that the host would have to wait for. From then
on a program does what the kernels of one adapter do, by their device functions (``lora_kernels``), with the rows of
``order`` and the adapter's line of the table of adapters: first rank, rank, threshold, and three fp64 numbers' bits
(``lowmem.ops.lora_multi.adapter_table``).

Sums over rows are cut into blocks of one adapter's rows. An adapter's first block writes to the result, the others to
spare slots, ``floor(M / STEP)`` of them at the most; :func:`sum_kernel` adds those in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .lora_kernels import da_rows, dy_rows, load_rank_columns, masked_expand_rows, shrink_rows
from .philox import draw_rows

_LINE = tl.constexpr(6)  # numbers of an adapter in the table
_RANK = tl.constexpr(1)
_THRESHOLD = tl.constexpr(2)
_SCALE = tl.constexpr(3)
_INV_KEEP = tl.constexpr(4)
_SCALE_INV_KEEP = tl.constexpr(5)


@triton.jit
def number(table_ptr, j, COLUMN: tl.constexpr):
    """An fp64 number of adapter j's line, as fp32."""
    return tl.load(table_ptr + j * _LINE + COLUMN).to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def rows_at(order_ptr, position, stop, M, ORDER: tl.constexpr):
    """Row numbers of ``position``; M, which is no row, from ``stop`` on and for an order that is none."""
    inside = position < stop
    if ORDER:
        row = tl.load(order_ptr + position, mask=inside, other=M)
        return tl.where((row >= 0) & (row < M), row, M)
    else:
        return tl.where(inside, position, M)


@triton.jit
def segment(blocks_ptr, block, offsets_ptr, M):
    """``(adapter or -1, first position, the segment's first position, its end)`` of a block."""
    j = tl.load(blocks_ptr + block.to(tl.int64) * 2)
    start = tl.load(blocks_ptr + block.to(tl.int64) * 2 + 1)
    at = offsets_ptr + tl.maximum(j, 0)
    return j, start, tl.maximum(tl.load(at), 0), tl.minimum(tl.load(at + 1), M)


@triton.jit
def blocks_kernel(
    blocks_ptr,  # int64 [count, 2]
    offsets_ptr,  # int64 [J + 1]
    J,
    M,
    count,
    step,
    EMPTY: tl.constexpr,  # an adapter without rows has a block too
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The block table. Grid: (tiles of BLOCK entries,). Each program goes through all adapters, CHUNK at a time."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wide = entry.to(tl.int64)
    passed = tl.zeros([BLOCK], tl.int64)  # adapters whose blocks end at or before the entry
    begin = tl.zeros([BLOCK], tl.int64)  # where the blocks of the next one begin
    before = tl.zeros([], tl.int64)
    for j0 in range(0, J, CHUNK):
        j = j0 + tl.arange(0, CHUNK)
        low = tl.load(offsets_ptr + j, mask=j < J, other=0)
        high = tl.load(offsets_ptr + j + 1, mask=j < J, other=0)
        rows = tl.maximum(tl.minimum(high, M) - tl.maximum(low, 0), 0)
        size = (rows + step - 1) // step
        if EMPTY:
            size = tl.where(j < J, tl.maximum(size, 1), 0)
        ends = before + tl.cumsum(size, 0)
        over = (ends[None, :] <= wide[:, None]) & (j < J)[None, :]
        passed += tl.sum(over.to(tl.int64), 1)
        begin = tl.maximum(begin, tl.max(tl.where(over, ends[None, :], 0), 1))
        before += tl.sum(size, 0)
    found = (passed < J) & (entry < count)
    low = tl.load(offsets_ptr + passed, mask=found, other=0)
    start = tl.maximum(low, 0) + (wide - begin) * step
    tl.store(blocks_ptr + wide * 2, tl.where(found, passed, -1), mask=entry < count)
    tl.store(blocks_ptr + wide * 2 + 1, tl.where(found, start, 0), mask=entry < count)


@triton.jit
def multi_shrink_kernel(
    x_ptr,  # [M, K]
    a_ptr,  # [sum of ranks, K]
    out_ptr,  # [parts, M, WIDTH]
    bits_ptr,  # uint8 [M, stride_bits]
    seed_ptr,  # int64 [J]
    blocks_ptr,
    offsets_ptr,
    order_ptr,
    table_ptr,
    M,
    K,
    WIDTH,
    stride_x,
    stride_a,
    stride_bits,
    chunk,
    WHOLE: tl.constexpr,  # one part: the result leaves scaled
    ORDER: tl.constexpr,
    DROP: tl.constexpr,
    SAVE: tl.constexpr,
    PAIRS: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """:func:`lora_kernels.shrink_kernel` for all adapters. Grid: (blocks, parts, rank tiles)."""
    j, start, low, end = segment(blocks_ptr, tl.program_id(0), offsets_ptr, M)
    part = tl.program_id(1)
    r0 = tl.program_id(2) * BR
    if j < 0:
        return
    R = tl.load(table_ptr + j * _LINE + _RANK).to(tl.int32)
    if r0 >= R:
        return
    position = start + tl.arange(0, BM)
    row = rows_at(order_ptr, position, end, M, ORDER)
    threshold = tl.load(table_ptr + j * _LINE + _THRESHOLD).to(tl.int32)
    a_ptr += tl.load(table_ptr + j * _LINE) * stride_a
    first = part * chunk
    acc = shrink_rows(
        x_ptr, a_ptr, bits_ptr, seed_ptr + j, row, position - low, first, tl.minimum(first + chunk, K), r0, M, K, R,
        stride_x, stride_a, stride_bits, threshold, threshold * 0, DROP, SAVE, PAIRS, EVEN, PRECISION, BM, BK, BR,
    )  # fmt: skip
    if WHOLE:
        if DROP:
            acc *= number(table_ptr, j, _SCALE_INV_KEEP)
        else:
            acc *= number(table_ptr, j, _SCALE)
    rank = r0 + tl.arange(0, BR)
    ptrs = out_ptr + (part.to(tl.int64) * M + row[:, None]) * WIDTH + rank[None, :]
    tl.store(ptrs, acc.to(out_ptr.dtype.element_ty), mask=(row[:, None] < M) & (rank[None, :] < R))


@triton.jit
def multi_reduce_kernel(
    parts_ptr,  # fp32 [parts, M, WIDTH]
    out_ptr,  # [M, WIDTH]
    blocks_ptr,
    offsets_ptr,
    order_ptr,
    table_ptr,
    M,
    WIDTH,
    parts,
    ORDER: tl.constexpr,
    DROP: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
):
    """``out = scale_j * (parts[0] + parts[1] + ...)``, in this order, on each adapter's rows and ranks. Grid: (blocks,
    rank tiles)."""
    j, start, low, end = segment(blocks_ptr, tl.program_id(0), offsets_ptr, M)
    rank = tl.program_id(1) * BR + tl.arange(0, BR)
    if j < 0:
        return
    R = tl.load(table_ptr + j * _LINE + _RANK).to(tl.int32)
    row = rows_at(order_ptr, start + tl.arange(0, BM), end, M, ORDER)
    at = row[:, None] * WIDTH + rank[None, :]
    inside = (row[:, None] < M) & (rank[None, :] < R)
    acc = tl.zeros([BM, BR], tl.float32)
    for _ in range(0, parts):
        acc += tl.load(parts_ptr + at, mask=inside, other=0.0)
        parts_ptr += tl.cast(M, tl.int64) * WIDTH
    if DROP:
        acc *= number(table_ptr, j, _SCALE_INV_KEEP)
    else:
        acc *= number(table_ptr, j, _SCALE)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def multi_dy_kernel(
    dy_ptr,  # [M, N]
    b_ptr,  # matrices [N, r_j], one behind the other
    s_ptr,  # [M, >= WIDTH]
    ds_ptr,  # [column tiles, M, WIDTH]
    db_ptr,  # as b
    spare_ptr,  # fp32 [spare slots, N * WIDTH]
    blocks_ptr,
    offsets_ptr,
    order_ptr,
    table_ptr,
    M,
    N,
    WIDTH,
    stride_dy,
    stride_s,
    chunk,  # rows of one block, a multiple of BM
    WHOLE: tl.constexpr,  # one column tile: ds leaves scaled
    ORDER: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    """:func:`lora_kernels.dy_kernel` for all adapters. Grid: (column tiles, blocks, rank tiles)."""
    j, start, low, end = segment(blocks_ptr, tl.program_id(1), offsets_ptr, M)
    r0 = tl.program_id(2) * BR
    if j < 0:
        return
    R = tl.load(table_ptr + j * _LINE + _RANK).to(tl.int32)
    if r0 >= R:
        return
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    rank = r0 + tl.arange(0, BR)
    base = tl.load(table_ptr + j * _LINE) * N
    b = load_rank_columns(b_ptr + base, R, column, N, rank, R, dy_ptr.dtype.element_ty)
    ds_ptr += tl.program_id(0).to(tl.int64) * M * WIDTH
    scale = 1.0
    if WHOLE:
        scale = number(table_ptr, j, _SCALE)
    acc = tl.zeros([BN, BR], tl.float32)
    for m in range(0, tl.minimum(chunk, end - start).to(tl.int32), BM):
        row = rows_at(order_ptr, start + m + tl.arange(0, BM), end, M, ORDER)
        acc = dy_rows(
            dy_ptr,
            s_ptr,
            ds_ptr,
            b,
            acc,
            row,
            column,
            rank,
            M,
            N,
            R,
            stride_dy,
            stride_s,
            WIDTH,
            scale,
            EVEN,
            PRECISION,
        )
    at = column.to(tl.int64)[:, None] * R + rank[None, :]
    inside = (column[:, None] < N) & (rank[None, :] < R)
    if start == low:
        tl.store(db_ptr + base + at, acc, mask=inside)
    else:
        slot = tl.program_id(1) - j - 1  # every adapter up to this one has had one block that took no slot
        tl.store(spare_ptr + slot * N * WIDTH + at, acc, mask=inside)


@triton.jit
def multi_da_kernel(
    ds_ptr,  # [M, >= WIDTH]
    x_ptr,  # [M, K]
    mask_ptr,  # uint8 [M, stride_mask]
    da_ptr,  # fp32 [sum of ranks, K]
    spare_ptr,  # fp32 [spare slots, WIDTH * K]
    blocks_ptr,
    offsets_ptr,
    order_ptr,
    table_ptr,
    M,
    K,
    WIDTH,
    stride_ds,
    stride_x,
    stride_mask,
    chunk,  # rows of one block, a multiple of BM
    ORDER: tl.constexpr,
    DROP: tl.constexpr,
    PAIRS: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """:func:`lora_kernels.da_kernel` for all adapters. Grid: (column tiles, blocks, rank tiles)."""
    j, start, low, end = segment(blocks_ptr, tl.program_id(1), offsets_ptr, M)
    r0 = tl.program_id(2) * BR
    if j < 0:
        return
    R = tl.load(table_ptr + j * _LINE + _RANK).to(tl.int32)
    if r0 >= R:
        return
    k = tl.program_id(0) * BK
    rank = r0 + tl.arange(0, BR)
    acc = tl.zeros([BK, BR], tl.float32)
    for m in range(0, tl.minimum(chunk, end - start).to(tl.int32), BM):
        row = rows_at(order_ptr, start + m + tl.arange(0, BM), end, M, ORDER)
        acc = da_rows(
            ds_ptr, x_ptr, mask_ptr, acc, row, k, rank, M, K, R, stride_ds, stride_x, stride_mask,
            DROP, PAIRS, EVEN, PRECISION, BM, BK,
        )  # fmt: skip
    if DROP:
        if end - low <= chunk:  # the only block; of several, the sum is scaled
            acc *= number(table_ptr, j, _INV_KEEP)
    column = k + tl.arange(0, BK)
    at = rank.to(tl.int64)[None, :] * K + column[:, None]
    inside = (column[:, None] < K) & (rank[None, :] < R)
    if start == low:
        tl.store(da_ptr + tl.load(table_ptr + j * _LINE) * K + at, acc, mask=inside)
    else:
        slot = tl.program_id(1) - j - 1
        tl.store(spare_ptr + slot * K * WIDTH + at, acc, mask=inside)


@triton.jit
def sum_kernel(
    out_ptr,  # fp32, r_j * cols numbers of each adapter, one behind the other
    spare_ptr,  # fp32 [spare slots, WIDTH * cols]
    blocks_ptr,
    offsets_ptr,
    table_ptr,
    M,
    cols,
    WIDTH,
    chunk,  # rows of one block
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each adapter's result plus its spare slots, in order, times ``1 / (1 - p)`` if SCALED. Grid: (blocks, tiles of
    BLOCK numbers); an adapter's first block works for it."""
    j, start, low, end = segment(blocks_ptr, tl.program_id(0), offsets_ptr, M)
    if j < 0:
        return
    if start != low:
        return
    if end - low <= chunk:
        return
    index = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < tl.load(table_ptr + j * _LINE + _RANK) * cols
    out_ptr += tl.load(table_ptr + j * _LINE) * cols
    spare_ptr += (tl.program_id(0) - j) * cols * WIDTH
    acc = tl.load(out_ptr + index, mask=inside, other=0.0)
    for _ in range(0, ((end - low - 1) // chunk).to(tl.int32)):
        acc += tl.load(spare_ptr + index, mask=inside, other=0.0)
        spare_ptr += tl.cast(cols, tl.int64) * WIDTH
    if SCALED:
        acc *= number(table_ptr, j, _INV_KEEP)
    tl.store(out_ptr + index, acc, mask=inside)


@triton.jit
def multi_expand_kernel(
    out_ptr,  # [M, K], added to
    ds_ptr,  # [M, ranks]
    a_ptr,  # [sum of ranks, K]
    mask_ptr,  # uint8 [M, stride_mask]
    blocks_ptr,
    offsets_ptr,
    order_ptr,
    table_ptr,
    M,
    K,
    stride_out,
    stride_ds,
    stride_a,
    stride_mask,
    ORDER: tl.constexpr,
    DROP: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """:func:`lora_kernels.masked_expand_kernel` onto ``out`` for all adapters. Grid: (blocks, column tiles)."""
    j, start, low, end = segment(blocks_ptr, tl.program_id(0), offsets_ptr, M)
    if j < 0:
        return
    row = rows_at(order_ptr, start + tl.arange(0, BM), end, M, ORDER)
    R = tl.load(table_ptr + j * _LINE + _RANK).to(tl.int32)
    a_ptr += tl.load(table_ptr + j * _LINE) * stride_a
    scale = 1.0
    if DROP:
        scale = number(table_ptr, j, _INV_KEEP)
    masked_expand_rows(
        out_ptr, ds_ptr, a_ptr, mask_ptr, row, tl.program_id(1) * BK, M, K, R, stride_out, stride_ds, stride_a,
        stride_mask, scale, DROP, True, EVEN, PRECISION, BM, BK, BR,
    )  # fmt: skip


@triton.jit
def multi_draw_kernel(
    bits_ptr,  # uint8 [M, stride]
    seed_ptr,  # int64 [J]
    blocks_ptr,
    offsets_ptr,
    order_ptr,
    table_ptr,
    M,
    columns,
    stride,
    ORDER: tl.constexpr,
    BM: tl.constexpr,
    BB: tl.constexpr,
):
    """The packed keep bits of every adapter's rows, drawn. Grid: (blocks, tiles of BB bytes)."""
    j, start, low, end = segment(blocks_ptr, tl.program_id(0), offsets_ptr, M)
    if j < 0:
        return
    position = start + tl.arange(0, BM)
    row = rows_at(order_ptr, position, end, M, ORDER)
    block = tl.program_id(1) * BB + tl.arange(0, BB)
    threshold = tl.load(table_ptr + j * _LINE + _THRESHOLD).to(tl.int32)
    draw_rows(bits_ptr, seed_ptr + j, row, position - low, block, M, columns, stride, threshold, threshold * 0)
