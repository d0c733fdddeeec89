"""The ``activation`` family: activations and SwiGLU whose backward keeps little; norms: activation_norm.py.

Notation: ``x [M, K]``, sums along K; all arithmetic in fp32 (fp64 for fp64), one rounding of each result::

    act        y = f(x),  dx = dy f'(x)            f: silu, gelu, gelu_tanh
    SwiGLU     h = silu(g) u,  dg = dh u silu'(g),  du = dh silu(g)

``form`` says what backward keeps (``save=`` of the public functions): 0 the tensors as they came; 1 FP8 groups
(activation_saved.py), for a norm of ``n``, whose values backward and the next layer both need; 2 and 3 codes of
``f'(x)``:

- deriv4 (after S2A, arXiv 2503.08154): 4 bits, ``f'`` rounded to the nearest of ``(c - 1) / s``, c = 0..15, with s = 13
  for silu and 11 for gelu: all of f' is covered, its limits 0 and 1 are exact, the error is at most ``1 / (2 s)``.
- deriv2 (ReSiLU2 and ReGELU2 of arXiv 2406.16282): 2 bits, a step function of x with three jumps (``JUMPS``).

A NaN has derivative code 0; f' is taken at x clamped to +-100 (fp64: 1000), so infinities have their limits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._dispatch import define
from .._dtypes import accumulate_dtype
from .._errors import bad
from .activation_saved import (
    DERIV4,
    FORMS,
    FP8,
    PLAIN,
    Recipe,
    offer,
    pack_reference,
    packed_bytes,
    unpack_reference,
)
from .lora import _below_autograd

KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
STEPS = (13, 11, 11)
JUMPS = ((-6.305046, -0.000868, 6.325816), (-3.185881, -0.001179, 3.190833))
LEVELS = ((0.0, -0.040604, 1.040321, 0.999999), (0.0, -0.049223, 1.04874, 0.999999))
"""deriv2 of silu and of gelu: where the derivative jumps, and the levels between."""


def launcher(name: str) -> Any:
    """The Triton launcher ``name``."""

    # Triton is imported at the first call on a CUDA device, never before
    def launch(*args: Any) -> Any:
        from ..triton_kernels import activation as kernels

        return getattr(kernels, name)(*args)

    launch.__name__ = f"triton_kernels.activation.{name}"
    return launch


# --------------------------------------------------------------------------------------------------------- activations


def code_bytes(form: int, cols: int) -> int:
    """Bytes of a row of derivative codes."""
    return (cols + 1) // 2 if form == DERIV4 else (cols + 3) // 4


def evaluate(x: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """``f(x)`` and ``f'(x)`` in x's dtype."""
    limit = 1000 if x.dtype == torch.float64 else 100
    c = x.clamp(-limit, limit)
    if kind == KINDS["gelu"]:
        p = 0.5 * torch.erfc(c * -math.sqrt(0.5))
        return x * p, p + c * torch.exp(-0.5 * c * c) / math.sqrt(2 * math.pi)
    if kind == KINDS["silu"]:
        s = torch.sigmoid(c)
        return x * s, s * (1 + c * torch.sigmoid(-c))
    root = 2 * math.sqrt(2 / math.pi)
    z = root * (c + 0.044715 * c**3)
    s = torch.sigmoid(z)
    return x * s, s + c * s * torch.sigmoid(-z) * root * (1 + 3 * 0.044715 * c * c)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Numbers below ``2^bits`` ``[M, K]``, ``8 / bits`` to a byte, the first in the lowest bits: uint8."""
    each = 8 // bits
    size = (codes.shape[1] + each - 1) // each
    wide = torch.nn.functional.pad(codes.int(), (0, -codes.shape[1] % each)).view(codes.shape[0], size, each)
    shifts = torch.arange(0, 8, bits, device=codes.device, dtype=torch.int32)
    return (wide << shifts).sum(2).to(torch.uint8)


def unpack_codes(packed: Tensor, bits: int, cols: int) -> Tensor:
    """The numbers ``[M, cols]``, int64, of :func:`pack_codes`."""
    shifts = torch.arange(0, 8, bits, device=packed.device)
    return ((packed[:, :, None].long() >> shifts) & ((1 << bits) - 1)).flatten(1)[:, :cols]


def derivative_codes(x: Tensor, kind: int, form: int) -> Tensor:
    """The packed codes of ``f'(x)`` for ``x`` in the accumulation dtype."""
    if form == DERIV4:
        slope = evaluate(x, kind)[1] * STEPS[kind]
        code = torch.round(slope).nan_to_num(0.0) + 1
        # the spare half of a row's last byte holds the derivative 0, code 1
        return pack_codes(torch.nn.functional.pad(code, (0, x.shape[1] % 2), value=1.0), 4)
    return pack_codes(sum((x >= jump).int() for jump in JUMPS[min(kind, 1)]), 2)  # type: ignore[arg-type]


def act_fake(x: Tensor, kind: int, form: int) -> tuple[Tensor, Tensor]:
    """Shapes of ``lowmem::act_forward``."""
    m, k = x.shape
    if form in (PLAIN, FP8):
        saved = x.new_empty(packed_bytes(m, k) if form == FP8 else 0, dtype=torch.uint8)
    else:
        saved = x.new_empty((m, code_bytes(form, k)), dtype=torch.uint8)
    return x.new_empty(m, k), saved


def act_reference(x: Tensor, kind: int, form: int) -> tuple[Tensor, Tensor]:
    """``(f(x) [M, K], what backward keeps)``: FP8 groups of x, derivative codes ``[M, ceil(K / 2 or 4)]`` uint8, or
    (form 0: x itself is kept) an empty tensor. ``kind``: 0 silu, 1 gelu, 2 gelu_tanh."""
    wide = x.to(accumulate_dtype(x.dtype))
    y = evaluate(wide, kind)[0].to(x.dtype).contiguous()
    if form == PLAIN:
        return y, x.new_empty(0, dtype=torch.uint8)
    return y, pack_reference(x) if form == FP8 else derivative_codes(wide, kind, form)


def act_grad_fake(dy: Tensor, saved: Tensor, kind: int, form: int) -> Tensor:
    """Shape of ``lowmem::act_backward``."""
    return dy.new_empty(dy.shape[0], dy.shape[1])


def act_grad_reference(dy: Tensor, saved: Tensor, kind: int, form: int) -> Tensor:
    """``dx = dy f'(x)`` ``[M, K]`` from x (form 0) or from what :func:`act_reference` returned."""
    m, k = dy.shape
    acc = accumulate_dtype(dy.dtype)
    if form in (PLAIN, FP8):
        x = saved.to(acc) if form == PLAIN else unpack_reference(saved, m, k, acc)
        slope = evaluate(x, kind)[1]
    elif form == DERIV4:
        slope = (unpack_codes(saved, 4, k).to(acc) - 1) / STEPS[kind]
    else:
        slope = torch.tensor(LEVELS[min(kind, 1)], device=dy.device, dtype=acc)[unpack_codes(saved, 2, k)]
    return (dy.to(acc) * slope).to(dy.dtype).contiguous()


define(
    "act_forward",
    "(Tensor x, int kind, int form) -> (Tensor, Tensor)",
    fake=act_fake,
    reference=act_reference,
    cpp=("cpu",),
    cuda=launcher("act_forward"),
)
define(
    "act_backward",
    "(Tensor dy, Tensor saved, int kind, int form) -> Tensor",
    fake=act_grad_fake,
    reference=act_grad_reference,
    cpp=("cpu",),
    cuda=launcher("act_backward"),
)


# -------------------------------------------------------------------------------------------------------------- SwiGLU


def swiglu_fake(g: Tensor, u: Tensor, form: int) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of ``lowmem::swiglu_forward``."""
    size = packed_bytes(g.shape[0], g.shape[1]) if form == FP8 else 0
    packed_g, packed_u = (g.new_empty(size, dtype=torch.uint8) for _ in range(2))
    return g.new_empty(g.shape[0], g.shape[1]), packed_g, packed_u


def swiglu_reference(g: Tensor, u: Tensor, form: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(silu(g) u [M, K], g and u in FP8 groups or empty)``."""
    acc = accumulate_dtype(g.dtype)
    wide = g.to(acc)
    h = (wide * torch.sigmoid(wide) * u.to(acc)).to(g.dtype).contiguous()
    if form == FP8:
        return h, pack_reference(g), pack_reference(u)
    return h, g.new_empty(0, dtype=torch.uint8), g.new_empty(0, dtype=torch.uint8)


def from_fp8_fake(packed_g: Tensor, packed_u: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Shape of ``lowmem::swiglu_from_fp8``."""
    return packed_g.new_empty((rows, cols), dtype=dtype)


def from_fp8_reference(packed_g: Tensor, packed_u: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """``silu(g) u [rows, cols]`` in ``dtype`` from FP8 groups."""
    acc = accumulate_dtype(dtype)
    g, u = (unpack_reference(t, rows, cols, acc) for t in (packed_g, packed_u))
    return swiglu_reference(g, u, PLAIN)[0].to(dtype)


def swiglu_grad_fake(dh: Tensor, g: Tensor, u: Tensor, form: int) -> tuple[Tensor, Tensor]:
    """Shapes of ``lowmem::swiglu_backward``."""
    return dh.new_empty(dh.shape[0], dh.shape[1]), dh.new_empty(dh.shape[0], dh.shape[1])


def swiglu_grad_reference(dh: Tensor, g: Tensor, u: Tensor, form: int) -> tuple[Tensor, Tensor]:
    """``(dg, du) [M, K]`` from g and u, both as they came (form 0) or in FP8 groups."""
    m, k = dh.shape
    acc = accumulate_dtype(dh.dtype)
    gate, up = ((t.to(acc) if form == PLAIN else unpack_reference(t, m, k, acc)) for t in (g, u))
    value, slope = evaluate(gate, KINDS["silu"])
    wide = dh.to(acc)
    return (wide * up * slope).to(dh.dtype).contiguous(), (wide * value).to(dh.dtype).contiguous()


define(
    "swiglu_forward",
    "(Tensor g, Tensor u, int form) -> (Tensor, Tensor, Tensor)",
    fake=swiglu_fake,
    reference=swiglu_reference,
    cpp=("cpu",),
    cuda=launcher("swiglu_forward"),
)
define(
    "swiglu_from_fp8",
    "(Tensor packed_g, Tensor packed_u, int rows, int cols, ScalarType dtype) -> Tensor",
    fake=from_fp8_fake,
    reference=from_fp8_reference,
    cpp=("cpu",),
    cuda=launcher("swiglu_from_fp8"),
)
define(
    "swiglu_backward",
    "(Tensor dh, Tensor g, Tensor u, int form) -> (Tensor, Tensor)",
    fake=swiglu_grad_fake,
    reference=swiglu_grad_reference,
    cpp=("cpu",),
    cuda=launcher("swiglu_backward"),
)


# ------------------------------------------------------------------------------------------------------------ autograd


def refuse_second(op: str) -> None:
    """In a backward: RuntimeError where its own derivative is asked for."""
    if not _below_autograd() and not torch.compiler.is_compiling():
        bad(op, "create_graph", "first derivatives", "a second derivative", kind=RuntimeError)


class _Act(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: int, form: int) -> tuple[Tensor, Tensor]:
        y, saved = torch.ops.lowmem.act_forward(x.reshape(-1, x.shape[-1]), kind, form)
        ctx.save_for_backward(x if form == PLAIN else saved)
        ctx.kind, ctx.form = kind, form
        ctx.mark_non_differentiable(saved)
        return y.view(x.shape), saved

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Any) -> Any:
        refuse_second("act")
        (saved,) = ctx.saved_tensors
        k = dy.shape[-1]
        saved = saved.reshape(-1, k) if ctx.form == PLAIN else saved
        return torch.ops.lowmem.act_backward(dy.reshape(-1, k), saved, ctx.kind, ctx.form).view(dy.shape), None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor, form: int) -> tuple[Tensor, Tensor, Tensor]:
        k = g.shape[-1]
        h, packed_g, packed_u = torch.ops.lowmem.swiglu_forward(g.reshape(-1, k), u.reshape(-1, k), form)
        ctx.save_for_backward(*((packed_g, packed_u) if form == FP8 else (g, u)))
        ctx.form = form
        ctx.mark_non_differentiable(packed_g, packed_u)
        return h.view(g.shape), packed_g, packed_u

    @staticmethod
    def backward(ctx: Any, dh: Tensor, *_: Any) -> Any:
        refuse_second("swiglu")
        g, u = ctx.saved_tensors
        k = dh.shape[-1]
        if ctx.form == PLAIN:
            g, u = g.reshape(-1, k), u.reshape(-1, k)
        dg, du = torch.ops.lowmem.swiglu_backward(dh.reshape(-1, k), g, u, ctx.form)
        return dg.view(dh.shape), du.view(dh.shape), None


# ---------------------------------------------------------------------------------------------------- public functions


def check_save(op: str, save: str, allowed: tuple[str, ...]) -> None:
    """ValueError unless ``save`` is one of ``allowed``."""
    if save not in allowed:
        bad(op, "save", " or ".join([", ".join(map(repr, allowed[:-1])), repr(allowed[-1])]), repr(save))


def check_matrix(op: str, name: str, x: Tensor) -> None:
    """TypeError or ValueError unless ``x`` is ``[..., K]`` in a dtype that the family serves."""
    if not x.is_floating_point():
        bad(op, name, "a floating dtype", x.dtype, kind=TypeError)
    if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        bad(op, name, "float64, float32, bfloat16 or float16", x.dtype, kind=TypeError)
    if x.dim() < 1 or x.shape[-1] < 1:
        bad(op, name, "shape [..., K] with K >= 1", f"shape {tuple(x.shape)}")


def check_like(op: str, name: str, t: Tensor, x: Tensor) -> None:
    """ValueError unless ``t`` has ``x``'s shape, dtype and device."""
    if t.shape != x.shape or t.dtype != x.dtype or t.device != x.device:
        want = f"shape {tuple(x.shape)} in {x.dtype} on {x.device}"
        bad(op, name, want, f"shape {tuple(t.shape)} in {t.dtype} on {t.device}")


GLU_SAVES = ("bf16", "fp8", "recompute")
ACT_SAVES = ("bf16", "fp8", "deriv4", "deriv2", "recompute")


def act(x: Tensor, kind: str, *, save: str = "bf16") -> Tensor:
    """``f(x)`` for ``kind`` ``"silu"``, ``"gelu"`` (exact) or ``"gelu_tanh"``, ``x [..., K]``.

    ``save``, bytes an element of 16 bits: ``"bf16"`` and ``"recompute"`` x as it came, 2; ``"fp8"`` 1.0078;
    ``"deriv4"`` 0.5; ``"deriv2"`` 0.25 (rows rounded up to bytes). Error of dx:
    rounding; ``|dy| max|f''| |x - x8|`` (f'' at most 0.5 for silu, 0.8 for gelu);
    ``|dy| / (2 s)``; for deriv2 ``|dy|`` times at most 0.541 (silu, at x = 0) or 0.55 (gelu).

    Raises ValueError or TypeError ``lowmem.act: <argument>: expected ..., got ...``.
    """
    if kind not in KINDS:
        bad("act", "kind", "'silu', 'gelu' or 'gelu_tanh'", repr(kind))
    check_save("act", save, ACT_SAVES)
    check_matrix("act", "x", x)
    y, saved = _Act.apply(x, KINDS[kind], FORMS[save])
    if save == "fp8":
        offer(y, Recipe("act_fp8", (saved,), (KINDS[kind],)))
    elif save == "recompute":
        offer(y, Recipe("act", (x,), (KINDS[kind],)))
    return y


def swiglu(gate: Tensor, up: Tensor, *, save: str = "bf16") -> Tensor:
    """``silu(gate) * up`` (arXiv 2002.05202), both ``[..., K]`` of one dtype.

    ``save``, bytes an element of 16 bits (plain torch: 6, and 2 more in the layer behind): ``"bf16"`` gate and up as
    they came, 4; ``"recompute"`` the same, and the output is offered to be computed again; ``"fp8"`` both in FP8
    groups, 2.0156, the output offered too. silu and the product are always computed again in backward. There is no
    derivative code: backward needs silu(gate) and up themselves, beside which a code would only add bytes.

    Raises ValueError or TypeError ``lowmem.swiglu: <argument>: expected ..., got ...``.
    """
    check_save("swiglu", save, GLU_SAVES)
    check_matrix("swiglu", "gate", gate)
    check_like("swiglu", "up", up, gate)
    h, packed_g, packed_u = _SwiGLU.apply(gate, up, FORMS[save])
    if save == "fp8":
        offer(h, Recipe("swiglu_fp8", (packed_g, packed_u)))
    elif save == "recompute":
        offer(h, Recipe("swiglu", (gate, up)))
    return h
