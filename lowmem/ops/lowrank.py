"""The ``lowrank`` family: one step of a projected optimizer, W in ``R^{m x n}`` with gradient G of the same shape.

The basis P is orthonormal on one side, r columns: ``left``: P [m, r], R = P^T G [r, n]; right: P [n, r],
R = G P [m, r]. What W receives is ``P N`` (left) or ``N P^T`` (right), written ``P.N`` below. "Long" is the side that
keeps its length: n for left, m for right; ``f_j`` multiplies column j (left) or row j (right) of a matrix.

=============================  ===========================================================================
``lowrank_project``            R = P^T G or G P, fp32 sums, rounded to g's dtype
``lowrank_adam_``              M <- b1 M + (1-b1) R;  V <- b2 V + (1-b2) R^2;  N = (M/c1) / (sqrt(V/c2) + eps)
``lowrank_project_adam_``      both in one launch
``lowrank_update_``            W <- decay W - alpha P.N, rounded to nearest, or stochastically under a seed
``lowrank_update_scaled_``     W <- decay W - alpha P.N - f_j G                     (Fira with N and f prepared, APOLLO)
``lowrank_update_sign_``       W <- decay W - alpha P.N - beta sign(G - P.R)        (FRUGAL)
=============================  ===========================================================================

No operator makes an ``m x n`` tensor: on the CPU the update is torch's in-place ``addmm_``, or goes by a few blocks of
rows through a scratch of at most a quarter of the weight and 8 MiB; on a GPU a tile of the product stays in registers.
The bytes of one step with elements of e bytes: G once (read), W twice, and R, M, V, N; a residual reads G once more.

Stochastic rounding (bf16 and fp16 weights): element (i, j) takes the 16-bit half of Philox that dropout would take,
child 1 (``lowmem.ops.philox``), so every backend rounds alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._dispatch import define
from .philox import philox4x32

_CHILD = 1  # the random stream of weight rounding; dropout uses 0
_SCRATCH = 1 << 23  # bytes of the row block that a CPU update goes through, at the most


def working(t: Tensor) -> torch.dtype:
    """The dtype of moments and sums for ``t``: float64 stays, everything else is fp32."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------------------------------ project

PROJECT = "(Tensor g, Tensor p, bool left) -> Tensor"


def project_fake(g: Tensor, p: Tensor, left: bool) -> Tensor:
    """Shape of ``lowmem::lowrank_project``."""
    return g.new_empty((p.shape[1], g.shape[1]) if left else (g.shape[0], p.shape[1]))


def project_reference(g: Tensor, p: Tensor, left: bool) -> Tensor:
    """R = P^T G [r, n] or G P [m, r] in g's dtype; ``p`` is rounded to it."""
    p = p.to(g.dtype)
    return p.T @ g if left else g @ p


# --------------------------------------------------------------------------------------------------------------- Adam

ADAM = (
    "(Tensor(a!) exp_avg, Tensor(b!) exp_avg_sq, Tensor r, float beta1, float beta2, float bias1, float bias2, "
    "float eps) -> Tensor"
)


def adam_fake(
    exp_avg: Tensor, exp_avg_sq: Tensor, r: Tensor, beta1: float, beta2: float, bias1: float, bias2: float, eps: float
) -> Tensor:
    """Shape of ``lowmem::lowrank_adam_``."""
    return r.new_empty(r.shape)


def adam_reference(
    exp_avg: Tensor, exp_avg_sq: Tensor, r: Tensor, beta1: float, beta2: float, bias1: float, bias2: float, eps: float
) -> Tensor:
    """One Adam step in the subspace: moments in place (fp32 or fp64), N = (M/bias1)/(sqrt(V/bias2) + eps) in r's
    dtype; ``bias1 = 1 - beta1^t`` and ``bias2 = 1 - beta2^t``."""
    x = r.to(exp_avg.dtype)
    exp_avg.mul_(beta1).add_(x, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(x, x, value=1 - beta2)
    return ((exp_avg / bias1) / ((exp_avg_sq / bias2).sqrt() + eps)).to(r.dtype)


# ----------------------------------------------------------------------------------------------------- project + Adam

PROJECT_ADAM = (
    "(Tensor(a!) exp_avg, Tensor(b!) exp_avg_sq, Tensor g, Tensor p, bool left, float beta1, float beta2, "
    "float bias1, float bias2, float eps) -> Tensor"
)


def project_adam_fake(exp_avg: Tensor, exp_avg_sq: Tensor, g: Tensor, p: Tensor, left: bool, *numbers: float) -> Tensor:
    """Shape of ``lowmem::lowrank_project_adam_``."""
    return project_fake(g, p, left)


def project_adam_reference(
    exp_avg: Tensor, exp_avg_sq: Tensor, g: Tensor, p: Tensor, left: bool, *numbers: float
) -> Tensor:
    """:func:`adam_reference` on :func:`project_reference`, R rounded to g's dtype between the two."""
    return adam_reference(exp_avg, exp_avg_sq, project_reference(g, p, left), *numbers)


def _project_adam_cpu(exp_avg: Tensor, exp_avg_sq: Tensor, g: Tensor, p: Tensor, left: bool, *numbers: float) -> Tensor:
    r = torch.ops.lowmem.lowrank_project(g, p, left)
    return torch.ops.lowmem.lowrank_adam_(exp_avg, exp_avg_sq, r, *numbers)


# ------------------------------------------------------------------------------------------------------------- update


def rounding_bits(rows: int, cols: int, seed: Tensor) -> Tensor:
    """The 16 random bits of every element of a ``[rows, cols]`` weight, int64 in [0, 65536)."""
    blocks = (cols + 7) // 8
    c0 = torch.arange(blocks, device=seed.device).view(1, blocks)
    c1 = torch.arange(rows, device=seed.device).view(rows, 1)
    words = torch.stack(philox4x32(seed, c0, c1, 0, _CHILD), dim=-1)
    return torch.stack((words & 0xFFFF, words >> 16), dim=-1).view(rows, blocks * 8)[:, :cols]


def round_stochastic(x: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """``x`` (fp32) to bf16, up with the probability of the part that is cut off: ``bits`` (uniform in [0, 65536)) are
    added below the last kept bit and the rest dropped. NaN and infinity stay."""
    raw = x.view(torch.int32).long() & 0xFFFFFFFF
    moved = (raw + bits) & 0xFFFF0000
    signed = (moved - ((moved >> 31) << 32)).to(torch.int32)
    return torch.where(x.isfinite(), signed.view(torch.float32), x).to(dtype)


def _store(w: Tensor, value: Tensor, seed: Tensor | None) -> None:
    if seed is None or w.dtype != torch.bfloat16:
        w.copy_(value)
    else:
        w.copy_(round_stochastic(value.float(), w.dtype, rounding_bits(w.shape[0], w.shape[1], seed)))


def _back(p: Tensor, n: Tensor, left: bool) -> Tensor:
    return p @ n if left else n @ p.T


def _wide(w: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(working(w)) for t in (w, *others))


UPDATE = "(Tensor(a!) w, Tensor p, Tensor n, bool left, float alpha, float decay, Tensor? seed) -> ()"


def update_fake(w: Tensor, p: Tensor, n: Tensor, left: bool, alpha: float, decay: float, seed: Tensor | None) -> None:
    """``lowmem::lowrank_update_`` returns nothing."""


def update_reference(
    w: Tensor, p: Tensor, n: Tensor, left: bool, alpha: float, decay: float, seed: Tensor | None
) -> None:
    """``w <- decay w - alpha P.N`` in place, computed in fp32 (fp64 for fp64), rounded once."""
    wide, p, n = _wide(w, p, n)
    _store(w, wide * decay - alpha * _back(p, n, left), seed)


def _update_cpu(w: Tensor, p: Tensor, n: Tensor, left: bool, alpha: float, decay: float, seed: Tensor | None) -> None:
    if seed is not None and w.dtype == torch.bfloat16:
        _by_rows(w, p, n, left, alpha, decay, seed)
        return
    # 16 bits: sums, decay and the addition are fp32 inside of it, with one rounding at the end
    p, n = p.to(w.dtype), n.to(w.dtype)
    torch.addmm(w, *((p, n) if left else (n, p.T)), beta=decay, alpha=-alpha, out=w)


def _rows_at_once(w: Tensor, size: int, parts: int) -> int:
    """Rows of a block with elements of ``size`` bytes: a ``parts``-th of the matrix, within the scratch."""
    return max(1, min(-(-w.shape[0] // parts), _SCRATCH // (size * max(w.shape[1], 1))))


def _by_rows(w: Tensor, p: Tensor, n: Tensor, left: bool, alpha: float, decay: float, seed: Tensor | None) -> None:
    # The product is rounded to bf16, 2^-9 of the update and not of the weight, and added in fp32, so that what is small
    # against the weight is not lost before the rounding of the sum. Few blocks: each is two parallel regions.
    p, n = p.to(w.dtype), n.to(w.dtype)
    first, second = (p, n) if left else (n, p.T)
    step = _rows_at_once(w, w.element_size(), 4)
    scratch = w.new_empty((min(step, w.shape[0]), w.shape[1]))
    for begin in range(0, w.shape[0], step):
        rows = slice(begin, min(begin + step, w.shape[0]))
        part = scratch[: rows.stop - begin]
        torch.mm(first[rows], second, out=part)
        axpy_rows(w[rows], part, -alpha, decay, seed, begin)


AXPY = "(Tensor(a!) w, Tensor x, float alpha, float decay, Tensor? seed, int row) -> ()"


def axpy_fake(w: Tensor, x: Tensor, alpha: float, decay: float, seed: Tensor | None, row: int) -> None:
    """``lowmem::lowrank_axpy_`` returns nothing."""


def axpy_reference(w: Tensor, x: Tensor, alpha: float, decay: float, seed: Tensor | None, row: int) -> None:
    """``w <- decay w + alpha x`` in place, in fp32, rounded once: ``w`` holds rows ``row``, ``row + 1``, ... of the
    weight, which decides their random bits."""
    value = w.to(working(w)) * decay + alpha * x.to(working(w))
    if seed is None or w.dtype != torch.bfloat16:
        w.copy_(value)
    else:
        w.copy_(round_stochastic(value, w.dtype, rounding_bits(row + w.shape[0], w.shape[1], seed)[row:]))


def axpy_rows(w: Tensor, x: Tensor, alpha: float, decay: float, seed: Tensor | None, row: int) -> None:
    """``lowrank_axpy_``, and its reference for a weight that lies transposed."""
    if w.stride(1) == 1 or w.shape[1] <= 1:
        torch.ops.lowmem.lowrank_axpy_(w, x, alpha, decay, seed, row)
    else:
        axpy_reference(w, x, alpha, decay, seed, row)


# ---------------------------------------------------------------------------------------------------------- residuals

SCALED = (
    "(Tensor(a!) w, Tensor g, Tensor p, Tensor n, Tensor f, bool left, float alpha, float decay, Tensor? seed) -> ()"
)


def update_scaled_fake(
    w: Tensor, g: Tensor, p: Tensor, n: Tensor, f: Tensor, left: bool, alpha: float, decay: float, seed: Tensor | None
) -> None:
    """``lowmem::lowrank_update_scaled_`` returns nothing."""


def update_scaled_reference(
    w: Tensor, g: Tensor, p: Tensor, n: Tensor, f: Tensor, left: bool, alpha: float, decay: float, seed: Tensor | None
) -> None:
    """``w <- decay w - alpha P.N - f_j g``, ``f`` [long] in fp32 (fp64 for fp64). A basis without columns, [m, 0] or
    [n, 0], leaves the product out."""
    wide, g, p, n, f = _wide(w, g, p, n, f)
    f = f.view(1, -1) if left else f.view(-1, 1)
    _store(w, wide * decay - alpha * _back(p, n, left) - f * g, seed)


def _update_scaled_cpu(
    w: Tensor, g: Tensor, p: Tensor, n: Tensor, f: Tensor, left: bool, alpha: float, decay: float, seed: Tensor | None
) -> None:
    if w.dtype in (torch.float32, torch.float64):
        f = f.to(w.dtype)
        if p.shape[1]:
            _update_cpu(w, p, n, left, alpha, decay, None)
        elif decay != 1.0:
            w.mul_(decay)
        w.addcmul_(g.to(w.dtype), f.view(1, -1) if left else f.view(-1, 1), value=-1.0)
        return
    f = f.to(working(w)).view(1, -1) if left else f.to(working(w)).view(-1, 1)
    for row, rows in row_blocks(w):
        u = g[rows].to(working(w), copy=True)
        u.mul_(f if left else f[rows])
        if p.shape[1]:
            u.addmm_(*_factors(p, n, left, rows, u), alpha=alpha)
        axpy_rows(w[rows], u, -1.0, decay, seed, row)


def row_blocks(w: Tensor) -> Iterator[tuple[int, slice]]:
    """Blocks of rows whose fp32 copy fits the scratch: the first row's number, and the slice."""
    step = _rows_at_once(w, 4, 8)
    for begin in range(0, w.shape[0], step):
        yield begin, slice(begin, min(begin + step, w.shape[0]))


def _factors(p: Tensor, n: Tensor, left: bool, rows: slice, like: Tensor) -> tuple[Tensor, Tensor]:
    p, n = p.to(like.dtype), n.to(like.dtype)
    return (p[rows], n) if left else (n[rows], p.T)


SIGN = (
    "(Tensor(a!) w, Tensor g, Tensor p, Tensor n, Tensor r, bool left, float alpha, float beta, float decay, "
    "Tensor? seed) -> ()"
)


def update_sign_fake(
    w: Tensor, g: Tensor, p: Tensor, n: Tensor, r: Tensor, left: bool, alpha: float, beta: float, decay: float,
    seed: Tensor | None,
) -> None:  # fmt: skip
    """``lowmem::lowrank_update_sign_`` returns nothing."""


def update_sign_reference(
    w: Tensor, g: Tensor, p: Tensor, n: Tensor, r: Tensor, left: bool, alpha: float, beta: float, decay: float,
    seed: Tensor | None,
) -> None:  # fmt: skip
    """``w <- decay w - alpha P.N - beta sign(g - P.R)``; ``P.R`` in fp32 (fp64 for fp64)."""
    wide, g, p, n, r = _wide(w, g, p, n, r)
    _store(w, wide * decay - alpha * _back(p, n, left) - beta * torch.sign(g - _back(p, r, left)), seed)


def _update_sign_cpu(
    w: Tensor, g: Tensor, p: Tensor, n: Tensor, r: Tensor, left: bool, alpha: float, beta: float, decay: float,
    seed: Tensor | None,
) -> None:  # fmt: skip
    p, n, r = (t.to(working(w)) for t in (p, n, r))
    for row, rows in row_blocks(w):
        u = g[rows].to(working(w), copy=True)
        u.addmm_(*_factors(p, r, left, rows, u), alpha=-1.0).sign_().mul_(beta)
        u.addmm_(*_factors(p, n, left, rows, u), alpha=alpha)
        axpy_rows(w[rows], u, -1.0, decay, seed, row)


def _kernels(*operands: Tensor) -> Any:
    """The Triton launchers where they serve these tensors, else None: fp64, empty, and moments that are not fp32 in
    one piece stay with the reference. A projection alone is cuBLAS's: nothing is fused behind it."""
    from ..triton_kernels import lowrank as kernels

    return kernels if kernels.serves(*operands) else None


def _moments_fit(exp_avg: Tensor, exp_avg_sq: Tensor) -> bool:
    return all(t.dtype == torch.float32 and t.is_contiguous() for t in (exp_avg, exp_avg_sq))


def _adam_cuda(exp_avg: Tensor, exp_avg_sq: Tensor, r: Tensor, *numbers: float) -> Tensor:
    kernels = _kernels(r) if _moments_fit(exp_avg, exp_avg_sq) else None
    return (kernels.adam if kernels else adam_reference)(exp_avg, exp_avg_sq, r, *numbers)


def _project_adam_cuda(
    exp_avg: Tensor, exp_avg_sq: Tensor, g: Tensor, p: Tensor, left: bool, *numbers: float
) -> Tensor:
    kernels = _kernels(g, p) if _moments_fit(exp_avg, exp_avg_sq) else None
    return (kernels.project_adam if kernels else project_adam_reference)(exp_avg, exp_avg_sq, g, p, left, *numbers)


def _update_cuda(w: Tensor, p: Tensor, n: Tensor, left: bool, alpha: float, decay: float, seed: Tensor | None) -> None:
    kernels = _kernels(w, p, n) if w.stride(1) == 1 else None
    (kernels.update if kernels else update_reference)(w, p, n, left, alpha, decay, seed)


def _update_scaled_cuda(
    w: Tensor, g: Tensor, p: Tensor, n: Tensor, f: Tensor, left: bool, alpha: float, decay: float, seed: Tensor | None
) -> None:
    kernels = _kernels(w, g, f) if w.stride(1) == 1 and f.dtype == torch.float32 else None
    if kernels:
        kernels.update(w, p, n, left, alpha, decay, seed, g=g, f=f)
    else:
        update_scaled_reference(w, g, p, n, f, left, alpha, decay, seed)


def _update_sign_cuda(
    w: Tensor, g: Tensor, p: Tensor, n: Tensor, r: Tensor, left: bool, alpha: float, beta: float, decay: float,
    seed: Tensor | None,
) -> None:  # fmt: skip
    kernels = _kernels(w, g, p, n, r) if w.stride(1) == 1 else None
    if kernels:
        kernels.update(w, p, n, left, alpha, decay, seed, g=g, r=r, beta=beta)
    else:
        update_sign_reference(w, g, p, n, r, left, alpha, beta, decay, seed)


# -------------------------------------------------------------------------------------------------------- definitions

define("lowrank_project", PROJECT, fake=project_fake, reference=project_reference)
define("lowrank_adam_", ADAM, fake=adam_fake, reference=adam_reference, cpp=("cpu",), cuda=_adam_cuda)
define(
    "lowrank_project_adam_",
    PROJECT_ADAM,
    fake=project_adam_fake,
    reference=project_adam_reference,
    cpu=_project_adam_cpu,
    cuda=_project_adam_cuda,
)
define("lowrank_axpy_", AXPY, fake=axpy_fake, reference=axpy_reference, cpp=("cpu",))
define("lowrank_update_", UPDATE, fake=update_fake, reference=update_reference, cpu=_update_cpu, cuda=_update_cuda)
define(
    "lowrank_update_scaled_",
    SCALED,
    fake=update_scaled_fake,
    reference=update_scaled_reference,
    cpu=_update_scaled_cpu,
    cuda=_update_scaled_cuda,
)
define(
    "lowrank_update_sign_",
    SIGN,
    fake=update_sign_fake,
    reference=update_sign_reference,
    cpu=_update_sign_cpu,
    cuda=_update_sign_cuda,
)
