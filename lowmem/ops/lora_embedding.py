"""LoRA on an embedding: ``y = W[ids] + scale * A[:, ids]^T B^T``.

The one-hot rows that an embedding multiplies ``W`` by are never written: the shrink is a gather of A's columns, the
expand is the family's (``lora_masked_expand_`` without a mask, in place on the gathered rows of W), and in backward
``dA`` is the embedding's own dense gradient of ``dS``. ``S`` is gathered again there, so nothing is saved but ``ids``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._errors import bad
from .lora import accumulate_dtype


def _gather(rows: Tensor, a: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return F.embedding(rows, a.t()).mul_(scale).to(dtype)  # S [M, r], scaled


class _LoRAEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, base: Tensor, a: Tensor, b: Tensor, scale: float, padding: int, by_freq: bool
    ) -> Tensor:
        rows = ids.reshape(-1)
        y = F.embedding(rows, base)
        s = _gather(rows, a, scale, y.dtype)
        torch.ops.lowmem.lora_masked_expand_(y, s, b.t(), None, 0.0, None, 0, True)
        ctx.save_for_backward(ids, a, b)
        ctx.settings = (scale, padding, by_freq, base.shape[0])
        return y.view(*ids.shape, y.shape[1])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        ids, a, b = ctx.saved_tensors
        scale, padding, by_freq, count = ctx.settings
        _, need_w, need_a, need_b = ctx.needs_input_grad[:4]
        rows, dy = ids.reshape(-1), upstream[0].reshape(-1, b.shape[0])

        def dense(rows_of_gradient: Tensor) -> Tensor:  # [count, ...] in the accumulation dtype: summed there
            wide = rows_of_gradient.to(accumulate_dtype(dy.dtype))
            return torch.ops.aten.embedding_dense_backward(wide, rows, count, padding, by_freq)

        ds: Any = None
        da = db = None
        if need_b:
            ds, db = torch.ops.lowmem.lora_dy(dy, b, _gather(rows, a, scale, dy.dtype), scale)
            db = db.to(b.dtype)
        elif need_a:
            ds = (dy @ b.to(dy.dtype)).mul_(scale)
        if need_a:
            da = dense(ds).t().to(a.dtype)
        return None, dense(dy).to(dy.dtype) if need_w else None, da, db, None, None, None


def lora_embedding(
    ids: Tensor,
    base: Tensor,
    A: Tensor,  # noqa: N803 (the field's names)
    B: Tensor,  # noqa: N803
    scale: float,
    *,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """``y = base[ids] + scale * A[:, ids]^T B^T`` (LoRA, arXiv 2106.09685, on an embedding).

    Args:
        ids: int32 or int64, any shape, numbers in ``[0, V)``.
        base: ``[V, N]``, float. A: ``[r, V]``; B: ``[N, r]``; any r >= 1, any floating dtype. A whose memory is that of
            ``[V, r]`` (``torch.zeros(V, r).t()``) is gathered in one piece a row.
        padding_idx: this row of base and this column of A get no gradient, as in ``F.embedding``.
        scale_grad_by_freq: divide a row's gradient by how often it occurs in ``ids``, as in ``F.embedding``.

    Returns ``[..., N]`` in base's dtype. Gradients are dense; those of A and base are summed in fp32 (fp64 for fp64).
    Saved for backward: ``ids`` itself and nothing else.

    Raises ValueError or TypeError ``lowmem.lora_embedding: <argument>: expected ..., got ...``; ``F.embedding``'s own
    IndexError for an id out of range.
    """
    op = "lora_embedding"
    if ids.dtype not in (torch.int32, torch.int64):
        bad(op, "ids", "int32 or int64", ids.dtype, kind=TypeError)
    if base.dim() != 2 or not base.is_floating_point():
        bad(op, "base", "a floating tensor [V, N]", f"shape {tuple(base.shape)} in {base.dtype}")
    count, n = base.shape
    if A.dim() != 2 or A.shape[0] < 1 or A.shape[1] != count or not A.is_floating_point():
        bad(op, "A", f"a floating tensor [r, {count}] with r >= 1", f"shape {tuple(A.shape)} in {A.dtype}")
    if tuple(B.shape) != (n, A.shape[0]) or not B.is_floating_point():
        bad(op, "B", f"a floating tensor [{n}, {A.shape[0]}]", f"shape {tuple(B.shape)} in {B.dtype}")
    for name, t in (("ids", ids), ("A", A), ("B", B)):
        if t.device != base.device:
            bad(op, name, f"device {base.device} (base's)", f"device {t.device}")
    if padding_idx is not None and not -count <= padding_idx < count:
        bad(op, "padding_idx", f"a number in [-{count}, {count})", padding_idx)
    padding = -1 if padding_idx is None else padding_idx % count
    return _LoRAEmbedding.apply(ids, base, A, B, float(scale), padding, bool(scale_grad_by_freq))
