"""RandLoRA (arXiv 2502.00987): a full-rank update out of frozen random bases and learned diagonals.

With ``L = min(K, N)``, ``H = max(K, N)``, ``n = ceil(L / r)`` bases of rank r, ``R = r n``, frozen ``narrow``
``[r, L]`` and ``wide`` ``[R, H]``, learned ``lam`` ``[r, n]`` and ``gam`` ``[n, L]``::

    U[i n + j, :] = lam[i, j] * narrow[i, :] * gam[j, :]            [R, L]
    dW = scale * wide^T U   where K <= N,   scale * U^T wide   where K > N

which is LoRA with ``A = U, B = wide^T`` or ``A = wide, B = U^T``. Both are as large as W, so they are made for the one
call and again in backward, and saved is ``x`` alone: the bases come from a seed, or from tensors that all layers share.

Seeded bases have mean 0 and deviation 1, as PEFT's, and come from the family's random map at ``p = 1/2``, so that they
are equal on every backend. ``wide`` holds signs, exact in every dtype: ``+1`` where the map keeps, else ``-1``, rows
``i n`` to ``(i + 1) n`` under child ``8 + i``. ``narrow`` holds 256 equal steps, eight bits under children 0 to 7:
signs there would not do, since columns of ``narrow`` with equal signs would cost the update its full rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._errors import bad
from ._autocast import cast
from .lora import accumulate_dtype
from .lora_drop import kept
from .philox import inv_keep

BITS = 8  # of an element of narrow


def random_bases(k: int, n: int, r: int, seed: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``narrow`` ``[r, min(k, n)]`` in fp32 and ``wide`` ``[r ceil(min(k, n) / r), max(k, n)]`` in ``dtype``, of
    ``seed`` (int64[1])."""
    low, high = min(k, n), max(k, n)
    count = -(-low // r)
    wide = torch.empty(r * count, high, device=seed.device, dtype=dtype)
    for i in range(r):
        signs = wide[i * count : (i + 1) * count]
        signs.copy_(kept(count, high, 0.5, seed, BITS + i, dtype)).mul_(2.0).sub_(1.0)
    narrow = torch.full((r, low), 1.0 - 2**BITS, device=seed.device)
    for bit in range(BITS):
        narrow.add_(kept(r, low, 0.5, seed, bit, torch.float32), alpha=2 ** (bit + 1))
    return narrow.div_(((4**BITS - 1) / 3) ** 0.5), wide


def _update(narrow: Tensor, lam: Tensor, gam: Tensor) -> Tensor:
    """``U`` ``[r n, L]`` in the accumulation dtype of the learned parts."""
    wide = torch.promote_types(lam.dtype, accumulate_dtype(narrow.dtype))
    scaled = lam.to(wide)[:, :, None] * narrow.to(wide)[:, None, :]
    return scaled.mul_(gam.to(wide)).flatten(0, 1)


def randlora_delta(k: int, n: int, lam: Tensor, gam: Tensor, narrow: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
    """``A`` ``[R, k]`` and ``B`` ``[n, R]`` of the LoRA that this RandLoRA is."""
    u = _update(narrow, lam, gam)
    return (u, wide.t()) if k <= n else (wide, u.t())


class _RandLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor,
        bias: Tensor | None,
        lam: Tensor,
        gam: Tensor,
        shared_a: Tensor | None,
        shared_b: Tensor | None,
        basis_seed: Tensor | None,
        seed: Tensor | None,
        scale: float,
        p: float,
    ) -> Tensor:
        need_x, need_w, _, need_lam, need_gam = ctx.needs_input_grad[:5]
        rows = x.reshape(-1, x.shape[-1])
        a, b, _ = _matrices(rows.dtype, base.shape, lam, gam, shared_a, shared_b, basis_seed)
        s = (_dropped(rows, p, seed) @ a.t()).mul_(scale * inv_keep(p))
        y = torch.ops.lowmem.lora_expand(rows, base, s, b, bias)
        keep_x = x if need_w or need_lam or need_gam else None
        ctx.save_for_backward(keep_x, base, lam, gam, shared_a, shared_b, basis_seed, seed)
        ctx.settings = (scale * inv_keep(p), p)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        x, base, lam, gam, shared_a, shared_b, basis_seed, seed = ctx.saved_tensors
        factor, p = ctx.settings
        need_x, need_w, need_bias, need_lam, need_gam = ctx.needs_input_grad[:5]
        dy = upstream[0].reshape(-1, upstream[0].shape[-1])
        rows: Any = None if x is None else x.reshape(-1, x.shape[-1])
        n, k = base.shape
        a, b, small = _matrices(dy.dtype, base.shape, lam, gam, shared_a, shared_b, basis_seed)
        ds = (dy @ b).mul_(factor)  # the gradient of drop(x) A^T before its factor
        dx = None
        if need_x:
            through_a = ds @ a
            if p > 0:
                through_a = torch.where(kept(len(dy), k, p, seed, 0, dy.dtype), through_a, 0)
            dx = through_a.addmm_(dy, base).view(*upstream[0].shape[:-1], k)
        dlam = dgam = None
        if need_lam or need_gam:
            dropped = _dropped(rows, p, seed)
            if k <= n:
                du = ds.t() @ dropped
            else:  # S is made again: it would be as large as dy
                du = (dropped @ a.t()).mul_(factor).t() @ dy
            wider = torch.promote_types(lam.dtype, accumulate_dtype(dy.dtype))
            du, small = du.view(*lam.shape, -1).to(wider), small.to(wider)
            if need_lam:
                dlam = torch.einsum("ijl,il,jl->ij", du, small, gam.to(wider)).to(lam.dtype)
            if need_gam:
                dgam = torch.einsum("ijl,il,ij->jl", du, small, lam.to(wider)).to(gam.dtype)
        dw = dy.t() @ rows if need_w else None
        return dx, dw, dy.sum(0) if need_bias else None, dlam, dgam, None, None, None, None, None, None


def _matrices(
    dtype: torch.dtype,
    size: tuple[int, ...],
    lam: Tensor,
    gam: Tensor,
    shared_a: Tensor | None,
    shared_b: Tensor | None,
    basis_seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A and B in ``dtype``, and ``narrow``."""
    n, k = size
    narrow, wide = bases_of(k, n, lam.shape[0], shared_a, shared_b, basis_seed, dtype)
    a, b = randlora_delta(k, n, lam, gam, narrow, wide)
    return a.to(dtype), b.to(dtype), narrow


def bases_of(
    k: int, n: int, r: int, shared_a: Tensor | None, shared_b: Tensor | None, basis_seed: Tensor | None, dtype: Any
) -> tuple[Tensor, Tensor]:
    """``narrow`` and ``wide`` of a ``k`` to ``n`` layer: its part of the shared tensors, or the seed's."""
    if shared_a is None or shared_b is None:
        assert basis_seed is not None
        return random_bases(k, n, r, basis_seed, dtype)
    low, high = min(k, n), max(k, n)
    return shared_a[:, 0, :low], shared_b[:high, : -(-low // r)].flatten(1).t()


def _dropped(rows: Tensor, p: float, seed: Any) -> Tensor:
    return torch.where(kept(rows.shape[0], rows.shape[1], p, seed, 0, rows.dtype), rows, 0) if p > 0 else rows


def randlora_linear(
    x: Tensor,
    base: Tensor,
    lam: Tensor,
    gam: Tensor,
    scale: float,
    *,
    basis_seed: Tensor | None = None,
    bases: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``y = x base^T + bias + drop_p(x) dW^T`` with RandLoRA's ``dW`` (arXiv 2502.00987; see the module's head).

    Args:
        x: ``[..., K]``, float.
        base: ``[N, K]``; bias: ``[N]``, both in x's dtype.
        lam: ``[r, n]``; gam: ``[n, min(K, N)]``, ``n = ceil(min(K, N) / r)``, any floating dtype.
        scale: usually ``alpha / r``.
        basis_seed: int64 of one element on x's device: the bases are that seed's signs, and take no memory.
        bases: instead, ``(A, B)`` as PEFT holds them for a whole model: ``[r, 1, >= min(K, N)]`` and
            ``[>= max(K, N), >= n, r]``; the leading part is used.
        p, seed: dropout of the adapter's input, as in :func:`lowmem.ops.lora_linear`.

    Returns ``[..., N]`` in x's dtype. Saved for backward: ``x`` (shared with every layer over it) and the seeds. While
    forward or backward runs, ``A`` and ``B`` are there: ``R (K + N)`` elements, ``R = r n``, of one layer at a time.

    Raises ValueError or TypeError ``lowmem.randlora_linear: <argument>: expected ..., got ...`` before anything is
    computed.
    """
    op = "randlora_linear"
    if x.dim() < 1 or not x.is_floating_point():
        bad(op, "x", "a floating tensor [..., K]", f"shape {tuple(x.shape)} in {x.dtype}")
    x, base, bias = cast(x, base, bias)
    k = x.shape[-1]
    if base.dim() != 2 or base.shape[1] != k or base.dtype != x.dtype:
        bad(op, "base", f"[N, {k}] in {x.dtype}", f"shape {tuple(base.shape)} in {base.dtype}")
    n = base.shape[0]
    low, high = min(k, n), max(k, n)
    r = lam.shape[0] if lam.dim() == 2 else 0
    count = -(-low // r) if r else 0
    if tuple(lam.shape) != (r, count) or r < 1 or not lam.is_floating_point():
        want = f"a floating tensor [r, ceil({low} / r)]"
        bad(op, "lam", want, f"shape {tuple(lam.shape)} in {lam.dtype}")
    if tuple(gam.shape) != (count, low) or not gam.is_floating_point():
        bad(op, "gam", f"a floating tensor [{count}, {low}]", f"shape {tuple(gam.shape)} in {gam.dtype}")
    if (bases is None) == (basis_seed is None):
        bad(op, "basis_seed", "either basis_seed or bases", "both" if bases is not None else "neither")
    if bases is not None:
        a, b = bases
        if a.dim() != 3 or tuple(a.shape[:2]) != (r, 1) or a.shape[2] < low or not a.is_floating_point():
            bad(op, "bases[0]", f"a floating tensor [{r}, 1, >= {low}]", f"shape {tuple(a.shape)} in {a.dtype}")
        if b.dim() != 3 or b.shape[0] < high or b.shape[1] < count or b.shape[2] != r or b.dtype != a.dtype:
            want = f"[>= {high}, >= {count}, {r}] in {a.dtype}"
            bad(op, "bases[1]", want, f"shape {tuple(b.shape)} in {b.dtype}")
        if a.requires_grad or b.requires_grad:
            bad(op, "bases", "frozen tensors", "one that requires a gradient")
    if bias is not None and (tuple(bias.shape) != (n,) or bias.dtype != x.dtype):
        bad(op, "bias", f"[{n}] in {x.dtype}", f"shape {tuple(bias.shape)} in {bias.dtype}")
    if not 0.0 <= p <= 1.0:
        bad(op, "p", "a probability in [0, 1]", p)
    for name, t, wanted in (("basis_seed", basis_seed, bases is None), ("seed", seed, p > 0)):
        if wanted and (t is None or t.dtype != torch.int64 or t.numel() != 1):
            bad(op, name, "an int64 tensor of one element", None if t is None else f"{t.dtype} of {t.numel()}")
    shared_a, shared_b = bases if bases is not None else (None, None)
    given = {"base": base, "lam": lam, "gam": gam, "bias": bias, "basis_seed": basis_seed, "seed": seed}
    given |= {"bases[0]": shared_a, "bases[1]": shared_b}
    for name, t in given.items():
        if t is not None and t.device != x.device:
            bad(op, name, f"device {x.device} (x's)", f"device {t.device}")
    with torch.autocast(x.device.type, enabled=False):
        return _RandLoRALinear.apply(
            x, base, bias, lam, gam, shared_a, shared_b, basis_seed, seed if p > 0 else None, float(scale), float(p)
        )
