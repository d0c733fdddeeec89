"""Randomized SVD, warm-started power iteration, orthonormal bases, and the smallest rank that captures an energy.

Everything takes a batch: ``[..., m, n]``, so that the refreshes of equal layers become one chain of batched products.
16-bit inputs are multiplied as they are, with fp32 sums, and factored in fp32. Random starts come from a seed tensor
(int64[1]): the same seed gives the same bits on the same device.

Sources: Halko, Martinsson and Tropp, "Finding structure with randomness" (arXiv 0909.4061), algorithms 4.4 and 5.1;
Fukaya et al., "CholeskyQR2" (ScalA 2014).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._errors import bad

_OVERSAMPLE = 8  # columns beyond the rank wanted: Halko et al. recommend 5 to 10


def _matrix(op: str, g: Tensor) -> None:
    if not isinstance(g, Tensor) or not g.is_floating_point():
        bad(op, "g", "a floating tensor", getattr(g, "dtype", type(g).__name__), kind=TypeError)
    if g.dim() < 2 or g.numel() == 0:
        bad(op, "g", "a matrix or a batch of matrices [..., m, n] with elements", f"shape {tuple(g.shape)}")


def _seed(op: str, seed: Tensor) -> torch.Generator:
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.numel() != 1:
        got = f"{seed.dtype} of shape {tuple(seed.shape)}" if isinstance(seed, Tensor) else type(seed).__name__
        bad(op, "seed", "an int64 tensor of one element", got, kind=TypeError)
    # torch's generators take a number: the one host read of a refresh where the seed lives on a GPU
    return torch.Generator(seed.device).manual_seed(int(seed))


def gaussian(shape: tuple[int, ...], seed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers on ``seed``'s device, the same for the same seed."""
    return torch.randn(shape, generator=_seed("gaussian", seed), device=seed.device, dtype=dtype)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a matrix of ``dtype`` is factored in: float64 stays, everything else is fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _times(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in ``a``'s dtype with fp32 sums, returned in the working dtype."""
    return (a @ b.to(a.dtype)).to(working_dtype(a.dtype))


def _unit_columns(y: Tensor) -> Tensor:
    """Columns of length 1. Very different sizes would spend the Gram matrix's precision, and the columns of a gradient
    of low rank go down to subnormal numbers, on which Householder QR took 20 times as long."""
    y = y / y.abs().amax(-2, keepdim=True).clamp_min(torch.finfo(y.dtype).tiny)
    return y / torch.linalg.vector_norm(y, dim=-2, keepdim=True).clamp_min(torch.finfo(y.dtype).tiny)


def _cholesky_q(y: Tensor) -> tuple[Tensor, bool]:
    gram = y.mT @ y
    factor, info = torch.linalg.cholesky_ex(gram)
    # The pivots of a unit-diagonal Gram matrix say how much of a column is new. Below eps ** 0.5 two passes do not
    # reach working precision, and a broken pivot is not finite: one host read decides.
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    new = torch.where((info == 0).unsqueeze(-1), pivots, 0.0).nan_to_num(0.0).amin()
    good = bool(new > math.sqrt(torch.finfo(y.dtype).eps) * 4)
    return (torch.linalg.solve_triangular(factor.mH, y, upper=True, left=False) if good else y), good


def orthonormal(y: Tensor, method: str = "auto") -> Tensor:
    """Orthonormal columns that span the columns of ``y [..., m, k]``, ``k <= m``, in ``y``'s dtype (fp32 or fp64).

    ``method="cholesky"`` is Cholesky-QR2: products and a k x k Cholesky factor, twice, and Householder QR for what
    it cannot do (dependent columns, zero columns); ``"qr"`` is Householder QR. ``"auto"`` is ``"cholesky"``.
    Dependent columns are replaced by arbitrary orthonormal ones, so there are always k.
    """
    if method not in ("auto", "cholesky", "qr"):
        bad("factor.orthonormal", "method", "'auto', 'cholesky' or 'qr'", repr(method))
    if y.shape[-1] > y.shape[-2]:
        bad("factor.orthonormal", "y", "at most as many columns as rows", f"shape {tuple(y.shape)}")
    if method != "qr" and y.shape[-1] > 1:
        y = _unit_columns(y)
        first, good = _cholesky_q(y)
        if good:
            second, good = _cholesky_q(first)
            if good:
                return second
    return torch.linalg.qr(y).Q


def _rank(op: str, g: Tensor, r: int) -> int:
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        bad(op, "r", "a whole number >= 1", repr(r))
    least = min(g.shape[-2:])
    if r > least:
        bad(op, "r", f"at most min(m, n) = {least}", r)
    return r


def _iterate(a: Tensor, q: Tensor, iters: int) -> Tensor:
    """``iters`` power steps on ``a a^T`` from the basis ``q [..., s, k]``, orthonormalised after each half step."""
    for _ in range(iters):
        q = orthonormal(_times(a, orthonormal(_times(a.mT, q))))
    return q


def _ritz(a: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triplets of ``q q^T a``: U [..., s, k], S descending, V [..., l, k]."""
    z = _times(a.mT, q)  # [..., l, k]
    if z.shape[-2] < z.shape[-1]:
        v, s, uh = torch.linalg.svd(z, full_matrices=False)
        return q @ uh.mH, s, v
    v, upper = torch.linalg.qr(z)
    w, s, uh = torch.linalg.svd(upper)  # k x k: z = v w s uh
    return q @ uh.mH, s, v @ w


def rsvd(g: Tensor, r: int, *, seed: Tensor, oversample: int = _OVERSAMPLE, iters: int = 2) -> tuple[Tensor, ...]:
    """Randomized SVD: ``(U [..., m, r], S [..., r], Vh [..., r, n])`` with ``U diag(S) Vh`` close to the best rank-r
    approximation of ``g [..., m, n]``; float64 for float64, otherwise fp32.

    A Gaussian block of ``r + oversample`` columns on the short side, ``iters`` power steps, then the exact SVD of the
    projected matrix. Without power steps the error is within a factor of the best that depends on the spectrum's tail
    (Halko et al., theorem 10.6); each step multiplies the tail's ratio once more. Raises ValueError for r above
    min(m, n).
    """
    op = "factor.rsvd"
    _matrix(op, g)
    _rank(op, g, r)
    if isinstance(oversample, bool) or not isinstance(oversample, int) or oversample < 0:
        bad(op, "oversample", "a whole number >= 0", repr(oversample))
    if isinstance(iters, bool) or not isinstance(iters, int) or iters < 0:
        bad(op, "iters", "a whole number >= 0", repr(iters))
    m, n = g.shape[-2:]
    a = g if m <= n else g.mT  # the short side first
    k = min(r + oversample, a.shape[-2])
    omega = gaussian((*g.shape[:-2], a.shape[-1], k), seed, working_dtype(g.dtype)).to(g.device)
    q = _iterate(a, orthonormal(_times(a, omega)), iters)
    u, s, v = (t[..., :r] for t in _ritz(a, q))
    return (u, s, v.mT) if m <= n else (v, s, u.mT)


def widen(p: Tensor, columns: int, seeds: Sequence[Tensor]) -> Tensor:
    """The basis ``p [..., s, k]`` and ``columns`` random orthonormal ones behind it; a seed for each matrix."""
    if columns <= 0:
        return p
    more = torch.stack([gaussian((p.shape[-2], columns), seed, p.dtype) for seed in seeds])
    more = more.to(p.device).view(*p.shape[:-1], columns)
    return torch.cat((p, orthonormal(more - p @ (p.mT @ more))), -1)


def power_iteration(
    g: Tensor,
    p: Tensor,
    *,
    iters: int = 1,
    rotate: bool = False,
    oversample: int = 0,
    seed: Tensor | None = None,
    products: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A warm step of subspace iteration: ``(basis [..., s, k], S)`` from the basis ``p [..., s, k]`` of before.

    ``g`` is ``[..., m, n]`` and s is the side that ``p`` has (m where m equals s, else n). Each of ``iters`` steps is
    ``Z = orth(g^T P)``, ``P = orth(g Z)``. With ``rotate`` the columns become approximate singular vectors, in
    descending order, and ``S [..., k]`` their singular values; else S is None and the basis stays close to ``p``'s
    order. ``oversample`` random columns (from ``seed``) go along and the best k are kept, which implies ``rotate``:
    the error then shrinks by ``s_{k + oversample + 1} / s_k`` a step, squared, not by ``s_{k + 1} / s_k``. ``products``
    is the dtype in which ``g`` is multiplied (sums are fp32): bf16 moves the basis by some 2^-9 and the energy that it
    captures by the square of that. Raises ValueError where ``p`` fits neither side.
    """
    op = "factor.power_iteration"
    _matrix(op, g)
    like = isinstance(p, Tensor) and p.dim() == g.dim() and p.shape[:-2] == g.shape[:-2]
    if not like or p.shape[-2] not in g.shape[-2:]:
        got = f"shape {tuple(p.shape)}" if isinstance(p, Tensor) else type(p).__name__
        bad(op, "p", f"a basis [..., {g.shape[-2]} or {g.shape[-1]}, k] for g of shape {tuple(g.shape)}", got)
    if isinstance(iters, bool) or not isinstance(iters, int) or iters < 1:
        bad(op, "iters", "a whole number >= 1", repr(iters))
    if isinstance(oversample, bool) or not isinstance(oversample, int) or oversample < 0:
        bad(op, "oversample", "a whole number >= 0", repr(oversample))
    if oversample and seed is None:
        bad(op, "seed", "an int64 tensor of one element, for oversample > 0", "None")
    a = g if p.shape[-2] == g.shape[-2] else g.mT
    k, most = p.shape[-1], min(a.shape[-2:])
    if k > most:
        bad(op, "p", f"at most {most} columns", k)
    q = p.to(working_dtype(g.dtype))
    if oversample and seed is not None:
        count = q.shape[:-2].numel()
        q = widen(q, min(oversample, most - k), [seed + i for i in range(count)])
    a = a if products is None else a.to(products)
    q = _iterate(a, q, iters)
    if not rotate and not oversample:
        return q, None
    u, s, _ = _ritz(a, q)
    return u[..., :k], s[..., :k]


def smallest_rank(s: Tensor, total: float | Tensor, lost: float) -> int:
    """The smallest r with ``total - (s_1^2 + ... + s_r^2) <= lost * total`` for singular values ``s`` in descending
    order and ``total = |G|^2``; ``len(s)`` where no r in sight does, and 0 for a zero matrix."""
    total = float(total)
    if not total > 0.0:
        return 0
    # a sum of all squares that misses the total by rounding alone has lost nothing
    slack = total * torch.finfo(s.dtype).eps * max(len(s), 1)
    left = total - torch.cumsum(s.double() ** 2, 0)
    fits = (left <= lost * total + slack).nonzero()
    return int(fits[0]) + 1 if fits.numel() else len(s)
