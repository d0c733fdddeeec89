"""Row norms, inclusion probabilities, and the choice of rows."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .._errors import bad
from ..ops.sampled import MODES, Pick, relative, water_level

Mode = Literal["systematic", "wta", "crs", "topk"]


def row_norms(x: Tensor) -> Tensor:
    """``|x_i|_2`` over the last dimension of ``x [..., K]``: float64 ``[n]``, ``n`` the product of the others. NaN and
    infinity show in their rows."""
    if not x.is_floating_point() or x.dim() < 1:
        bad("row_norms", "x", "a floating tensor [..., K]", f"shape {tuple(x.shape)} in {x.dtype}")
    with torch.no_grad():
        return torch.ops.lowmem.sampled_norms(x.reshape(-1, x.shape[-1]))


def budget_rows(n: int, budget: float) -> int:
    """How many of ``n`` rows a budget in (0, 1] keeps: ``ceil(budget n)``, so at least one of any."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0.0 < budget <= 1.0:
        bad("sampling", "budget", "a share of the rows in (0, 1]", repr(budget))
    return min(n, math.ceil(budget * n))


def _check(op: str, p: Tensor, k: int) -> None:
    if p.dim() != 1 or not p.is_floating_point() or p.numel() == 0:
        bad(op, "p", "a floating vector [n] with n >= 1", f"shape {tuple(p.shape)} in {p.dtype}")
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= p.numel():
        bad(op, "k", f"an integer from 1 to {p.numel()}", repr(k))


def inclusion_probabilities(p: Tensor, k: int) -> Tensor:
    """``pi_i = min(1, c p_i)`` with ``c`` such that they sum to ``k`` ("water-filling"), float64 ``[n]``: what
    ``mode="systematic"`` includes row ``i`` with. Where fewer than ``k`` of ``p [n]`` are positive, these get 1 and the
    others 0.

    Among designs of ``k`` rows with weights ``1 / pi``, ``pi`` in proportion to the size of a row's term (as far as 1
    allows) has the least bound on the variance.
    """
    _check("inclusion_probabilities", p, k)
    with torch.no_grad():
        q = relative(p)
        s = q.sort(descending=True).values
        suffix, left, t = water_level(s, k)
        c = torch.where(suffix[t] > 0, left[t] / suffix[t], 0.0)
        certain = (q > s[t]) & (t > 0)
        return torch.where(certain | ((suffix[t] <= 0) & (q > 0)), 1.0, (c * q).clamp(max=1.0))


def choose(p: Tensor, k: int, *, mode: Mode = "systematic", seed: Tensor) -> tuple[Tensor, Tensor]:
    """``(rows, scale)``: ``k`` rows by importances ``p [n]`` and the weights with which their terms add up.

    ==============  ===========================================================================================
    systematic      ``k`` different rows, row ``i`` with probability ``min(1, c p_i)`` and weight one over it
    wta             the largest for certain, as many as minimise the bound on the variance, the rest drawn
                    independently (WTA-CRS, arXiv 2305.15265); a row may come twice
    crs             all drawn independently (column-row sampling)
    topk            the ``k`` largest with weight 1: **biased**, the rest counts as zero
    ==============  ===========================================================================================

    All but topk are unbiased: ``E[sum_j scale_j f(rows_j)] = sum_i f(i)`` for every ``f`` that is zero where ``p`` is.
    Importances that are not finite count as larger than all others, so that NaN reaches the gradient; the scale of
    ``p`` does not matter, from 1e-300 to 1e300. Rows come in ascending order. ``seed`` int64[1] on ``p``'s device: the
    same seed gives the same rows, in recomputation too. Nothing is read on the host.

    Raises ValueError ``lowmem.choose: <argument>: expected ..., got ...``.
    """
    op = "choose"
    _check(op, p, k)
    if mode not in MODES:
        bad(op, "mode", f"one of {', '.join(MODES)}", repr(mode))
    if seed.dtype != torch.int64 or seed.shape != (1,) or seed.device != p.device:
        bad(op, "seed", f"int64[1] on {p.device}", f"{seed.dtype}{list(seed.shape)} on {seed.device}", kind=TypeError)
    with torch.no_grad():
        return torch.ops.lowmem.sampled_choose(p, k, mode, seed)


def pick(
    x: Tensor,
    budget: float,
    *,
    mode: Mode = "systematic",
    seed: Tensor,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Pick:
    """The rows of ``x [..., K]`` that a sampled backward keeps: ``ceil(budget n)`` of the ``n`` rows, by importances
    ``|x_i| weight_i``.

    Args:
        weight: ``[n]`` or ``x``'s leading shape, what is known of the gradients' norms; it must be positive where they
            may be (a :class:`GradNormCache` sees to that), else the estimate is biased.
        mask: bool, ``[n]`` or ``x``'s leading shape: rows that are False (padding) are never used.

    Raises ValueError or TypeError ``lowmem.pick: <argument>: expected ..., got ...``.
    """
    op = "pick"
    flat = x.detach().reshape(-1, x.shape[-1])
    n = flat.shape[0]
    if n == 0:
        bad(op, "x", "at least one row", "none")
    p = row_norms(flat)
    for name, value in (("weight", weight), ("mask", mask)):
        if value is None:
            continue
        if value.numel() != n or (value.dim() != 1 and value.shape != x.shape[:-1]):
            bad(op, name, f"shape [{n}] or {list(x.shape[:-1])}", list(value.shape))
        if name == "mask" and value.dtype != torch.bool:
            bad(op, name, "bool", value.dtype, kind=TypeError)
    if weight is not None:
        p = p * weight.reshape(-1).to(torch.float64)
    if mask is not None:
        p = torch.where(mask.reshape(-1), p, 0.0)
    rows, scale = choose(p, budget_rows(n, budget), mode=mode, seed=seed)
    return Pick(rows, scale, torch.ops.lowmem.sampled_gather(flat, rows, None))
