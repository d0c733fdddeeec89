"""LoRA on a 2-D convolution: ``y = conv(x, W) + bias + scale * B conv(drop(x), A)``, B a 1x1 convolution (as PEFT).

A is a convolution of r channels with W's kernel, stride, padding and dilation. B mixes channels at each pixel: over
pixels as rows it is the family's expand, in place on the base's output, and its gradients are the family's pass over
dy, wherever the images' memory lets pixels be rows of one matrix (channels last, or one image); elsewhere it is a batch
of GEMMs. Saved for backward: ``x`` as it came, ``S`` and the seed; the dropped-out x is made again and not kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from .._errors import bad
from ._autocast import cast
from .lora import accumulate_dtype
from .lora_drop import kept
from .philox import inv_keep

Pair = tuple[int, int]


def _pixels(t: Tensor) -> Tensor | None:
    """``t`` ``[B, C, H, W]`` as a view ``[B H W, C]`` of its pixels, or None where its memory does not allow it."""
    one = t.shape[0] == 1 and t.is_contiguous()
    if not one and not t.is_contiguous(memory_format=torch.channels_last):
        return None
    return t.movedim(1, -1).view(-1, t.shape[1])


def _expand_(y: Tensor, s: Tensor, b: Tensor) -> None:
    rows = _pixels(y)
    if rows is not None:
        s_rows = s.movedim(1, -1).reshape(-1, s.shape[1])
        torch.ops.lowmem.lora_masked_expand_(rows, s_rows, b.t(), None, 0.0, None, 0, True)
    else:
        y.view(*y.shape[:2], y.shape[2] * y.shape[3]).baddbmm_(b.to(y.dtype).expand(y.shape[0], *b.shape), s.flatten(2))


def _dy(dy: Tensor, b: Tensor, s: Tensor | None, factor: float) -> tuple[Tensor, Tensor | None]:
    """``dS = factor * B^T dy`` ``[B, r, H, W]``, and ``dB = dy S^T`` ``[N, r]`` in the accumulation dtype."""
    size = (dy.shape[0], b.shape[1], *dy.shape[2:])
    rows = _pixels(dy)
    if rows is not None and s is not None:
        ds, db = torch.ops.lowmem.lora_dy(rows, b, s.movedim(1, -1).reshape(-1, s.shape[1]), factor)
        return ds.view(size[0], *size[2:], size[1]).movedim(-1, 1), db
    flat = dy.flatten(2)
    ds = torch.matmul(b.to(dy.dtype).t(), flat).mul_(factor).view(size)
    if s is None:
        return ds, None
    return ds, torch.bmm(flat, s.flatten(2).transpose(1, 2)).sum(0, dtype=accumulate_dtype(dy.dtype))


class _LoRAConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        seed: Tensor | None,
        scale: float,
        p: float,
        geometry: tuple[Pair, Pair, Pair],
    ) -> Tensor:
        need_x, need_w, _, need_a, need_b = ctx.needs_input_grad[:5]
        y = torch.conv2d(x, base, bias, *geometry)
        s = torch.conv2d(_dropped(x, p, seed), a.to(x.dtype), None, *geometry).mul_(scale * inv_keep(p))
        _expand_(y, s, b.flatten(1))
        keep_x = x if need_w or need_a else None
        ctx.save_for_backward(keep_x, base, a, b, s if need_b else None, seed if need_x or need_a else None)
        ctx.settings = (scale * inv_keep(p), p, geometry, x.shape)
        return y

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        x, base, a, b, s, seed = ctx.saved_tensors
        factor, p, geometry, size = ctx.settings
        need_x, need_w, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        dy = upstream[0]
        dx = dw = da = db = None
        ds: Any = None
        if need_b or need_x or need_a:
            ds, db = _dy(dy, b.flatten(1), s, factor)
        if need_x:
            dx = conv2d_input(size, base, dy, *geometry)
            through_a = conv2d_input(size, a.to(dy.dtype), ds, *geometry)
            if p > 0:
                through_a = torch.where(_keep(size, p, seed, dy.dtype), through_a, 0)
            dx = dx.add_(through_a)
        if need_a:
            da = conv2d_weight(_dropped(x, p, seed), a.shape, ds, *geometry).to(a.dtype)
        if need_w:
            dw = conv2d_weight(x, base.shape, dy, *geometry)
        dbias = dy.sum((0, 2, 3)) if need_bias else None
        return dx, dw, dbias, da, None if db is None else db.view(b.shape).to(b.dtype), None, None, None, None


def _keep(size: torch.Size, p: float, seed: Any, dtype: torch.dtype) -> Tensor:
    return kept(size[0] * size[1], size[2] * size[3], p, seed, 0, dtype).view(size)


def _dropped(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    return torch.where(_keep(x.shape, p, seed, x.dtype), x, 0) if p > 0 else x


def _pair(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def lora_conv2d(
    x: Tensor,
    base: Tensor,
    A: Tensor,  # noqa: N803 (the field's names)
    B: Tensor,  # noqa: N803
    scale: float,
    *,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``y = conv(x, base) + bias + scale * B conv(drop_p(x), A)`` (LoRA, arXiv 2106.09685, on a convolution as PEFT).

    Args:
        x: ``[batch, C, H, W]`` or ``[C, H, W]``, float, any memory format.
        base: ``[N, C, kh, kw]`` in x's dtype; bias: ``[N]`` in x's dtype.
        A: ``[r, C, kh, kw]``; B: ``[N, r, 1, 1]``; any r >= 1, any floating dtype (rounded to x's).
        stride, padding, dilation: as in ``F.conv2d``, for base and A; padding may be "same" or "valid".
        p: drop probability of A's input, in 1/65536ths.
        seed: int64 of one element on x's device, required where ``p > 0``. Element ``(b, c, h, w)`` takes place
            ``(b C + c, h W + w)`` of the family's random map.

    Returns ``[batch, N, H', W']`` in x's dtype. Under ``torch.autocast`` x, base and bias are cast first, as
    ``F.conv2d`` does. Saved for backward: ``x``, ``S`` ``[batch, r, H', W']`` and the seed; of these only ``x`` where A
    alone trains and only ``S`` where B alone does.

    Raises ValueError or TypeError ``lowmem.lora_conv2d: <argument>: expected ..., got ...`` before anything is
    computed.
    """
    op = "lora_conv2d"
    if x.dim() not in (3, 4) or not x.is_floating_point():
        bad(op, "x", "a floating tensor [batch, C, H, W] or [C, H, W]", f"shape {tuple(x.shape)} in {x.dtype}")
    x, base, bias = cast(x, base, bias)
    channels = x.shape[-3]
    if base.dim() != 4 or base.shape[1] != channels or base.dtype != x.dtype:
        got = f"shape {tuple(base.shape)} in {base.dtype}"
        bad(op, "base", f"[N, {channels}, kh, kw] in {x.dtype}", got, hint="groups are not served")
    n, kernel = base.shape[0], tuple(base.shape[2:])
    if A.dim() != 4 or A.shape[0] < 1 or tuple(A.shape[1:]) != (channels, *kernel) or not A.is_floating_point():
        bad(op, "A", f"a floating tensor [r, {channels}, {kernel[0]}, {kernel[1]}]", f"shape {tuple(A.shape)}")
    if tuple(B.shape) != (n, A.shape[0], 1, 1) or not B.is_floating_point():
        bad(op, "B", f"a floating tensor [{n}, {A.shape[0]}, 1, 1]", f"shape {tuple(B.shape)} in {B.dtype}")
    if bias is not None and (tuple(bias.shape) != (n,) or bias.dtype != x.dtype):
        bad(op, "bias", f"[{n}] in {x.dtype}", f"shape {tuple(bias.shape)} in {bias.dtype}")
    for name, t in (("base", base), ("A", A), ("B", B), ("bias", bias)):
        if t is not None and t.device != x.device:
            bad(op, name, f"device {x.device} (x's)", f"device {t.device}")
    if not 0.0 <= p <= 1.0:
        bad(op, "p", "a probability in [0, 1]", p)
    if p > 0 and (seed is None or seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device):
        got = "None" if seed is None else f"{seed.dtype} of {seed.numel()} on {seed.device}"
        bad(op, "seed", f"int64 of one element on {x.device}, since p > 0", got)
    dilated = _pair(dilation)
    if isinstance(padding, str):
        if padding not in ("same", "valid") or (padding == "same" and _pair(stride) != (1, 1)):
            bad(op, "padding", "numbers, 'valid', or 'same' with stride 1", repr(padding))
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilated, kernel, strict=True)]
        extra = [t % 2 for t in total]
        if any(extra):  # an even kernel: one more at the end, as torch has it
            x = F.pad(x, (0, extra[1], 0, extra[0]))
        padded = (total[0] // 2, total[1] // 2)
    else:
        padded = _pair(padding)
    geometry = (_pair(stride), padded, dilated)
    batched = x if x.dim() == 4 else x.unsqueeze(0)
    with torch.autocast(x.device.type, enabled=False):
        y = _LoRAConv2d.apply(batched, base, bias, A, B, seed if p > 0 else None, float(scale), float(p), geometry)
    return y if x.dim() == 4 else y.squeeze(0)
