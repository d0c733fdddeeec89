"""Linear layer and cross entropy in one, without the logits: ``loss(softcap(x W^T + b), target)``.

``x [M, K]``, ``W [V, K]``, ``b [V]``, ``target [M]`` int64. The rows are taken in chunks over one scratch
``[rows, V]``: a GEMM fills it with a chunk's logits, ``lowmem::cross_entropy_rows_`` turns them into the rows'
losses and, in place, into their gradients, and two GEMMs take those to ``dx`` and ``dW``. So the loss's forward
computes the gradients too (three GEMMs, as the plain way does), and backward multiplies them by what arrives.

With ``v`` the capped logits of a row, ``y`` its label and ``e`` the label smoothing::

    lse  = log sum_j exp v_j
    loss = lse - (1 - e) v_y - e mean_j v_j + z_loss lse^2
    dv_j = exp(v_j - lse) (1 + 2 z_loss lse) - e / V - (1 - e) [j = y]      times 1 - (v_j / softcap)^2 where capped

The scratch holds numbers of x's dtype; sums, exponentials and losses are fp32 (fp64 for fp64). Chunking over rows is
what Liger (arXiv 2410.10989) does; cut cross entropy (arXiv 2411.09009) recomputes the logits instead.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .._dispatch import define
from .._dtypes import accumulate_dtype
from .._errors import bad
from .lora import _below_autograd

SCRATCH_BYTES = 48_000_000
"""Bytes of the scratch that are always allowed; beyond it, a chunk may take ``SCRATCH_SHARE`` of the logits."""
SCRATCH_SHARE = 0.045


def chunk_rows(rows: int, vocabulary: int, itemsize: int) -> int:
    """Rows of one chunk: as many as ``max(48 MB, 4.5 % of the logits)`` holds, in chunks of nearly equal size."""
    row = max(vocabulary * itemsize, 1)
    most = max(1, int(max(SCRATCH_BYTES, SCRATCH_SHARE * rows * row)) // row)
    chunks = -(-max(rows, 1) // most)
    return -(-max(rows, 1) // chunks)


# ------------------------------------------------------------------------------------------------------ rows of logits

ROWS = (
    "(Tensor(a!) logits, Tensor(b!) loss, Tensor target, Tensor? bias, Tensor? factor, int ignore_index, "
    "float smoothing, float z_loss, float softcap) -> ()"
)


def rows_fake(
    logits: Tensor,
    loss: Tensor,
    target: Tensor,
    bias: Tensor | None,
    factor: Tensor | None,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
) -> None:
    """``lowmem::cross_entropy_rows_`` writes in place and returns nothing."""


def rows_reference(
    logits: Tensor,
    loss: Tensor,
    target: Tensor,
    bias: Tensor | None,
    factor: Tensor | None,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
) -> None:
    """Losses of ``logits [m, V]`` (without ``bias [V]``) into ``loss [m]`` (accumulation dtype), and, where ``factor``
    ``[m]`` is given, ``factor_i * d loss_i / d logits`` over the logits. ``softcap`` 0 is none. Rows whose target is
    ``ignore_index`` get loss 0 and gradient 0, whatever they hold. Labels are the caller's to check."""
    acc = accumulate_dtype(logits.dtype)
    v = logits.to(acc)
    if bias is not None:
        v = v + bias.to(acc)
    if softcap > 0:
        v = softcap * torch.tanh(v / softcap)
    kept = target != ignore_index
    label = torch.where(kept, target, 0)[:, None]
    count = logits.shape[1]
    lse = torch.logsumexp(v, 1)
    value = lse - (1 - smoothing) * v.gather(1, label).squeeze(1)
    if smoothing > 0:
        value = value - smoothing * v.mean(1)
    if z_loss > 0:
        value = value + z_loss * lse * lse
    loss.copy_(torch.where(kept, value, 0))
    if factor is None:
        return
    grad = torch.exp(v - lse[:, None])
    if z_loss > 0:
        grad = grad * (1 + 2 * z_loss * lse)[:, None]
    if smoothing > 0:
        grad = grad - smoothing / count
    grad.scatter_add_(1, label, torch.full_like(label, -1, dtype=acc).mul_(1 - smoothing))
    if softcap > 0:
        grad = grad * (1 - (v / softcap).square())
    logits.copy_(torch.where(kept[:, None], grad * factor.to(acc)[:, None], 0))


def _rows_cuda(*args: Any) -> None:
    from ..triton_kernels import activation_loss as kernels

    kernels.rows_(*args)


define(
    "cross_entropy_rows_",
    ROWS,
    fake=rows_fake,
    reference=rows_reference,
    cpp=("cpu",),
    cuda=_rows_cuda,
)


# ------------------------------------------------------------------------------------------------------- the whole loss

LOSS = (
    "(Tensor x, Tensor weight, Tensor target, Tensor? bias, Tensor? factor, int ignore_index, float smoothing, "
    "float z_loss, float softcap, int rows, bool need_dx, bool need_dw, bool need_db, ScalarType dw_dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def loss_fake(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    factor: Tensor | None,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
    rows: int,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    dw_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes of ``lowmem::linear_cross_entropy``."""
    acc = accumulate_dtype(x.dtype)
    dx = x.new_empty((x.shape[0], x.shape[1]) if need_dx else (0,))
    dw = weight.new_empty((weight.shape[0], weight.shape[1]) if need_dw else (0,), dtype=dw_dtype)
    db = weight.new_empty((weight.shape[0],) if need_db else (0,), dtype=acc)
    return x.new_empty(x.shape[0], dtype=acc), dx, dw, db


def _check_labels(target: Tensor, vocabulary: int, ignore_index: int) -> None:
    """A ValueError on the CPU; elsewhere an assertion that is queued on the device, so that nothing waits for it."""
    good = ((target >= 0) & (target < vocabulary)) | (target == ignore_index)
    expected = f"labels in [0, {vocabulary}) or ignore_index {ignore_index}"
    if target.device.type == "cpu":
        if not bool(good.all()):
            bad("linear_cross_entropy", "target", expected, int(target[~good][0]))
    elif target.numel():
        torch._assert_async(good.all(), f"lowmem.linear_cross_entropy: target: expected {expected}, got others")


def _chunked(
    rows_: Any,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    factor: Tensor | None,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
    rows: int,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    dw_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_labels(target, weight.shape[0], ignore_index)
    loss, dx, dw, db = loss_fake(
        x, weight, target, bias, factor, ignore_index, smoothing, z_loss, softcap, rows, need_dx, need_dw, need_db,
        dw_dtype,
    )  # fmt: skip
    m, v = x.shape[0], weight.shape[0]
    if m == 0:  # no product is formed below
        dw.zero_()
        db.zero_()
    grads = need_dx or need_dw or need_db
    scratch = x.new_empty(min(rows, m), v)
    for start in range(0, m, rows):
        at = slice(start, min(start + rows, m))
        logits = scratch[: at.stop - start]
        torch.mm(x[at], weight.T, out=logits)
        rows_(
            logits, loss[at], target[at], bias, factor[at] if factor is not None and grads else None, ignore_index,
            smoothing, z_loss, softcap,
        )  # fmt: skip
        if need_dx:
            torch.mm(logits, weight, out=dx[at])
        if need_dw and dw_dtype != x.dtype:
            # a wide sum over narrow operands: GEMMs of this kind are not everywhere, so the product comes apart
            dw = dw.copy_(logits.T @ x[at]) if start == 0 else dw.add_(logits.T @ x[at])
        elif need_dw:
            torch.mm(logits.T, x[at], out=dw) if start == 0 else dw.addmm_(logits.T, x[at])
        if need_db:
            total = logits.sum(0, dtype=db.dtype)
            db = db.copy_(total) if start == 0 else db.add_(total)
    return loss, dx, dw, db


def loss_reference(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(loss [M], dx, dW, db)``: the rows' losses in the accumulation dtype and, as far as they are asked for (else
    empty), the gradients of ``sum_i factor_i loss_i``, dW in ``dw_dtype`` and db in the accumulation dtype; ``rows``
    rows at a time.

    Labels are checked on the CPU before anything is computed; on a device the check is queued and waits for nothing.
    """
    return _chunked(rows_reference, *args)


def _loss_composed(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _chunked(torch.ops.lowmem.cross_entropy_rows_, *args)


define(
    "linear_cross_entropy",
    LOSS,
    fake=loss_fake,
    reference=loss_reference,
    cpu=_loss_composed,
    cuda=_loss_composed,
)


# ---------------------------------------------------------------------------------------------------------- autograd


def _scale(grad: Tensor, by: Tensor) -> Tensor:
    """``grad * by`` (one element, or one a row), over ``grad`` where nothing else can see it."""
    by = by.to(grad.dtype)
    if torch.compiler.is_compiling():
        return grad * by
    # on a GPU the value is not read: that would wait for it
    return grad if by.numel() == 1 and by.device.type == "cpu" and float(by) == 1.0 else grad.mul_(by)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        numbers: tuple[int, float, float, float, int],
        reduction: str,
        save: str,
        dw_dtype: torch.dtype,
    ) -> Tensor:
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        # each row's upstream factor is known only in backward: it can still be applied to dx, not to sums over rows
        again = save == "recompute" or (reduction == "none" and (need_w or need_b))
        now = (need_x or need_w or need_b) and not again
        acc = accumulate_dtype(x.dtype)
        kept = (target != numbers[0]).sum().clamp_(min=1).to(acc)
        each = (1 / kept if reduction == "mean" else torch.ones_like(kept)).expand(target.shape[0])
        grads = (now and need_x, now and need_w, now and need_b)
        loss, dx, dw, db = torch.ops.lowmem.linear_cross_entropy(
            x, weight, target, bias, each if now else None, *numbers, *grads, dw_dtype
        )
        if again:
            ctx.save_for_backward(x, weight, bias, target, each)
        else:
            ctx.save_for_backward(dx, dw, db)
        ctx.again, ctx.numbers, ctx.dw_dtype = again, numbers, dw_dtype
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        if reduction == "none":
            return loss
        # loss is 0 where a row is ignored, even where its logits are not finite
        return loss.sum() if reduction == "sum" else loss.sum() / kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if not _below_autograd() and not torch.compiler.is_compiling():
            bad("linear_cross_entropy", "create_graph", "first derivatives", "a second derivative", kind=RuntimeError)
        need = ctx.needs_input_grad[:3]
        none = (None,) * 5
        w_dtype, b_dtype = ctx.dtypes
        if ctx.again:
            x, weight, bias, target, each = ctx.saved_tensors
            _, dx, dw, db = torch.ops.lowmem.linear_cross_entropy(
                x, weight, target, bias, each * grad, *ctx.numbers, *need, ctx.dw_dtype
            )
        else:
            dx, dw, db = ctx.saved_tensors
            dx = _scale(dx, grad[:, None] if grad.dim() else grad) if need[0] else dx
            dw, db = (_scale(t, grad) if wanted else t for t, wanted in zip((dw, db), need[1:], strict=True))
        dw = dw.to(w_dtype) if need[1] else None
        return dx if need[0] else None, dw, db.to(b_dtype) if need[2] else None, *none


REDUCTIONS = ("mean", "sum", "none")
SAVES = ("grad", "recompute")


def check_options(
    op: str, smoothing: float, z_loss: float, softcap: float | None, reduction: str, save: str, rows: int | None
) -> None:
    """ValueError unless the options of :func:`linear_cross_entropy` make sense."""
    if not 0.0 <= smoothing <= 1.0:
        bad(op, "label_smoothing", "a number in [0, 1]", smoothing)
    if not 0.0 <= z_loss < float("inf"):
        bad(op, "z_loss", "a finite number >= 0", z_loss)
    if softcap is not None and not 0.0 < softcap < float("inf"):
        bad(op, "softcap", "a finite number > 0, or None", softcap)
    if reduction not in REDUCTIONS:
        bad(op, "reduction", "'mean', 'sum' or 'none'", repr(reduction))
    if save not in SAVES:
        bad(op, "save", "'grad' or 'recompute'", repr(save))
    if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
        bad(op, "rows", "an integer >= 1, or None", repr(rows))


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    save: Literal["grad", "recompute"] = "grad",
    rows: int | None = None,
    dw_dtype: torch.dtype | None = None,
) -> Tensor:
    """``cross_entropy(softcap(x weight^T + bias), target)`` without ever holding the logits.

    Args:
        x: ``[..., K]``, float. weight: ``[V, K]`` in x's dtype. bias: ``[V]``, any floating dtype.
        target: ``[...]`` int64, labels in ``[0, V)`` or ``ignore_index``. On the CPU another label is a ValueError; on
            a GPU it trips an assertion queued on the device, as torch's own loss does, so that the host waits for
            nothing.
        label_smoothing: e in [0, 1], as in ``torch.nn.functional.cross_entropy``.
        z_loss: adds ``z_loss * logsumexp(logits)^2`` to each row's loss (PaLM, arXiv 2204.02311).
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2, arXiv 2408.00118).
        reduction: ``"mean"`` over the rows that are not ignored, ``"sum"``, or ``"none"``: ``[...]``.
        save: ``"grad"`` computes the gradients in forward, and backward scales them in place: three GEMMs, one backward
            pass (a second one over the same graph raises). ``"recompute"`` keeps x and weight alone and computes all in
            backward, at the price of a fourth GEMM; ``reduction="none"`` with a trained weight or bias always does.
        rows: rows of one chunk; None: :func:`chunk_rows`.
        dw_dtype: the dtype in which dW is summed over the chunks; None: weight's. 16-bit sums are rounded once a chunk;
            ``torch.float32`` rounds once in all and holds ``4 V K`` bytes, and one product of ``V K`` beside it.

    Returns the loss in fp32 (fp64 for fp64). Where every row is ignored the mean is 0, and so are the gradients (torch
    gives NaN): a batch of padding changes nothing. Not finite logits of a row that counts give a NaN loss, as in torch.
    A frozen weight has no dW computed. Memory beside the gradients: ``rows * V * itemsize`` bytes and O(M + V).

    Raises ValueError or TypeError ``lowmem.linear_cross_entropy: <argument>: expected ..., got ...``.
    """
    op = "linear_cross_entropy"
    check_options(op, label_smoothing, z_loss, softcap, reduction, save, rows)
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        x, weight = x.to(dtype), weight.to(dtype)
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        if t is not None and not t.is_floating_point():
            bad(op, name, "a floating dtype", t.dtype, kind=TypeError)
        if t is not None and t.device != x.device:
            bad(op, name, f"device {x.device} (x's)", f"device {t.device}")
    if x.dim() < 1 or x.shape[-1] < 1:
        bad(op, "x", "shape [..., K] with K >= 1", f"shape {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.shape[0] < 1:
        bad(op, "weight", f"shape [V, {x.shape[-1]}] with V >= 1", f"shape {tuple(weight.shape)}")
    if weight.dtype != x.dtype:
        hint = "cast x, or run under torch.autocast"
        bad(op, "weight", f"x's dtype {x.dtype}", weight.dtype, hint=hint, kind=TypeError)
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        bad(op, "bias", f"shape [{weight.shape[0]}]", f"shape {tuple(bias.shape)}")
    if target.dtype != torch.int64:
        bad(op, "target", "int64 labels", target.dtype, kind=TypeError)
    if target.shape != x.shape[:-1]:
        bad(op, "target", f"shape {tuple(x.shape[:-1])} (x's without the last)", f"shape {tuple(target.shape)}")
    if target.device != x.device:
        bad(op, "target", f"device {x.device} (x's)", f"device {target.device}")
    if dw_dtype is not None and not dw_dtype.is_floating_point:
        bad(op, "dw_dtype", "a floating dtype", dw_dtype, kind=TypeError)
    flat, labels = x.reshape(-1, x.shape[-1]), target.reshape(-1)
    chunk = rows or chunk_rows(flat.shape[0], weight.shape[0], x.element_size())
    numbers = (ignore_index, label_smoothing, z_loss, softcap or 0.0, chunk)
    with torch.autocast(kind, enabled=False):
        loss = _LinearCrossEntropy.apply(flat, weight, bias, labels, numbers, reduction, save, dw_dtype or weight.dtype)
    return loss.view(target.shape) if reduction == "none" else loss
