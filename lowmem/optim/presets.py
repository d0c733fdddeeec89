"""Published methods as settings of :class:`ProjAdamW`. Each takes ``(params, lr, **overrides)``; an override may be any
argument of ProjAdamW. What a preset leaves out of its paper is said in its docstring."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from .policy import FisherWindow, OnConverged, OnSimilar
from .proj_adamw import ProjAdamW

_RANKS = ("rank", "energy", "density")
# as the released GaLore: exact SVD, every matrix renewed in the same step, moments left as they are
_GALORE: dict[str, Any] = {
    "rank": 128, "projector": "svd", "refresh": 200, "stagger": False, "moments": "keep", "scale": 0.25, "eps": 1e-6,
    "eps_hat": True,
}  # fmt: skip


def _make(params: Iterable[Any], lr: float, overrides: dict[str, Any], settings: dict[str, Any]) -> ProjAdamW:
    if any(overrides.get(name) is not None for name in _RANKS):  # another rank policy replaces the preset's
        settings = {name: value for name, value in settings.items() if name not in _RANKS}
    return ProjAdamW(params, lr, **{**settings, **overrides})


def AdaRankGrad(params: Iterable[Any], lr: float = 1e-3, **overrides: Any) -> ProjAdamW:
    """Adaptive rank and moments (arXiv 2410.17881): randomized SVD, the smallest rank that captures 90 % of the
    gradient's energy, renewed when the projected gradient has converged, moments rotated into the new basis.

    V is rotated by squared overlaps, ``(C o C) V``: rotated by C, as the paper's page has it, it becomes negative.
    ``rank_min`` is a floor under the rank; without one a layer whose gradient is nearly of rank 1 learns in one
    direction."""
    settings = {"energy": 0.9, "projector": "rsvd", "refresh": OnConverged(), "moments": "rotate", "scale": 1.0}
    return _make(params, lr, overrides, settings)


def GaLore(params: Iterable[Any], lr: float = 1e-3, **overrides: Any) -> ProjAdamW:
    """Gradient low-rank projection (arXiv 2403.03507), step for step as galore_torch 1.0 without weight decay, which it
    applies after the update and torch's AdamW, and this, before."""
    return _make(params, lr, overrides, _GALORE)


def QGaLore(params: Iterable[Any], lr: float = 1e-3, **overrides: Any) -> ProjAdamW:
    """Q-GaLore (arXiv 2407.08296) without its INT8 weights: lazy renewal by subspace similarity, INT8 basis and
    moments, stochastic rounding of bf16 weights. Its basis has 4 bits there and 8 here."""
    settings = {**_GALORE, "refresh": OnSimilar(), "state": "int8", "basis": "int8", "rounding": "stochastic"}
    return _make(params, lr, overrides, settings)


def Fira(params: Iterable[Any], lr: float = 1e-3, **overrides: Any) -> ProjAdamW:
    """Fira (arXiv 2410.01623): GaLore, and the rest of the gradient scaled column by column as Adam scaled the
    projected part, under a norm-growth limiter. ``G - P R`` as in the paper; the released code subtracts
    ``scale P R``, which is the same at scale 1."""
    return _make(params, lr, overrides, {**_GALORE, "residual": "fira", "limiter": 1.01})


def FRUGAL(params: Iterable[Any], lr: float = 1e-3, **overrides: Any) -> ProjAdamW:
    """FRUGAL (arXiv 2411.07837): Adam on a quarter of the rows or columns, drawn anew every 200 steps with moments
    reset, sign descent on the rest."""
    settings = {
        "density": 0.25, "projector": "randk", "refresh": 200, "stagger": False, "moments": "reset",
        "residual": "sign", "scale": 1.0,
    }  # fmt: skip
    return _make(params, lr, overrides, settings)


def Apollo(params: Iterable[Any], lr: float = 1e-3, **overrides: Any) -> ProjAdamW:
    """APOLLO (arXiv 2412.05270): the full gradient with one Adam-like scale a channel, estimated from a random
    projection of rank 256."""
    settings = {
        "rank": 256, "projector": "random", "refresh": 200, "stagger": False, "moments": "keep", "residual": "apollo",
        "scale": 1.0, "eps": 1e-6, "eps_hat": True,
    }  # fmt: skip
    return _make(params, lr, overrides, settings)


def ApolloMini(params: Iterable[Any], lr: float = 1e-3, **overrides: Any) -> ProjAdamW:
    """APOLLO-Mini (arXiv 2412.05270): rank 1 and one scale a matrix, times sqrt(128)."""
    if not any(overrides.get(name) is not None for name in _RANKS):
        overrides = {"rank": 1, **overrides}
    return Apollo(params, lr, **{"granularity": "tensor", "scale": math.sqrt(128.0), **overrides})


def NaturalGaLore(params: Iterable[Any], lr: float = 1e-3, **overrides: Any) -> ProjAdamW:
    """Natural GaLore (arXiv 2410.16029): GaLore on the projected gradient times the inverse empirical Fisher matrix of
    the last four, by Woodbury. It keeps four more projected gradients a matrix."""
    return _make(params, lr, overrides, {**_GALORE, "precond": FisherWindow(4, 1.0)})


def GradNormLoRP(params: Iterable[Any], lr: float = 1e-3, **overrides: Any) -> ProjAdamW:
    """GradNormLoRP (arXiv 2412.19616) without its LoRA factors: ``W = g V/|V|`` by rows, GaLore on V's gradient, Adam
    on g. V's gradient has its projection term and g is kept from step to step, as in the paper and not as in the
    released code."""
    return _make(params, lr, overrides, {**_GALORE, "reparam": "weight_norm"})
