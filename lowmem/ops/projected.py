"""A linear layer whose weight's gradient is never formed: ``nn.ProjectedLinear``'s operators and derivative.

For W [m, n], input X [T, n] and dY [T, m], with a basis P of ``rank`` columns on one side (``lowmem.ops.lowrank``)::

    right:  R = dY^T (X P)      [m, rank]    saved for backward: X P, rank numbers a token
    left:   R = (P^T dY^T) X    [rank, n]    saved for backward: X

``2 T rank (m + n)`` operations and no m x n tensor, against ``2 T m n`` for dW. In a step that renews the basis (the
layer is *due*) X is saved, and backward adds ``G = dY^T X`` to :attr:`Projection.dense` beside R.

=====================  ==================================================================================
``projected_keep``     what backward needs of X: X P, or X where the layer is due; and a stamp
``projected_grad``     R, padded with zeros to the layer's constant width; G too, in the layer's projection
=====================  ==================================================================================

What changes from step to step (the basis, its rank, whether the layer is due) is in the layer's :class:`Projection`,
which the operators find by an integer handle: a compiled graph has nothing of it in it, and is compiled once. The stamp
says which basis and which way forward took, so that backward does the same or refuses.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._dispatch import define
from .lowrank import working

_OP = "ProjectedLinear"
_handles = itertools.count(1)
_PROJECTIONS: weakref.WeakValueDictionary[int, Projection] = weakref.WeakValueDictionary()


@dataclass(eq=False)
class Projection:
    """What a layer's backward needs to know of its optimizer. ``width``: the most columns a basis may have; ``read``:
    the basis, None until an optimizer has found one; ``due``: the next backward gathers ``dense``, G in the weight's
    dtype; ``version`` counts bases."""

    left: bool
    width: int
    short: int
    place: int = 0
    read: Callable[[], Tensor] | None = None
    due: bool = True
    dense: Tensor | None = None
    version: int = 0
    optimizer: Any = None  # a weak reference to the one that the layer's parameter is in
    parameter: Callable[[], Tensor | None] = lambda: None
    group: Any = None  # DDP's process group, seen in forward
    handle: int = field(default_factory=lambda: next(_handles))
    _task: int = -1
    _first: Tensor | None = None

    def __post_init__(self) -> None:
        _PROJECTIONS[self.handle] = self

    def basis(self, like: Tensor) -> Tensor:
        """P in ``like``'s dtype, or int64 numbers of rows or columns. Before the first refresh: Gaussian with variance
        1/width, so that the expected ``|R|`` is ``|G|``; the same on every process."""
        if self.read is not None:
            basis = self.read()
        else:
            if self._first is None:
                generator = torch.Generator().manual_seed(self.place)
                self._first = torch.randn(self.short, self.width, generator=generator) / self.width**0.5
            basis = self._first
        basis = basis.to(like.device)
        return basis if basis.dtype == torch.int64 else basis.to(like.dtype)

    def renewed(self, read: Callable[[], Tensor]) -> None:
        """There is another basis."""
        self.read, self._first = read, None
        self.version += 1

    def add(self, g: Tensor) -> None:
        """Add G of one backward. What a dropped gradient (``.grad is None``) left behind does not count."""
        task = torch._C._current_graph_task_id()
        p = self.parameter()
        sharded = p is not None and hasattr(p, "full_tensor")  # FSDP sets .grad only where it synchronises
        if p is not None and not sharded and p.grad is None and task != self._task:
            self.dense = None
        self._task = task
        self.dense = g if self.dense is None else self.dense.add_(g)


def find(handle: int) -> Projection:
    """The projection of a handle; RuntimeError where its layer is gone."""
    projection = _PROJECTIONS.get(handle)
    if projection is None:
        raise RuntimeError(f"lowmem.{_OP}: handle: expected that of a living layer, got {handle}")
    return projection


def _note_group(projection: Projection) -> None:
    if torch.distributed.is_available():
        wrapper: Any = getattr(torch.nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
        if wrapper is not None:
            projection.group = wrapper.process_group


def _stamp(projection: Projection) -> Tensor:
    return torch.tensor([projection.version, int(projection.due)])


KEEP = "(Tensor x, SymInt handle) -> (Tensor, Tensor)"


def keep_fake(x: Tensor, handle: int) -> tuple[Tensor, Tensor]:
    """Shapes of ``lowmem::projected_keep``: how much is kept is known only when it runs."""
    size = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty((size,)), torch.empty(2, dtype=torch.int64)


def keep_reference(x: Tensor, handle: int) -> tuple[Tensor, Tensor]:
    """``(kept, stamp)`` for ``x [..., n]``, flat: X P on the right side, X where the layer is due, and nothing on the
    left side, where the caller has X."""
    projection = find(handle)
    _note_group(projection)
    if projection.left:
        kept = x.new_empty(0)
    elif projection.due:
        kept = x.reshape(-1).clone()
    else:
        kept = right(x.reshape(-1, x.shape[-1]), projection.basis(x)).view(-1)
    return kept, _stamp(projection)


def right(x: Tensor, basis: Tensor) -> Tensor:
    """``x P``."""
    return x.index_select(1, basis) if basis.dtype == torch.int64 else x @ basis


GRAD = "(Tensor dy, Tensor kept, Tensor stamp, SymInt handle, SymInt rows, SymInt cols) -> Tensor"


def grad_fake(dy: Tensor, kept: Tensor, stamp: Tensor, handle: int, rows: int, cols: int) -> Tensor:
    """Shape of ``lowmem::projected_grad``."""
    return dy.new_empty((rows, cols))


def grad_reference(dy: Tensor, kept: Tensor, stamp: Tensor, handle: int, rows: int, cols: int) -> Tensor:
    """R ``[rows, cols]`` in dy's dtype, zero beyond the basis's rank, from what :func:`keep_reference` kept (left:
    X itself). Adds G to the projection where forward was due."""
    projection = find(handle)
    version, due = stamp.tolist()
    if version != projection.version:
        raise RuntimeError(f"lowmem.{_OP}: backward: expected before the optimizer's step, got a replaced basis")
    if projection.optimizer is None or projection.optimizer() is None:
        raise RuntimeError(
            f"lowmem.{_OP}: lowrank_grad: expected in the groups of a lowmem.optim.ProjAdamW before backward, "
            f"got no such optimizer (R is all that it receives: another optimizer would leave the weight as it is)"
        )
    dy = dy.reshape(-1, dy.shape[-1])
    basis = projection.basis(dy)
    rank, left, index = basis.shape[-1], projection.left, basis.dtype == torch.int64
    out = dy.new_empty((rows, cols)) if rank == projection.width else dy.new_zeros((rows, cols))
    part = out[:rank] if left else out[:, :rank]
    if due:
        g = dy.T @ kept.view(len(dy), -1)
        part.copy_(_project(g, basis, left))
        projection.add(g)
    elif left:
        thin = dy.index_select(1, basis) if index else dy @ basis
        torch.mm(thin.T, kept.view(len(dy), -1), out=part)
    else:
        torch.mm(dy.T, kept.view(len(dy), rank), out=part)
    return out


def _project(g: Tensor, basis: Tensor, left: bool) -> Tensor:
    if basis.dtype == torch.int64:
        return g.index_select(0 if left else 1, basis)
    return torch.ops.lowmem.lowrank_project(g, basis, left)


def scale_of(r: Tensor, g: Tensor, projection: Projection) -> Tensor:
    """What ``r``, R as it lies in ``.grad``, was multiplied with after backward (GradScaler, clipping), as a number for
    G: the least squares solution of ``r = c P.G``; 1 where rounding alone explains the difference."""
    part = _project(g, projection.basis(g), projection.left).to(working(g))
    seen = r.to(part.dtype)[tuple(slice(k) for k in part.shape)].flatten()
    part = part.flatten()
    square = part @ part
    c = torch.where(square > 0, seen @ part / torch.where(square > 0, square, 1.0), 1.0)
    return torch.where((c - 1).abs() <= torch.finfo(r.dtype).eps, 1.0, c)


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lowrank_grad: Tensor, handle: int, left: bool
    ) -> Any:
        ctx.handle, ctx.left, ctx.shape, ctx.dtype = handle, left, lowrank_grad.shape, lowrank_grad.dtype
        y = torch.nn.functional.linear(x, weight, bias)
        if torch.compiler.is_compiling():
            kept, stamp = torch.ops.lowmem.projected_keep(x, handle)
            ctx.save_for_backward(x if left else kept, stamp, weight)
            # outputs, or a compiled graph would not know where their size comes from
            ctx.mark_non_differentiable(kept, stamp)
            return y, kept, stamp
        projection = find(handle)
        if left or projection.due:  # no copy of X
            _note_group(projection)
            ctx.save_for_backward(x, _stamp(projection), weight)
        else:
            ctx.save_for_backward(*torch.ops.lowmem.projected_keep(x, handle), weight)
        return y, None, None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Any) -> Any:
        kept, stamp, weight = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        dbias = dy.sum(tuple(range(dy.dim() - 1))) if ctx.needs_input_grad[2] else None
        r = None
        if ctx.needs_input_grad[3]:
            r = torch.ops.lowmem.projected_grad(dy, kept, stamp, ctx.handle, *ctx.shape).to(ctx.dtype)
        return dx, None, dbias, r, None, None


def projected_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lowrank_grad: Tensor, projection: Projection
) -> Tensor:
    """``x W^T + bias``; ``lowrank_grad`` receives R as its gradient, W none."""
    y: Tensor = _Projected.apply(x, weight, bias, lowrank_grad, projection.handle, projection.left)[0]
    return y


define("projected_keep", KEEP, fake=keep_fake, reference=keep_reference)
define("projected_grad", GRAD, fake=grad_fake, reference=grad_reference)
