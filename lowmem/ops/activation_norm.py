"""RMSNorm and LayerNorm of the ``activation`` family (formulas and forms: activation.py).

``x [M, K]``, sums along K; all arithmetic in fp32 (fp64 for fp64), one rounding of each result::

    RMSNorm    n = x rstd,            rstd = (mean x^2 + eps)^-1/2             y = n w (+ b)
    LayerNorm  n = (x - mean) rstd,   rstd = (mean (x - mean)^2 + eps)^-1/2    y = n w + b
    backward   dn = dy w,  dx = rstd (dn - [mean dn] - n mean(dn n)) (+ dsum),  dw = sum_rows dy n,  db = sum_rows dy

The bracket is LayerNorm's alone. With a residual the norm reads ``x + residual`` (rounded to x's dtype), returns that
sum too and adds its gradient ``dsum`` in the same pass. Form 1 keeps ``n`` in FP8 groups, whose values backward and the
next layer both need.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._dispatch import define
from .._dtypes import accumulate_dtype
from .._errors import bad
from .activation import check_like, check_matrix, check_save, launcher, refuse_second
from .activation_saved import FORMS, FP8, Recipe, offer, pack_reference, packed_bytes, unpack_reference

NORM_SAVES = ("bf16", "fp8", "recompute")

# --------------------------------------------------------------------------------------------------------------- norms

NORM = (
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool center, int form) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
Four = tuple[Tensor, Tensor, Tensor, Tensor]


def norm_fake(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, center: bool, form: int
) -> Four:
    """Shapes of ``lowmem::norm_forward``."""
    m, k = x.shape
    stats = x.new_empty((m, 2 if center else 1), dtype=accumulate_dtype(x.dtype))
    packed = x.new_empty(packed_bytes(m, k) if form == FP8 else 0, dtype=torch.uint8)
    return x.new_empty(m, k), x.new_empty((0,) if residual is None else (m, k)), packed, stats


def norm_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, center: bool, form: int
) -> Four:
    """``(y [M, K], x + residual or empty, n in FP8 groups or empty, stats [M, 1] = rstd or [M, 2] = mean, rstd)``;
    RMSNorm, or with ``center`` LayerNorm. ``weight`` and ``bias`` ``[K]`` may be of another floating dtype."""
    acc = accumulate_dtype(x.dtype)
    summed = x.new_empty(0) if residual is None else x + residual
    wide = (x if residual is None else summed).to(acc)
    mean = wide.mean(1, keepdim=True) if center else None
    wide = wide if mean is None else wide - mean
    rstd = torch.rsqrt(wide.square().mean(1, keepdim=True) + eps)
    n = wide * rstd
    y = n if weight is None else n * weight.to(acc)
    y = y if bias is None else y + bias.to(acc)
    packed = pack_reference(n) if form == FP8 else x.new_empty(0, dtype=torch.uint8)
    return y.to(x.dtype).contiguous(), summed.contiguous(), packed, rstd if mean is None else torch.cat([mean, rstd], 1)


NORM_GRAD = (
    "(Tensor dy, Tensor? dsum, Tensor saved, Tensor? weight, Tensor stats, bool center, int form, bool need_dw, "
    "bool need_db) -> (Tensor, Tensor, Tensor)"
)


def norm_grad_fake(
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
    """Shapes of ``lowmem::norm_backward``."""
    k, acc = dy.shape[1], accumulate_dtype(dy.dtype)
    dw, db = (dy.new_empty(k if need else 0, dtype=acc) for need in (need_dw, need_db))
    return dy.new_empty(dy.shape[0], k), dw, db


def norm_grad_reference(
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
    """``(dx [M, K], dw [K], db [K])``, the sums in the accumulation dtype (empty where not needed); ``saved`` is x
    (form 0) or n in FP8 groups."""
    m, k = dy.shape
    acc = accumulate_dtype(dy.dtype)
    rstd = stats[:, -1:]
    if form == FP8:
        n = unpack_reference(saved, m, k, acc)
    else:
        n = saved.to(acc) * rstd if not center else (saved.to(acc) - stats[:, :1]) * rstd
    wide = dy.to(acc)
    dn = wide if weight is None else wide * weight.to(acc)
    dx = dn - n * (dn * n).mean(1, keepdim=True)
    if center:
        dx = dx - dn.mean(1, keepdim=True)
    dx = dx * rstd
    dx = (dx if dsum is None else dx + dsum.to(acc)).to(dy.dtype).contiguous()
    none = dy.new_empty(0, dtype=acc)
    return dx, (wide * n).sum(0) if need_dw else none, wide.sum(0) if need_db else none.clone()


define("norm_forward", NORM, fake=norm_fake, reference=norm_reference, cpp=("cpu",), cuda=launcher("norm_forward"))
define(
    "norm_backward",
    NORM_GRAD,
    fake=norm_grad_fake,
    reference=norm_grad_reference,
    cpp=("cpu",),
    cuda=launcher("norm_backward"),
)


# --------------------------------------------------------------------------------------------------- autograd


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        center: bool,
        form: int,
        share: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        k = x.shape[-1]
        second = None if residual is None else residual.reshape(-1, k)
        y, summed, packed, stats = torch.ops.lowmem.norm_forward(
            x.reshape(-1, k), second, weight, bias, eps, center, form
        )
        y, summed = y.view(x.shape), summed.view(x.shape if residual is not None else (0,))
        kept = packed if form == FP8 else y if share else x if residual is None else summed
        ctx.save_for_backward(kept, weight, bias if share else None, stats)
        ctx.options = (center, form, share, residual is not None)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (weight, bias))
        ctx.mark_non_differentiable(packed, *([] if residual is not None else [summed]))
        ctx.set_materialize_grads(False)
        return y, summed, packed

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None, _: Any) -> Any:
        refuse_second("norm")
        saved, weight, bias, stats = ctx.saved_tensors
        center, form, share, has_residual = ctx.options
        dsum = dsum if has_residual else None
        shape = dy.shape if dy is not None else dsum.shape if dsum is not None else None
        if shape is None:
            return (None,) * 8
        k = shape[-1]
        if dy is None:  # only the sum was used
            assert dsum is not None
            return dsum, dsum if has_residual else None, *(None,) * 6
        if share:
            saved, stats = _from_output(saved.reshape(-1, k), weight, bias, stats)
        dx, dw, db = torch.ops.lowmem.norm_backward(
            dy.reshape(-1, k),
            dsum.reshape(-1, k) if dsum is not None else None,
            saved if form == FP8 else saved.reshape(-1, k),
            weight,
            stats,
            center,
            form,
            ctx.needs_input_grad[2],
            ctx.needs_input_grad[3],
        )
        dx = dx.view(shape)
        dw, db = (
            t.to(dtype) if need else None
            for t, dtype, need in zip((dw, db), ctx.dtypes, ctx.needs_input_grad[2:4], strict=True)
        )
        return dx, dx if has_residual else None, dw, db, None, None, None, None


def _from_output(y: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor) -> tuple[Tensor, Tensor]:
    """``x - mean`` from ``y = n w + b``, and the statistics for a mean of zero."""
    n = y.to(stats.dtype)
    n = n if bias is None else n - bias.to(n.dtype)
    if weight is not None:
        n = torch.where(weight == 0, 0, n / weight.to(n.dtype))
    mean = torch.zeros_like(stats)
    return (n / stats[:, -1:]).to(y.dtype), torch.cat([mean[:, 1:], stats[:, -1:]], 1)


# ------------------------------------------------------------------------------------------- public functions


def _norm(
    op: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    save: str,
    share_output: bool,
    center: bool,
) -> Any:
    check_save(op, save, NORM_SAVES)
    check_matrix(op, "x", x)
    if share_output and save != "bf16":
        bad(op, "share_output", "save='bf16' (the other forms keep no output to share)", f"save={save!r}")
    if not (math.isfinite(eps) and eps >= 0):
        bad(op, "eps", "a finite number >= 0", eps)
    if residual is not None:
        check_like(op, "residual", residual, x)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if not t.is_floating_point() or t.device != x.device:
            bad(op, name, f"a floating dtype on {x.device}", f"{t.dtype} on {t.device}", kind=TypeError)
        if tuple(t.shape) != (x.shape[-1],):
            bad(op, name, f"shape [{x.shape[-1]}]", f"shape {tuple(t.shape)}")
    y, summed, packed = _Norm.apply(x, residual, weight, bias, eps, center, FORMS[save], share_output)
    if save == "fp8":
        offer(y, Recipe("norm_fp8", (packed, weight, bias)))
    elif save == "recompute":
        offer(y, Recipe("norm", (x if residual is None else summed, weight, bias), (eps, float(center))))
    return y if residual is None else (y, summed)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    save: str = "bf16",
    share_output: bool = False,
) -> Any:
    """``y = x (mean x^2 + eps)^-1/2 * weight (+ bias)`` over the last dimension (RMSNorm, arXiv 1910.07467), in fp32
    (fp64 for fp64) with one rounding.

    Args:
        x: ``[..., K]``, float. weight, bias: ``[K]``, any floating dtype, or None.
        residual: x's shape and dtype; the norm is then that of ``x + residual``, which is returned too.
        save: what backward keeps besides the 4 bytes a row of rstd: ``"bf16"`` x (or the sum) as it came; ``"fp8"``
            the normalised rows in FP8 groups, 1.0078 bytes an element; ``"recompute"`` x as it came. The last two offer
            the output to be computed again, so that a consumer keeps no copy of it (activation_saved.py).
        share_output: with ``save="bf16"``, keep y in place of x (MS-RMSNorm, arXiv 2406.16282): the next linear layer
            keeps y anyway. Backward divides by weight; where a weight is exactly zero, its channel is taken as n = 0.

    Returns y, or ``(y, x + residual)``. dx is exact to rounding except with ``"fp8"``, where n has the groups' error:
    an error of dx of at most ``rstd (|mean(dn n)| |n - n8| + |n8| |mean(dn (n - n8))|)``.

    Raises ValueError or TypeError ``lowmem.rms_norm: <argument>: expected ..., got ...``.
    """
    return _norm("rms_norm", x, weight, bias, residual, eps, save, share_output, False)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    save: str = "bf16",
    share_output: bool = False,
) -> Any:
    """``y = (x - mean) (mean (x - mean)^2 + eps)^-1/2 * weight + bias`` over the last dimension (arXiv 1607.06450);
    arguments, bytes (8 a row for mean and rstd) and errors as for :func:`rms_norm`."""
    return _norm("layer_norm", x, weight, bias, residual, eps, save, share_output, True)
