"""The kernels of the ``activation`` family. Rows have a stride and contiguous columns; what kernels write is dense. A
norm's program holds a whole row; elementwise kernels take tiles of a row, several groups of 128 wide. No atomics: the
sums over rows leave one partial result a program, which are added in order."""

from __future__ import annotations

import triton
import triton.language as tl

from .activation_math import (
    evaluate,
    load_codes,
    load_packed,
    load_row,
    sigmoid_pair,
    store_codes,
    store_packed,
    store_row,
    tanh,
)


@triton.jit
def pack_kernel(x_ptr, packed_ptr, M, K, stride_x, BLOCK: tl.constexpr):
    """``[M, K]`` to FP8 groups. Grid: (rows, column tiles)."""
    row, k0 = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    store_packed(load_row(x_ptr, row, stride_x, k0, K, BLOCK), packed_ptr, row, k0, M, K, BLOCK)


@triton.jit
def unpack_kernel(packed_ptr, out_ptr, M, K, BLOCK: tl.constexpr):
    """FP8 groups to ``[M, K]``. Grid: (rows, column tiles)."""
    row, k0 = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    store_row(load_packed(packed_ptr, row, k0, M, K, BLOCK), out_ptr, row, K, k0, K, BLOCK)


@triton.jit(do_not_specialize=["eps"])
def norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    summed_ptr,
    packed_ptr,
    stats_ptr,  # fp32 [M, 1] or [M, 2]
    M,
    K,
    stride_x,
    stride_residual,
    eps,
    CENTER: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Residual, norm, FP8 groups of the normalised row. Grid: (rows)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x = load_row(x_ptr, row, stride_x, 0, K, BLOCK)
    if RESIDUAL:  # rounded as it is stored: the next layer reads that
        x = (x + load_row(residual_ptr, row, stride_residual, 0, K, BLOCK)).to(summed_ptr.dtype.element_ty)
        store_row(x, summed_ptr, row, K, 0, K, BLOCK)
        x = x.to(tl.float32)
    if CENTER:
        mean = tl.sum(x, 0) / K
        x = tl.where(at < K, x - mean, 0.0)
        tl.store(stats_ptr + 2 * row, mean)
    variance = tl.sum(x * x, 0) / K + eps
    rstd = tl.rsqrt(variance)
    rstd = rstd * (1.5 - 0.5 * variance * rstd * rstd)  # the instruction is approximate
    tl.store(stats_ptr + (2 * row + 1 if CENTER else row), rstd)
    n = x * rstd
    y = n
    if WEIGHT:
        y = y * load_row(weight_ptr, 0, 0, 0, K, BLOCK)
    if BIAS:
        y = y + load_row(bias_ptr, 0, 0, 0, K, BLOCK)
    store_row(y, y_ptr, row, K, 0, K, BLOCK)
    if PACK:
        store_packed(n, packed_ptr, row, 0, M, K, BLOCK)


@triton.jit
def norm_grad_kernel(
    dy_ptr,
    dsum_ptr,
    saved_ptr,  # x, or the packed normalised rows
    weight_ptr,
    stats_ptr,
    dx_ptr,
    dw_ptr,  # fp32 [programs, K]
    db_ptr,
    M,
    K,
    stride_dy,
    stride_dsum,
    stride_x,
    each,  # rows of a program
    CENTER: tl.constexpr,
    PACKED: tl.constexpr,
    DSUM: tl.constexpr,
    WEIGHT: tl.constexpr,
    DW: tl.constexpr,
    DB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx, and this program's share of dw and db. Grid: (programs)."""
    first = tl.program_id(0).to(tl.int64) * each
    at = tl.arange(0, BLOCK)
    dw = tl.zeros([BLOCK], tl.float32)
    db = tl.zeros([BLOCK], tl.float32)
    if WEIGHT:
        w = load_row(weight_ptr, 0, 0, 0, K, BLOCK)
    for row in range(first, tl.minimum(first + each, M)):
        if CENTER:
            rstd = tl.load(stats_ptr + 2 * row + 1)
        else:
            rstd = tl.load(stats_ptr + row)
        if PACKED:
            n = load_packed(saved_ptr, row, 0, M, K, BLOCK)
        else:
            n = load_row(saved_ptr, row, stride_x, 0, K, BLOCK)
            if CENTER:
                n = tl.where(at < K, n - tl.load(stats_ptr + 2 * row), 0.0)
            n = n * rstd
        dn = load_row(dy_ptr, row, stride_dy, 0, K, BLOCK)
        if DW:
            dw += dn * n
        if DB:
            db += dn
        if WEIGHT:
            dn = dn * w
        dx = dn - n * (tl.sum(dn * n, 0) / K)
        if CENTER:
            dx = dx - tl.sum(dn, 0) / K
        dx = dx * rstd
        if DSUM:
            dx = dx + load_row(dsum_ptr, row, stride_dsum, 0, K, BLOCK)
        store_row(dx, dx_ptr, row, K, 0, K, BLOCK)
    if DW:
        store_row(dw, dw_ptr, tl.program_id(0), K, 0, K, BLOCK)
    if DB:
        store_row(db, db_ptr, tl.program_id(0), K, 0, K, BLOCK)


@triton.jit
def act_kernel(
    x_ptr, y_ptr, saved_ptr, M, K, stride_x, bytes_a_row, KIND: tl.constexpr, FORM: tl.constexpr, BLOCK: tl.constexpr
):
    """``f(x)`` and what backward keeps. Grid: (rows, column tiles)."""
    row, k0 = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    x = load_row(x_ptr, row, stride_x, k0, K, BLOCK)
    y, slope = evaluate(x, KIND)
    store_row(y, y_ptr, row, K, k0, K, BLOCK)
    inside = k0 + tl.arange(0, BLOCK) < K
    if FORM == 1:
        store_packed(x, saved_ptr, row, k0, M, K, BLOCK)
    elif FORM == 2:
        level = slope * (13.0 if KIND == 0 else 11.0)
        level = (level + 12582912.0) - 12582912.0  # to the nearest integer, ties to even
        code = tl.where(inside & (slope == slope), level, 0.0).to(tl.int32) + 1
        store_codes(code, saved_ptr, row, bytes_a_row, k0, bytes_a_row, 4, BLOCK)
    elif FORM == 3:
        if KIND == 0:
            code = (x >= -6.305046).to(tl.int32) + (x >= -0.000868).to(tl.int32) + (x >= 6.325816).to(tl.int32)
        else:
            code = (x >= -3.185881).to(tl.int32) + (x >= -0.001179).to(tl.int32) + (x >= 3.190833).to(tl.int32)
        store_codes(tl.where(inside, code, 0), saved_ptr, row, bytes_a_row, k0, bytes_a_row, 2, BLOCK)


@triton.jit
def act_grad_kernel(
    dy_ptr,
    saved_ptr,
    dx_ptr,
    M,
    K,
    stride_dy,
    stride_saved,
    KIND: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``dy f'(x)``. Grid: (rows, column tiles)."""
    row, k0 = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    if FORM == 0:
        value, slope = evaluate(load_row(saved_ptr, row, stride_saved, k0, K, BLOCK), KIND)
    elif FORM == 1:
        value, slope = evaluate(load_packed(saved_ptr, row, k0, M, K, BLOCK), KIND)
    elif FORM == 2:
        code = load_codes(saved_ptr, row, stride_saved, k0, stride_saved, 4, BLOCK)
        slope = (code - 1).to(tl.float32) / (13.0 if KIND == 0 else 11.0)
    else:
        code = load_codes(saved_ptr, row, stride_saved, k0, stride_saved, 2, BLOCK)
        if KIND == 0:
            slope = tl.where(code == 1, -0.040604, tl.where(code == 2, 1.040321, 0.999999))
        else:
            slope = tl.where(code == 1, -0.049223, tl.where(code == 2, 1.04874, 0.999999))
        slope = tl.where(code == 0, 0.0, slope)
    store_row(load_row(dy_ptr, row, stride_dy, k0, K, BLOCK) * slope, dx_ptr, row, K, k0, K, BLOCK)


@triton.jit
def swiglu_kernel(
    g_ptr, u_ptr, h_ptr, packed_g_ptr, packed_u_ptr, M, K, stride_g, stride_u,
    FROM_PACKED: tl.constexpr, PACK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``silu(g) u`` from g and u, or from their FP8 groups, which PACK writes. Grid: (rows, column tiles)."""
    row, k0 = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    if FROM_PACKED:
        g = load_packed(packed_g_ptr, row, k0, M, K, BLOCK)
        u = load_packed(packed_u_ptr, row, k0, M, K, BLOCK)
    else:
        g = load_row(g_ptr, row, stride_g, k0, K, BLOCK)
        u = load_row(u_ptr, row, stride_u, k0, K, BLOCK)
    s, _ = sigmoid_pair(g)
    store_row(g * s * u, h_ptr, row, K, k0, K, BLOCK)
    if PACK:
        store_packed(g, packed_g_ptr, row, k0, M, K, BLOCK)
        store_packed(u, packed_u_ptr, row, k0, M, K, BLOCK)


@triton.jit
def swiglu_grad_kernel(
    dh_ptr, g_ptr, u_ptr, dg_ptr, du_ptr, M, K, stride_dh, stride_g, stride_u, PACKED: tl.constexpr, BLOCK: tl.constexpr
):
    """dg and du. Grid: (rows, column tiles)."""
    row, k0 = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    if PACKED:
        g = load_packed(g_ptr, row, k0, M, K, BLOCK)
        u = load_packed(u_ptr, row, k0, M, K, BLOCK)
    else:
        g = load_row(g_ptr, row, stride_g, k0, K, BLOCK)
        u = load_row(u_ptr, row, stride_u, k0, K, BLOCK)
    value, slope = evaluate(g, 0)
    dh = load_row(dh_ptr, row, stride_dh, k0, K, BLOCK)
    store_row(dh * u * slope, dg_ptr, row, K, k0, K, BLOCK)
    store_row(dh * value, du_ptr, row, K, k0, K, BLOCK)


# ------------------------------------------------------------------------------------------------------ cross entropy


@triton.jit
def load_logits(row_ptr, bias_ptr, k0, V, softcap, BIAS: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of a row's logits, fp32, -inf beyond V."""
    at = k0 + tl.arange(0, BLOCK)
    v = tl.load(row_ptr + at, mask=at < V, other=0.0).to(tl.float32)
    if BIAS:
        v += tl.load(bias_ptr + at, mask=at < V, other=0.0).to(tl.float32)
    if CAP:
        v = softcap * tanh(v / softcap)
    return tl.where(at < V, v, float("-inf"))


@triton.jit(do_not_specialize=["ignore_index", "smoothing", "z_loss", "softcap"])
def loss_kernel(
    logits_ptr,
    loss_ptr,  # fp32 [M]
    target_ptr,  # int64
    bias_ptr,
    factor_ptr,  # fp32
    V,
    stride_logits,
    stride_target,
    stride_factor,
    ignore_index,
    smoothing,
    z_loss,
    softcap,
    BIAS: tl.constexpr,
    GRAD: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row's loss, and its gradient over its logits. Grid: (rows)."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(target_ptr + row * stride_target)
    row_ptr = logits_ptr + row * stride_logits
    at = tl.arange(0, BLOCK)
    if label == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        if GRAD:
            for k0 in range(0, V, BLOCK):
                tl.store(row_ptr + k0 + at, tl.zeros([BLOCK], row_ptr.dtype.element_ty), mask=k0 + at < V)
    else:
        top = tl.full([], float("-inf"), tl.float32)
        total = tl.full([], 0.0, tl.float32)
        plain = tl.full([], 0.0, tl.float32)
        for k0 in range(0, V, BLOCK):
            v = load_logits(row_ptr, bias_ptr, k0, V, softcap, BIAS, CAP, BLOCK)
            new = tl.maximum(top, tl.max(v, 0))
            shift = tl.where(new == float("-inf"), 0.0, new)  # so far all are -inf
            total = total * tl.exp(top - shift) + tl.sum(tl.exp(v - shift), 0)
            plain += tl.sum(tl.where(k0 + at < V, v, 0.0), 0)
            top = new
        lse = top + tl.log(total)
        own = tl.load(row_ptr + label).to(tl.float32)
        if BIAS:
            own += tl.load(bias_ptr + label).to(tl.float32)
        if CAP:
            own = softcap * tanh(own / softcap)
        value = lse - (1.0 - smoothing) * own + z_loss * lse * lse
        if smoothing > 0.0:
            value -= smoothing * plain / V
        tl.store(loss_ptr + row, value)
        if GRAD:
            factor = tl.load(factor_ptr + row * stride_factor)
            for k0 in range(0, V, BLOCK):
                v = load_logits(row_ptr, bias_ptr, k0, V, softcap, BIAS, CAP, BLOCK)
                grad = tl.exp(v - lse) * (1.0 + 2.0 * z_loss * lse) - smoothing / V
                grad -= tl.where(k0 + at == label, 1.0 - smoothing, 0.0)
                if CAP:
                    grad = grad * (1.0 - (v / softcap) * (v / softcap))
                tl.store(row_ptr + k0 + at, (grad * factor).to(row_ptr.dtype.element_ty), mask=k0 + at < V)
