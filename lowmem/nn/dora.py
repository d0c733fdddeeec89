"""The row norms that DoRA (arXiv 2402.09353) divides by, without a dense copy of the merged weight."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dtypes import accumulate_dtype
from ..ops.quant import qmatmul
from ..quant import QTensor, dequantize


@torch.no_grad()
def row_norms_squared(weight: Tensor | QTensor) -> Tensor:
    """``|W_n|^2`` of every row of ``weight`` ``[N, K]``: ``[N]`` in the accumulation dtype."""
    if isinstance(weight, QTensor):
        weight = dequantize(weight)
    return torch.linalg.vector_norm(weight, dim=1, dtype=accumulate_dtype(weight.dtype)).square_()


@torch.no_grad()
def merged_row_norms(weight: Tensor | QTensor, squared: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``|W_n + (B A)_n|`` of every row, ``[N]`` in ``a``'s dtype, from ``squared = |W_n|^2``.

    ``|W_n + b_n A|^2 = |W_n|^2 + 2 b_n . (A W^T)_n + b_n (A A^T) b_n^T``: one GEMM of rank r over ``W`` ``[N, K]`` and
    ``[N, r]`` numbers in place of the ``[N, K]`` product. ``a`` ``[r, K]`` and ``b`` ``[N, r]`` (scale and gate folded
    in) are in the accumulation dtype; the result is at least the smallest normal number, so that a zero row divides to
    zero.
    """
    low = a.to(weight.dtype)
    cross = (qmatmul(low, weight).T if isinstance(weight, QTensor) else weight @ low.T).to(a.dtype)
    total = squared + (b * (2.0 * cross + b @ (a @ a.T))).sum(1)
    return total.clamp_min_(0.0).sqrt_().clamp_min_(torch.finfo(a.dtype).tiny)
