"""The ``lora`` family: ``y = x W^T + bias + scale * drop(x) A^T B^T`` with frozen (or trainable) ``W``.

The graph is cut at ``S = scale * drop(x) A^T`` (``[M, r]``), as in LoRAFusion (arXiv 2510.00206): everything that reads
``x`` besides the base GEMM is one *shrink*, everything that writes ``y`` is one *expand*. Notation: ``x [M, K]``,
``W [N, K]``, ``A [r, K]``, ``B [N, r]``, ``dy [M, N]``; ``scale = alpha / r``; ``drop`` keeps an element with
probability ``1 - p`` and divides it by that.

Backward, with ``dS = scale * dy B``::

    dB = dy^T S          dA = dS^T drop(x)         dx = dy W + mask * (dS A) / (1 - p)

Saved for it: ``x`` itself (which q/k/v or gate/up share), ``S``, and either one bit an element (``M * ceil(K/32) * 4``
bytes) or nothing but the seed, from which the mask is drawn again.

Conventions of all operators here: 2-D tensors with any strides; ``x``, ``w``, ``dy``, ``s``, ``ds`` and ``y`` share one
floating dtype, ``a`` and ``b`` may have another one (fp32 adapters over a bf16 base), products accumulate in fp32 (fp64
for fp64), and weight gradients leave in that accumulation dtype. Dropped elements contribute exactly zero, even where
``x`` is not finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dispatch import define, triton_launcher
from .._dtypes import accumulate_dtype
from .._errors import bad
from ..quant.qtensor import QTensor
from . import lora_rule
from .activation_saved import INPUT_SAVES, Recipe, offered, rebuild
from .philox import inv_keep, keep_mask, pack_bits, unpack_bits
from .sampled import Pick, check_pick


def _mask_words(x: Tensor, p: float, save_mask: bool) -> tuple[int, ...]:
    return (x.shape[0], (x.shape[1] + 31) // 32) if save_mask and p > 0 else (0,)


def _keep(rows: int, cols: int, mask: Tensor | None, p: float, seed: Tensor | None, child: int) -> Tensor | None:
    if p == 0:
        return None
    if mask is not None:
        return unpack_bits(mask, cols)
    assert seed is not None
    return keep_mask(rows, cols, p, seed, child)


# ------------------------------------------------------------------------------------------------------------- shrink

SHRINK = "(Tensor x, Tensor a, float scale, float p, Tensor? seed, int child, bool save_mask) -> (Tensor, Tensor)"


def shrink_fake(
    x: Tensor, a: Tensor, scale: float, p: float, seed: Tensor | None, child: int, save_mask: bool
) -> tuple[Tensor, Tensor]:
    """Shapes of ``lowmem::lora_shrink``."""
    return x.new_empty(x.shape[0], a.shape[0]), x.new_empty(_mask_words(x, p, save_mask), dtype=torch.int32)


def shrink_reference(
    x: Tensor, a: Tensor, scale: float, p: float, seed: Tensor | None, child: int, save_mask: bool
) -> tuple[Tensor, Tensor]:
    """``S = scale * drop(x) a^T``: ``[M, r]`` in ``x.dtype``, and the packed keep bits ``[M, ceil(K/32)]`` int32 where
    ``save_mask`` and ``p > 0`` (else an empty tensor)."""
    keep = _keep(x.shape[0], x.shape[1], None, p, seed, child)
    if keep is None:
        return (x @ a.to(x.dtype).T).mul_(scale), x.new_empty(0, dtype=torch.int32)
    s = (torch.where(keep, x, 0) @ a.to(x.dtype).T).mul_(scale * inv_keep(p))
    return s, pack_bits(keep) if save_mask else x.new_empty(0, dtype=torch.int32)


# ------------------------------------------------------------------------------------------------------------- expand

EXPAND = "(Tensor x, Tensor? w, Tensor s, Tensor b, Tensor? bias) -> Tensor"


def expand_fake(x: Tensor, w: Tensor | None, s: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """Shape of ``lowmem::lora_expand``."""
    return x.new_empty(x.shape[0], b.shape[0])


def expand_reference(x: Tensor, w: Tensor | None, s: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """``y = x w^T + s b^T + bias``: ``[M, N]`` in ``x.dtype``; ``w`` None leaves the first term out. ``s`` is
    scaled."""
    delta = s @ b.to(s.dtype).T
    if w is not None:
        delta = delta.add_(x @ w.T)
    return delta if bias is None else delta.add_(bias)


def _expand_composed(x: Tensor, w: Tensor | None, s: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """Where lowmem/_C is missing: the base GEMM writes ``y``, a rank-r GEMM accumulates onto it in place."""
    bt = b.to(x.dtype).T
    if w is None:
        return s @ bt if bias is None else torch.addmm(bias, s, bt)
    return F.linear(x, w, bias).addmm_(s, bt)


# ------------------------------------------------------------------------------------------------------------ dy pass

DY = "(Tensor dy, Tensor b, Tensor s, float scale) -> (Tensor, Tensor)"


def dy_fake(dy: Tensor, b: Tensor, s: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Shapes of ``lowmem::lora_dy``."""
    return dy.new_empty(dy.shape[0], b.shape[1]), dy.new_empty(b.shape, dtype=accumulate_dtype(dy.dtype))


def dy_reference(dy: Tensor, b: Tensor, s: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``dS = scale * dy b`` (``[M, r]``, ``dy.dtype``) and ``dB = dy^T s`` (``[N, r]``, accumulation dtype)."""
    return (dy @ b.to(dy.dtype)).mul_(scale), (dy.T @ s).to(accumulate_dtype(dy.dtype))


# ---------------------------------------------------------------------------------------------------- masked expand

MASKED_EXPAND = (
    "(Tensor(a!) out, Tensor ds, Tensor a, Tensor? mask, float p, Tensor? seed, int child, bool accumulate) -> ()"
)


def masked_expand_fake(
    out: Tensor, ds: Tensor, a: Tensor, mask: Tensor | None, p: float, seed: Tensor | None, child: int, accumulate: bool
) -> None:
    """``lowmem::lora_masked_expand_`` writes ``out`` and returns nothing."""


def masked_expand_reference(
    out: Tensor, ds: Tensor, a: Tensor, mask: Tensor | None, p: float, seed: Tensor | None, child: int, accumulate: bool
) -> None:
    """``out = accumulate * out + mask * (ds a) / (1 - p)``: ``[M, K]`` in place. ``mask`` holds packed bits, or None to
    draw them again from ``seed`` and ``child``; with ``p = 0`` both are ignored."""
    delta = ds @ a.to(ds.dtype)
    keep = _keep(out.shape[0], out.shape[1], mask, p, seed, child)
    if keep is not None:
        delta = torch.where(keep, delta.mul_(inv_keep(p)), 0)
    out.add_(delta) if accumulate else out.copy_(delta)


# ------------------------------------------------------------------------------------------------------------ dx GEMM

DX = "(Tensor dy, Tensor? w, Tensor ds, Tensor a, Tensor? mask, float p, Tensor? seed, int child) -> Tensor"


def dx_fake(
    dy: Tensor, w: Tensor | None, ds: Tensor, a: Tensor, mask: Tensor | None, p: float, seed: Tensor | None, child: int
) -> Tensor:
    """Shape of ``lowmem::lora_dx``."""
    return dy.new_empty(dy.shape[0], a.shape[1])


def dx_reference(
    dy: Tensor, w: Tensor | None, ds: Tensor, a: Tensor, mask: Tensor | None, p: float, seed: Tensor | None, child: int
) -> Tensor:
    """``dx = dy w + mask * (ds a) / (1 - p)``: ``[M, K]`` in ``dy.dtype``; ``w`` None leaves the first term out."""
    dx = dy.new_zeros(dy.shape[0], a.shape[1]) if w is None else dy @ w
    masked_expand_reference(dx, ds, a, mask, p, seed, child, True)
    return dx


def _dx_composed(
    dy: Tensor, w: Tensor | None, ds: Tensor, a: Tensor, mask: Tensor | None, p: float, seed: Tensor | None, child: int
) -> Tensor:
    """Where lowmem/_C is missing: the base GEMM, then the masked rank-r update in place on its output."""
    dx = dy.new_empty(dy.shape[0], a.shape[1]) if w is None else dy @ w
    torch.ops.lowmem.lora_masked_expand_(dx, ds, a, mask, p, seed, child, w is not None)
    return dx


# ----------------------------------------------------------------------------------------------------------------- dA

DA = "(Tensor ds, Tensor x, Tensor? mask, float p, Tensor? seed, int child) -> Tensor"


def da_fake(ds: Tensor, x: Tensor, mask: Tensor | None, p: float, seed: Tensor | None, child: int) -> Tensor:
    """Shape of ``lowmem::lora_da``."""
    return x.new_empty(ds.shape[1], x.shape[1], dtype=accumulate_dtype(x.dtype))


def da_reference(ds: Tensor, x: Tensor, mask: Tensor | None, p: float, seed: Tensor | None, child: int) -> Tensor:
    """``dA = ds^T drop(x)``: ``[r, K]`` in the accumulation dtype, from the raw ``x`` and the mask's bits or seed."""
    keep = _keep(x.shape[0], x.shape[1], mask, p, seed, child)
    if keep is None:
        return (ds.T @ x).to(accumulate_dtype(x.dtype))
    return (ds.T @ torch.where(keep, x, 0)).to(accumulate_dtype(x.dtype)).mul_(inv_keep(p))


def _launcher(name: str, module: str = "lora") -> Any:
    return triton_launcher(module, name)


define("lora_shrink", SHRINK, fake=shrink_fake, reference=shrink_reference, cpp=("cpu",), cuda=_launcher("shrink"))
define(
    "lora_expand",
    EXPAND,
    fake=expand_fake,
    reference=expand_reference,
    cpp=("cpu",),
    cpu=_expand_composed,
    cuda=_launcher("expand"),
)
define("lora_dy", DY, fake=dy_fake, reference=dy_reference, cpp=("cpu", "cuda"), cuda=_launcher("dy"))
define(
    "lora_masked_expand_",
    MASKED_EXPAND,
    fake=masked_expand_fake,
    reference=masked_expand_reference,
    cpp=("cpu", "cuda"),
    cuda=_launcher("masked_expand_"),
)
define(
    "lora_dx",
    DX,
    fake=dx_fake,
    reference=dx_reference,
    cpp=("cpu",),
    cpu=_dx_composed,
    cuda=_launcher("dx"),
)
define("lora_da", DA, fake=da_fake, reference=da_reference, cpp=("cpu",), cuda=_launcher("da"))


# ---------------------------------------------------------------------------------------------------------- autograd


# of one child: base (a packed base: its bytes), bias, A, B, gate, seed, and a packed base's other five tensors
TENSORS = 11


def _below_autograd() -> bool:
    # Inside the Function nothing is recorded, yet each operator would still pass through the Autograd key and its check
    # in Python: 4 to 10 us a call. Not while compiling, where the tracer must see the operators at that key, and not
    # under create_graph, where the check is what refuses a second derivative.
    return not torch.compiler.is_compiling() and not torch.is_grad_enabled()


class _LoRALinear(torch.autograd.Function):
    """One or several adapted layers over one ``x``: it is saved once, and their dx are summed in the GEMMs."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        if _below_autograd():
            with torch._C._AutoDispatchBelowAutograd():
                return _LoRALinear._forward(ctx, *args)
        return _LoRALinear._forward(ctx, *args)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        saved = ctx.saved_tensors  # outside: under activation checkpointing this runs a piece of the model again
        if _below_autograd():
            with torch._C._AutoDispatchBelowAutograd():
                return _LoRALinear._backward(ctx, saved, *upstream)
        return _LoRALinear._backward(ctx, saved, *upstream)

    @staticmethod
    def _forward(
        ctx: Any, x: Tensor, settings: tuple[tuple[Any, ...], ...], keep: tuple[Any, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ops = torch.ops.lowmem
        save_mask, save, recipe = keep
        rows = x.reshape(-1, x.shape[-1])
        need_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        saved: list[Tensor | None] = []
        outputs = []
        need_rows = False
        for i, (scale, p, child, packed) in enumerate(settings):
            base, bias, a, b, gate, seed, *parts = tensors[TENSORS * i : TENSORS * (i + 1)]
            need_w, _, need_a, need_b, need_gate = needs[TENSORS * i : TENSORS * i + 5]
            sampled = recipe is not None and recipe.how == "sampled"
            bits = (save_mask or sampled) and p > 0 and (need_x or need_a)
            s, mask = ops.lora_shrink(rows, a, scale, p, seed, child, bits)
            gated = s if gate is None else s * gate.to(s.dtype)
            if packed is None:
                y = ops.lora_expand(rows, base, gated, b, bias)
            else:  # the rank-r term is accumulated onto the packed product where it lies
                y = ops.quant_matmul(rows, base, *parts, *packed, 0, bias, False)
                assert b is not None
                ops.lora_masked_expand_(y, gated, b.T, None, 0.0, None, 0, True)
            outputs.append(y.view(*x.shape[:-1], y.shape[-1]))
            need_rows = need_rows or need_w or need_a
            s_kept = s if need_b or need_gate else None
            saved += (base, a, b, gate, s_kept, mask if bits else None, None if bits else seed, *parts)
        # x is saved as it came, so that layers over one input share its storage; W, A, B are parameters, not copies
        if need_rows and recipe is None and save == "fp8":
            recipe = Recipe("fp8", (ops.fp8_pack(rows),))
        kept = (x if need_rows else None,) if recipe is None or not need_rows else recipe.tensors
        ctx.save_for_backward(*kept, *saved)
        ctx.settings, ctx.kept, ctx.shape = settings, len(kept), rows.shape
        ctx.how = (recipe.how, recipe.numbers) if recipe is not None and need_rows else None
        ctx.set_materialize_grads(False)  # an output that nobody used costs nothing
        return tuple(outputs)

    @staticmethod
    def _backward(ctx: Any, tensors: tuple[Any, ...], *upstream: Tensor | None) -> Any:
        ops = torch.ops.lowmem
        (x, *others), saved = tensors[: ctx.kept], tensors[ctx.kept :]
        need_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        rows: Any = None if x is None or ctx.how is not None else x.reshape(-1, x.shape[-1])
        dx: Any = None
        lead: Any = None
        grads: list[Tensor | None] = []
        for i, (scale, p, child, packed) in enumerate(ctx.settings):
            base, a, b, gate, s, mask, seed, *parts = saved[(TENSORS + 1) * i : (TENSORS + 1) * (i + 1)]
            need_w, need_bias, need_a, need_b, need_gate = needs[TENSORS * i : TENSORS * i + 5]
            grad = upstream[i]
            if grad is None:
                grads += [None] * TENSORS
                continue
            lead, dy = grad.shape[:-1], grad.reshape(-1, grad.shape[-1])
            ds: Any = None
            da = db = dgate = None
            g = None if gate is None else gate.to(dy.dtype)
            outer = scale if g is None else 1.0  # with a gate, dy B is needed bare: dgate = sum(S * (dy B))
            if need_b:
                ds, db = _dy(dy, b, s if g is None else s * g, outer)
                db = db.to(b.dtype)
            elif need_x or need_a or need_gate:
                ds = (dy @ b.to(dy.dtype)).mul_(outer)
            if need_gate:
                dgate = (ds.to(accumulate_dtype(ds.dtype)) * s).sum(0).to(gate.dtype)
            if g is not None and (need_x or need_a):
                ds = ds * (g * scale)
            if need_x and packed is not None:
                product = ops.quant_matmul(dy, base, *parts, *packed, 0, None, True)
                dx = product if dx is None else dx.add_(product)
                ops.lora_masked_expand_(dx, ds, a, mask, p, seed, child, True)
            elif need_x and dx is None:
                dx = ops.lora_dx(dy, base, ds, a, mask, p, seed, child)
            elif need_x:
                ops.lora_masked_expand_(dx, ds, a, mask, p, seed, child, True)
                if base is not None:
                    dx.addmm_(dy, base)
            if (need_a or need_w) and ctx.how is not None and ctx.how[0] == "sampled":
                da, dw = _sampled_grads(ds if need_a else None, dy if need_w else None, (x, *others), mask, p, child)
                da = None if da is None else da.to(a.dtype)
                grads += (dw, dy.sum(0) if need_bias else None, da, db, dgate, *[None] * (TENSORS - 5))
                continue
            if (need_a or need_w) and rows is None:  # for the first layer that needs them
                (how, numbers), (m, k) = ctx.how, ctx.shape
                rows = rebuild(how, numbers, (x, *others), m, k, dy.dtype)
            if need_a:
                da = _da(ds, rows, a, mask, p, seed, child)
            dw = dy.T @ rows if need_w else None
            grads += (dw, dy.sum(0) if need_bias else None, da, db, dgate, *[None] * (TENSORS - 5))
        return None if dx is None else dx.view(*lead, dx.shape[1]), None, None, *grads


def _weighs(t: Tensor, adapter: Tensor) -> bool:
    # torch's GEMMs round a weight gradient to t's dtype: no loss only where the adapter's own dtype is that
    return t.device.type == "cpu" and adapter.dtype == t.dtype and not torch.compiler.is_compiling()


def _dy(dy: Tensor, b: Tensor, s: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``lora_dy``, on a CPU by the rule."""
    run = torch.ops.lowmem.lora_dy
    if _weighs(dy, b):
        shape = (dy.shape[0], dy.shape[1])

        def ways() -> Any:
            return lambda: run(dy, b, s, scale), lambda: dy_reference(dy, b, s, scale)

        if lora_rule.cpu_way("lora_dy", shape, b.shape[1], dy.dtype, ways) == "torch":
            return dy_reference(dy, b, s, scale)
    return run(dy, b, s, scale)


def _da(ds: Tensor, rows: Tensor, a: Tensor, mask: Tensor | None, p: float, seed: Tensor | None, child: int) -> Tensor:
    """``lora_da`` in A's dtype, on a CPU by the rule."""
    run = torch.ops.lowmem.lora_da
    if p == 0 and _weighs(rows, a):
        shape = (rows.shape[0], rows.shape[1])

        def ways() -> Any:
            return lambda: run(ds, rows, None, 0.0, None, child), lambda: ds.T @ rows

        if lora_rule.cpu_way("lora_da", shape, ds.shape[1], rows.dtype, ways) == "torch":
            return ds.T @ rows
    return run(ds, rows, mask, p, seed, child).to(a.dtype)


def _sampled_grads(
    ds: Tensor | None, dy: Tensor | None, pick: tuple[Any, ...], mask: Tensor | None, p: float, child: int
) -> tuple[Tensor | None, Tensor | None]:
    """``(dA, dW)`` from the rows of a pick, each None where its upstream gradient is."""
    ops = torch.ops.lowmem
    taken, rows, scale = pick
    da = None
    if ds is not None:
        bits = None if mask is None else mask.index_select(0, rows)
        da = ops.lora_da(ops.sampled_gather(ds, rows, scale), taken, bits, p, None, child)
    return da, None if dy is None else ops.sampled_dw(dy, taken, rows, scale)


class Adapted(NamedTuple):
    """One adapted layer of :func:`lora_group`: the arguments of :func:`lora_linear` but x."""

    base: Tensor | QTensor | None
    A: Tensor
    B: Tensor
    scale: float
    bias: Tensor | None = None
    gate: Tensor | None = None
    p: float = 0.0
    seed: Tensor | None = None
    child: int = 0


def _check(op: str, x: Tensor, layer: Adapted) -> None:
    base, a, b, _, bias, gate, p, seed, _ = layer
    if not x.is_floating_point():
        bad(op, "x", "a floating dtype", x.dtype, kind=TypeError)
    if x.dim() < 1:
        bad(op, "x", "at least one dimension [..., K]", f"shape {tuple(x.shape)}")
    k = x.shape[-1]
    if a.dim() != 2 or a.shape[1] != k or a.shape[0] < 1:
        bad(op, "A", f"shape [r, {k}] with r >= 1 (K = x's last dimension)", f"shape {tuple(a.shape)}")
    if b.dim() != 2 or b.shape[1] != a.shape[0]:
        bad(op, "B", f"shape [N, {a.shape[0]}] (r = A's rows)", f"shape {tuple(b.shape)}")
    n = b.shape[0]
    if base is not None:
        if tuple(base.shape) != (n, k):
            bad(op, "base", f"shape [{n}, {k}] (B's rows, x's last dimension)", f"shape {tuple(base.shape)}")
        if not isinstance(base, QTensor) and base.dtype != x.dtype:
            bad(
                op,
                "base",
                f"x's dtype {x.dtype}",
                base.dtype,
                hint="cast x, or run under torch.autocast",
                kind=TypeError,
            )
    if bias is not None and (tuple(bias.shape) != (n,) or bias.dtype != x.dtype):
        bad(op, "bias", f"shape [{n}] in {x.dtype}", f"shape {tuple(bias.shape)} in {bias.dtype}")
    if gate is not None and tuple(gate.shape) != (a.shape[0],):
        bad(op, "gate", f"shape [{a.shape[0]}] (r = A's rows)", f"shape {tuple(gate.shape)}")
    for name, t in (("base", base), ("A", a), ("B", b), ("bias", bias), ("gate", gate)):
        if t is None:
            continue
        if not isinstance(t, QTensor) and not t.is_floating_point():
            bad(op, name, "a floating dtype", t.dtype, kind=TypeError)
        if t.device != x.device:
            bad(op, name, f"device {x.device} (x's)", f"device {t.device}")
    if not 0.0 <= p <= 1.0:
        bad(op, "p", "a probability in [0, 1]", p)
    if p > 0:
        if seed is None:
            bad(
                op,
                "seed",
                "an int64 tensor of one element, since p > 0",
                None,
                hint="torch.randint(0, 2**62, (1,), device=x.device)",
            )
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
            bad(op, "seed", f"int64 of one element on {x.device}", f"{seed.dtype} of {seed.numel()} on {seed.device}")


def lora_linear(
    x: Tensor,
    base: Tensor | QTensor | None,
    A: Tensor,  # noqa: N803 (the field's names)
    B: Tensor,  # noqa: N803
    scale: float,
    *,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
    child: int = 0,
    save_mask: bool = True,
    save: str = "bf16",
    pick: Pick | None = None,
) -> Tensor:
    """``y = x base^T + bias + scale * ((drop_p(x) A^T) * gate) B^T`` (LoRA, arXiv 2106.09685; split as LoRAFusion,
    2510.00206).

    Args:
        x: ``[..., K]``, float; any leading shape, zero rows included.
        base: ``[N, K]`` in ``x.dtype``, a :class:`lowmem.quant.QTensor` of that shape (QLoRA, 2305.14314: frozen, read
            from its bytes in forward and in backward), or None for the low-rank term alone.
        A: ``[r, K]``; B: ``[N, r]``; any r >= 1, any floating dtype (rounded to ``x.dtype`` where a tensor core
            needs it).
        scale: usually ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA.
        bias: ``[N]`` in ``x.dtype``.
        gate: ``[r]``, any floating dtype: a factor for each rank (SoRA, 2311.11696; SVFit, 2409.05926). With A and B
            frozen only ``S`` is saved for its gradient.
        p: drop probability of the adapter's input, expressed in 1/65536ths; 1 drops everything.
        seed: int64 of one element on x's device, required when ``p > 0``: same seed, same mask, on every backend.
        child: distinguishes layers that share one seed.
        save_mask: keep ``M * ceil(K/32) * 4`` bytes of bits for backward; False keeps the seed alone and draws them
            again.
        save: how x is kept for dA: ``"bf16"`` as it came, in any dtype; ``"fp8"`` in FP8 groups, ``M * (K + ceil(K /
            128))`` bytes, with an error of dA of at most ``|dS|^T |x| / 16``; ``"recompute"`` as it came. In the last
            two nothing is kept of an x that its producer offers to compute again (activation_saved.py).
        pick: rows of x from :func:`lowmem.sampling.pick`, of which dA (and dW) is then an unbiased estimate; they are
            kept instead of x, ``k (K itemsize + 12)`` bytes, and masks as bits.

    Returns ``[..., N]`` in ``x.dtype``. Under ``torch.autocast`` x, base and bias are cast first, as ``F.linear`` does.
    Saved for backward: ``x``, ``S [M, r]`` and the bits or the seed: ``M * (K + r) * itemsize + M * K / 8`` bytes, of
    which ``x`` is shared with every other layer over the same input.

    Raises ValueError or TypeError ``lowmem.lora_linear: <argument>: expected ..., got ...`` before anything is
    computed.
    """
    layer = Adapted(base, A, B, scale, bias, gate, p, seed, child)
    return _run(x, (layer,), save_mask, save, pick)[0]


def lora_group(
    x: Tensor, layers: Sequence[Adapted], *, save_mask: bool = True, save: str = "bf16", pick: Pick | None = None
) -> tuple[Tensor, ...]:
    """:func:`lora_linear` of several layers over one ``x`` (q/k/v, gate/up): one output each, the same bits as apart.

    ``x`` is cast (under autocast) and saved once, and in backward the layers' ``dx`` are accumulated by the GEMMs into
    one ``[..., K]`` tensor, where separate calls make one each and add them: ``len(layers) - 1`` buffers and additions
    less. Dropout masks are the layers' own, from their seeds.

    Raises as :func:`lora_linear` does, or ValueError where ``layers`` is empty.
    """
    if not layers:
        bad("lora_group", "layers", "at least one layer", "none")
    return _run(x, tuple(layers), save_mask, save, pick)


def _run(x: Tensor, layers: tuple[Adapted, ...], save_mask: bool, save: str, pick: Pick | None) -> tuple[Tensor, ...]:
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        if x.is_floating_point() and x.dtype != torch.float64:
            x = x.to(dtype)
            layers = tuple(
                layer._replace(
                    base=layer.base.to(dtype) if isinstance(layer.base, Tensor) else layer.base,
                    bias=None if layer.bias is None else layer.bias.to(dtype),
                )
                for layer in layers
            )
        with torch.autocast(kind, enabled=False):
            return _run(x, layers, save_mask, save, pick)
    op = "lora_linear" if len(layers) == 1 else "lora_group"
    settings = []
    tensors: list[Tensor | None] = []
    for layer in layers:
        _check(op, x, layer)
        base, packed = layer.base, None
        parts: tuple[Tensor | None, ...] = (None,) * 5
        if isinstance(base, QTensor):
            packed = (base.spec.code, *base.shape)
            base, *rest = base.tensors()
            parts = tuple(rest)
        settings.append((layer.scale, layer.p, layer.child, packed))
        tensors += (base, layer.bias, layer.A, layer.B, layer.gate, layer.seed if layer.p > 0 else None, *parts)
    if save not in INPUT_SAVES:
        bad(op, "save", "'bf16', 'fp8' or 'recompute'", repr(save))
    recipe = None if save == "bf16" else offered(x)
    if pick is not None:
        check_pick(op, x, pick)
        recipe = Recipe("sampled", (pick.x, pick.rows, pick.scale))
    keep = (save_mask, save, recipe)
    return _LoRALinear.apply(x, tuple(settings), keep, *tensors)
