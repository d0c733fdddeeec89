"""Launchers of the ``quant`` family: the operators' kernels on CUDA devices, with exactly their schemas.

Any sizes, zero included; x in bf16, fp16 or fp32. What no kernel serves (fp64, a GPU without an entry in
``device.ARCHITECTURES``) goes to the plain-torch references. Which way multiplies is for ``lowmem.ops.quant_rule`` to
say.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from ..ops import quant as family
from ..ops import quant_rule as rule
from ..quant.formats import PER_CHANNEL, QuantSpec, row_bytes
from . import device as gpu
from . import quant_configs as configs
from . import quant_kernels as kernels

Maybe = Tensor | None


def _cuda_cpp(t: Tensor) -> bool:
    return _dispatch.CUDA.loaded and t.is_cuda  # the interpreter's tensors lie on the CPU


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _numbers(spec: QuantSpec, k: int) -> tuple[int, int, int]:
    """Bytes of a row, elements of a group and groups of a row, where a row has its own."""
    if spec.is_table:
        return 0, spec.group_size, 0
    return row_bytes(spec.bits, k), max(spec.group_size, 1), spec.row_groups(k)


# --------------------------------------------------------------------------------------------------------- dequantize


def dequantize_(out: Tensor, packed: Tensor, *rest: Any) -> None:
    """``lowmem::quant_dequantize_``: CUDA C++ where it is loaded, else Triton; both bit for bit the reference."""
    if _cuda_cpp(out) and out.dtype in gpu.FLOATS:
        torch.ops.lowmem_c.quant_dequantize_(out, packed, *rest)
    elif gpu.architecture(out.device) is not None and out.dtype in gpu.FLOATS:
        dequantize_triton_(out, packed, *rest)
    else:
        family.dequantize_reference(out, packed, *rest)


def dequantize_triton_(
    out: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Maybe,
    scale_code: Maybe,
    scale_absmax: Maybe,
    scale_offset: Maybe,
    spec: int,
    k: int,
    row0: int,
    col0: int,
) -> None:
    """The Triton kernel of the dequantization."""
    arch, what = gpu.architecture(out.device), QuantSpec.from_code(spec)
    assert arch is not None
    rows, cols = out.shape
    if rows == 0 or cols == 0:
        return
    size, group, row_groups = _numbers(what, k)
    start, between = (row0 * k + col0, k) if what.is_table else (col0, 0)
    bm, bk, _, warps, stages = configs.dequantize(arch)
    with gpu.on(out.device):
        kernels.dequantize_kernel[(gpu.cdiv(cols, bk), gpu.cdiv(rows, bm))](
            out, packed, family.code_table(what.format, out.device) if what.is_table else scale,
            scale, scale if zero is None else zero,
            scale if scale_code is None else scale_code, scale if scale_absmax is None else scale_absmax,
            scale if scale_offset is None else scale_offset,
            rows, cols, k, row0, col0, out.stride(0), out.stride(1), size, group, row_groups, what.scale_group,
            TABLE=what.is_table, BITS=what.bits, PER_ROW=what.group_size == PER_CHANNEL, ZEROS=zero is not None,
            SCALE_BITS=what.scale_bits if what.double_quant else 0,
            OFFSETS=scale_offset is not None and scale_offset.numel() > 1,
            ALIGNED=start % 8 == 0 and (rows == 1 or between % 8 == 0), BM=bm, BK=bk,
            num_warps=warps, num_stages=stages, enable_fp_fusion=False,  # each product and sum is rounded
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ product


def matmul(x: Tensor, *args: Any) -> Tensor:
    """``lowmem::quant_matmul``: by :func:`lowmem.ops.quant_rule.matmul_way`."""
    return _matmul(rule.MEASURED.get(_name(x.device), rule.ROWS), x, *args)


def matmul_small(x: Tensor, *args: Any) -> Tensor:
    """``lowmem::quant_matmul_small``: from the packed bytes wherever a kernel serves that, else through scratch."""
    return _matmul(rule.MEASURED.get(_name(x.device), rule.ROWS)._replace(mma=rule.MMA_MOST), x, *args)


def _matmul(rows: rule.Rows, x: Tensor, *args: Any) -> Tensor:
    packed, k, transposed = args[0], args[8], args[-1]
    if x.dtype not in gpu.FLOATS:
        return family.matmul_reference(x, *args)
    on_16 = packed.data_ptr() % 16 == 0
    way = rule.matmul_way(_name(x.device), x.shape[-2], k, x.dtype, transposed, _cuda_cpp(x) and on_16, rows)
    if way == "scratch":
        return family.matmul_scratch(x, *args)
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    *rest, bias, _ = args
    bias = bias if bias is None else bias.contiguous()
    kernel = torch.ops.lowmem_c.quant_gemv if way == "gemv" else torch.ops.lowmem_c.quant_mma
    return kernel(x, *rest, bias, False)


# -------------------------------------------------------------------------------------------------------- scale grads


def scale_grad(
    dy: Tensor,
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Maybe,
    scale_code: Maybe,
    scale_absmax: Maybe,
    scale_offset: Maybe,
    spec: int,
    n: int,
    k: int,
    row0: int,
) -> tuple[Tensor, Tensor]:
    """``lowmem::quant_scale_grad``: one Triton GEMM for each expert whose epilogue reduces to groups; dW is never
    stored. Groups wider than a tile, and rows of x beyond one part, are summed from fp32 partial sums, in order."""
    arch = gpu.serves(x, dy)
    if arch is None or dy.numel() == 0:
        return family.scale_grad_reference(
            dy, x, packed, scale, zero, scale_code, scale_absmax, scale_offset, spec, n, k, row0
        )
    if x.dim() == 3:
        weight = packed, scale, zero, scale_code, scale_absmax, scale_offset, spec, n, k
        each = [scale_grad(dy[e], x[e], *weight, row0 + e * n) for e in range(x.shape[0])]
        ds, dz = zip(*each, strict=True)
        return torch.stack(ds), torch.stack(dz) if zero is not None else dz[0]
    what = QuantSpec.from_code(spec)
    groups = what.scale_count(1, k)
    ds, dw = _group_sums(arch, dy, x, packed, zero, what, n, k, row0, groups)
    if zero is None:
        return ds, x.new_empty(0, dtype=torch.float32)
    index = torch.arange(row0 * groups, (row0 + n) * groups, device=x.device).view(n, groups)
    s = family.scales_reference(scale, scale_code, scale_absmax, scale_offset, what, index)
    return ds, dw.mul_(s).neg_()


def _group_sums(
    arch: str,
    dy: Tensor,
    x: Tensor,
    packed: Tensor,
    zero: Maybe,
    what: QuantSpec,
    n: int,
    k: int,
    row0: int,
    groups: int,
) -> tuple[Tensor, Tensor]:
    m = x.shape[0]
    dy, x = gpu.rows(dy), gpu.rows(x)
    bn, bk, bm, warps, stages = configs.scale_grad(arch, gpu.small(x, dy))
    per_row = what.group_size == PER_CHANNEL
    span = bk if per_row else min(what.group_size, bk)
    spans = gpu.cdiv(k, span)
    tiles = gpu.cdiv(n, bn) * gpu.cdiv(k, bk)
    # few tiles: the rows of x are split until every multiprocessor has two, none shorter than sixteen steps
    wanted = max(1, min(2 * gpu.programs(x.device) // tiles, m // (16 * bm)))
    chunk = gpu.cdiv(gpu.cdiv(m, wanted), bm) * bm
    parts = gpu.cdiv(m, chunk)
    ds = x.new_empty(parts, n, spans, dtype=torch.float32)
    dw = x.new_empty(parts, n, spans, dtype=torch.float32) if zero is not None else ds
    size, group, row_groups = _numbers(what, k)
    table = family.code_table(what.format, x.device) if what.is_table else ds
    with gpu.on(x.device):
        kernels.scale_grad_kernel[(tiles, parts)](
            dy, x, packed, table, packed if zero is None else zero, ds, dw, m, n, k, row0, dy.stride(0), x.stride(0),
            size, group, row_groups, spans, chunk,
            TABLE=what.is_table, BITS=what.bits, PER_ROW=per_row, ZEROS=zero is not None, SPAN=span,
            EVEN=n % bn == 0 and k % bk == 0, PRECISION=gpu.precision(x), GROUP=configs.GROUP_TILES,
            BM=bm, BN=bn, BK=bk, num_warps=warps, num_stages=stages,
        )  # fmt: skip

    def whole(t: Tensor) -> Tensor:
        if parts == 1 and spans == groups:
            return t[0]
        return t.sum((0, 2))[:, None] if per_row else t.view(parts, n, groups, -1).sum((0, 3))

    return whole(ds), whole(dw)
