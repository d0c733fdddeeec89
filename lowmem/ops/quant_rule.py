"""Which of several ways multiplies with a packed weight on a GPU: a rule over the rows of x, kept as data.

``y = x W^T`` with ``x [M, K]`` and ``W [N, K]`` in ``b`` bits:

=========  ================================================================================================
"gemv"     CUDA C++, at most 8 rows: reads ``N K b / 8`` bytes once; ``M N K`` multiply-adds outside tensor cores
"mma"      CUDA C++, at most 64 rows, 16-bit x: the same bytes; products on the tensor cores, ``8 ceil(M / 8)`` rows
           of x whatever M; x is read once for each 64 rows of W
"scratch"  any M: W is dequantized into shared scratch (``N K b / 8`` bytes read, ``2 N K`` written) and read from
           there by the BLAS; also ``dx = dy W``, from scratch in the same row-major order
=========  ================================================================================================

The scratch way moves ``b / 8 + 4`` bytes a weight where the packed ways move ``b / 8``, so that they win while the
bytes of W decide, and lose where the products do. From how many rows on is to be measured; ``MEASURED`` holds, for each
GPU's name, what was, and ``ROWS`` the default for all others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

GEMV_MOST, MMA_MOST = 8, 64
"""Rows that the kernels serve."""


class Rows(NamedTuple):
    """Most rows of x for each way, 0: never."""

    gemv: int
    mma: int


ROWS = Rows(gemv=2, mma=64)
"""Without a measurement. Beyond two rows a multiply-add a weight and row outweighs decoding the weight (four
instructions), which the tensor cores' way does once for all rows."""

MEASURED: dict[str, Rows] = {}
"""By the GPU's name as torch gives it."""


def matmul_way(
    device: str, m: int, k: int, dtype: torch.dtype, transposed: bool, cuda_cpp: bool, rows: Rows | None = None
) -> str:
    """Who multiplies: "gemv", "mma" or "scratch".

    Args:
        device: the GPU's name; m: rows of x (of each expert); k: columns of the weight; dtype: x's.
        transposed: ``x W``, which only the scratch way serves.
        cuda_cpp: ``lowmem/_C_cuda`` is loaded and the weight's bytes start on 16.
        rows: instead of the device's own limits.
    """
    if transposed or not cuda_cpp or dtype not in (torch.float32, torch.float16, torch.bfloat16) or m == 0:
        return "scratch"
    limits = rows or MEASURED.get(device, ROWS)
    tensor_cores = dtype.itemsize == 2 and k % 32 == 0
    if k % 8 == 0 and m <= (limits.gemv if tensor_cores else GEMV_MOST if limits.gemv else 0):
        return "gemv"
    return "mma" if tensor_cores and m <= limits.mma else "scratch"
