"""What DoRA (arXiv 2402.09353) adds to a LoRA layer: the row norms that it divides by, with no dense copy of the merged
weight, and the factor on each column of the output."""

from __future__ import annotations

from typing import Any

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
def merged_row_norms(weight: Tensor | QTensor, squared: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``|W_n + (B diag(c) A)_n|`` of every row, ``[N]`` in the accumulation dtype, from ``squared = |W_n|^2``.

    With ``b = B diag(c)``, ``|W_n + b_n A|^2 = |W_n|^2 + 2 b_n . (A W^T)_n + b_n (A A^T) b_n^T``: the family's shrink
    over ``W`` ``[N, K]``, in four blocks of rows. ``a`` ``[r, K]`` and ``b`` ``[N, r]`` are in any floating dtype,
    ``c`` ``[r]`` (scale and gate) in squared's. The temporaries are ``N / 4`` rows of r numbers (and ``a`` in squared's
    dtype where it has another). The result is at least the smallest normal number: a zero row divides to zero.
    """
    wide = a.to(squared.dtype)
    gram = (wide @ wide.T) * c * c[:, None]
    del wide
    total = squared.clone()
    if isinstance(weight, QTensor):
        crossed = qmatmul(a.to(weight.dtype), weight).t()
    rows = -(-weight.shape[0] // 4)
    for start in range(0, weight.shape[0], rows):
        block = slice(start, start + rows)
        part = b[block].to(squared.dtype)
        if isinstance(weight, QTensor):
            inner = crossed[block].to(squared.dtype)
        else:
            inner = torch.ops.lowmem.lora_shrink(weight[block], a, 1.0, 0.0, None, 0, False)[0].to(squared.dtype)
        inner.mul_(c)
        inner.mul_(2.0).addmm_(part, gram)
        total[block] += inner.mul_(part).sum(1)
    return total.clamp_min_(0.0).sqrt_().clamp_min_(torch.finfo(total.dtype).tiny)


class _Scaled(torch.autograd.Function):
    """``y * factor + bias``. Backward makes one tensor of y's size beside dy: the product for the factor's gradient and
    then dx stand in it; and the sum over rows is a GEMM, where torch's reduction over the outer dimension took longer
    than the rest together (docs/performance.md)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
        narrow = factor.to(y.dtype)
        ctx.save_for_backward(y, narrow)
        ctx.dtype = factor.dtype
        return y * narrow if bias is None else torch.addcmul(bias.to(y.dtype), y, narrow)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        y, narrow = ctx.saved_tensors
        dy, n = upstream[0], narrow.shape[0]
        scratch = dy * y
        dfactor = None
        if ctx.needs_input_grad[1]:
            rows = scratch.reshape(-1, n)
            dfactor = (rows.new_ones(1, rows.shape[0]) @ rows)[0].to(ctx.dtype)
        dbias = dy.reshape(-1, n).sum(0) if ctx.needs_input_grad[2] else None
        return torch.mul(dy, narrow, out=scratch), dfactor, dbias


def scaled(y: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """``y * factor + bias`` for ``y`` ``[..., N]``, ``factor`` and ``bias`` ``[N]`` of any floating dtype, in y's
    dtype."""
    return _Scaled.apply(y, factor, bias)
