"""Trainable scales and zeros of packed weights (PEQA, arXiv 2305.14152): what :func:`lowmem.ops.qmatmul` does where a
:class:`QTensor`'s ``scale`` or ``zero`` requires a gradient.

With ``dW = dy^T x``, ``v = code - zero`` (or the table's value) and a group ``g`` of row ``n``::

    ds[n, g] = sum_{k in g} dW[n, k] v[n, k]          dz[n, g] = -s[n, g] sum_{k in g} dW[n, k]

``dW`` is formed in panels of shared scratch and reduced at once: what leaves is ``N * groups`` numbers, not ``N * K``.

With one scale a row and no trained zero, ``y = s[n] * (x v^T)`` gives ``ds[n] = sum_m dy[m, n] y[m, n] / s[n]``: no
product at all, from ``y`` in the place of ``x``.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from .._dtypes import accumulate_dtype
from ..memory.workspace import WORKSPACE
from ..quant.formats import QuantSpec
from .quant import Maybe, scales_reference

PANEL = 256
"""Rows of dW in scratch at a time, with as many values of codes: ``2 * 256 * K`` fp32 numbers."""

ROWS = 2048
"""Rows of x (or of y) that are widened to fp32 at a time."""

LEAST_SCALE = 2.0**-100
"""Below it a row's output is as good as zero and tells nothing of the scale's gradient, which is then 0."""


def unscaled(spec: QuantSpec) -> int:
    """The spec's code for scales that are plain floats."""
    return spec.code & 511


def scale_grad_panels(
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
    """``lowmem::quant_scale_grad`` in panels of ``PANEL`` rows of dW, summed over ``ROWS`` rows of x at a time."""
    what = QuantSpec.from_code(spec)
    wide = accumulate_dtype(x.dtype)
    groups = what.scale_count(1, k)
    xs, dys = (x, dy) if x.dim() == 3 else (x[None], dy[None])
    experts = len(xs)
    floats = scale.dtype if scale_absmax is None else scale_absmax.dtype
    ones = torch.ones(what.scale_count(row0 + experts * n, k), dtype=floats, device=x.device)  # codes less zeros alone
    ds = torch.zeros(experts, n, groups, dtype=wide, device=x.device)
    sums = torch.zeros(ds.shape if zero is not None else (0,), dtype=wide, device=x.device)
    size = min(PANEL, max(n, 1))
    with (
        WORKSPACE.borrow((size * k,), wide, x.device) as first,
        WORKSPACE.borrow((size * k,), wide, x.device) as second,
    ):
        for expert, start in itertools.product(range(experts), range(0, xs.shape[1], ROWS)):
            part = slice(start, start + ROWS)
            x_part, dy_part = xs[expert][part].to(wide), dys[expert][part]
            for at in range(0, n, size):
                rows = min(size, n - at)
                here = slice(at, at + rows)
                dw, v = first[: rows * k].view(rows, k), second[: rows * k].view(rows, k)
                torch.mm(dy_part[:, here].to(wide).T, x_part, out=dw)
                row = row0 + expert * n + at
                torch.ops.lowmem.quant_dequantize_(v, packed, ones, zero, None, None, None, unscaled(what), k, row, 0)
                if zero is not None:
                    sums[expert, here] += dw.view(rows, groups, -1).sum(-1)
                ds[expert, here] += dw.mul_(v).view(rows, groups, -1).sum(-1)
    shape = (*dy.shape[:-2], n, groups)
    if zero is None:
        return ds.view(shape), sums
    index = torch.arange(row0 * groups, (row0 + experts * n) * groups, device=x.device)
    s = scales_reference(scale, scale_code, scale_absmax, scale_offset, what, index).to(wide).view(ds.shape)
    return ds.view(shape), sums.mul_(s).neg_().view(shape)


def row_scale_grad(dy: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """``ds[n] = sum_m dy[m, n] y[m, n] / scale[n]`` for one scale a row, ``[..., n, 1]``; 0 where a scale is below
    ``LEAST_SCALE``."""
    wide = accumulate_dtype(y.dtype)
    total = torch.zeros((*y.shape[:-2], y.shape[-1]), dtype=wide, device=y.device)
    for at in range(0, y.shape[-2], ROWS):
        total += (dy[..., at : at + ROWS, :].to(wide) * y[..., at : at + ROWS, :]).sum(-2)
    s = scale.to(wide).view(total.shape)
    lost = s.abs() < LEAST_SCALE
    return torch.where(lost, 0.0, total / torch.where(lost, 1.0, s)).unsqueeze(-1)


def saves_output(spec: QuantSpec, x: Tensor, n: int, bias: Maybe, zero_trains: bool) -> bool:
    """Whether the scale's gradient is taken from ``y``: one scale a row, no trained zero, no bias (``y`` is the layer's
    output itself, which what follows mostly keeps too), ``y`` smaller than ``x``, and a dtype with fp32's exponents."""
    one = spec.scale_count(1, x.shape[-1]) == 1 and (not spec.is_table or x.shape[-1] == spec.group_size)
    return one and not zero_trains and bias is None and n < x.shape[-1] and x.dtype != torch.float16


class _ScaledMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Maybe,
        spec: int,
        n: int,
        k: int,
        row0: int,
        packed: Tensor,
        scale: Tensor,
        zero: Maybe,
    ) -> Tensor:
        y = torch.ops.lowmem.quant_matmul(x, packed, scale, zero, None, None, None, spec, n, k, row0, bias, False)
        zero_trains = zero is not None and ctx.needs_input_grad[8]
        ctx.from_y = saves_output(QuantSpec.from_code(spec), x, n, bias, zero_trains)
        ctx.save_for_backward(y if ctx.from_y else x, packed, scale, zero)
        ctx.numbers = (spec, n, k, row0)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        kept, packed, scale, zero = ctx.saved_tensors
        spec, n, k, row0 = ctx.numbers
        weight = (packed, scale, zero, None, None, None, spec, n, k, row0)
        dx = dbias = ds = dz = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.lowmem.quant_matmul(grad, *weight, None, True)
        if ctx.needs_input_grad[1]:
            dbias = grad.sum(tuple(range(grad.dim() - 1)))
        if ctx.needs_input_grad[7] or ctx.needs_input_grad[8]:
            groups = QuantSpec.from_code(spec).scale_count(1, k)
            part = slice(row0 * groups, (row0 + (grad.shape[0] if grad.dim() == 3 else 1) * n) * groups)
            if ctx.from_y:
                found, zeros = row_scale_grad(grad, kept, scale.reshape(-1)[part]), None
            else:
                found, zeros = torch.ops.lowmem.quant_scale_grad(grad, kept, *weight)
            ds = _placed(found, scale, part) if ctx.needs_input_grad[7] else None
            dz = _placed(zeros, zero, part) if ctx.needs_input_grad[8] else None
        return dx, dbias, None, None, None, None, None, ds, dz


def _placed(grad: Any, like: Tensor, part: slice) -> Tensor:
    """``grad`` in ``like``'s shape and dtype, zeros where another expert's scales are."""
    if grad.numel() == like.numel():
        return grad.to(like.dtype).view(like.shape)
    out = torch.zeros_like(like)
    out.view(-1)[part] = grad.reshape(-1).to(like.dtype)
    return out
