"""The kernels of the ``lowrank`` family: projection with Adam behind it, and the update of W. See ``lowrank.py``.

Both are written once for the two sides: the launcher says by strides which operand is the basis.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .philox import load_key, words


@triton.jit
def tile_product(
    a_ptr, b_ptr, X, Y, K, stride_ax, stride_ak, stride_bk, stride_by, x0, y0, k0, k1, acc,
    dtype: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``acc + a[x0:, k0:k1] b[k0:k1, y0:]`` for a ``[BM, BN]`` tile; operands are rounded to ``dtype``."""
    x = x0.to(tl.int64) + tl.arange(0, BM)
    y = y0.to(tl.int64) + tl.arange(0, BN)
    for k in range(k0, k1, BK):
        at = k + tl.arange(0, BK)
        far = at.to(tl.int64)
        in_a = (x[:, None] < X) & (at[None, :] < K)
        in_b = (at[:, None] < K) & (y[None, :] < Y)
        a = tl.load(a_ptr + x[:, None] * stride_ax + far[None, :] * stride_ak, mask=in_a, other=0.0).to(dtype)
        b = tl.load(b_ptr + far[:, None] * stride_bk + y[None, :] * stride_by, mask=in_b, other=0.0).to(dtype)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def adam_tile(m_ptr, v_ptr, out_ptr, at, inside, r, beta1, beta2, bias1, bias2, eps):
    """One Adam step on a tile of R (fp32): moments in place, N to ``out_ptr``."""
    m = tl.load(m_ptr + at, mask=inside, other=0.0) * beta1 + (1.0 - beta1) * r
    v = tl.load(v_ptr + at, mask=inside, other=0.0) * beta2 + (1.0 - beta2) * r * r
    tl.store(m_ptr + at, m, mask=inside)
    tl.store(v_ptr + at, v, mask=inside)
    n = (m / bias1) / (tl.sqrt_rn(v / bias2) + eps)
    tl.store(out_ptr + at, n.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def project_kernel(
    a_ptr,  # [X, K]: P^T (left) or G (right)
    b_ptr,  # [K, Y]: G or P
    m_ptr,  # fp32 [X, Y]
    v_ptr,
    out_ptr,  # [X, Y]: R, or N with ADAM
    parts_ptr,  # fp32 [SPLITS, X, Y], unused with one split
    locks_ptr,  # int32, one a tile, zero before and after
    X,
    Y,
    K,
    stride_ax,
    stride_ak,
    stride_bk,
    stride_by,
    span,
    beta1,
    beta2,
    bias1,
    bias2,
    eps,
    dtype: tl.constexpr,
    ADAM: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """R = a b, or the Adam step on it. Grid: (tiles of X, tiles of Y, SPLITS); a program sums ``span`` of K.

    The program that finishes a tile last adds all parts in the order of K: the same bits whoever that is.
    """
    x0 = tl.program_id(0) * BM
    y0 = tl.program_id(1) * BN
    part = tl.program_id(2)
    acc = tile_product(
        a_ptr, b_ptr, X, Y, K, stride_ax, stride_ak, stride_bk, stride_by, x0, y0, part * span,
        tl.minimum(part * span + span, K), tl.zeros([BM, BN], tl.float32), dtype, PRECISION, BM, BN, BK,
    )  # fmt: skip
    x = x0.to(tl.int64) + tl.arange(0, BM)
    y = y0 + tl.arange(0, BN)
    at = x[:, None] * Y + y[None, :]
    inside = (x[:, None] < X) & (y[None, :] < Y)
    last = True
    if SPLITS > 1:
        size = X.to(tl.int64) * Y
        tl.store(parts_ptr + part * size + at, acc, mask=inside)
        lock = locks_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        tl.debug_barrier()  # every thread's part is written before one of them says so
        last = tl.atomic_add(lock, 1, sem="acq_rel") == SPLITS - 1
        if last:
            tl.debug_barrier()
            acc = tl.zeros([BM, BN], tl.float32)
            for s in range(SPLITS):
                acc += tl.load(parts_ptr + s * size + at, mask=inside, other=0.0, cache_modifier=".cg")
            tl.atomic_xchg(lock, 0)
    if last:
        r = acc.to(dtype)
        if ADAM:
            adam_tile(m_ptr, v_ptr, out_ptr, at, inside, r.to(tl.float32), beta1, beta2, bias1, bias2, eps)
        else:
            tl.store(out_ptr + at, r, mask=inside)


@triton.jit
def adam_kernel(
    m_ptr, v_ptr, r_ptr, out_ptr, size, beta1, beta2, bias1, bias2, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    """The Adam step on an R that is there; one program a block of elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    r = tl.load(r_ptr + at, mask=inside, other=0.0).to(tl.float32)
    adam_tile(m_ptr, v_ptr, out_ptr, at, inside, r, beta1, beta2, bias1, bias2, eps)


@triton.jit
def random_halves(key0, key1, row, block, BM: tl.constexpr, BN: tl.constexpr):
    """The 16 random bits, int32 ``[BM, BN]``, of the rows ``row`` and of the columns of BN / 8 Philox blocks."""
    w0, w1, w2, w3 = words(key0, key1, row.to(tl.uint32)[:, None], block.to(tl.uint32)[None, :], 1)
    low = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    high = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    return tl.reshape(tl.join(low, high), [BM, BN]).to(tl.int32)


@triton.jit
def round_random(x, bits):
    """fp32 to a number that bf16 holds: ``bits`` are added below its last bit, the rest is cut off. Infinities and NaN
    stay."""
    raw = x.to(tl.int32, bitcast=True)
    moved = (raw + bits) & -65536
    special = (raw & 0x7F800000) == 0x7F800000
    quiet = tl.where(x != x, raw | 0x400000, raw) & -65536
    return tl.where(special, quiet, moved).to(tl.float32, bitcast=True)


@triton.jit
def update_kernel(
    w_ptr,  # [M, N]
    g_ptr,  # [M, N], with RESIDUAL
    a_ptr,  # [M, R]: P (left) or N (right)
    b_ptr,  # [R, N]: N or P^T
    a2_ptr,  # SIGN: as a and b with R in the place of N
    b2_ptr,
    f_ptr,  # SCALED: fp32, one a column (left) or row
    seed_ptr,  # int64 [1]
    M,
    N,
    R,
    stride_wm,
    stride_gm,
    stride_gn,
    stride_am,
    stride_ar,
    stride_br,
    stride_bn,
    alpha,
    beta,
    decay,
    dtype: tl.constexpr,
    LEFT: tl.constexpr,
    RESIDUAL: tl.constexpr,  # "none", "scaled" or "sign"
    STOCHASTIC: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """``w <- decay w - alpha a b - E`` on one tile, which never leaves the registers. E: 0, ``f_j g``, or
    ``beta sign(g - a2 b2)``. Grid: (tiles of M, tiles of N)."""
    m0 = tl.program_id(0) * BM
    n0 = tl.program_id(1) * BN
    row = m0.to(tl.int64) + tl.arange(0, BM)
    column = n0.to(tl.int64) + tl.arange(0, BN)
    inside = (row[:, None] < M) & (column[None, :] < N)
    move = tl.zeros([BM, BN], tl.float32)
    if RESIDUAL == "sign":
        rest = tile_product(
            a2_ptr, b2_ptr, M, N, R, stride_am, stride_ar, stride_br, stride_bn, m0, n0, 0, R, move, dtype, PRECISION,
            BM, BN, BK,
        )  # fmt: skip
        at_g = row[:, None] * stride_gm + column[None, :] * stride_gn
        rest = tl.load(g_ptr + at_g, mask=inside, other=0.0).to(tl.float32) - rest
        move = tl.where(rest > 0, beta, tl.where(rest < 0, -beta, 0.0 * rest))  # NaN stays NaN
    acc = tile_product(
        a_ptr, b_ptr, M, N, R, stride_am, stride_ar, stride_br, stride_bn, m0, n0, 0, R,
        tl.zeros([BM, BN], tl.float32), dtype, PRECISION, BM, BN, BK,
    )  # fmt: skip
    move += alpha * acc
    if RESIDUAL == "scaled":
        at_g = row[:, None] * stride_gm + column[None, :] * stride_gn
        if LEFT:
            f = tl.load(f_ptr + column, mask=column < N, other=0.0)[None, :]
        else:
            f = tl.load(f_ptr + row, mask=row < M, other=0.0)[:, None]
        move += f * tl.load(g_ptr + at_g, mask=inside, other=0.0).to(tl.float32)
    at = row[:, None] * stride_wm + column[None, :]
    value = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32) * decay - move
    if STOCHASTIC:
        key0, key1 = load_key(seed_ptr)
        block = n0 // 8 + tl.arange(0, BN // 8)
        value = round_random(value, random_halves(key0, key1, row, block, BM, BN))
    tl.store(w_ptr + at, value.to(w_ptr.dtype.element_ty), mask=inside)
