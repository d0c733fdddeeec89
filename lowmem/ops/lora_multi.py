"""The ``lora`` family over a batch whose rows belong to different adapters: the operators of :mod:`lowmem.ops.lora`,
each over all adapters in one call.

A batch of ``M`` rows is cut by ``offsets`` ``[J + 1]`` (int64, on x's device): adapter ``j`` owns rows
``order[offsets[j]:offsets[j + 1]]``, or ``offsets[j]:offsets[j + 1]`` where ``order`` is None. Rows outside all of them
see the base alone. ``a`` and ``b`` are lists of ``J`` matrices ``[r_j, K]`` and ``[N, r_j]``; ``s`` and ``ds`` are
``[M, max r_j]``, row ``m`` holding its own adapter's ranks and zeros. Scales and drop probabilities come as ``table``
(:func:`adapter_table`), a tensor, so that no operator takes a number that a step may change.

What each operator computes is defined by the loop over adapters below (it reads ``offsets`` on the host): adapter ``j``
draws its mask from ``seeds[j]`` with rows counted inside its own segment, so that a row gets what the single-adapter
operator would give it. ``csrc/cpu/lora_multi.cpp`` serves the CPU; ``triton_kernels/lora_multi.py`` serves GPUs, one
launch a pass over all adapters and no host sync: which adapter a block of rows belongs to is worked out on the device.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dispatch import define
from .._dtypes import accumulate_dtype
from .._errors import bad
from ..quant.qtensor import QTensor
from .lora import _below_autograd, _launcher
from .philox import inv_keep, threshold
from .quant import qmatmul

FIRST, RANK, THRESHOLD, SCALE, INV_KEEP, SCALE_INV_KEEP = range(6)
"""Columns of :func:`adapter_table`."""


def _bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _number(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0]


def _build_table(ranks: tuple[int, ...], scales: tuple[float, ...], ps: tuple[float, ...], device: Any) -> Tensor:
    rows, first = [], 0
    for r, scale, p in zip(ranks, scales, ps, strict=True):
        keep = inv_keep(p)
        rows.append((first, r, threshold(p), _bits(scale), _bits(keep), _bits(scale * keep)))
        first += r
    table = torch.tensor(rows, dtype=torch.int64, device="cpu")
    if torch.device(device).type == "cpu":
        return table
    return table.pin_memory().to(device, non_blocking=True)  # a copy from pageable memory would wait for the device


@lru_cache(maxsize=4096)
def _kept_table(ranks: tuple[int, ...], scales: tuple[float, ...], ps: tuple[float, ...], device: Any) -> Tensor:
    with torch.inference_mode(False):  # kept, and saved for backward later
        return _build_table(ranks, scales, ps, device)


def adapter_table(ranks: tuple[int, ...], scales: tuple[float, ...], ps: tuple[float, ...], device: Any) -> Tensor:
    """int64 ``[J, 6]`` on ``device``: row j holds adapter j's first row in the stacked ranks, its rank, the 16-bit keep
    threshold of ``p_j`` (0: no dropout), and the bits of the fp64 numbers ``scale_j``, ``1 / (1 - p_j)`` and their
    product. Kept: the same numbers give the same tensor, made once and without a host sync."""
    if torch._C._len_torch_dispatch_stack():  # under a mode (fake tensors, for one) the tensor is that mode's
        return _build_table(ranks, scales, ps, device)
    return _kept_table(ranks, scales, ps, device)


TABLE = "(int[] ranks, float[] scales, float[] ps, Tensor like) -> Tensor"


def table_fake(ranks: list[int], scales: list[float], ps: list[float], like: Tensor) -> Tensor:
    """Shape of ``lowmem::lora_multi_table``."""
    return like.new_empty(len(ranks), 6, dtype=torch.int64)


def table_reference(ranks: list[int], scales: list[float], ps: list[float], like: Tensor) -> Tensor:
    """A copy of :func:`adapter_table` on ``like``'s device: for compiled graphs, whose numbers may be symbols."""
    return adapter_table(tuple(ranks), tuple(scales), tuple(ps), like.device).clone()


def _segments(
    order: Tensor | None, offsets: Tensor, table: Tensor, seeds: Tensor | None
) -> Iterator[tuple[int, Any, float, float, Tensor | None]]:
    """``(j, rows, scale, p, seed)`` of every adapter that owns rows; rows as a slice or an index."""
    ends = offsets.tolist()
    for j, (_, _, cut, scale, _, _) in enumerate(table.tolist()):
        low, high = ends[j], ends[j + 1]
        if high > low:
            rows = slice(low, high) if order is None else order[low:high]
            seed = seeds[j : j + 1] if seeds is not None and cut > 0 else None
            yield j, rows, _number(scale), cut / 65536, seed


def _width(matrices: Sequence[Tensor], dim: int) -> int:
    return max(one.shape[dim] for one in matrices)


# ------------------------------------------------------------------------------------------------------------- shrink

SHRINK = (
    "(Tensor x, Tensor[] a, Tensor table, Tensor? seeds, Tensor? order, Tensor offsets, bool drop, bool save_mask) "
    "-> (Tensor, Tensor)"
)


def shrink_fake(
    x: Tensor,
    a: list[Tensor],
    table: Tensor,
    seeds: Tensor | None,
    order: Tensor | None,
    offsets: Tensor,
    drop: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor]:
    """Shapes of ``lowmem::lora_multi_shrink``."""
    words = (x.shape[0], (x.shape[1] + 31) // 32) if save_mask and drop else (0,)
    return x.new_empty(x.shape[0], _width(a, 0)), x.new_empty(words, dtype=torch.int32)


def shrink_reference(
    x: Tensor,
    a: list[Tensor],
    table: Tensor,
    seeds: Tensor | None,
    order: Tensor | None,
    offsets: Tensor,
    drop: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor]:
    """``S_m = scale_j * drop_j(x_m) a_j^T`` for every row of adapter j, zeros elsewhere, and the packed keep bits ``[M,
    ceil(K/32)]``: all ones for rows of an adapter without dropout, zeros for rows of none; an empty tensor without
    ``drop`` (which says whether any adapter has dropout) or ``save_mask``."""
    s = x.new_zeros(x.shape[0], _width(a, 0))
    words = (x.shape[0], (x.shape[1] + 31) // 32) if save_mask and drop else (0,)
    mask = x.new_zeros(words, dtype=torch.int32)
    for j, rows, scale, p, seed in _segments(order, offsets, table, seeds):
        p = p if drop else 0.0
        bits = save_mask and p > 0
        part, keep = torch.ops.lowmem.lora_shrink(x[rows], a[j], scale, p, seed, 0, bits)
        s[rows, : a[j].shape[0]] = part
        if save_mask and drop:
            mask[rows] = keep if bits else _all_kept(x.shape[1], mask)
    return s, mask


def _all_kept(columns: int, like: Tensor) -> Tensor:
    bits = [-1] * (columns // 32) + ([(1 << columns % 32) - 1] if columns % 32 else [])
    return torch.tensor(bits, dtype=torch.int32, device=like.device)


# ------------------------------------------------------------------------------------------------------------- expand

EXPAND = (
    "(Tensor(a!) out, Tensor s, Tensor[] a, Tensor table, Tensor? mask, Tensor? seeds, Tensor? order, Tensor offsets, "
    "bool drop) -> ()"
)


def expand_fake(
    out: Tensor,
    s: Tensor,
    a: list[Tensor],
    table: Tensor,
    mask: Tensor | None,
    seeds: Tensor | None,
    order: Tensor | None,
    offsets: Tensor,
    drop: bool,
) -> None:
    """``lowmem::lora_multi_expand_`` writes ``out`` and returns nothing."""


def expand_reference(
    out: Tensor,
    s: Tensor,
    a: list[Tensor],
    table: Tensor,
    mask: Tensor | None,
    seeds: Tensor | None,
    order: Tensor | None,
    offsets: Tensor,
    drop: bool,
) -> None:
    """``out_m += keep_m * (s_m a_j) / (1 - p_j)`` in place for every row of adapter j, or ``out_m += s_m a_j`` without
    ``drop``; ``a_j`` ``[r_j, columns of out]``. The keep bits are ``mask``'s, or drawn again from ``seeds``."""
    for j, rows, _, p, seed in _segments(order, offsets, table, seeds):
        p = p if drop else 0.0
        keep = mask[rows] if mask is not None and p > 0 else None
        part = out[rows]  # a view for a slice, a copy for an index
        delta = s[rows, : a[j].shape[0]]
        torch.ops.lowmem.lora_masked_expand_(part, delta, a[j], keep, p, seed if p > 0 else None, 0, True)
        if order is not None:
            out[rows] = part


# ------------------------------------------------------------------------------------------------------------ dy pass

DY = "(Tensor dy, Tensor[] b, Tensor s, Tensor table, Tensor? order, Tensor offsets) -> (Tensor, Tensor)"


def dy_fake(
    dy: Tensor, b: list[Tensor], s: Tensor, table: Tensor, order: Tensor | None, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Shapes of ``lowmem::lora_multi_dy``."""
    size = sum(one.numel() for one in b)
    return dy.new_empty(dy.shape[0], _width(b, 1)), dy.new_empty(size, dtype=accumulate_dtype(dy.dtype))


def dy_reference(
    dy: Tensor, b: list[Tensor], s: Tensor, table: Tensor, order: Tensor | None, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """``dS_m = scale_j * dy_m b_j`` ``[M, max r_j]`` (zeros where a row has no such rank) and all ``dB_j = dy_j^T s_j``
    ``[N, r_j]``, one behind the other in one vector; zeros for an adapter without rows."""
    ds = dy.new_zeros(dy.shape[0], _width(b, 1))
    db = dy.new_zeros(sum(one.numel() for one in b), dtype=accumulate_dtype(dy.dtype))
    parts = split_like(db, b)
    for j, rows, scale, _, _ in _segments(order, offsets, table, None):
        r = b[j].shape[1]
        part, grad = torch.ops.lowmem.lora_dy(dy[rows], b[j], s[rows, :r].contiguous(), scale)
        ds[rows, :r] = part
        parts[j].copy_(grad)
    return ds, db


def split_like(flat: Tensor, matrices: Sequence[Tensor]) -> list[Tensor]:
    """The matrices that lie one behind the other in ``flat``, as views of the shapes of ``matrices``."""
    sizes = [one.numel() for one in matrices]
    return [part.view(one.shape) for part, one in zip(flat.split(sizes), matrices, strict=True)]


# ----------------------------------------------------------------------------------------------------------------- dA

DA = (
    "(Tensor ds, Tensor x, int[] ranks, Tensor table, Tensor? mask, Tensor? seeds, Tensor? order, Tensor offsets, "
    "bool drop) -> Tensor"
)


def da_fake(
    ds: Tensor,
    x: Tensor,
    ranks: list[int],
    table: Tensor,
    mask: Tensor | None,
    seeds: Tensor | None,
    order: Tensor | None,
    offsets: Tensor,
    drop: bool,
) -> Tensor:
    """Shape of ``lowmem::lora_multi_da``."""
    return x.new_empty(sum(ranks), x.shape[1], dtype=accumulate_dtype(x.dtype))


def da_reference(
    ds: Tensor,
    x: Tensor,
    ranks: list[int],
    table: Tensor,
    mask: Tensor | None,
    seeds: Tensor | None,
    order: Tensor | None,
    offsets: Tensor,
    drop: bool,
) -> Tensor:
    """All ``dA_j = ds_j^T drop_j(x_j)``, stacked ``[sum(ranks), K]`` in the accumulation dtype; zeros for an adapter
    without rows. Mask and seeds as for the expand."""
    da = x.new_zeros(sum(ranks), x.shape[1], dtype=accumulate_dtype(x.dtype))
    parts = da.split(ranks)
    for j, rows, _, p, seed in _segments(order, offsets, table, seeds):
        p = p if drop else 0.0
        keep = mask[rows] if mask is not None and p > 0 else None
        part = ds[rows, : ranks[j]].contiguous()
        parts[j].copy_(torch.ops.lowmem.lora_da(part, x[rows], keep, p, seed if p > 0 else None, 0))
    return da


def _triton(name: str) -> Any:
    return _launcher(name, "lora_multi")


define("lora_multi_table", TABLE, fake=table_fake, reference=table_reference)
for _name, _schema, _fake, _reference in (
    ("lora_multi_shrink", SHRINK, shrink_fake, shrink_reference),
    ("lora_multi_expand_", EXPAND, expand_fake, expand_reference),
    ("lora_multi_dy", DY, dy_fake, dy_reference),
    ("lora_multi_da", DA, da_fake, da_reference),
):
    define(
        _name,
        _schema,
        fake=_fake,
        reference=_reference,
        cpp=("cpu",),
        cuda=_triton(_name.removeprefix("lora_multi_")),
    )


# ---------------------------------------------------------------------------------------------------------- autograd


class _MultiLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        if _below_autograd():
            with torch._C._AutoDispatchBelowAutograd():
                return _MultiLoRALinear._forward(ctx, *args)
        return _MultiLoRALinear._forward(ctx, *args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        saved = ctx.saved_tensors  # outside: under activation checkpointing this runs a piece of the model again
        if _below_autograd():
            with torch._C._AutoDispatchBelowAutograd():
                return _MultiLoRALinear._backward(ctx, saved, grad)
        return _MultiLoRALinear._backward(ctx, saved, grad)

    @staticmethod
    def _forward(
        ctx: Any,
        x: Tensor,
        base: Tensor | None,
        bias: Tensor | None,
        table: Tensor,
        order: Tensor | None,
        offsets: Tensor,
        seeds: Tensor | None,
        save_mask: bool,
        *factors: Tensor,
    ) -> Tensor:
        ops = torch.ops.lowmem
        a, b = list(factors[: len(factors) // 2]), factors[len(factors) // 2 :]
        needs = ctx.needs_input_grad
        need_a, need_b = any(needs[8 : 8 + len(a)]), any(needs[8 + len(a) :])
        rows = x.reshape(-1, x.shape[-1])
        drop = seeds is not None
        bits = save_mask and drop and (needs[0] or need_a)
        s, mask = ops.lora_multi_shrink(rows, a, table, seeds, order, offsets, drop, bits)
        if base is not None:
            y = F.linear(rows, base, bias)
        else:
            y = x.new_zeros(rows.shape[0], b[0].shape[0]) if bias is None else bias.repeat(rows.shape[0], 1)
        ops.lora_multi_expand_(y, s, [one.T for one in b], table, None, None, order, offsets, False)
        ctx.save_for_backward(
            x if needs[1] or need_a else None,
            base,
            table,
            order,
            offsets,
            s if need_b else None,
            mask if bits else None,
            None if bits else seeds,
            *factors,
        )
        ctx.drop, ctx.need = drop, (need_a, need_b)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def _backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> Any:
        ops = torch.ops.lowmem
        x, base, table, order, offsets, s, mask, seeds, *factors = saved
        a, b = factors[: len(factors) // 2], factors[len(factors) // 2 :]
        (need_a, need_b), needs = ctx.need, ctx.needs_input_grad
        dy = grad.reshape(-1, grad.shape[-1])
        dx = dw = None
        da: Any = [None] * len(a)
        db: Any = [None] * len(a)
        if s is None:
            s = dy.new_zeros(dy.shape[0], _width(a, 0))
        ds, flat = ops.lora_multi_dy(dy, b, s, table, order, offsets)
        if need_b:
            db = [part.to(one.dtype) for part, one in zip(split_like(flat, b), b, strict=True)]
        if needs[0]:
            dx = dy.new_zeros(dy.shape[0], a[0].shape[1]) if base is None else dy @ base
            ops.lora_multi_expand_(dx, ds, a, table, mask, seeds, order, offsets, ctx.drop)
            dx = dx.view(*grad.shape[:-1], dx.shape[1])
        if x is not None:
            rows = x.reshape(-1, x.shape[-1])
            if need_a:
                ranks = [one.shape[0] for one in a]
                stacked = ops.lora_multi_da(ds, rows, ranks, table, mask, seeds, order, offsets, ctx.drop)
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
    checked: bool = False,
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
        checked: order and offsets are known to be right, as those of :func:`lowmem.nn.route` are.

    On the CPU the values of offsets and order are checked first. On a GPU, and under ``torch.compile``, offsets are
    checked by an assertion on the device, without a host sync.

    Returns ``[..., N]``. Saved for backward: ``x``, ``S`` ``[M, max r_j]``, bits or seeds, ``order``,
    ``offsets`` and 48 bytes an adapter.
    """
    op = "multi_lora_linear"
    if isinstance(base, QTensor):
        rest = multi_lora_linear(
            x,
            None,
            A,
            B,
            scales,
            offsets,
            order=order,
            bias=bias,
            ps=ps,
            seeds=seeds,
            save_mask=save_mask,
            checked=checked,
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
    if checked:
        pass
    elif kind == "cpu" and not torch.compiler.is_compiling():
        _check_rows(op, order, offsets, m)
    else:  # no host sync: the assertion runs on the device, and the kernels stay inside the tensors whatever it finds
        fine = (offsets[1:] >= offsets[:-1]).all() & (offsets[0] >= 0) & (offsets[-1] <= m)
        torch._assert_async(fine, f"lowmem.{op}: offsets: expected ascending numbers in [0, {m}]")
    ranks = tuple(one.shape[0] for one in A)
    if torch.compiler.is_compiling():
        table = torch.ops.lowmem.lora_multi_table(ranks, scales, ps, offsets)
    else:
        table = adapter_table(ranks, tuple(map(float, scales)), tuple(map(float, ps)), x.device)
    with torch.autocast(kind, enabled=False):
        return _MultiLoRALinear.apply(
            x, base, bias, table, order, offsets, seeds if any(ps) else None, save_mask, *A, *B
        )


def _check_rows(op: str, order: Tensor | None, offsets: Tensor, rows: int) -> None:
    ends = offsets.tolist()
    if any(low > high for low, high in zip([0, *ends], [*ends, rows], strict=True)):
        bad(op, "offsets", f"ascending numbers in [0, {rows}]", ends)
    if order is not None and rows and not torch.equal(order.sort().values, torch.arange(rows)):
        got = order.tolist() if rows < 20 else f"{int(order.min())}..{int(order.max())}, with repeats or gaps"
        bad(op, "order", f"a permutation of 0..{rows - 1}", got)
