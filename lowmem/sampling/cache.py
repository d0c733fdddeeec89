""":class:`GradNormCache`: what earlier steps knew of the gradients' norms."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._errors import bad


class GradNormCache(nn.Module):
    """Norms of output gradients by key, on the device, from the last time that each key was seen.

    A key is whatever tells a row's gradient: its sample (keys repeated over the sample's tokens) or its position.
    :meth:`weight` turns what is known into importances ``w_i = (1 - m) g_i / mean(g) + m`` for
    :func:`lowmem.sampling.pick`; ``g_i`` is the cached norm, the mean of the known ones where a key was never seen or
    is out of range. They are positive for every row, so estimates stay unbiased, with an empty cache too (all equal).

    ``m`` is the larger of ``floor`` and the *staleness*: half the distance ``sum_i |a_i - b_i|`` between the cached
    and the new norms of a step, each over its sum: 0 where the cache told the new ones, up to 1 where it told nothing;
    averaged over about ten steps. A cache that is out of date thus fades out by itself.

    Buffers, ``4 size + 8`` bytes: ``norms`` fp32 ``[size]`` (-1: never seen), ``staleness`` and ``steps`` fp32.

    Args:
        size: number of keys.
        floor: the least share of equal importance, in (0, 1].

    Raises ValueError or TypeError ``lowmem.GradNormCache: <argument>: expected ..., got ...``.
    """

    norms: Tensor
    staleness: Tensor
    steps: Tensor

    def __init__(self, size: int, *, floor: float = 0.1, device: torch.device | str | None = None) -> None:
        super().__init__()
        op = "GradNormCache"
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            bad(op, "size", "an integer >= 1", repr(size))
        if not 0.0 < floor <= 1.0:
            bad(op, "floor", "a share in (0, 1]", repr(floor))
        self.floor = float(floor)
        self.register_buffer("norms", torch.full((size,), -1.0, device=device))
        self.register_buffer("staleness", torch.zeros((), device=device))
        self.register_buffer("steps", torch.zeros((), device=device))

    def _look(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """``(cached norms, known?)`` of each key."""
        if keys.dim() != 1 or keys.dtype != torch.int64 or keys.device != self.norms.device:
            got = f"shape {tuple(keys.shape)} in {keys.dtype} on {keys.device}"
            bad("GradNormCache", "keys", f"int64 [n] on {self.norms.device}", got, kind=TypeError)
        inside = (keys >= 0) & (keys < self.norms.numel())
        found = self.norms[torch.where(inside, keys, 0)]
        return found, inside & (found >= 0)

    @torch.no_grad()
    def weight(self, keys: Tensor) -> Tensor:
        """Importances ``[n]``, fp32, of rows with ``keys`` (int64 ``[n]``): positive, with mean about 1."""
        found, known = self._look(keys)
        count = known.sum()
        mean = torch.where(known, found, 0.0).sum() / count.clamp(min=1)
        relative = torch.where(known & (mean > 0), found / torch.where(mean > 0, mean, 1.0), 1.0)
        m = self.staleness.clamp(min=self.floor, max=1.0)
        return (1 - m) * relative + m

    @torch.no_grad()
    def update(self, keys: Tensor, norms: Tensor) -> None:
        """Take in the gradient norms ``[n]`` of rows with ``keys``: a key that stands for several rows gets their root
        mean square. Norms that are not finite, and keys out of range, are left out."""
        found, known = self._look(keys)
        if norms.shape != keys.shape:
            bad("GradNormCache", "norms", f"shape {tuple(keys.shape)}", tuple(norms.shape))
        norms = norms.to(torch.float32)
        good = norms.isfinite() & (keys >= 0) & (keys < self.norms.numel())
        both = known & good
        old, new = torch.where(both, found, 0.0), torch.where(both, norms, 0.0)
        told = (old.sum() > 0) & (new.sum() > 0)
        distance = 0.5 * (old / old.sum().clamp(min=1e-38) - new / new.sum().clamp(min=1e-38)).abs().sum()
        rate = 1.0 / (self.steps + 1).clamp(max=10.0)
        self.staleness.copy_(torch.where(told, self.staleness + rate * (distance - self.staleness), self.staleness))
        self.steps.add_(told.to(self.steps.dtype))
        size = self.norms.numel()
        at = torch.where(good, keys, size)  # the last place takes what is left out
        top = torch.where(good, norms, 0.0).amax().clamp(min=1e-30)  # squares of 1e-30 would vanish
        squares = norms.new_zeros(size + 1).index_add_(0, at, torch.where(good, norms / top, 0.0).square())
        times = norms.new_zeros(size + 1).index_add_(0, at, torch.ones_like(norms))
        fresh = (squares / times.clamp(min=1)).sqrt()[:size] * top
        self.norms.copy_(torch.where(times[:size] > 0, fresh, self.norms))

    def extra_repr(self) -> str:
        """Size and floor."""
        return f"{self.norms.numel()}, floor={self.floor:g}"
