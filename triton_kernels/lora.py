"""Launchers of the ``lora`` family: the operators' CUDA kernels, with exactly their schemas.

Each takes any strides (rows whose columns are not contiguous are copied), any sizes, zero included, and x in bf16, fp16
or fp32 with adapters in any of the three. What no kernel serves (fp64, a GPU without an entry in ``lora_configs``) goes
to the plain-torch references. Which of several ways serves a call is ``lowmem.ops.lora_rule``'s to say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import _dispatch
from ..ops import lora as family
from ..ops import lora_rule
from ..ops.philox import inv_keep, threshold
from . import device as gpu
from . import lora_configs as configs
from . import lora_gemm as gemm
from . import lora_kernels as kernels
from . import philox

_REDUCE_BLOCK = 1024
_DESCRIPTORS = ("sm_90", "sm_100", "interpreter")


# ---------------------------------------------------------------------------------------------------- small helpers


def _pairs(x: Tensor) -> bool:
    """Rows can be read as 32-bit words that hold two elements each."""
    return x.dtype.itemsize == 2 and x.shape[1] % 2 == 0 and x.stride(0) % 2 == 0 and x.data_ptr() % 4 == 0


def _parts(kernel: str, length: int, step: int, tiles: int, device: torch.device, at_least: int) -> tuple[int, int]:
    """``(parts, chunk)``: how a reduction over ``length`` is split so that all programs of ``tiles`` tiles are resident
    at once and none waits for a second turn; ``chunk`` is a multiple of ``step``, no part shorter than ``at_least``
    steps. It depends on the GPU's model and the sizes alone, so a device repeats its bits."""
    steps = gpu.cdiv(length, step)
    wanted = configs.RESIDENT[kernel] * gpu.programs(device) // tiles
    each = gpu.cdiv(steps, max(1, min(wanted, steps // at_least)))
    return gpu.cdiv(steps, each), each * step


def _reduce(parts: Tensor, out: Tensor, scale: float) -> None:
    size = out.numel()
    grid = (gpu.cdiv(size, _REDUCE_BLOCK),)
    kernels.reduce_kernel[grid](parts, out, size, parts.shape[0], scale, BLOCK=_REDUCE_BLOCK, num_warps=4)


def _bits(
    rows: int, columns: int, mask: Tensor | None, p: float, seed: Tensor | None, child: int, unused: Tensor
) -> tuple[bool, Tensor, int]:
    """``(dropout?, packed bits as bytes, their row stride)``; drawn here where only the seed was kept."""
    if p == 0:
        return False, unused, 0
    if mask is None:
        assert seed is not None
        mask = unused.new_empty(rows, gpu.cdiv(columns, 32), dtype=torch.int32)
        stride = mask.shape[1] * 4
        bm, bb, warps = configs.DRAW_TILE
        philox.draw_kernel[(gpu.cdiv(rows, bm), gpu.cdiv(stride, bb))](
            mask.view(torch.uint8), seed, rows, columns, stride, threshold(p), child, BM=bm, BB=bb, num_warps=warps
        )
    return True, mask.contiguous().view(torch.uint8), mask.shape[1] * 4


# ------------------------------------------------------------------------------------------------------------- shrink


def shrink(
    x: Tensor, a: Tensor, scale: float, p: float, seed: Tensor | None, child: int, save_mask: bool
) -> tuple[Tensor, Tensor]:
    """``lowmem::lora_shrink``: S ``[M, r]`` scaled, and the packed keep bits. Long sums over few rows are split over K,
    and the parts added in a fixed order."""
    arch = gpu.serves(x, a)
    if arch is None:
        return family.shrink_reference(x, a, scale, p, seed, child, save_mask)
    (m, k), r = x.shape, a.shape[0]
    x, a = gpu.rows(x), gpu.rows(a)
    name = "shrink" if p > 0 else "shrink_plain"
    small = gpu.small(x)
    br = configs.rank_block(name, arch, r, small)
    bm, bk, _, warps, stages = configs.tile(name, arch, br, small)
    tiles = gpu.cdiv(m, bm), gpu.cdiv(r, br)
    parts, chunk = _parts(name, k, bk, tiles[0] * tiles[1], x.device, 2 if arch == "interpreter" else 8)
    s = x.new_empty(m, r)
    out = s if parts == 1 else x.new_empty(parts, m, r, dtype=torch.float32)
    save = save_mask and p > 0
    bits = x.new_empty((m, gpu.cdiv(k, 32)) if save else (0,), dtype=torch.int32)
    full = scale * inv_keep(p) if p > 0 else scale
    with gpu.on(x.device):
        kernels.shrink_kernel[(tiles[0], parts, tiles[1])](
            x, a, out, bits.view(torch.uint8) if save else x, seed if p > 0 else x, m, k, r, x.stride(0), a.stride(0),
            gpu.cdiv(k, 32) * 4, chunk, full if parts == 1 else 1.0, threshold(p), child,
            DROP=p > 0, SAVE=save, PAIRS=_pairs(x), EVEN=k % bk == 0, PRECISION=gpu.precision(x), BM=bm, BK=bk, BR=br,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if parts > 1:
            _reduce(out, s, full)
    return s, bits


# ------------------------------------------------------------------------------------------------------------ dy pass


def dy(dy: Tensor, b: Tensor, s: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``lowmem::lora_dy``: dS ``[M, r]`` and dB ``[N, r]``, from one read of dy where the rule says so."""
    arch = gpu.serves(dy, b, s)
    way = "torch"
    if arch is not None:
        way = lora_rule.dy_way(_name(dy.device), b.shape[1], dy.dtype, _dispatch.CUDA.loaded and dy.is_cuda)
    if way == "torch":
        return family.dy_reference(dy, b, s, scale)
    if way == "cuda":
        return torch.ops.lowmem_c.lora_dy(dy, b, s, scale)
    return dy_fused(dy, b, s, scale)


def dy_fused(dy: Tensor, b: Tensor, s: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The Triton kernel of the dY pass: reads dy once per 64 ranks; repeatable bit for bit."""
    arch = gpu.architecture(dy.device)
    assert arch is not None
    (m, n), r = dy.shape, b.shape[1]
    dy, b, s = gpu.rows(dy), gpu.rows(b), gpu.rows(s)
    small = gpu.small(dy)
    br = configs.rank_block("dy", arch, r, small)
    bm, bn, _, warps, stages = configs.tile("dy", arch, br, small)
    strips, rank_tiles = gpu.cdiv(n, bn), gpu.cdiv(r, br)
    parts, chunk = _parts("dy", m, bm, strips * rank_tiles, dy.device, 2)
    ds, db = dy.new_empty(m, r), dy.new_empty(n, r, dtype=torch.float32)
    ds_out = ds if strips == 1 else dy.new_empty(strips, m, r, dtype=torch.float32)
    db_out = db if parts == 1 else dy.new_empty(parts, n, r, dtype=torch.float32)
    with gpu.on(dy.device):
        kernels.dy_kernel[(strips, parts, rank_tiles)](
            dy, b, s, ds_out, db_out, m, n, r, dy.stride(0), b.stride(0), s.stride(0), chunk,
            scale if strips == 1 else 1.0,
            EVEN=n % bn == 0, PRECISION=gpu.precision(dy), BM=bm, BN=bn, BR=br, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if strips > 1:
            _reduce(ds_out, ds, scale)
        if parts > 1:
            _reduce(db_out, db, 1.0)
    return ds, db


# ----------------------------------------------------------------------------------------------------------------- dA


def da(ds: Tensor, x: Tensor, mask: Tensor | None, p: float, seed: Tensor | None, child: int) -> Tensor:
    """``lowmem::lora_da``: dA ``[r, K]`` from the raw x and the mask's bits or seed; repeatable bit for bit."""
    arch = gpu.serves(x, ds)
    if arch is None:
        return family.da_reference(ds, x, mask, p, seed, child)
    (m, k), r = x.shape, ds.shape[1]
    x, ds = gpu.rows(x), gpu.rows(ds)
    small = gpu.small(x)
    br = configs.rank_block("da", arch, r, small)
    bm, bk, _, warps, stages = configs.tile("da", arch, br, small)
    tiles = gpu.cdiv(k, bk), gpu.cdiv(r, br)
    parts, chunk = _parts("da", m, bm, tiles[0] * tiles[1], x.device, 2)
    out = x.new_empty(r, k, dtype=torch.float32)
    partial = out if parts == 1 else x.new_empty(parts, r, k, dtype=torch.float32)
    full = inv_keep(p) if p > 0 else 1.0
    with gpu.on(x.device):
        drop, mask_bytes, stride_mask = _bits(m, k, mask, p, seed, child, x)
        kernels.da_kernel[(tiles[0], parts, tiles[1])](
            ds, x, mask_bytes, partial, m, k, r, ds.stride(0), x.stride(0), stride_mask, chunk,
            full if parts == 1 else 1.0,
            DROP=drop, PAIRS=_pairs(x), EVEN=k % bk == 0, PRECISION=gpu.precision(x), BM=bm, BK=bk, BR=br,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if parts > 1:
            _reduce(partial, out, full)
    return out


# ------------------------------------------------------------------------------------------------------ masked expand


def masked_expand_(
    out: Tensor, ds: Tensor, a: Tensor, mask: Tensor | None, p: float, seed: Tensor | None, child: int, accumulate: bool
) -> None:
    """``lowmem::lora_masked_expand_``, in place on ``out`` ``[M, K]``."""
    arch = gpu.serves(out, ds, a)
    cuda = _dispatch.CUDA.loaded and out.is_cuda  # the interpreter's tensors lie on the CPU
    way = "torch" if arch is None else lora_rule.masked_expand_way(_name(out.device), cuda)
    if way == "torch":
        family.masked_expand_reference(out, ds, a, mask, p, seed, child, accumulate)
    elif way == "cuda":
        torch.ops.lowmem_c.lora_masked_expand_(out, ds, a, mask, p, seed, child, accumulate)
    else:
        masked_expand_fused(out, ds, a, mask, p, seed, child, accumulate)


def masked_expand_fused(
    out: Tensor, ds: Tensor, a: Tensor, mask: Tensor | None, p: float, seed: Tensor | None, child: int, accumulate: bool
) -> None:
    """The Triton kernel of the masked expand."""
    arch = gpu.architecture(out.device)
    assert arch is not None
    if out.stride(1) != 1 and out.shape[1] != 1:
        copy = out.contiguous()
        masked_expand_fused(copy, ds, a, mask, p, seed, child, accumulate)
        out.copy_(copy)
        return
    (m, k), r = out.shape, ds.shape[1]
    ds, a = gpu.rows(ds), gpu.rows(a)
    small = gpu.small(out)
    br = configs.rank_block("masked_expand", arch, r, small)
    bm, bk, _, warps, stages = configs.tile("masked_expand", arch, br, small)
    with gpu.on(out.device):
        drop, mask_bytes, stride_mask = _bits(m, k, mask, p, seed, child, out)
        kernels.masked_expand_kernel[(gpu.cdiv(m, bm), gpu.cdiv(k, bk))](
            out, ds, a, mask_bytes, m, k, r, out.stride(0), ds.stride(0), a.stride(0), stride_mask,
            inv_keep(p) if p > 0 else 1.0,
            DROP=drop, ACCUMULATE=accumulate, EVEN=k % bk == 0, PRECISION=gpu.precision(out), BM=bm, BK=bk, BR=br,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- fused GEMMs


def _descriptors(arch: str, *tensors: Tensor) -> bool:
    """Tensor descriptors can carry all of ``tensors``: 16-byte aligned base and rows, contiguous columns."""
    wide_enough = tensors[0].dtype.itemsize == 2 or arch == "interpreter"  # fp32 has no tiles for them
    return (
        arch in _DESCRIPTORS
        and wide_enough
        and all(
            t.data_ptr() % 16 == 0 and t.stride(0) * t.dtype.itemsize % 16 == 0 and t.stride(1) == 1 and t.stride(0) > 0
            for t in tensors
        )
    )


def _gemm(
    name: str, arch: str, x: Tensor, w: Tensor, rank: int, by_descriptor: bool
) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """Constants and launch options of a fused GEMM, and whether its descriptor kernel flattens its loops."""
    small = not by_descriptor and gpu.small(x, w)
    br = configs.rank_block(name, arch, rank, small)
    bm, bn, bk, warps, stages = configs.tile(name, arch, br, small)
    constants = dict(BM=bm, BN=bn, BK=bk, BR=br, RANK_TILES=gpu.cdiv(rank, br), GROUP=configs.GROUP_ROWS)
    constants |= dict(PRECISION=gpu.precision(x))
    return constants, dict(num_warps=warps, num_stages=stages), configs.flatten(arch, br, constants["RANK_TILES"])


def expand_fused(
    x: Tensor, w: Tensor, s: Tensor, b: Tensor, bias: Tensor | None, *, descriptors: bool = True
) -> Tensor:
    """``y = x w^T + s b^T + bias`` in one Triton GEMM; by tensor descriptors where they can be and ``descriptors``."""
    arch = gpu.architecture(x.device)
    assert arch is not None
    (m, k), n, r = x.shape, w.shape[0], s.shape[1]
    x, w, s, b = gpu.rows(x), gpu.rows(w), gpu.rows(s), gpu.rows(b)
    bias = bias if bias is None else bias.contiguous()
    y = x.new_empty(m, n)
    by_descriptor = descriptors and _descriptors(arch, x, w, y)
    constants, options, flatten = _gemm("expand", arch, x, w, r, by_descriptor)
    bm, bn, bk = constants["BM"], constants["BN"], constants["BK"]
    tiles = gpu.cdiv(m, bm) * gpu.cdiv(n, bn)
    constants["BIAS"] = bias is not None
    rest = s, b, y if bias is None else bias
    with gpu.on(x.device):
        if by_descriptor:
            count = min(tiles, gpu.programs(x.device))
            gemm.expand_descriptor_kernel[(count,)](
                TensorDescriptor(x, [m, k], [x.stride(0), 1], [bm, bk]),
                TensorDescriptor(w, [n, k], [w.stride(0), 1], [bn, bk]),
                TensorDescriptor(y, [m, n], [y.stride(0), 1], [bm, bn]),
                *rest, m, n, k, r, s.stride(0), b.stride(0),
                PROGRAMS=count, FLATTEN=flatten, **constants, **options,
            )  # fmt: skip
        else:
            gemm.expand_kernel[(tiles,)](
                x, w, *rest, y, m, n, k, r, x.stride(0), w.stride(0), s.stride(0), b.stride(0), y.stride(0),
                **constants, **options,
            )  # fmt: skip
    return y


def dx_fused(
    dy: Tensor,
    w: Tensor,
    ds: Tensor,
    a: Tensor,
    mask: Tensor | None,
    p: float,
    seed: Tensor | None,
    child: int,
    *,
    descriptors: bool = True,
) -> Tensor:
    """``dx = dy w + mask * (ds a) / (1 - p)`` in one Triton GEMM."""
    arch = gpu.architecture(dy.device)
    assert arch is not None
    (m, n), k, r = dy.shape, w.shape[1], ds.shape[1]
    dy, w, ds, a = gpu.rows(dy), gpu.rows(w), gpu.rows(ds), gpu.rows(a)
    dx = dy.new_empty(m, k)
    by_descriptor = descriptors and _descriptors(arch, dy, w, dx)
    constants, options, flatten = _gemm("dx", arch, dy, w, r, by_descriptor)
    bm, bn, bk = constants["BM"], constants["BN"], constants["BK"]
    tiles = gpu.cdiv(m, bm) * gpu.cdiv(k, bn)
    scale = inv_keep(p) if p > 0 else 1.0
    with gpu.on(dy.device):
        constants["DROP"], mask_bytes, stride_mask = _bits(m, k, mask, p, seed, child, dx)
        if by_descriptor:
            count = min(tiles, gpu.programs(dy.device))
            gemm.dx_descriptor_kernel[(count,)](
                TensorDescriptor(dy, [m, n], [dy.stride(0), 1], [bm, bk]),
                TensorDescriptor(w, [n, k], [w.stride(0), 1], [bk, bn]),
                TensorDescriptor(dx, [m, k], [dx.stride(0), 1], [bm, bn]),
                ds, a, mask_bytes, m, n, k, r, ds.stride(0), a.stride(0), stride_mask, scale,
                PROGRAMS=count, FLATTEN=flatten, **constants, **options,
            )  # fmt: skip
        else:
            gemm.dx_kernel[(tiles,)](
                dy, w, ds, a, mask_bytes, dx, m, n, k, r,
                dy.stride(0), w.stride(0), ds.stride(0), a.stride(0), stride_mask, dx.stride(0), scale,
                **constants, **options,
            )  # fmt: skip
    return dx


# -------------------------------------------------------------------------------- composed GEMMs and the choice between


def _expand_composed(x: Tensor, w: Tensor | None, s: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    # the rank-r product writes y, the base GEMM accumulates onto it and reads it in its epilogue
    bt = b.to(x.dtype).T
    y = s @ bt if bias is None else torch.addmm(bias, s, bt)
    return y if w is None else y.addmm_(x, w.T)


def _dx_composed(
    dy: Tensor, w: Tensor | None, ds: Tensor, a: Tensor, mask: Tensor | None, p: float, seed: Tensor | None, child: int
) -> Tensor:
    dx = dy.new_empty(dy.shape[0], a.shape[1])
    masked_expand_(dx, ds, a, mask, p, seed, child, False)
    return dx if w is None else dx.addmm_(dy, w)


def _fuses(
    kind: str, x: Tensor, w: Tensor | None, rank: int, shape: tuple[int, int, int], fused: Callable[[], Any]
) -> bool:
    arch = gpu.serves(x)
    if w is None or w.numel() == 0 or arch is None or (gpu.small(x, w) and not _descriptors(arch, x, w)):
        return False

    def measure() -> lora_rule.Rates:
        a_copy = torch.empty(2**28, dtype=torch.uint8, device=x.device)
        b_copy = torch.empty_like(a_copy)
        return lora_rule.measure(
            lambda: x @ (w.T if kind == "expand" else w),
            fused,
            lambda: b_copy.copy_(a_copy),
            flops=2.0 * shape[0] * shape[1] * shape[2],
            copied_bytes=2.0 * a_copy.numel(),
            seconds=lora_rule.cuda_seconds,
        )

    measurable = x.is_cuda and not torch.cuda.is_current_stream_capturing()
    return lora_rule.fuses(kind, _name(x.device), shape, rank, x.dtype, measure if measurable else None)


def expand(x: Tensor, w: Tensor | None, s: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """``lowmem::lora_expand``: one Triton GEMM, or the rank-r product and then cuBLAS accumulating onto it."""
    shape = x.shape[0], b.shape[0], x.shape[1]
    if _fuses("expand", x, w, s.shape[1], shape, lambda: expand_fused(x, w, s, b, bias)):
        return expand_fused(x, w, s, b, bias)
    return _expand_composed(x, w, s, b, bias)


def dx(
    dy: Tensor, w: Tensor | None, ds: Tensor, a: Tensor, mask: Tensor | None, p: float, seed: Tensor | None, child: int
) -> Tensor:
    """``lowmem::lora_dx``: one Triton GEMM, or the masked rank-r product and then cuBLAS accumulating onto it."""
    shape = dy.shape[0], a.shape[1], dy.shape[1]
    if _fuses("dx", dy, w, ds.shape[1], shape, lambda: dx_fused(dy, w, ds, a, mask, p, seed, child)):
        return dx_fused(dy, w, ds, a, mask, p, seed, child)
    return _dx_composed(dy, w, ds, a, mask, p, seed, child)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
