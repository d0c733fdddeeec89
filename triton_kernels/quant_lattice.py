"""Triton for the lattice weights of LR-QAT (:mod:`lowmem.ops.quant_lattice`): one tile of ``Phi + c B A`` is formed,
rounded and clipped in registers, and leaves as codes or as the weight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..memory.workspace import WORKSPACE
from ..ops import quant_lattice as family
from . import device as gpu
from .lora_kernels import load_rank_rows

# (rows, columns, ranks at once, warps) of a tile; nothing is tuned at run time
TILE = (64, 128, 16, 4)
INTERPRETER_TILE = (16, 64, 16, 4)


@triton.jit(do_not_specialize=["c", "step"])
def lattice_kernel(
    out_ptr,  # [rows, K]
    phi_ptr,  # [N, K]
    a_ptr,  # [R, K]
    b_ptr,  # [N, R]
    scale_ptr,  # [N, groups]
    rows,
    K,
    R,
    row0,
    c,
    step,  # what one unit of phi is worth
    stride_phi,
    stride_a,
    stride_b,
    stride_scale,
    group_size,
    HALF: tl.constexpr,
    WEIGHT: tl.constexpr,  # the weight in out's dtype, or codes that go one step beyond the lattice
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """``out = s clip(round(Phi + c B A))``, or the codes. Grid: (column tiles, row tiles). The sum over the ranks is
    made in one order, whatever the rows asked for: forward and backward see the same codes."""
    i = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    row = row0 + i
    column = tl.program_id(0) * BK + tl.arange(0, BK)
    acc = tl.zeros([BN, BK], tl.float32)
    for r0 in range(0, R, BR):
        rank = r0 + tl.arange(0, BR)
        in_b = (i[:, None] < rows) & (rank[None, :] < R)
        b = tl.load(b_ptr + row[:, None] * stride_b + rank[None, :], mask=in_b, other=0.0).to(tl.float32)
        a = load_rank_rows(a_ptr, stride_a, r0, R, column, K, tl.float32, BR)
        acc = tl.dot(b, a, acc, input_precision="ieee")
    there = (i[:, None] < rows) & (column[None, :] < K)
    phi = tl.load(phi_ptr + row[:, None] * stride_phi + column[None, :], mask=there, other=0).to(tl.float32)
    z = phi * step + acc * c
    # half to even: beyond 2**23 an fp32 has no fraction; two steps beyond the lattice are enough
    z = tl.minimum(tl.maximum(z, -HALF - 2.0), HALF + 1.0)
    code = (z + 12582912.0) - 12582912.0
    to = out_ptr + i[:, None] * K + column[None, :]
    if WEIGHT:
        at = row[:, None] * stride_scale + (column // group_size)[None, :]
        s = tl.load(scale_ptr + at, mask=there, other=0.0).to(tl.float32)
        code = tl.minimum(tl.maximum(code, -HALF + 0.0), HALF - 1.0)
        tl.store(to, (code * s).to(out_ptr.dtype.element_ty), mask=there)
    else:
        code = tl.minimum(tl.maximum(code, -HALF - 1.0), HALF + 0.0)
        tl.store(to, code.to(tl.int16), mask=there)


def _fill(out: Tensor, phi: Tensor, a: Tensor, b: Tensor, scale: Tensor | None, c: float, bits: int, row0: int) -> None:
    rows, k = out.shape
    if out.numel() == 0:
        return
    phi, a, b = gpu.rows(phi), gpu.rows(a), gpu.rows(b)
    step = 1.0 if phi.is_floating_point() else 2.0 ** (bits - 8)
    scale_or = out if scale is None else gpu.rows(scale)
    interpreting = gpu.architecture(out.device) == "interpreter"
    bn, bk, br, warps = INTERPRETER_TILE if interpreting else TILE
    with gpu.on(out.device):
        lattice_kernel[(gpu.cdiv(k, bk), gpu.cdiv(rows, bn))](
            out, phi, a, b, scale_or, rows, k, a.shape[0], row0, c, step,
            phi.stride(0), a.stride(0), b.stride(0), scale_or.stride(0), 1 if scale is None else k // scale.shape[1],
            HALF=2 ** (bits - 1), WEIGHT=scale is not None, BN=bn, BK=bk, BR=br, num_warps=warps, num_stages=1,
        )  # fmt: skip


def _serves(x: Tensor, *others: Tensor) -> bool:
    floats = all(t.dtype in (*gpu.FLOATS, torch.int8) for t in (x, *others))
    return gpu.architecture(x.device) is not None and floats


def lattice_codes(phi: Tensor, a: Tensor, b: Tensor, c: float, bits: int, row0: int, rows: int) -> Tensor:
    """``lowmem::quant_lattice_codes``."""
    if not _serves(phi, a, b):
        return family.codes_reference(phi, a, b, c, bits, row0, rows)
    out = phi.new_empty(rows, phi.shape[1], dtype=torch.int16)
    _fill(out, phi, a, b, None, c, bits, row0)
    return out


def lattice_matmul(
    x: Tensor,
    phi: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    c: float,
    bits: int,
    bias: Tensor | None,
    transposed: bool,
) -> Tensor:
    """``lowmem::quant_lattice_matmul``: the weight into shared scratch in one launch, then the BLAS."""
    if not _serves(x, phi, a, b, scale):
        return family.matmul_reference(x, phi, a, b, scale, c, bits, bias, transposed)
    with WORKSPACE.borrow(tuple(phi.shape), x.dtype, x.device) as w:
        _fill(w, phi, a, b, scale, c, bits, 0)
        y = x @ w if transposed else x @ w.T
    return y if bias is None else y.add_(bias)
