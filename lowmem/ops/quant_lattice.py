"""Weights rounded to a lattice that low-rank factors move: LR-QAT (arXiv 2406.06385).

::

    Z = Phi + c B A          W = s * clip(round(Z), -2**(bits-1), 2**(bits-1) - 1)          y = x W^T

``Phi [N, K]`` is ``W0 / s0`` frozen, as fixed point in int8 (``Phi = phi / 2**(8 - bits)``) or in a floating dtype;
``A [r, K]``, ``B [N, r]``, ``s [N, groups]`` train; ``round`` is half to even. Backward passes through the rounding
where the rounded value is on the lattice, ``m = [-2**(bits-1) <= round(Z) <= 2**(bits-1) - 1]``::

    dW = dy^T x     dZ = s m dW     dB = c dZ A^T     dA = c B^T dZ     ds[n, g] = sum_{k in g} dW clip(round(Z))

(``Phi`` is frozen, so ``s`` has no term from it.) ``Z``, ``m`` and ``W`` are made again in backward from what trains:
saved are x and nothing else of that size. ``dW`` exists a panel of rows at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._dispatch import define, triton_launcher
from .._dtypes import accumulate_dtype
from .._errors import bad
from ..memory.workspace import WORKSPACE

PANEL = 256
"""Rows of Z and dW that are in scratch at a time. Z is always made in the same panels: the same bits everywhere."""

BITS = (2, 3, 4, 8)

LATTICE = "(Tensor phi, Tensor a, Tensor b, float c, int bits, int row0, int rows) -> Tensor"


def codes_fake(phi: Tensor, a: Tensor, b: Tensor, c: float, bits: int, row0: int, rows: int) -> Tensor:
    """Shape of ``lowmem::quant_lattice_codes``."""
    return phi.new_empty(rows, phi.shape[1], dtype=torch.int16)


def codes_reference(phi: Tensor, a: Tensor, b: Tensor, c: float, bits: int, row0: int, rows: int) -> Tensor:
    """``round(Z)`` of ``rows`` rows from ``row0`` on, clipped to one step beyond the lattice: int16 ``[rows, K]`` in
    ``[-2**(bits-1) - 1, 2**(bits-1)]``. The extra steps say that an element is off the lattice (``m = 0``)."""
    part = phi[row0 : row0 + rows]
    wide = accumulate_dtype(a.dtype)
    z = part.to(wide)
    if not phi.is_floating_point():
        z = z * 2.0 ** (bits - 8)
    z = z.addmm(b[row0 : row0 + rows].to(wide), a.to(wide), alpha=c)
    half = 2 ** (bits - 1)
    return z.round_().clamp_(-half - 1, half).to(torch.int16)


MATMUL = "(Tensor x, Tensor phi, Tensor a, Tensor b, Tensor scale, float c, int bits, Tensor? bias, bool transposed)"
MATMUL += " -> Tensor"


def matmul_fake(
    x: Tensor,
    phi: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    c: float,
    bits: int,
    bias: Tensor | None,
    transposed: bool,
) -> Tensor:
    """Shape of ``lowmem::quant_lattice_matmul``."""
    return x.new_empty(x.shape[0], phi.shape[1] if transposed else phi.shape[0])


def _weight(phi: Tensor, a: Tensor, b: Tensor, scale: Tensor, c: float, bits: int, out: Tensor) -> Tensor:
    half = 2 ** (bits - 1)
    for at in range(0, phi.shape[0], PANEL):
        rows = min(PANEL, phi.shape[0] - at)
        codes = torch.ops.lowmem.quant_lattice_codes(phi, a, b, c, bits, at, rows).clamp_(-half, half - 1)
        s = scale[at : at + rows]
        wide = accumulate_dtype(s.dtype)
        part = codes.view(rows, s.shape[1], -1).to(wide) * s.to(wide)[..., None]
        out[at : at + rows] = part.view(rows, -1)
    return out


def matmul_reference(
    x: Tensor,
    phi: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    c: float,
    bits: int,
    bias: Tensor | None,
    transposed: bool,
) -> Tensor:
    """``x W^T + bias`` (``x [M, K]``) or, transposed, ``x W`` (``x [M, N]``), W rounded to x's dtype in scratch."""
    with WORKSPACE.borrow(tuple(phi.shape), x.dtype, x.device) as scratch:
        w = _weight(phi, a, b, scale, c, bits, scratch)
        y = x @ w if transposed else x @ w.T
    return y if bias is None else y.add_(bias)


GRAD = (
    "(Tensor dy, Tensor x, Tensor phi, Tensor a, Tensor b, Tensor scale, float c, int bits) -> (Tensor, Tensor, Tensor)"
)


def grad_fake(
    dy: Tensor, x: Tensor, phi: Tensor, a: Tensor, b: Tensor, scale: Tensor, c: float, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of ``lowmem::quant_lattice_grad``."""
    wide = accumulate_dtype(x.dtype)
    return tuple(t.new_empty(t.shape, dtype=wide) for t in (a, b, scale))  # type: ignore[return-value]


def grad_reference(
    dy: Tensor, x: Tensor, phi: Tensor, a: Tensor, b: Tensor, scale: Tensor, c: float, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dA, dB, ds)`` in the accumulation dtype, from ``dW`` whole."""
    return _grads(dy, x, phi, a, b, scale, c, bits, phi.shape[0])


def _grad_panels(
    dy: Tensor, x: Tensor, phi: Tensor, a: Tensor, b: Tensor, scale: Tensor, c: float, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """In panels of ``PANEL`` rows, each used up at once: dW is never stored."""
    return _grads(dy, x, phi, a, b, scale, c, bits, PANEL)


def _grads(
    dy: Tensor, x: Tensor, phi: Tensor, a: Tensor, b: Tensor, scale: Tensor, c: float, bits: int, panel: int
) -> tuple[Tensor, Tensor, Tensor]:
    wide = accumulate_dtype(x.dtype)
    (n, k), half = phi.shape, 2 ** (bits - 1)
    da, db, ds = (torch.zeros(t.shape, dtype=wide, device=x.device) for t in (a, b, scale))
    wide_a, wide_b = a.to(wide), b.to(wide)
    size = max(1, min(panel, n))
    wide_x = x.to(wide)
    with WORKSPACE.borrow((size * k,), wide, x.device) as scratch:
        for at in range(0, n, size):
            rows = min(size, n - at)
            here = slice(at, at + rows)
            grad = torch.mm(dy[:, here].to(wide).T, wide_x, out=scratch[: rows * k].view(rows, k))
            # panels of Z as forward makes them, whatever this loop's size
            codes = torch.cat(
                [
                    torch.ops.lowmem.quant_lattice_codes(phi, a, b, c, bits, i, min(PANEL, at + rows - i))
                    for i in range(at, at + rows, PANEL)
                ]
            )
            on = (codes >= -half) & (codes < half)
            codes.clamp_(-half, half - 1)
            ds[here] = (grad * codes).view(rows, scale.shape[1], -1).sum(-1)
            s = scale[here].to(wide)[..., None]
            dz = (grad.mul_(on).view(rows, scale.shape[1], -1) * s).view(rows, k)
            db[here] = c * (dz @ wide_a.T)
            da.addmm_(wide_b[here].T, dz, alpha=c)
    return da, db, ds


define(
    "quant_lattice_codes",
    LATTICE,
    fake=codes_fake,
    reference=codes_reference,
    cuda=triton_launcher("quant_lattice", "lattice_codes"),
)
define(
    "quant_lattice_matmul",
    MATMUL,
    fake=matmul_fake,
    reference=matmul_reference,
    cuda=triton_launcher("quant_lattice", "lattice_matmul"),
)
define("quant_lattice_grad", GRAD, fake=grad_fake, reference=grad_reference, cpu=_grad_panels, cuda=_grad_panels)


class _LatticeMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        phi: Tensor,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        c: float,
        bits: int,
    ) -> Tensor:
        trains = any(ctx.needs_input_grad[2:5])
        ctx.save_for_backward(x if trains else None, phi, a, b, scale)
        ctx.numbers = (c, bits)
        return torch.ops.lowmem.quant_lattice_matmul(x, phi, a, b, scale, c, bits, bias, False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, phi, a, b, scale = ctx.saved_tensors
        need = ctx.needs_input_grad
        dx = da = db = ds = None
        if need[0]:
            dx = torch.ops.lowmem.quant_lattice_matmul(dy, phi, a, b, scale, *ctx.numbers, None, True)
        if any(need[2:5]):
            grads = torch.ops.lowmem.quant_lattice_grad(dy, x, phi, a, b, scale, *ctx.numbers)
            da, db, ds = (
                g.to(t.dtype) if wanted else None for g, t, wanted in zip(grads, (a, b, scale), need[2:5], strict=True)
            )
        return dx, None, da, db, ds, dy.sum(0) if need[5] else None, None, None


def lattice_linear(
    x: Tensor,
    phi: Tensor,
    A: Tensor,  # noqa: N803 (the factors' own names)
    B: Tensor,  # noqa: N803
    scale: Tensor,
    c: float,
    bits: int,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """``y = x W^T + bias``, ``W = scale * clip(round(Phi + c B A))`` (see the module's head).

    Args:
        x: ``[..., K]``, float.
        phi: ``[N, K]``: int8 fixed point with ``8 - bits`` fractional bits, or a floating dtype.
        A, B: ``[r, K]`` and ``[N, r]``, float.
        scale: ``[N, groups]``, groups a divisor of K.
        c: ``alpha / r``.
        bits: 2, 3, 4 or 8.
        bias: ``[N]`` in x's dtype.

    Returns ``[..., N]`` in x's dtype, with gradients for x, A, B, scale and bias. Under ``torch.autocast`` x and
    bias are cast, as ``F.linear`` does. Raises ValueError or TypeError ``lowmem.lattice_linear: <argument>: ...``.
    """
    op, kind = "lattice_linear", x.device.type
    if torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return lattice_linear(x.to(dtype), phi, A, B, scale, c, bits, bias=None if bias is None else bias.to(dtype))
    if bits not in BITS:
        bad(op, "bits", "2, 3, 4 or 8", bits)
    if phi.dim() != 2 or not (phi.dtype == torch.int8 or phi.is_floating_point()):
        bad(op, "phi", "[N, K] in int8 or a floating dtype", f"shape {list(phi.shape)} in {phi.dtype}")
    n, k = phi.shape
    if not x.is_floating_point():
        bad(op, "x", "a floating dtype", x.dtype, kind=TypeError)
    if x.dim() < 1 or x.shape[-1] != k:
        bad(op, "x", f"shape [..., {k}]", f"shape {list(x.shape)}")
    for name, t, shape in (("A", A, (A.shape[0], k)), ("B", B, (n, A.shape[0])), ("scale", scale, (n, -1))):
        fits = t.dim() == 2 and t.shape[0] == shape[0] and shape[1] in (-1, t.shape[1])
        if not fits or not t.is_floating_point():
            bad(op, name, f"a floating tensor {list(shape)}", f"shape {list(t.shape)} in {t.dtype}")
    if scale.shape[1] < 1 or k % scale.shape[1]:
        bad(op, "scale", f"[{n}, groups], groups a divisor of K = {k}", list(scale.shape))
    if bias is not None and (tuple(bias.shape) != (n,) or bias.dtype != x.dtype):
        bad(op, "bias", f"shape [{n}] in {x.dtype}", f"shape {list(bias.shape)} in {bias.dtype}")
    y = _LatticeMatmul.apply(x.reshape(-1, k), phi, A, B, scale, bias, c, bits)
    return y.view(*x.shape[:-1], n)
