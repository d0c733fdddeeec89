"""The basis of one projected matrix: how it is found, what it does to a matrix, and how moments follow a change.

``Side``: ``left`` means that the basis spans a subspace of the rows' space, P [m, r] and R = P^T G [r, n]; otherwise of
the columns' space, P [n, r] and R = G P [m, r]. "Short" is the side that P has, "long" the one that R keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..factor.lowrank import gaussian, orthonormal, power_iteration, rsvd, smallest_rank, widen, working_dtype
from ..ops.lowrank import axpy_rows, row_blocks

_OPS = torch.ops.lowmem
_FIRST_GUESS = 16  # columns that an energy policy tries first


def is_left(side: str, shape: Sequence[int]) -> bool:
    """Whether the basis stands on the rows: ``auto`` takes the shorter side, and the columns of a square matrix."""
    return side == "left" or (side == "auto" and shape[0] < shape[1])


# ------------------------------------------------------------------------------------------------------- find a basis


def singular_basis(
    a: Tensor, k: int, projector: str, old: Tensor | None, seeds: Sequence[Tensor], iters: int | None
) -> tuple[Tensor, Tensor]:
    """``(P [B, s, k], S [B, k])`` of the matrices ``a [B, s, l]``, short side first: approximate leading left singular
    vectors and values, exact for ``projector="svd"``. ``old [B, s, j]`` starts ``"power"``, missing columns are drawn.
    """
    if projector == "svd":
        wide = a.to(working_dtype(a.dtype))
        if wide.is_contiguous() or not wide.mT.is_contiguous():
            u, s, _ = torch.linalg.svd(wide, full_matrices=False)
        else:  # of the matrix as it lies in memory: signs and rounding as of svd(G)
            _, s, vh = torch.linalg.svd(wide.mT, full_matrices=False)
            u = vh.mT
        return u[..., :k], s[..., :k]
    if projector == "power" and old is not None:
        start = old.to(working_dtype(a.dtype))[..., :k]
        start = widen(start, min(k + k // 2, *a.shape[-2:]) - start.shape[-1], seeds)
        basis, values = power_iteration(a, start, iters=iters or 2, rotate=True)
        assert values is not None
        return basis[..., :k], values[..., :k]
    found = [rsvd(a[i], k, seed=seed, iters=2 if iters is None else iters) for i, seed in enumerate(seeds)]
    return torch.stack([u for u, _, _ in found]), torch.stack([s for _, s, _ in found])


def energy_rank(
    a: Tensor, total: float, energy: float, least: int, most: int, projector: str, old: Tensor | None, seed: Tensor,
    iters: int | None,
) -> tuple[Tensor, int]:  # fmt: skip
    """``(P [s, r], r)``: the smallest r in [least, most] that captures ``energy * total`` of ``a [s, l]``, and its
    basis. The block of columns doubles until it captures enough; r is then read off its singular values."""
    most = min(most, *a.shape)
    k = min(most, max(_FIRST_GUESS, least, 0 if old is None else old.shape[1] + old.shape[1] // 2 + 4))
    while True:
        basis, s = singular_basis(a[None], k, projector, None if old is None else old[None], [seed], iters)
        basis, s = basis[0], s[0]
        r = smallest_rank(s, total, 1.0 - energy)
        enough = float((s.double()[:r] ** 2).sum()) >= energy * total * (1 - 1e-6)
        if enough or k >= most:
            r = min(max(r, least), k)
            return basis[:, :r].contiguous(), r
        k = min(most, 2 * k)


def random_basis(short: int, r: int, seed: Tensor, *, orthogonal: bool) -> Tensor:
    """``[short, r]`` in fp32: orthonormal columns, or Gaussian with variance 1/r, which keeps a column's expected
    length (APOLLO)."""
    draw = gaussian((short, r), seed)
    return orthonormal(draw, "qr") if orthogonal else draw / r**0.5


def random_coordinates(short: int, r: int, seed: Tensor) -> Tensor:
    """``r`` of ``short`` numbers, ascending, int64."""
    return gaussian((short,), seed).topk(r).indices.sort().values


# ------------------------------------------------------------------------------------------ what a basis does to G, W


def project(g: Tensor, basis: Tensor, left: bool) -> Tensor:
    """R; ``basis`` is P, or int64 numbers of the rows (left) or columns that make up the subspace."""
    if basis.dtype == torch.int64:
        return g.index_select(0 if left else 1, basis)
    if basis.shape[1] == 0:
        return g.new_zeros((0, g.shape[1]) if left else (g.shape[0], 0))
    return _OPS.lowrank_project(g, basis, left)


def norm(x: Tensor) -> Tensor:
    """Euclidean norm in fp32 (fp64 for fp64); finite only where every element is."""
    return torch.linalg.vector_norm(x, dtype=working_dtype(x.dtype))


def long_norms(x: Tensor, left: bool) -> Tensor:
    """Euclidean norms [long] in fp32 (fp64 for fp64) of the columns (left) or rows."""
    if x.dtype in (torch.float32, torch.float64):
        return torch.linalg.vector_norm(x, dim=0 if left else 1)
    # torch widens 16-bit matrices as a whole: here by blocks of rows
    parts = [torch.linalg.vector_norm(x[rows].float(), dim=0 if left else 1) for _, rows in row_blocks(x)]
    return torch.linalg.vector_norm(torch.stack(parts), dim=0) if left else torch.cat(parts)


def update_coordinates(
    w: Tensor, index: Tensor, n: Tensor, g: Tensor | None, f: Tensor | None, left: bool, alpha: float, beta: float,
    decay: float, seed: Tensor | None,
) -> None:  # fmt: skip
    """``w <- decay w - alpha P.n - E`` for a basis of coordinates. E is 0 on them; elsewhere 0 without ``g``,
    ``f_j g`` with ``f [long]``, else ``beta sign(g)``."""
    if g is not None:
        keep = torch.ones(w.shape[0 if left else 1], dtype=working_dtype(w.dtype), device=w.device)
        keep.index_fill_(0, index, 0.0)
        for row, rows in row_blocks(w):
            part = g[rows].to(keep.dtype, copy=True)
            if f is None:
                part.sign_().mul_(beta)
            else:
                part.mul_(f if left else f[rows, None])
            part.mul_(keep[rows, None] if left else keep)
            axpy_rows(w[rows], part, -1.0, decay, seed, row)
    elif decay != 1.0:
        w.mul_(decay)
    if index.numel():
        # stream of its own: the chosen lines were rounded once above where there is a residual
        own = None if seed is None else seed + (1 << 40)
        chosen = w.index_select(0 if left else 1, index)
        axpy_rows(chosen, n, -alpha, 1.0, own, 0)
        w.index_copy_(0 if left else 1, index, chosen)


# ------------------------------------------------------------------------------------------------ moments on a change


def overlap(new: Tensor, old: Tensor) -> Tensor:
    """C = P_new^T P_old [r_new, r_old] in fp32 (fp64); for coordinates, 1 where a number is in both."""
    if new.dtype == torch.int64:
        return (new[:, None] == old[None, :]).to(torch.float32)
    kind = working_dtype(new.dtype)
    return new.to(kind).T @ old.to(kind)


def rotate(m: Tensor, v: Tensor, c: Tensor, left: bool) -> tuple[Tensor, Tensor]:
    """Moments in the new basis: ``M <- C M`` and ``V <- (C o C) V`` (right: from the other side).

    V holds mean squares: were the old coordinates uncorrelated, the new ones' mean squares would be exactly this. It
    cannot become negative, which ``C V`` does."""
    c = c.to(m.dtype)
    return (c @ m, (c * c) @ v) if left else (m @ c.T, v @ (c * c).T)


def resized(t: Tensor, r: int, left: bool) -> Tensor:
    """``t`` with ``r`` coordinates of the subspace: the first ones kept, zeros for more."""
    shape = (r, t.shape[1]) if left else (t.shape[0], r)
    if t.shape == shape:
        return t
    out = t.new_zeros(shape)
    k = min(r, t.shape[0 if left else 1])
    (out[:k] if left else out[:, :k]).copy_(t[:k] if left else t[:, :k])
    return out


def rank_of(basis: Tensor) -> int:
    """Columns of a basis."""
    return basis.shape[-1]


def wanted_rank(group: dict[str, Any], shape: Sequence[int], left: bool) -> int:
    """The fixed rank of a group's policy on a matrix, before clamping; the cap for an energy policy."""
    short = shape[0] if left else shape[1]
    if group["density"] is not None:
        return round(group["density"] * short)
    if group["energy"] is not None:
        return min(*shape) if group["rank_max"] is None else group["rank_max"]
    return group["rank"]
