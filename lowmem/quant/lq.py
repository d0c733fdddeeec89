"""A matrix as a quantized one plus a low-rank one, ``W ~ dequantize(Q) + scale * B A``: LQ-LoRA and LoftQ.

Both alternate two exact partial steps: the best rank-r term for a fixed ``Q`` (a truncated SVD of ``W - Q``) and a
quantized tensor for a fixed low-rank term (``Q = quantize(W - scale * B A)``). The second is not a minimiser over both,
so the error may rise; each iterate's error is measured and the best one is returned, which is not the last in general.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from .._errors import bad
from ..factor import rsvd
from .formats import QuantSpec
from .qtensor import QTensor
from .quantize import dequantize, quantize

OVERSAMPLE = 8  # columns of the random sketch beyond r
POWER = 6  # passes of subspace iteration: a quantizer's residual has a flat spectrum; 6 are within 0.3 % of the best


def low_rank(m: Tensor, r: int, *, seed: Tensor | None = None, exact: bool | None = None) -> tuple[Tensor, Tensor]:
    """The best rank-``r`` approximation ``left @ right`` of ``m``, its singular values split evenly between the two.

    Args:
        m: ``[..., N, K]``, float32 or float64.
        r: rank, at most ``min(N, K)``.
        seed: int64[1], of the random sketch; the same seed gives the same bits. None: a fixed one.
        exact: True for a full SVD, False for :func:`lowmem.factor.rsvd` with ``POWER`` power
            steps; None takes the full one where ``4 (r + 8) > min(N, K)``.

    Returns ``left [..., N, r]`` and ``right [..., r, K]``.
    """
    least = min(m.shape[-2:])
    if exact is None:
        exact = 4 * (r + OVERSAMPLE) > least
    if exact:
        u, s, vt = torch.linalg.svd(m, full_matrices=False)
    else:
        fixed = torch.zeros(1, dtype=torch.int64, device=m.device) if seed is None else seed
        u, s, vt = rsvd(m, r, seed=fixed, oversample=OVERSAMPLE, iters=POWER)
    root = s[..., :r].sqrt()
    return u[..., :r] * root[..., None, :], vt[..., :r, :] * root[..., :, None]


def _weights(op: str, w: Tensor, fisher: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
    """``sqrt(F)``, ``D_r [..., N, 1]`` and ``D_c [..., 1, K]``, the last two without zeros."""
    if fisher is None:
        return None
    if fisher.shape != w.shape:
        bad(op, "fisher", f"shape {list(w.shape)} as w has", f"shape {list(fisher.shape)}")
    if not fisher.is_floating_point():
        bad(op, "fisher", "a floating dtype", fisher.dtype, kind=TypeError)
    f = fisher.detach().to(w.device, w.dtype)
    if not bool(torch.isfinite(f).all()) or bool((f < 0).any()):
        bad(op, "fisher", "finite values >= 0", "others")
    if not bool(f.any()):
        bad(op, "fisher", "a value above 0", "zeros alone")
    rows, cols = f.mean(-1, keepdim=True).sqrt(), f.mean(-2, keepdim=True).sqrt()
    # a row that never had a gradient would be divided by 0: it weighs almost nothing instead
    rows = rows.clamp_min(float(rows.max()) * 1e-4)
    cols = cols.clamp_min(float(cols.max()) * 1e-4)
    return f.sqrt_(), rows, cols


def _check(op: str, w: Tensor, r: int, scale: float, iterations: int) -> Tensor:
    if not isinstance(w, Tensor) or not w.is_floating_point():
        bad(op, "w", "a floating tensor", getattr(w, "dtype", type(w).__name__), kind=TypeError)
    if w.dim() not in (2, 3) or w.numel() == 0:
        bad(op, "w", "[out, in] or [experts, out, in], none of them 0", list(w.shape))
    if isinstance(r, bool) or not isinstance(r, int) or not 1 <= r <= min(w.shape[-2:]):
        bad(op, "r", f"an integer in [1, {min(w.shape[-2:])}], the smaller side of w", repr(r))
    if not (isinstance(scale, (int, float)) and math.isfinite(scale) and scale > 0):
        bad(op, "scale", "a finite number > 0", repr(scale))
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        bad(op, "iterations", "an integer >= 1", repr(iterations))
    if not bool(torch.isfinite(w).all()):
        bad(op, "w", "finite values", "NaN or infinity")
    return w.detach().to(torch.float64 if w.dtype == torch.float64 else torch.float32)


class _Search:
    """The alternation's state: the matrix, its weights, and the best iterate so far."""

    def __init__(self, w: Tensor, r: int, make: Callable[[Tensor], QTensor], weights: Any, seed: Tensor | None) -> None:
        self.w, self.r, self.make, self.weights, self.seed = w, r, make, weights, seed
        self.best: tuple[QTensor, Tensor, Tensor] | None = None
        self.least = math.inf
        self.errors: list[float] = []

    def fit(self, dense: Tensor | None) -> tuple[Tensor, Tensor]:
        """``B, A`` of rank r nearest to ``w - dense`` in the weighted norm."""
        rest = self.w if dense is None else self.w - dense
        if self.weights is None:
            return low_rank(rest, self.r, seed=self.seed)
        _, rows, cols = self.weights
        left, right = low_rank(rest * rows * cols, self.r, seed=self.seed)
        return left / rows, right / cols

    def quantize(self, left: Tensor | None, right: Tensor | None) -> tuple[QTensor, Tensor]:
        """A quantized ``w - left @ right``, and its dense values."""
        q = self.make(self.w if left is None or right is None else self.w - left @ right)
        return q, dequantize(q).to(self.w.dtype)

    def note(self, q: QTensor, dense: Tensor, left: Tensor, right: Tensor) -> float:
        """The iterate's error, relative to ``w``; keeps it where it is the smallest so far."""
        rest = (self.w - dense).sub_(left @ right)
        size = self.w
        if self.weights is not None:
            rest, size = rest.mul_(self.weights[0]), self.w * self.weights[0]
        error = float(torch.linalg.vector_norm(rest, dtype=torch.float64))
        norm = float(torch.linalg.vector_norm(size, dtype=torch.float64))
        error = error / norm if norm > 0 else error
        self.errors.append(error)
        if error < self.least:
            self.least, self.best = error, (q, left, right)
        return error

    def result(self, dtype: torch.dtype, scale: float, errors: list[float] | None) -> tuple[QTensor, Tensor, Tensor]:
        assert self.best is not None
        if errors is not None:
            errors[:] = self.errors
        q, left, right = self.best
        root = math.sqrt(scale)
        return replace(q, dtype=dtype), (right / root).contiguous(), (left / root).contiguous()


def lq_decompose(
    w: Tensor,
    r: int,
    spec: QuantSpec | str,
    *,
    fisher: Tensor | None = None,
    iterations: int = 50,
    tol: float = 1e-4,
    scale: float = 1.0,
    method: Literal["absmax", "mse", "hqq"] = "absmax",
    seed: Tensor | None = None,
    errors: list[float] | None = None,
) -> tuple[QTensor, Tensor, Tensor]:
    """``w ~ dequantize(Q) + scale * B A`` by LQ-LoRA's alternation (arXiv 2311.12023, algorithm 2).

    From ``Q = 0``: ``B A = SVD_r(w - Q)``, ``Q = quantize(w - scale B A)``, until the error rises or falls by less than
    ``tol``. With ``fisher`` the error is ``||sqrt(F) * (w - Q - scale B A)||`` and the SVD is of
    ``D_r (w - Q) D_c``, ``D_r = sqrt(mean_j F)``, ``D_c = sqrt(mean_i F)``: exact where ``F`` has rank 1.

    Measured after both half steps, and once for the quantize-first start ``Q = quantize(w)``, ``B A = SVD_r(w - Q)``,
    so the result is never worse than ``quantize(w)`` alone; the best of all is returned.

    Args:
        w: ``[out, in]``, or ``[experts, out, in]`` (one decomposition an expert), any floating dtype; computed in
            float32 (float64 for float64).
        r: rank of ``B A``.
        spec: a :class:`QuantSpec` or the name of a format.
        fisher: diagonal Fisher information, ``w``'s shape: the mean of squared gradients.
        iterations: at most so many.
        tol: least relative fall of the error that is worth another iteration.
        scale: what the layer multiplies ``B A`` by (``alpha / r``).
        method: of :func:`quantize`.
        seed: int64[1], of the randomized SVD that serves small ``r`` (see :func:`low_rank`); None: a fixed one.
        errors: a list that receives each iterate's relative error, in the order of measuring.

    Returns ``(Q, A [..., r, in], B [..., out, r])``, ``A`` and ``B`` in the dtype of the computation,
    ``Q`` dequantizing to ``w``'s.

    Raises ValueError or TypeError ``lowmem.lq_decompose: <argument>: expected ..., got ...``.
    """
    op = "lq_decompose"
    full = _check(op, w, r, scale, iterations)
    search = _Search(full, r, lambda m: quantize(m, spec, method=method), _weights(op, full, fisher), seed)
    q, dense = search.quantize(None, None)
    search.note(q, dense, *search.fit(dense))  # the quantize-first start
    left, right = search.fit(None)
    last = math.inf
    for _ in range(iterations):
        q, dense = search.quantize(left, right)
        now = search.note(q, dense, left, right)
        left, right = search.fit(dense)
        search.note(q, dense, left, right)
        if not now < last * (1 - tol):
            break
        last = now
    return search.result(w.dtype, scale, errors)


def loftq_init(
    w: Tensor,
    r: int,
    spec: QuantSpec | str,
    *,
    iterations: int = 1,
    scale: float = 1.0,
    method: Literal["absmax", "mse", "hqq"] = "absmax",
    seed: Tensor | None = None,
    errors: list[float] | None = None,
) -> tuple[QTensor, Tensor, Tensor]:
    """``w ~ dequantize(Q) + scale * B A`` by LoftQ (arXiv 2310.08659): from ``B A = 0``, ``iterations`` times
    ``Q = quantize(w - scale B A)`` and ``B A = SVD_r(w - Q)``; the best of the iterates.

    Arguments, result and errors as in :func:`lq_decompose`. Two bits are stored in two bits.
    """
    op = "loftq_init"
    full = _check(op, w, r, scale, iterations)
    search = _Search(full, r, lambda m: quantize(m, spec, method=method), None, seed)
    left: Tensor | None = None
    right: Tensor | None = None
    for _ in range(iterations):
        q, dense = search.quantize(left, right)
        left, right = search.fit(dense)
        search.note(q, dense, left, right)
    return search.result(w.dtype, scale, errors)
