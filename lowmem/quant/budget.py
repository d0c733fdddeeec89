"""Which format each matrix gets under a budget of bits: LQ-LoRA's integer program (arXiv 2311.12023, section 3.2).

One configuration for each matrix, the sum of their bits within the budget, the sum of their squared errors least::

    min  sum_l sum_c cost[l, c] x[l, c]     with  sum_c x[l, c] = 1,  sum_l sum_c bits[l, c] x[l, c] <= budget
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._errors import bad
from ..ops import quant as ops
from .formats import QuantSpec
from .lq import low_rank
from .qtensor import QTensor
from .quantize import double_quantize, nearest_codes, quantize

SAMPLE = 1 << 17
"""Elements of a matrix whose quantization errors are measured, in evenly spaced rows."""


def lq_specs() -> list[QuantSpec]:
    """LQ-LoRA's 432 configurations: NF2, NF3, NF4 or int8; scales of 2, 3, 4 or 8 bits for groups of 16, 32 or 64;
    one bf16, fp16 or fp32 number for each 16, 64 or 256 of them. ``bits = b + b0 / B0 + b1 / (B0 B1)``, 2.03 to 9.5."""
    return [
        QuantSpec(f, g, double_quant=True, scale_bits=b, scale_dtype=t, scale_group=s)
        for f, b, t, g, s in itertools.product(
            ("nf2", "nf3", "nf4", "int8"),
            (2, 3, 4, 8),
            (torch.bfloat16, torch.float16, torch.float32),
            (16, 32, 64),
            (16, 64, 256),
        )
    ]


def solve_budget(costs: Sequence[Sequence[float]], bits: Sequence[Sequence[int]], budget: int) -> list[int]:
    """The configuration of each matrix, ``min sum costs`` with ``sum bits <= budget``, by scipy's HiGHS, to optimality.

    Args:
        costs: ``costs[l][c]`` of matrix l in configuration c, finite; NaN marks a configuration that it cannot have.
        bits: the same shape, integers.
        budget: the most that the bits may add up to.

    Raises ValueError ``lowmem.assign_bits: budget_bits: ...`` where even the smallest configurations exceed it.
    """
    op = "assign_bits"
    choices = [_undominated(c, b) for c, b in zip(costs, bits, strict=True)]
    least = sum(min(bits[i][c] for c in options) for i, options in enumerate(choices))
    if least > budget:
        bad(op, "budget_bits", f"at least {least} bits in all, what the smallest configurations take", f"{budget}")
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_matrix
    except ImportError:
        bad(op, "scipy", "the package to be installed", "none", hint="pip install scipy", kind=ImportError)
    owner = [i for i, options in enumerate(choices) for _ in options]
    flat = [(i, c) for i, options in enumerate(choices) for c in options]
    cost = np.array([costs[i][c] for i, c in flat], dtype=np.float64)
    size = np.array([bits[i][c] for i, c in flat], dtype=np.float64)
    top = float(cost.max()) or 1.0
    one_each = coo_matrix((np.ones(len(flat)), (owner, range(len(flat)))), shape=(len(choices), len(flat))).tocsr()
    room = float(budget)
    while True:
        found = milp(
            cost / top,
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(size[None] / budget, -np.inf, room / budget),
            ],
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            bad(op, "budget_bits", "a program that HiGHS solves", found.message, kind=RuntimeError)
        chosen = [c for (_, c), x in zip(flat, found.x, strict=True) if x > 0.5]
        over = sum(bits[i][c] for i, c in enumerate(chosen)) - budget
        if over <= 0:
            return chosen
        room -= over  # the solver's tolerance let it pass the budget by a few bits


def _undominated(costs: Sequence[float], bits: Sequence[int]) -> list[int]:
    """The configurations that no other one beats in both cost and bits, smallest first."""
    kept: list[int] = []
    best = math.inf
    for c in sorted((c for c in range(len(costs)) if not math.isnan(costs[c])), key=lambda c: (bits[c], costs[c])):
        if costs[c] < best:
            best = costs[c]
            kept.append(c)
    return kept


def quantization_costs(
    w: Tensor,
    specs: Sequence[QuantSpec],
    *,
    r: int = 0,
    fisher: Tensor | None = None,
    method: Literal["absmax", "mse", "hqq"] = "absmax",
    sample: int = SAMPLE,
) -> list[float]:
    """``||sqrt(F) * (W - dequantize(quantize(W, spec, method)))||**2`` for each spec (``F = 1`` without ``fisher``),
    NaN where it does not fit; with ``r``, of ``W`` less its best rank-r term.

    Measured on ``sample`` elements and scaled up. Specs whose codes do not depend on how scales are stored share them:
    a group's error is ``sum F w^2 - 2 s sum F w v + s^2 sum F v^2``, ``v`` the codes' values."""
    full = w.detach().reshape(-1, w.shape[-1]) if r == 0 else None
    if full is None:
        dense = w.detach().float()
        left, right = low_rank(dense, r)
        full = (dense - left @ right).reshape(-1, w.shape[-1])
    rows = max(1, min(full.shape[0], sample // max(full.shape[1], 1)))
    step = full.shape[0] // rows
    part = full[: rows * step : step].float().contiguous()
    weight = None if fisher is None else fisher.detach().reshape(full.shape)[: rows * step : step].float()
    factor = full.numel() / max(part.numel(), 1)
    moments: dict[Any, tuple[Tensor, Tensor, Tensor]] = {}
    plain: dict[Any, QTensor] = {}
    costs = []
    for spec in specs:
        if not spec.is_table and spec.group_size > 0 and part.shape[1] % spec.group_size:
            costs.append(math.nan)
            continue
        exact = spec.is_table and method == "absmax"  # others choose codes under scales as they are stored
        wide = torch.float32 if exact else spec.scales_in
        base = QuantSpec(spec.format, spec.group_size, zero_point=spec.zero_point, scale_dtype=wide)
        if base not in plain:
            plain[base] = quantize(part, base, method=method)
        q = replace(plain[base], spec=spec, scale=plain[base].scale.to(spec.scales_in))
        if spec.double_quant:
            q = double_quantize(q, q.scale)
        again = spec.double_quant and spec.scale_bits < 8  # quantize then chooses codes under the stored scales
        key = spec if again else base
        if key not in moments:
            moments[key] = _moments(q if again else plain[base], part, weight)
        ww, wv, vv = moments[key]
        index = torch.arange(len(ww), device=part.device)
        s = ops.scales_reference(q.scale, q.scale_code, q.scale_absmax, q.scale_offset, spec, index).double()
        costs.append(float((ww - 2 * s * wv + s * s * vv).sum()) * factor)
    return costs


def _moments(q: QTensor, part: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """``sum F w^2``, ``sum F w v`` and ``sum F v^2`` of each group in float64, v the value of a code over its scale."""
    codes, _ = nearest_codes(q, part)
    groups = torch.arange(len(codes), device=part.device)[:, None].expand(codes.shape)
    v = ops.unit_values(codes, q.zero, q.spec, groups, torch.float32)

    def grouped(t: Tensor) -> Tensor:
        return torch.nn.functional.pad(t.reshape(-1), (0, codes.numel() - t.numel())).view(codes.shape)

    w = grouped(part)
    fw, fv = (w, v) if weight is None else (w * grouped(weight), v * grouped(weight))
    if weight is None and part.numel() < codes.numel():
        fv = v * grouped(torch.ones_like(part))
    return tuple((a * b).sum(-1, dtype=torch.float64) for a, b in ((fw, w), (fw, v), (fv, v)))  # type: ignore[return-value]


def assign_bits(
    model: nn.Module | Mapping[str, Tensor],
    budget_bits: float,
    *,
    specs: Sequence[QuantSpec] | None = None,
    r: int = 0,
    fisher: Mapping[str, Tensor] | None = None,
    target_modules: str | Collection[str] = "all-linear",
    method: Literal["absmax", "mse", "hqq"] = "absmax",
    sample: int = SAMPLE,
) -> dict[str, QuantSpec]:
    """A spec for each linear layer so that they take at most ``budget_bits`` bits a weight together, with the least sum
    of squared quantization errors (see the module's head).

    Args:
        model: a module, whose layers are named as :func:`lowmem.convert` does, or names to weights.
        budget_bits: bits a weight over all these layers together, scales included, adapters not.
        specs: the configurations to choose from; None for LQ-LoRA's 432 (:func:`lq_specs`).
        r: rank of the low-rank term that :func:`lq_decompose` will take out; 0 for none.
        fisher: name to the mean squared gradient of that weight, its shape.
        target_modules: which layers of a module, PEFT's rules.
        method: of :func:`quantize`, which the weights will be quantized with.
        sample: elements of a matrix that are quantized to measure its errors.

    Returns name to spec. Needs scipy. Raises ValueError ``lowmem.assign_bits: <argument>: expected ..., got ...``.
    """
    op = "assign_bits"
    if isinstance(model, nn.Module):
        from ..convert import _targets

        found = _targets(model, target_modules)
        weights: dict[str, Tensor] = {n: m.weight for n, m in found.items() if isinstance(m, nn.Linear)}
    else:
        weights = dict(model)
    if not weights:
        bad(op, "model", "linear layers", "none")
    if isinstance(budget_bits, bool) or not (isinstance(budget_bits, (int, float)) and math.isfinite(budget_bits)):
        bad(op, "budget_bits", "a finite number of bits a weight", repr(budget_bits))
    candidates = list(lq_specs() if specs is None else specs)
    if not candidates:
        bad(op, "specs", "one QuantSpec or more", "none")
    missing = [n for n in weights if fisher is not None and n not in fisher]
    if missing:
        bad(op, "fisher", "a tensor for each layer", f"none for {missing[0]!r}")
    costs, bits = [], []
    for name, w in weights.items():
        f = None if fisher is None else fisher[name]
        if f is not None and f.shape != w.shape:
            bad(op, "fisher", f"shape {list(w.shape)} for {name!r}", list(f.shape))
        if not bool(torch.isfinite(w).all()):
            bad(op, "model", "finite weights", f"NaN or infinity in {name!r}")
        row = quantization_costs(w, candidates, r=min(r, *w.shape[-2:]), fisher=f, method=method, sample=sample)
        if all(math.isnan(c) for c in row):
            bad(op, "specs", f"one that fits {name!r} with K = {w.shape[-1]}", "none")
        costs.append(row)
        bits.append([8 * s.storage_bytes(math.prod(w.shape[:-1]), w.shape[-1]) for s in candidates])
    budget = math.floor(budget_bits * sum(w.numel() for w in weights.values()))
    chosen = solve_budget(costs, bits, budget)
    return {name: candidates[c] for name, c in zip(weights, chosen, strict=True)}
