"""Launchers of the ``lowrank`` family: a step of a projected optimizer in two launches, no m x n temporary.

1. ``project_kernel`` with ADAM: R = P^T G or G P by tiles, the Adam step on each tile while it is in registers. Where
   the tiles are fewer than the multiprocessors K is split, and the last program of a tile adds the parts in order.
2. ``update_kernel``: tiles of W, with the product P.N on the accumulator, decay, the rest of the gradient, and
   stochastic rounding.

Where something must look at R between the two (a check for NaN, a preconditioner), ``project`` and ``adam`` are two
launches.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from . import device as gpu
from . import lowrank_kernels as k

Tile = tuple[int, int, int, int, int]  # BM, BN, BK, warps, stages

MAX_SPLITS = 16
ADAM_BLOCK = 1024

# By architecture, for 16-bit operands that 16 divides; other operands take SMALL. The long side of R's tile is kept
# short: at r = 128 it is the number of tiles along it that fills the GPU.
PROJECT: dict[str, dict[int, Tile]] = {  # by R's rank block; (rank, long, K)
    arch: {
        16: (16, 64, 64, 4, 4),
        32: (32, 64, 64, 4, 4),
        64: (64, 64, 64, 4, 4),
        128: (128, 64, 64, 8, 3),  # with 4 warps the Adam step spills
    }
    for arch in ("sm_80", "sm_90", "sm_100")
}
PROJECT["sm_86"] = {16: (16, 64, 64, 4, 3), 32: (32, 64, 64, 4, 3), 64: (64, 64, 64, 4, 3), 128: (128, 64, 32, 8, 3)}
PROJECT["gfx942"] = {16: (16, 64, 64, 4, 2), 32: (32, 64, 64, 4, 2), 64: (64, 64, 64, 4, 2), 128: (128, 64, 32, 4, 2)}
UPDATE: dict[str, Tile] = {
    "sm_80": (128, 64, 32, 8, 3),
    "sm_86": (128, 64, 32, 8, 2),
    "sm_90": (128, 128, 32, 8, 3),
    "sm_100": (128, 128, 32, 8, 3),
    "gfx942": (128, 64, 32, 8, 2),
}
SMALL: Tile = (32, 32, 16, 4, 2)


def rank_block(rank: int) -> int:
    """The block of ranks that a tile of R holds."""
    return next((block for block in (16, 32, 64) if rank <= block), 128)


def project_tile(arch: str, rank: int, small: bool, left: bool) -> Tile:
    """``(BM, BN, BK, warps, stages)`` of R's tile, whose first side is the rank (left) or the long side."""
    tile = SMALL if small or arch not in PROJECT else PROJECT[arch][rank_block(rank)]
    return tile if left else (tile[1], tile[0], *tile[2:])


def update_tile(arch: str, small: bool, residual: str) -> Tile:
    """``(BM, BN, BK, warps, stages)`` of W's tile; half as wide where G is held beside it."""
    tile = SMALL if small or arch not in UPDATE else UPDATE[arch]
    return tile if residual == "none" else (tile[0], min(tile[1], 64), *tile[2:])


def splits(tiles: int, depth: int, programs: int, block: int) -> tuple[int, int]:
    """``(parts, span)``: into how many parts K = ``depth`` is cut, and the length of one, a multiple of ``block``."""
    parts = max(1, min(MAX_SPLITS, programs // max(tiles, 1), gpu.cdiv(depth, 8 * block)))
    span = gpu.cdiv(gpu.cdiv(depth, parts), block) * block
    return max(1, gpu.cdiv(depth, span)), span


def serves(g: Tensor, *others: Tensor) -> bool:
    """Whether the kernels take these tensors (bf16 in the interpreter, fp64 and empty ones stay with the reference)."""
    return gpu.serves(g, *others) is not None and all(t.numel() for t in others)


def _small(t: Tensor, sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Loads cannot be 16 bytes wide, or dots are slow: the tile SMALL."""
    return t.dtype.itemsize == 4 or any(s % 16 for s in sizes) or any(s % 16 for s in strides if s != 1)


def _operands(g: Tensor, p: Tensor, left: bool) -> tuple[tuple[Tensor, Tensor], tuple[int, ...], tuple[int, int, int]]:
    """``(a, b), strides, (X, Y, K)`` of R = a b."""
    if left:
        return (p, g), (p.stride(1), p.stride(0), g.stride(0), g.stride(1)), (p.shape[1], g.shape[1], g.shape[0])
    return (g, p), (g.stride(0), g.stride(1), p.stride(0), p.stride(1)), (g.shape[0], p.shape[1], g.shape[1])


def _project(g: Tensor, p: Tensor, left: bool, moments: tuple[Tensor, Tensor] | None, numbers: Any) -> Tensor:
    arch = gpu.architecture(g.device) or "sm_80"
    (a, b), strides, (x, y, depth) = _operands(g, p, left)
    small = _small(g, (x, y, depth), strides)
    bm, bn, bk, warps, stages = project_tile(arch, p.shape[1], small, left)
    grid = (gpu.cdiv(x, bm), gpu.cdiv(y, bn))
    parts, span = splits(grid[0] * grid[1], depth, gpu.programs(g.device), bk)
    out = torch.empty((x, y), dtype=g.dtype, device=g.device)
    sums = torch.empty((parts, x, y) if parts > 1 else (1,), dtype=torch.float32, device=g.device)
    locks = torch.zeros(grid[0] * grid[1] if parts > 1 else 1, dtype=torch.int32, device=g.device)
    m, v = moments or (sums, sums)
    with gpu.on(g.device):
        k.project_kernel[(*grid, parts)](
            a, b, m, v, out, sums, locks, x, y, depth, *strides, span, *numbers, dtype=_DTYPES[g.dtype],
            ADAM=moments is not None, SPLITS=parts, PRECISION=gpu.precision(g), BM=bm, BN=bn, BK=bk, num_warps=warps,
            num_stages=stages,
        )  # fmt: skip
    return out


_DTYPES = {
    torch.float32: triton.language.float32,
    torch.float16: triton.language.float16,
    torch.bfloat16: triton.language.bfloat16,
}


def project(g: Tensor, p: Tensor, left: bool) -> Tensor:
    """R = P^T G [r, n] or G P [m, r] in g's dtype (``lowmem::lowrank_project``)."""
    return _project(g, p, left, None, (0.0, 0.0, 1.0, 1.0, 0.0))


def project_adam(
    exp_avg: Tensor, exp_avg_sq: Tensor, g: Tensor, p: Tensor, left: bool, beta1: float, beta2: float, bias1: float,
    bias2: float, eps: float,
) -> Tensor:  # fmt: skip
    """``lowmem::lowrank_project_adam_`` in one launch; moments are fp32 and contiguous."""
    return _project(g, p, left, (exp_avg, exp_avg_sq), (beta1, beta2, bias1, bias2, eps))


def adam(
    exp_avg: Tensor, exp_avg_sq: Tensor, r: Tensor, beta1: float, beta2: float, bias1: float, bias2: float, eps: float
) -> Tensor:
    """``lowmem::lowrank_adam_``; moments are fp32 and contiguous."""
    r = r.contiguous()
    out = torch.empty_like(r)
    with gpu.on(r.device):
        k.adam_kernel[(gpu.cdiv(r.numel(), ADAM_BLOCK),)](
            exp_avg, exp_avg_sq, r, out, r.numel(), beta1, beta2, bias1, bias2, eps, BLOCK=ADAM_BLOCK, num_warps=4
        )
    return out


def update(
    w: Tensor, p: Tensor, n: Tensor, left: bool, alpha: float, decay: float, seed: Tensor | None, *,
    g: Tensor | None = None, f: Tensor | None = None, r: Tensor | None = None, beta: float = 0.0,
) -> None:  # fmt: skip
    """``lowmem::lowrank_update_``; with ``g`` and ``f`` ``lowrank_update_scaled_``, with ``g`` and ``r``
    ``lowrank_update_sign_``. ``w`` has neighbouring elements in a row."""
    arch = gpu.architecture(w.device) or "sm_80"
    first, second = (p, n) if left else (n, p.T)
    first2, second2 = (first, second) if r is None else ((p, r) if left else (r, p.T))
    if (first2.stride(), second2.stride()) != (first.stride(), second.stride()):
        first, second, first2, second2 = (t.contiguous() for t in (first, second, first2, second2))
    rows, columns = w.shape
    rank = first.shape[1]
    strides = (*first.stride(), *second.stride())
    of_g = (0, 0) if g is None else g.stride()
    small = _small(first, (rows, columns, rank), (w.stride(0), *strides, *of_g))
    kind = "none" if g is None else "scaled" if f is not None else "sign"
    bm, bn, bk, warps, stages = update_tile(arch, small, kind)
    with gpu.on(w.device):
        k.update_kernel[(gpu.cdiv(rows, bm), gpu.cdiv(columns, bn))](
            w, w if g is None else g, first, second, first2, second2, w if f is None else f,
            w if seed is None else seed, rows, columns, rank, w.stride(0), *of_g, *strides, alpha, beta, decay,
            dtype=_DTYPES[first.dtype], LEFT=left, RESIDUAL=kind, PRECISION=gpu.precision(first),
            STOCHASTIC=seed is not None and w.dtype is torch.bfloat16, BM=bm, BN=bn, BK=bk, num_warps=warps,
            num_stages=stages,
        )  # fmt: skip
