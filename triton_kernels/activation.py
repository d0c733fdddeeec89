"""Launchers of the ``activation`` family: the operators' CUDA kernels, with exactly their schemas.

Any strides (rows whose columns are not contiguous are copied) and sizes, in bf16, fp16 and fp32. What no kernel serves
goes to the plain-torch references: fp64, a GPU without an entry, norms of more than ``MAX_ROW`` columns.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..ops import activation as family
from ..ops import activation_norm as norms
from ..ops import activation_saved as forms
from . import activation_kernels as kernels
from . import device as gpu

TILE = {16: 2048, 32: 1024}
"""Columns of an elementwise tile, by the bits of an element: 16 bytes a thread and load."""
WARPS = 4
MAX_ROW = 8192
"""Columns that a norm's program holds in registers at most."""
GRAD_PROGRAMS = 4
"""Programs of a norm's backward a multiprocessor: each leaves one partial sum."""


def tile(x: Tensor, arch: str) -> int:
    """Columns of an elementwise tile."""
    return 256 if arch == "interpreter" else TILE[8 * x.dtype.itemsize]


def row_launch(columns: int) -> tuple[int, int]:
    """``(columns of the block, warps)`` of a kernel that holds a row: 8 or 16 elements a thread."""
    block = max(128, triton.next_power_of_2(columns))
    return block, max(1, min(16, block // 256))


def _grid(x: Tensor, block: int) -> tuple[int, int]:
    return x.shape[0], gpu.cdiv(x.shape[1], block)


def _bytes(x: Tensor, form: int) -> Tensor:
    size = forms.packed_bytes(x.shape[0], x.shape[1]) if form == forms.FP8 else 0
    return x.new_empty(size, dtype=torch.uint8)


def pack(x: Tensor) -> Tensor:
    """``lowmem::fp8_pack``."""
    arch = gpu.serves(x)
    if arch is None:
        return forms.pack_reference(x)
    x, block = gpu.rows(x), tile(x, arch)
    packed = _bytes(x, forms.FP8)
    with gpu.on(x.device):
        kernels.pack_kernel[_grid(x, block)](x, packed, *x.shape, x.stride(0), BLOCK=block, num_warps=WARPS)
    return packed


def unpack(packed: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """``lowmem::fp8_unpack``."""
    out = packed.new_empty((rows, cols), dtype=dtype)
    arch = gpu.serves(out)
    if arch is None:
        return forms.unpack_reference(packed, rows, cols, dtype)
    block = tile(out, arch)
    with gpu.on(out.device):
        kernels.unpack_kernel[_grid(out, block)](packed.contiguous(), out, rows, cols, BLOCK=block, num_warps=WARPS)
    return out


def norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, center: bool, form: int
) -> norms.Four:
    """``lowmem::norm_forward``: residual, norm and FP8 groups in one pass."""
    if gpu.serves(x, residual, weight, bias) is None or x.shape[1] > MAX_ROW:
        return norms.norm_reference(x, residual, weight, bias, eps, center, form)
    x = gpu.rows(x)
    other = x if residual is None else gpu.rows(residual)
    y, packed = x.new_empty(x.shape), _bytes(x, form)
    summed = x.new_empty(x.shape if residual is not None else (0,))
    stats = x.new_empty((x.shape[0], 2 if center else 1), dtype=torch.float32)
    block, warps = row_launch(x.shape[1])
    with gpu.on(x.device):
        kernels.norm_kernel[(x.shape[0],)](
            x, other, x if weight is None else weight.contiguous(), x if bias is None else bias.contiguous(), y,
            y if residual is None else summed, packed if form else stats, stats, *x.shape, x.stride(0),
            other.stride(0), eps, CENTER=center, RESIDUAL=residual is not None, WEIGHT=weight is not None,
            BIAS=bias is not None, PACK=form == forms.FP8, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return y, summed, packed, stats


def norm_backward(
    dy: Tensor,
    dsum: Tensor | None,
    saved: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    center: bool,
    form: int,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``lowmem::norm_backward``; the programs' partial sums are added in order, so a device repeats its bits."""
    plain = saved if form == forms.PLAIN else None
    if gpu.serves(dy, dsum, weight, plain) is None or dy.shape[1] > MAX_ROW:
        return norms.norm_grad_reference(dy, dsum, saved, weight, stats, center, form, need_dw, need_db)
    dy = gpu.rows(dy)
    (m, k), kept = dy.shape, saved.contiguous() if plain is None else gpu.rows(saved)
    added = dy if dsum is None else gpu.rows(dsum)
    # without sums over rows nothing ties them together
    each = gpu.cdiv(m, GRAD_PROGRAMS * gpu.programs(dy.device)) if need_dw or need_db else 1
    parts = gpu.cdiv(m, each)
    dx = dy.new_empty(dy.shape)
    dw, db = (dy.new_empty((parts, k) if need else (0, 0), dtype=torch.float32) for need in (need_dw, need_db))
    block, warps = row_launch(k)
    with gpu.on(dy.device):
        kernels.norm_grad_kernel[(parts,)](
            dy, added, kept, dy if weight is None else weight.contiguous(), stats.contiguous(), dx,
            dw if need_dw else stats, db if need_db else stats, m, k, dy.stride(0), added.stride(0),
            kept.stride(0) if plain is not None else 0, each, CENTER=center, PACKED=plain is None,
            DSUM=dsum is not None, WEIGHT=weight is not None, DW=need_dw, DB=need_db, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return dx, dw.sum(0) if need_dw else dw.view(0), db.sum(0) if need_db else db.view(0)


def act_forward(x: Tensor, kind: int, form: int) -> tuple[Tensor, Tensor]:
    """``lowmem::act_forward``."""
    arch = gpu.serves(x)
    if arch is None:
        return family.act_reference(x, kind, form)
    x, block = gpu.rows(x), tile(x, arch)
    y, width = x.new_empty(x.shape), family.code_bytes(form, x.shape[1])
    coded = form in (forms.DERIV4, forms.DERIV2)
    saved = x.new_empty((x.shape[0], width), dtype=torch.uint8) if coded else _bytes(x, form)
    with gpu.on(x.device):
        kernels.act_kernel[_grid(x, block)](
            x, y, saved if form else y, *x.shape, x.stride(0), width, KIND=kind, FORM=form, BLOCK=block, num_warps=WARPS
        )
    return y, saved


def act_backward(dy: Tensor, saved: Tensor, kind: int, form: int) -> Tensor:
    """``lowmem::act_backward``."""
    arch = gpu.serves(dy, saved if form == forms.PLAIN else None)
    if arch is None:
        return family.act_grad_reference(dy, saved, kind, form)
    dy, block = gpu.rows(dy), tile(dy, arch)
    kept = gpu.rows(saved) if form == forms.PLAIN else saved.contiguous()
    dx = dy.new_empty(dy.shape)
    with gpu.on(dy.device):
        kernels.act_grad_kernel[_grid(dy, block)](
            dy, kept, dx, *dy.shape, dy.stride(0), kept.stride(0), KIND=kind, FORM=form, BLOCK=block, num_warps=WARPS
        )
    return dx


def swiglu_forward(g: Tensor, u: Tensor, form: int) -> tuple[Tensor, Tensor, Tensor]:
    """``lowmem::swiglu_forward``."""
    arch = gpu.serves(g, u)
    if arch is None:
        return family.swiglu_reference(g, u, form)
    g, u, block = gpu.rows(g), gpu.rows(u), tile(g, arch)
    h, packed_g, packed_u = g.new_empty(g.shape), _bytes(g, form), _bytes(g, form)
    with gpu.on(g.device):
        kernels.swiglu_kernel[_grid(g, block)](
            g, u, h, packed_g if form else h, packed_u if form else h, *g.shape, g.stride(0), u.stride(0),
            FROM_PACKED=False, PACK=form == forms.FP8, BLOCK=block, num_warps=WARPS,
        )  # fmt: skip
    return h, packed_g, packed_u


def swiglu_from_fp8(packed_g: Tensor, packed_u: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """``lowmem::swiglu_from_fp8``."""
    h = packed_g.new_empty((rows, cols), dtype=dtype)
    arch = gpu.serves(h)
    if arch is None:
        return family.from_fp8_reference(packed_g, packed_u, rows, cols, dtype)
    block = tile(h, arch)
    with gpu.on(h.device):
        kernels.swiglu_kernel[_grid(h, block)](
            h, h, h, packed_g.contiguous(), packed_u.contiguous(), rows, cols, 0, 0,
            FROM_PACKED=True, PACK=False, BLOCK=block, num_warps=WARPS,
        )  # fmt: skip
    return h


def swiglu_backward(dh: Tensor, g: Tensor, u: Tensor, form: int) -> tuple[Tensor, Tensor]:
    """``lowmem::swiglu_backward``."""
    plain = form == forms.PLAIN
    arch = gpu.serves(dh, *((g, u) if plain else ()))
    if arch is None:
        return family.swiglu_grad_reference(dh, g, u, form)
    dh, block = gpu.rows(dh), tile(dh, arch)
    g, u = (gpu.rows(t) if plain else t.contiguous() for t in (g, u))
    dg, du = dh.new_empty(dh.shape), dh.new_empty(dh.shape)
    with gpu.on(dh.device):
        kernels.swiglu_grad_kernel[_grid(dh, block)](
            dh, g, u, dg, du, *dh.shape, dh.stride(0), g.stride(0) if plain else 0, u.stride(0) if plain else 0,
            PACKED=not plain, BLOCK=block, num_warps=WARPS,
        )  # fmt: skip
    return dg, du
