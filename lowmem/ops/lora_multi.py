"""The ``lora`` family over a batch whose rows belong to different adapters: the operators of :mod:`lowmem.ops.lora`,
each over all adapters in one call.

A batch of ``M`` rows is cut by ``offsets`` ``[J + 1]`` (int64, on x's device): adapter ``j`` owns rows
``order[offsets[j]:offsets[j + 1]]``, or ``offsets[j]:offsets[j + 1]`` where ``order`` is None. Rows outside all of them
see the base alone. The adapters' matrices are stacked: ``a`` ``[R, K]`` and ``b`` ``[N, R]`` with ``R = sum(ranks)``;
``s`` and ``ds`` are ``[M, max(ranks)]``, row ``m`` holding its own adapter's ranks and zeros.

What each operator computes is defined by the loop over adapters below, which is also its kernel (it reads ``offsets``
on the host): adapter ``j`` draws its mask from ``seeds[j]`` with rows counted inside its own segment, so that a row
gets what the single-adapter operator would give it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dispatch import define
from .._dtypes import accumulate_dtype
from .._errors import bad
from ..quant.qtensor import QTensor
from .quant import qmatmul


def _segments(order: Tensor | None, offsets: Tensor, ranks: list[int]) -> Iterator[tuple[int, slice, Any]]:
    """``(j, slice of the stacked ranks, rows)`` of every adapter that owns rows; rows as a slice or an index."""
    ends = offsets.tolist()
    first = 0
    for j, r in enumerate(ranks):
        low, high = ends[j], ends[j + 1]
        if high > low:
            yield j, slice(first, first + r), slice(low, high) if order is None else order[low:high]
        first += r


def _seed(seeds: Tensor | None, j: int, p: float) -> Tensor | None:
    return seeds[j : j + 1] if seeds is not None and p > 0 else None


SHRINK = (
    "(Tensor x, Tensor a, int[] ranks, float[] scales, float[] ps, Tensor? seeds, Tensor? order, Tensor offsets, "
    "bool save_mask) -> (Tensor, Tensor)"
)


def shrink_fake(
    x: Tensor,
    a: Tensor,
    ranks: list[int],
    scales: list[float],
    ps: list[float],
    seeds: Tensor | None,
    order: Tensor | None,
    offsets: Tensor,
    save_mask: bool,
) -> tuple[Tensor, Tensor]:
    """Shapes of ``lowmem::lora_multi_shrink``."""
    words = (x.shape[0], (x.shape[1] + 31) // 32) if save_mask and any(ps) else (0,)
    return x.new_empty(x.shape[0], max(ranks)), x.new_empty(words, dtype=torch.int32)


def shrink_reference(
    x: Tensor,
    a: Tensor,
    ranks: list[int],
    scales: list[float],
    ps: list[float],
    seeds: Tensor | None,
    order: Tensor | None,
    offsets: Tensor,
    save_mask: bool,
) -> tuple[Tensor, Tensor]:
    """``S_m = scale_j * drop_j(x_m) a_j^T`` for every row of adapter j, and the packed keep bits ``[M, ceil(K/32)]``
    (empty without ``save_mask`` or dropout; zero for rows without)."""
    s = x.new_zeros(x.shape[0], max(ranks))
    words = (x.shape[0], (x.shape[1] + 31) // 32) if save_mask and any(ps) else (0,)
    mask = x.new_zeros(words, dtype=torch.int32)
    for j, at, rows in _segments(order, offsets, ranks):
        bits = save_mask and ps[j] > 0
        part, keep = torch.ops.lowmem.lora_shrink(x[rows], a[at], scales[j], ps[j], _seed(seeds, j, ps[j]), 0, bits)
        s[rows, : ranks[j]] = part
        if bits:
            mask[rows] = keep
    return s, mask


EXPAND = (
    "(Tensor(a!) out, Tensor s, Tensor a, int[] ranks, float[] ps, Tensor? mask, Tensor? seeds, Tensor? order, "
    "Tensor offsets) -> ()"
)


def expand_fake(
    out: Tensor,
    s: Tensor,
    a: Tensor,
    ranks: list[int],
    ps: list[float],
    mask: Tensor | None,
    seeds: Tensor | None,
    order: Tensor | None,
    offsets: Tensor,
) -> None:
    """``lowmem::lora_multi_expand_`` writes ``out`` and returns nothing."""


def expand_reference(
    out: Tensor,
    s: Tensor,
    a: Tensor,
    ranks: list[int],
    ps: list[float],
    mask: Tensor | None,
    seeds: Tensor | None,
    order: Tensor | None,
    offsets: Tensor,
) -> None:
    """``out_m += mask_m * (s_m a_j) / (1 - p_j)`` in place for every row of adapter j; ``a`` ``[R, columns of
    out]``."""
    for j, at, rows in _segments(order, offsets, ranks):
        keep = mask[rows] if mask is not None and ps[j] > 0 else None
        seed = None if keep is not None else _seed(seeds, j, ps[j])
        part = out[rows]  # a view for a slice, a copy for an index
        if ps[j] > 0:
            torch.ops.lowmem.lora_masked_expand_(part, s[rows, : ranks[j]], a[at], keep, ps[j], seed, 0, True)
        else:
            part.addmm_(s[rows, : ranks[j]], a[at].to(out.dtype))
        if order is not None:
            out[rows] = part


DY = "(Tensor dy, Tensor b, Tensor s, int[] ranks, float[] scales, Tensor? order, Tensor offsets) -> (Tensor, Tensor)"


def dy_fake(
    dy: Tensor, b: Tensor, s: Tensor, ranks: list[int], scales: list[float], order: Tensor | None, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Shapes of ``lowmem::lora_multi_dy``."""
    return dy.new_empty(s.shape), dy.new_empty(b.shape, dtype=accumulate_dtype(dy.dtype))


def dy_reference(
    dy: Tensor, b: Tensor, s: Tensor, ranks: list[int], scales: list[float], order: Tensor | None, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """``dS_m = scale_j * dy_m b_j`` ``[M, max(ranks)]`` and ``dB_j = dy_j^T s_j``, stacked ``[N, R]``."""
    ds, db = dy.new_zeros(s.shape), dy.new_zeros(b.shape, dtype=accumulate_dtype(dy.dtype))
    for j, at, rows in _segments(order, offsets, ranks):
        ds[rows, : ranks[j]], db[:, at] = torch.ops.lowmem.lora_dy(
            dy[rows], b[:, at], s[rows, : ranks[j]].contiguous(), scales[j]
        )
    return ds, db


DA = (
    "(Tensor ds, Tensor x, int[] ranks, float[] ps, Tensor? mask, Tensor? seeds, Tensor? order, Tensor offsets) "
    "-> Tensor"
)


def da_fake(
    ds: Tensor,
    x: Tensor,
    ranks: list[int],
    ps: list[float],
    mask: Tensor | None,
    seeds: Tensor | None,
    order: Tensor | None,
    offsets: Tensor,
) -> Tensor:
    """Shape of ``lowmem::lora_multi_da``."""
    return x.new_empty(sum(ranks), x.shape[1], dtype=accumulate_dtype(x.dtype))


def da_reference(
    ds: Tensor,
    x: Tensor,
    ranks: list[int],
    ps: list[float],
    mask: Tensor | None,
    seeds: Tensor | None,
    order: Tensor | None,
    offsets: Tensor,
) -> Tensor:
    """``dA_j = ds_j^T drop_j(x_j)``, stacked ``[R, K]`` in the accumulation dtype; zero for an adapter without rows."""
    da = x.new_zeros(sum(ranks), x.shape[1], dtype=accumulate_dtype(x.dtype))
    for j, at, rows in _segments(order, offsets, ranks):
        keep = mask[rows] if mask is not None and ps[j] > 0 else None
        seed = None if keep is not None else _seed(seeds, j, ps[j])
        da[at] = torch.ops.lowmem.lora_da(ds[rows, : ranks[j]].contiguous(), x[rows], keep, ps[j], seed, 0)
    return da


define("lora_multi_shrink", SHRINK, fake=shrink_fake, reference=shrink_reference, cpu=shrink_reference)
define("lora_multi_expand_", EXPAND, fake=expand_fake, reference=expand_reference, cpu=expand_reference)
define("lora_multi_dy", DY, fake=dy_fake, reference=dy_reference, cpu=dy_reference)
define("lora_multi_da", DA, fake=da_fake, reference=da_reference, cpu=da_reference)


class _MultiLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor | None,
        bias: Tensor | None,
        order: Tensor | None,
        offsets: Tensor,
        seeds: Tensor | None,
        settings: tuple[tuple[float, ...], tuple[float, ...]],
        save_mask: bool,
        *factors: Tensor,
    ) -> Tensor:
        ops = torch.ops.lowmem
        a, b = factors[: len(factors) // 2], factors[len(factors) // 2 :]
        scales, ps = settings
        ranks = [one.shape[0] for one in a]
        needs = ctx.needs_input_grad
        need_a, need_b = any(needs[8 : 8 + len(a)]), any(needs[8 + len(a) :])
        rows = x.reshape(-1, x.shape[-1])
        bits = save_mask and any(ps) and (needs[0] or need_a)
        s, mask = ops.lora_multi_shrink(rows, torch.cat(a), ranks, scales, ps, seeds, order, offsets, bits)
        if base is not None:
            y = F.linear(rows, base, bias)
        else:
            y = x.new_zeros(rows.shape[0], b[0].shape[0]) if bias is None else bias.repeat(rows.shape[0], 1)
        none = [0.0] * len(a)
        ops.lora_multi_expand_(y, s, torch.cat([one.T for one in b]), ranks, none, None, None, order, offsets)
        ctx.save_for_backward(
            x if needs[1] or need_a else None,
            base,
            order,
            offsets,
            s if need_b else None,
            mask if bits else None,
            None if bits else seeds,
            *factors,
        )
        ctx.settings, ctx.need = (ranks, scales, ps), (need_a, need_b)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ops = torch.ops.lowmem
        x, base, order, offsets, s, mask, seeds, *factors = ctx.saved_tensors
        a, b = factors[: len(factors) // 2], factors[len(factors) // 2 :]
        ranks, scales, ps = ctx.settings
        (need_a, need_b), needs = ctx.need, ctx.needs_input_grad
        dy = grad.reshape(-1, grad.shape[-1])
        dx = dw = None
        da: Any = [None] * len(a)
        db: Any = [None] * len(a)
        if s is None:
            s = dy.new_zeros(dy.shape[0], max(ranks))
        ds, stacked = ops.lora_multi_dy(dy, torch.cat(b, 1), s, ranks, scales, order, offsets)
        if need_b:
            db = [part.to(one.dtype) for part, one in zip(stacked.split(ranks, 1), b, strict=True)]
        if needs[0]:
            dx = dy.new_zeros(dy.shape[0], a[0].shape[1]) if base is None else dy @ base
            ops.lora_multi_expand_(dx, ds, torch.cat(a), ranks, ps, mask, seeds, order, offsets)
            dx = dx.view(*grad.shape[:-1], dx.shape[1])
        if x is not None:
            rows = x.reshape(-1, x.shape[-1])
            if need_a:
                stacked = ops.lora_multi_da(ds, rows, ranks, ps, mask, seeds, order, offsets)
                da = [part.to(one.dtype) for part, one in zip(stacked.split(ranks), a, strict=True)]
            dw = dy.T @ rows if needs[1] else None
        dbias = dy.sum(0) if needs[2] else None
        return dx, dw, dbias, None, None, None, None, None, *da, *db


def multi_lora_linear(
    x: Tensor,
    base: Tensor | QTensor | None,
    A: Sequence[Tensor],  # noqa: N803
    B: Sequence[Tensor],  # noqa: N803
    scales: Sequence[float],
    offsets: Tensor,
    *,
    order: Tensor | None = None,
    bias: Tensor | None = None,
    ps: Sequence[float] | None = None,
    seeds: Tensor | None = None,
    save_mask: bool = True,
) -> Tensor:
    """:func:`lowmem.ops.lora_linear` where row ``m`` uses the adapter that owns it: ``y_m = base(x_m) + scale_j *
    drop_j(x_m) A_j^T B_j^T``.

    Args:
        x: ``[..., K]``, M rows in all.
        base: ``[N, K]`` in ``x.dtype``, a :class:`lowmem.quant.QTensor` or None; bias: ``[N]`` in ``x.dtype`` or None.
        A, B: J tensors ``[r_j, K]`` and ``[N, r_j]``, each of its own rank.
        scales: J numbers; ps: J drop probabilities (default: none).
        offsets: int64 ``[J + 1]`` on x's device, ascending, within ``[0, M]``: adapter j owns rows
            ``order[offsets[j]:offsets[j + 1]]``; rows in no segment see the base alone.
        order: int64 ``[M]`` permutation of the rows on x's device; None is the rows' own order.
        seeds: int64 ``[J]`` on x's device, where any p > 0. A row's mask is the one that a call of its adapter's rows
            alone would draw under ``seeds[j]``.
        save_mask: as in :func:`lowmem.ops.lora_linear`.

    Returns ``[..., N]``. Saved for backward: ``x``, ``S`` ``[M, max r_j]``, bits or seeds, ``order`` and ``offsets``.
    """
    op = "multi_lora_linear"
    if isinstance(base, QTensor):
        rest = multi_lora_linear(
            x, None, A, B, scales, offsets, order=order, bias=bias, ps=ps, seeds=seeds, save_mask=save_mask
        )
        return qmatmul(x, base).add_(rest)
    count = len(A)
    ps = tuple(ps) if ps is not None else (0.0,) * count
    if count < 1:
        bad(op, "A", "at least one adapter", "none")
    for name, value in (("B", B), ("scales", scales), ("ps", ps)):
        if len(value) != count:
            bad(op, name, f"{count} of them, as of A", len(value))
    if x.dim() < 1 or not x.is_floating_point():
        bad(op, "x", "a floating tensor [..., K]", f"shape {tuple(x.shape)} in {x.dtype}")
    k, n = x.shape[-1], B[0].shape[0] if B[0].dim() == 2 else 0
    for j, (a, b) in enumerate(zip(A, B, strict=True)):
        if a.dim() != 2 or a.shape[0] < 1 or a.shape[1] != k or not a.is_floating_point():
            bad(op, f"A[{j}]", f"a floating tensor [r, {k}]", f"shape {tuple(a.shape)} in {a.dtype}")
        if tuple(b.shape) != (n, a.shape[0]) or not b.is_floating_point():
            bad(op, f"B[{j}]", f"a floating tensor [{n}, {a.shape[0]}]", f"shape {tuple(b.shape)} in {b.dtype}")
        if a.dtype != A[0].dtype or b.dtype != B[0].dtype:
            bad(op, f"A[{j}], B[{j}]", "one dtype for all A and one for all B", f"{a.dtype}, {b.dtype}", kind=TypeError)
        if a.device != x.device or b.device != x.device:
            bad(op, f"A[{j}], B[{j}]", f"device {x.device} (x's)", f"{a.device}, {b.device}")
        if not 0.0 <= ps[j] <= 1.0:
            bad(op, f"ps[{j}]", "a probability in [0, 1]", ps[j])
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        x, base = x.to(dtype), None if base is None else base.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if base is not None and (tuple(base.shape) != (n, k) or base.dtype != x.dtype):
        bad(op, "base", f"[{n}, {k}] in {x.dtype}", f"shape {tuple(base.shape)} in {base.dtype}")
    if bias is not None and (tuple(bias.shape) != (n,) or bias.dtype != x.dtype):
        bad(op, "bias", f"[{n}] in {x.dtype}", f"shape {tuple(bias.shape)} in {bias.dtype}")
    m = x.numel() // k if k else 0
    wanted: list[tuple[str, Tensor | None, int]] = [("offsets", offsets, count + 1)]
    wanted += [("order", order, m)] if order is not None else []
    wanted += [("seeds", seeds, count)] if any(ps) else []
    for name, tensor, size in wanted:
        if tensor is None or tensor.dtype != torch.int64 or tuple(tensor.shape) != (size,) or tensor.device != x.device:
            got = None if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            bad(op, name, f"int64 [{size}] on {x.device}", got)
    if kind == "cpu" and not torch.compiler.is_compiling():
        ends = offsets.tolist()
        if any(low > high for low, high in zip([0, *ends], [*ends, m], strict=True)):
            bad(op, "offsets", f"ascending numbers in [0, {m}]", ends)
    settings = (tuple(float(scale) for scale in scales), tuple(float(p) for p in ps))
    with torch.autocast(kind, enabled=False):
        return _MultiLoRALinear.apply(
            x, base, bias, order, offsets, seeds if any(ps) else None, settings, save_mask, *A, *B
        )
