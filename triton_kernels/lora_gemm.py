"""The fused GEMMs of the ``lora`` family: expand (forward) and dx (backward), by pointers and by tensor descriptors.

The low-rank term lives on the accumulator of the base product, so that neither it nor a partial result is ever written:
expand adds ``s b^T`` behind the loop over K, dx starts from ``mask * (ds a) / (1 - p)`` (added behind the loop it would
need the mask while all accumulators are live, and spill). Pointer kernels are for GPUs without tensor descriptors and
for tensors whose alignment rules them out; descriptor kernels are persistent: each program takes every
``PROGRAMS``-th tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .lora_kernels import load_mask_byte, load_rank_rows
from .philox import spread


@triton.jit
def tile_of(index, M, COLUMNS, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Row and column tile number ``index``: GROUP row tiles advance through the columns together."""
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(COLUMNS, BN)
    first = index // (GROUP * tiles_n) * GROUP
    group = tl.minimum(tiles_m - first, GROUP)
    within = index % (GROUP * tiles_n)
    return first + within % group, within // group


@triton.jit
def add_rank_term(
    acc, s_ptr, b_ptr, M, N, R, stride_s, stride_b, m0, n0, dtype: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, RANK_TILES: tl.constexpr,
):  # fmt: skip
    """``acc + s[m0:, :] b[n0:, :]^T``."""
    row = m0.to(tl.int64) + tl.arange(0, BM)
    column = n0.to(tl.int64) + tl.arange(0, BN)
    for r0 in tl.range(0, RANK_TILES * BR, BR, num_stages=1):  # one stage: shared memory belongs to the base product
        rank = r0 + tl.arange(0, BR)
        in_s = (row[:, None] < M) & (rank[None, :] < R)
        in_b = (column[:, None] < N) & (rank[None, :] < R)
        s = tl.load(s_ptr + row[:, None] * stride_s + rank[None, :], mask=in_s, other=0.0)
        b = tl.load(b_ptr + column[:, None] * stride_b + rank[None, :], mask=in_b, other=0.0).to(dtype)
        acc = tl.dot(s, tl.trans(b), acc, input_precision=PRECISION)
    return acc


@triton.jit
def masked_rank_term(
    ds_ptr, a_ptr, mask_ptr, M, K, R, stride_ds, stride_a, stride_mask, m0, k0, scale,
    dtype: tl.constexpr, PRECISION: tl.constexpr, DROP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, RANK_TILES: tl.constexpr,
):  # fmt: skip
    """``mask * (ds a) * scale`` on the tile at ``(m0, k0)``: fp32 ``[BM, BN]``."""
    row = m0.to(tl.int64) + tl.arange(0, BM)
    column = k0 + tl.arange(0, BN)
    acc = tl.zeros([BM, BN], tl.float32)
    for r0 in tl.range(0, RANK_TILES * BR, BR, num_stages=1):
        rank = r0 + tl.arange(0, BR)
        in_ds = (row[:, None] < M) & (rank[None, :] < R)
        ds = tl.load(ds_ptr + row[:, None] * stride_ds + rank[None, :], mask=in_ds, other=0.0)
        a = load_rank_rows(a_ptr, stride_a, r0, R, column, K, dtype, BR)
        acc = tl.dot(ds, a, acc, input_precision=PRECISION)
    acc *= scale
    if DROP:
        byte = load_mask_byte(mask_ptr, row, stride_mask, M, k0 // 8 + tl.arange(0, BN // 8), K, False)
        acc = tl.where(spread(byte, BM, BN) != 0, acc, 0.0)
    return acc


@triton.jit
def expand_kernel(
    x_ptr,  # [M, K]
    w_ptr,  # [N, K]
    s_ptr,  # [M, R]
    b_ptr,  # [N, R]
    bias_ptr,  # [N]
    y_ptr,  # [M, N]
    M,
    N,
    K,
    R,
    stride_x,
    stride_w,
    stride_s,
    stride_b,
    stride_y,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    RANK_TILES: tl.constexpr,
):
    """``y = x w^T + s b^T + bias`` by pointers. Grid: (tiles,)."""
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BM, BN, GROUP)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    row = tile_m.to(tl.int64) * BM + tl.arange(0, BM)
    column = tile_n.to(tl.int64) * BN + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    # rows beyond the end repeat the last one: their products land in rows of y that are not stored
    x_ptrs = x_ptr + tl.minimum(row, M - 1)[:, None] * stride_x + depth[None, :]
    w_ptrs = w_ptr + tl.minimum(column, N - 1)[:, None] * stride_w + depth[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        x = tl.load(x_ptrs, mask=depth[None, :] < K - k, other=0.0)
        w = tl.load(w_ptrs, mask=depth[None, :] < K - k, other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
        x_ptrs += BK
        w_ptrs += BK
    acc = add_rank_term(
        acc, s_ptr, b_ptr, M, N, R, stride_s, stride_b, tile_m * BM, tile_n * BN,
        dtype, PRECISION, BM, BN, BR, RANK_TILES,
    )  # fmt: skip
    if BIAS:
        acc += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    inside = (row[:, None] < M) & (column[None, :] < N)
    tl.store(y_ptr + row[:, None] * stride_y + column[None, :], acc.to(dtype), mask=inside)


@triton.jit
def expand_descriptor_kernel(
    x_desc,  # [M, K] by [BM, BK]
    w_desc,  # [N, K] by [BN, BK]
    y_desc,  # [M, N] by [BM, BN]
    s_ptr,
    b_ptr,
    bias_ptr,
    M,
    N,
    K,
    R,
    stride_s,
    stride_b,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    FLATTEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    RANK_TILES: tl.constexpr,
):
    """``y = x w^T + s b^T + bias`` by tensor descriptors, persistent. Grid: (PROGRAMS,)."""
    dtype: tl.constexpr = y_desc.dtype
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    for index in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=FLATTEN):
        tile_m, tile_n = tile_of(index, M, N, BM, BN, GROUP)
        m0 = tile_m * BM
        n0 = tile_n * BN
        acc = tl.zeros([BM, BN], tl.float32)
        for k in range(0, tl.cdiv(K, BK)):
            x = x_desc.load([m0, k * BK])
            w = w_desc.load([n0, k * BK])
            acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
        acc = add_rank_term(
            acc, s_ptr, b_ptr, M, N, R, stride_s, stride_b, m0, n0, dtype, PRECISION, BM, BN, BR, RANK_TILES
        )  # fmt: skip
        if BIAS:
            column = n0 + tl.arange(0, BN)
            acc += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
        y_desc.store([m0, n0], acc.to(dtype))


@triton.jit(do_not_specialize=["scale"])
def dx_kernel(
    dy_ptr,  # [M, N]
    w_ptr,  # [N, K]
    ds_ptr,  # [M, R]
    a_ptr,  # [R, K]
    mask_ptr,  # uint8 [M, stride_mask]
    dx_ptr,  # [M, K]
    M,
    N,
    K,
    R,
    stride_dy,
    stride_w,
    stride_ds,
    stride_a,
    stride_mask,
    stride_dx,
    scale,
    DROP: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,  # columns of the tile, of K
    BK: tl.constexpr,  # depth of the reduction, of N
    BR: tl.constexpr,
    RANK_TILES: tl.constexpr,
):
    """``dx = mask * (ds a) * scale + dy w`` by pointers. Grid: (tiles,)."""
    tile_m, tile_k = tile_of(tl.program_id(0), M, K, BM, BN, GROUP)
    dtype: tl.constexpr = dx_ptr.dtype.element_ty
    acc = masked_rank_term(
        ds_ptr, a_ptr, mask_ptr, M, K, R, stride_ds, stride_a, stride_mask, tile_m * BM, tile_k * BN,
        scale, dtype, PRECISION, DROP, BM, BN, BR, RANK_TILES,
    )  # fmt: skip
    row = tile_m.to(tl.int64) * BM + tl.arange(0, BM)
    column = tile_k * BN + tl.arange(0, BN)
    depth = tl.arange(0, BK).to(tl.int64)
    dy_ptrs = dy_ptr + tl.minimum(row, M - 1)[:, None] * stride_dy + depth[None, :]
    w_ptrs = w_ptr + depth[:, None] * stride_w + column[None, :]
    in_w = column[None, :] < K
    for n in range(0, N, BK):
        dy = tl.load(dy_ptrs, mask=depth[None, :] < N - n, other=0.0)
        w = tl.load(w_ptrs, mask=(depth[:, None] < N - n) & in_w, other=0.0)
        acc = tl.dot(dy, w, acc, input_precision=PRECISION)
        dy_ptrs += BK
        w_ptrs += tl.cast(stride_w, tl.int64) * BK
    inside = (row[:, None] < M) & in_w
    tl.store(dx_ptr + row[:, None] * stride_dx + column[None, :], acc.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["scale"])
def dx_descriptor_kernel(
    dy_desc,  # [M, N] by [BM, BK]
    w_desc,  # [N, K] by [BK, BN]
    dx_desc,  # [M, K] by [BM, BN]
    ds_ptr,
    a_ptr,
    mask_ptr,
    M,
    N,
    K,
    R,
    stride_ds,
    stride_a,
    stride_mask,
    scale,
    DROP: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    FLATTEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    RANK_TILES: tl.constexpr,
):
    """``dx = mask * (ds a) * scale + dy w`` by tensor descriptors, persistent. Grid: (PROGRAMS,)."""
    dtype: tl.constexpr = dx_desc.dtype
    tiles = tl.cdiv(M, BM) * tl.cdiv(K, BN)
    for index in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=FLATTEN):
        tile_m, tile_k = tile_of(index, M, K, BM, BN, GROUP)
        m0 = tile_m * BM
        k0 = tile_k * BN
        acc = masked_rank_term(
            ds_ptr, a_ptr, mask_ptr, M, K, R, stride_ds, stride_a, stride_mask, m0, k0,
            scale, dtype, PRECISION, DROP, BM, BN, BR, RANK_TILES,
        )  # fmt: skip
        for n in range(0, tl.cdiv(N, BK)):
            dy = dy_desc.load([m0, n * BK])
            w = w_desc.load([n * BK, k0])
            acc = tl.dot(dy, w, acc, input_precision=PRECISION)
        dx_desc.store([m0, k0], acc.to(dtype))
