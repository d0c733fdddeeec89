"""``ProjectedLinear``: a linear layer whose weight's gradient exists only in its optimizer's subspace."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import bad
from ..ops._autocast import cast
from ..ops.projected import Projection, projected_linear

_OP = "ProjectedLinear"
_LAYERS: weakref.WeakSet[ProjectedLinear] = weakref.WeakSet()


class ProjectedLinear(nn.Module):
    """``y = x W^T + bias`` with W frozen for autograd; ``lowrank_grad``, a parameter of zeros, receives ``R = P^T G``
    ``[rank, n]`` (left) or ``G P`` ``[m, rank]`` (right) as its gradient, and the m x n gradient G is never formed
    (GaLore, arXiv 2403.03507, reads only R). :func:`lowmem.optim.project_` makes these layers,
    :class:`lowmem.optim.ProjAdamW` reads R, moves W and renews P.

    Bytes with elements of e: gradient ``e rank m`` (right) or ``e rank n`` (left) in place of ``e m n``, as much again
    for ``lowrank_grad``; saved for backward ``e r`` a token on the right side, where r is the basis's present rank, and
    x itself on the left side. In a step that renews the basis: x and G, as a dense layer.

    ``lowrank_grad`` is a parameter so that DDP, FSDP2, gradient scaling and clipping treat R as the gradient that it
    is; it stays zero, has a constant shape, and is not in the ``state_dict``, which is ``nn.Linear``'s own.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        rank: the most columns that P may have, lowered to ``min(m, n)``.
        side: ``"auto"`` (the shorter side), ``"left"`` or ``"right"``.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int,
        side: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._take(nn.Linear(in_features, out_features, bias, device=device, dtype=dtype), rank, side)

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int, *, side: str = "auto") -> ProjectedLinear:
        """A layer with ``linear``'s own parameters; its weight is frozen."""
        if type(linear) is not nn.Linear:
            bad(_OP, "linear", "an nn.Linear (no subclass)", type(linear).__name__, kind=TypeError)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take(linear, rank, side)
        return layer.train(linear.training)

    def _take(self, linear: nn.Linear, rank: int, side: str) -> None:
        from ..optim.policy import SIDES  # lowmem.optim imports this package
        from ..optim.subspace import is_left

        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            bad(_OP, "rank", "a whole number >= 1", repr(rank))
        if side not in SIDES:
            bad(_OP, "side", f"one of {', '.join(map(repr, SIDES))}", repr(side))
        weight = linear.weight
        if not weight.is_floating_point():
            bad(_OP, "linear", "a floating weight", weight.dtype, kind=TypeError)
        m, n = weight.shape
        self.in_features, self.out_features, self.rank = n, m, rank
        left, width = is_left(side, weight.shape), min(rank, m, n)
        self.weight = weight.requires_grad_(False)
        self.register_parameter("bias", linear.bias)
        self.lowrank_grad = nn.Parameter(weight.new_zeros((width, n) if left else (m, width)))
        self._made(Projection(left, width, m if left else n))

    def _made(self, projection: Projection) -> None:
        self.projection = projection
        here = weakref.ref(self)
        projection.parameter = lambda: None if (layer := here()) is None else layer.lowrank_grad
        _LAYERS.add(self)

    def __getstate__(self) -> dict[str, Any]:
        p = self.projection
        return {**self.__dict__, "projection": (p.left, p.width, p.short, p.place)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has a projection of its own, without an optimizer."""
        super().__setstate__(state)
        self._made(Projection(*state["projection"]))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + "lowrank_grad", None)

    def _load_from_state_dict(self, state: Any, prefix: str, meta: Any, strict: bool, missing: Any, *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, meta, strict, missing, *rest)
        if prefix + "lowrank_grad" in missing:
            missing.remove(prefix + "lowrank_grad")

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (nn.Linear's name)
        """``[..., in_features]`` to ``[..., out_features]``. ValueError where the weight was unfrozen."""
        if self.weight.requires_grad:
            hint = (
                "its gradient is never formed: read lowrank_grad.grad, which is R, or leave the layer out of project_"
            )
            bad(_OP, "weight", "requires_grad=False", "requires_grad=True", hint=hint)
        if not torch.is_grad_enabled() or not self.lowrank_grad.requires_grad:
            return nn.functional.linear(input, self.weight, self.bias)
        x, weight, bias = cast(input, self.weight, self.bias)
        return projected_linear(x, weight, bias, self.lowrank_grad, self.projection)

    def extra_repr(self) -> str:
        """Sizes, width and side."""
        side = "left" if self.projection.left else "right"
        width = self.projection.width
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, " + (
            f"rank={width}, side={side}"
        )


def live_layers() -> list[ProjectedLinear]:
    """Every layer that exists in this process."""
    return list(_LAYERS)
