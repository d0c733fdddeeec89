"""A linear layer whose products run in FP8: E4M3 forward, E5M2 for what arrives from above, the input kept in FP8.

``y = x W^T + b`` with ``x [M, K]``, ``W [N, K]``. A matrix is divided by a scale (fp32: its largest magnitude over the
format's largest number) and rounded; products accumulate in fp32 inside ``torch._scaled_mm`` and leave in x's dtype::

    "tensor"  one scale a matrix             dx = dy8 W8, dW = dy8^T x8, both in FP8
    "row"     one scale a row of x and dy    y, dx in FP8 (W by rows, then by columns); dW = dy^T (x8 decoded), since
              and W, or a column of W        scales of rows do not come out of a sum over rows

Kept for backward: x8 and its scales, ``M K + 4`` or ``M (K + 4)`` bytes, and W itself.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .._dtypes import accumulate_dtype
from .._errors import bad
from .activation import refuse_second

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SCALINGS = ("tensor", "row")
HALF = (torch.bfloat16, torch.float16)


def to_fp8(x: Tensor, dtype: torch.dtype, dim: int | None) -> tuple[Tensor, Tensor]:
    """``x / scale`` in ``dtype``, and the scale fp32: of the whole matrix (``dim`` None, no dimensions), or one for
    each row (``dim`` 1, ``[M, 1]``) or column (``dim`` 0, ``[1, K]``). An x of zeros has scale 1. A NaN or an infinity
    makes its scale so, and with it every product that the scale takes part in."""
    wide = x.float()
    most = torch.linalg.vector_norm(wide, float("inf"), dim=dim, keepdim=dim is not None) if x.numel() else (
        wide.new_zeros(() if dim is None else [1 if i == dim else n for i, n in enumerate(x.shape)]))  # fmt: skip
    largest = torch.finfo(dtype).max
    scale = torch.where(most == 0, 1.0, most / largest).clamp(min=torch.finfo(torch.float32).tiny)
    # casts saturate on some devices and not on others
    return (wide / scale).clamp(-largest, largest).to(dtype), scale


def _served(a: Tensor, b: Tensor, scales: tuple[Tensor, Tensor], out: torch.dtype) -> bool:
    """Whether ``torch._scaled_mm`` takes the product: on the CPU always; on CUDA devices that have FP8 (8.9 and newer)
    sizes of 16, and scales of rows for bf16 results."""
    if not (a.numel() and b.numel()):
        return False
    if a.device.type == "cpu":
        return True
    if a.device.type != "cuda" or torch.cuda.get_device_capability(a.device) < (8, 9):
        return False
    sixteens = all(size % 16 == 0 for size in (a.shape[1], b.shape[1]))
    return sixteens and (scales[0].dim() == 0 or out == torch.bfloat16)


def scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out: torch.dtype) -> Tensor:
    """``(scale_a a) (scale_b b)`` in ``out``, a ``[M, K]``, b ``[K, N]``, both FP8: by ``torch._scaled_mm`` where it
    serves, else by :func:`scaled_mm_reference`."""
    if not _served(a, b, (scale_a, scale_b), out):
        return scaled_mm_reference(a, b, scale_a, scale_b, out)
    if b.stride(0) != 1:  # cuBLAS wants the second operand by columns
        b = b.t().contiguous().t()
    return torch._scaled_mm(a.contiguous(), b, scale_a, scale_b, out_dtype=out)


def scaled_mm_reference(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out: torch.dtype) -> Tensor:
    """The same in fp32 (fp64 for fp64) from the decoded matrices, rounded once."""
    acc = accumulate_dtype(out)
    return ((a.to(acc) * scale_a.to(acc)) @ (b.to(acc) * scale_b.to(acc))).to(out)


class _FP8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scaling: str) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        dim = None if scaling == "tensor" else 1
        x8, sx = to_fp8(rows, E4M3, dim)
        w8, sw = to_fp8(weight, E4M3, dim)
        y = scaled_mm(x8, w8.t(), sx, sw.t() if dim else sw, x.dtype)
        need_w = ctx.needs_input_grad[1]
        ctx.save_for_backward(weight, *((x8, sx) if need_w else ()))
        ctx.scaling, ctx.bias_dtype = scaling, None if bias is None else bias.dtype
        return (y if bias is None else y.add_(bias.to(y.dtype))).view(*x.shape[:-1], y.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        refuse_second("fp8_linear")
        weight, *kept = ctx.saved_tensors
        dy = grad.reshape(-1, grad.shape[-1])
        by_row = ctx.scaling == "row"
        dx = dw = db = None
        need_x, need_w, need_b, _ = ctx.needs_input_grad
        dy8, sdy = to_fp8(dy, E5M2, 1 if by_row else None)
        if need_x:
            w8, sw = to_fp8(weight, E4M3, 0 if by_row else None)
            dx = scaled_mm(dy8, w8, sdy, sw, dy.dtype).view(*grad.shape[:-1], weight.shape[1])
        if need_w:
            x8, sx = kept
            if by_row:
                dw = dy.t() @ (x8.to(torch.float32) * sx).to(dy.dtype)
            else:
                dw = scaled_mm(dy8.t(), x8, sdy, sx, dy.dtype)
            dw = dw.to(weight.dtype)
        if need_b:
            db = dy.sum(0, dtype=accumulate_dtype(dy.dtype)).to(ctx.bias_dtype)
        return dx, dw, db, None


def fp8_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, scaling: Literal["tensor", "row"] = "tensor"
) -> Tensor:
    """``x weight^T + bias`` with products in FP8 (E4M3; E5M2 for the gradient from above), x kept in FP8.

    Args:
        x: ``[..., K]``, bf16, fp16 or fp32. weight: ``[N, K]`` in x's dtype. bias: ``[N]``, added in x's dtype.
        scaling: one fp32 scale a matrix, or one a row (see the module's head).

    An element of x or weight is off by at most ``max(1/16 of it, scale / 1024)``, of dy by ``max(1/8, scale 2^-17)``.
    The error of y is thus at most about ``(1/16 + 1/16 + 1/256) |x| |W|^T``. NaN and infinities make everything NaN
    that shares their scale.

    Raises ValueError or TypeError ``lowmem.fp8_linear: <argument>: expected ..., got ...``.
    """
    op = "fp8_linear"
    if scaling not in SCALINGS:
        bad(op, "scaling", "'tensor' or 'row'", repr(scaling))
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype in (torch.float32, *HALF):
        dtype = torch.get_autocast_dtype(kind)
        x, weight = x.to(dtype), weight.to(dtype)
    for name, t in (("x", x), ("weight", weight)):
        if t.dtype not in (torch.float32, *HALF):
            bad(op, name, "float32, bfloat16 or float16", t.dtype, kind=TypeError)
    if x.dim() < 1 or x.shape[-1] < 1:
        bad(op, "x", "shape [..., K] with K >= 1", f"shape {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        bad(op, "weight", f"shape [N, {x.shape[-1]}]", f"shape {tuple(weight.shape)}")
    if weight.dtype != x.dtype or weight.device != x.device:
        got = f"{weight.dtype} on {weight.device}"
        bad(op, "weight", f"{x.dtype} on {x.device} (x's)", got, kind=TypeError)
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        bad(op, "bias", f"shape [{weight.shape[0]}]", f"shape {tuple(bias.shape)}")
    with torch.autocast(kind, enabled=False):
        return _FP8Linear.apply(x, weight, bias, scaling)
