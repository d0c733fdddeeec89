"""``quantize`` and ``dequantize``: between dense weights and :class:`QTensor`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from .._errors import bad
from ..ops import quant as ops
from .formats import QuantSpec, as_spec, code_table, dynamic_map, pack_codes
from .qtensor import QTensor, packed_shape, scale_shape

METHODS = ("absmax", "mse", "hqq")
CHUNK = 1 << 22  # elements that the searching quantizers hold in fp32 at a time
CLIPS = 24  # scales that "mse" tries for a group
HQQ_ROUNDS, HQQ_P, HQQ_BETA, HQQ_KAPPA = 20, 0.7, 10.0, 1.01  # HQQ's own settings


def quantize(
    w: Tensor,
    spec: str | QuantSpec,
    *,
    group_size: int | None = None,
    double_quant: bool | None = None,
    method: Literal["absmax", "mse", "hqq"] = "absmax",
) -> QTensor:
    """``w [..., N, K]`` in ``spec``'s format.

    Args:
        w: two dimensions or more, any floating dtype, finite. Experts are ``[E, N, K]``.
        spec: a :class:`QuantSpec`, or a format's name for its defaults.
        group_size, double_quant: replace the spec's own where given.
        method: ``"absmax"``: the group's largest magnitude (or range, with zero points) is representable; nf4 and fp4
            are then bit-equal to bitsandbytes, double quantization included. ``"mse"``: of scales between 0.35 and 1
            times that one, the one with the least squared error. ``"hqq"``: half-quadratic splitting under the
            ``l_0.7`` norm (Badri and Shaji, HQQ, 2023), which fits float zeros, or without zero points the scales.

    Raises ValueError or TypeError ``lowmem.quantize: <argument>: expected ..., got ...`` before anything is written:
    NaN or infinity in w, a group size that does not divide K (int formats), an unknown format or method.
    """
    op = "quantize"
    what = as_spec(op, spec)
    if group_size is not None:
        what = replace(what, group_size=group_size)
    if double_quant is not None:
        what = replace(what, double_quant=double_quant)
    if method not in METHODS:
        bad(op, "method", f"one of {', '.join(METHODS)}", repr(method))
    if not isinstance(w, Tensor) or not w.is_floating_point():
        bad(op, "w", "a tensor of a floating dtype", getattr(w, "dtype", type(w).__name__), kind=TypeError)
    if w.dim() < 2:
        bad(op, "w", "two dimensions or more [..., N, K]", f"shape {tuple(w.shape)}")
    k = w.shape[-1]
    if not what.is_table and what.group_size > 0 and k % what.group_size:
        hint = "-1 gives one scale a row; nf4, nf3, nf2 and fp4 serve any K"
        bad(op, "group_size", f"a divisor of K = {k}", what.group_size, hint=hint)
    with torch.no_grad():
        matrix = w.detach().reshape(-1, k)
        if method == "absmax":
            parts = torch.ops.lowmem.quant_quantize(matrix, what.code, what.zero_point, what.scales_in)
        else:
            parts = _searched(matrix, what, _mse if method == "mse" else _hqq)
        packed, scale, zero = parts
        if not bool(torch.isfinite(scale).all()):
            got = "NaN or infinity" if not bool(torch.isfinite(matrix).all()) else f"scales beyond {what.scales_in}"
            bad(op, "w", "finite values", got)
        shape = tuple(w.shape)
        q = QTensor(packed.view(packed_shape(what, shape)), scale.view(scale_shape(what, shape)), what, shape, w.dtype)
        if what.zero_point:
            q = replace(q, zero=zero.view(q.scale.shape))
        if not what.double_quant:
            return q
        q = double_quantize(q, scale)
        return encode_with(q, matrix) if what.scale_bits < 8 else q


def nearest_codes(q: QTensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of ``w [rows, K]`` that are nearest under the scales and zeros of ``q``: uint8
    ``[scales, group_size]``, codes of 0 beyond w's last element; and those scales, fp32 ``[scales]``."""
    what, (rows, k) = q.spec, w.shape
    size = what.group_size if what.group_size > 0 else k
    flat = w.reshape(-1)
    count = what.scale_count(rows, k)
    index = torch.arange(count, device=flat.device)
    s = ops.scales_reference(q.scale, q.scale_code, q.scale_absmax, q.scale_offset, what, index).float()
    z = torch.full_like(s, 2.0 ** (what.bits - 1)) if q.zero is None else q.zero.reshape(-1).float()
    codes = torch.empty(count, size, dtype=torch.uint8, device=flat.device)
    step = max(CHUNK // max(size, 1), 1)
    for start in range(0, count, step):
        stop = min(start + step, count)
        part = flat[start * size : stop * size].float()
        part = torch.nn.functional.pad(part, (0, -part.numel() % size)).view(-1, size)
        codes[start:stop] = _encode(part, s[start:stop], z[start:stop], what)[0]
    return codes, s


def encode_with(q: QTensor, w: Tensor) -> QTensor:
    """``q`` with the codes of ``w [rows, K]`` chosen anew (:func:`nearest_codes`): scale codes of few bits are far from
    the scales that the first codes were made for."""
    codes, _ = nearest_codes(q, w)
    return replace(q, packed=_pack(codes.reshape(-1)[: w.numel()], q.spec, w.shape[1]).view(q.packed.shape))


def _pack(codes: Tensor, what: QuantSpec, k: int) -> Tensor:
    return ops.pack_flat(codes, what) if what.is_table else pack_codes(codes.view(-1, k), what.bits).reshape(-1)


def double_quantize(q: QTensor, scale: Tensor) -> QTensor:
    """``q`` with its ``scale`` (float, flat) as codes, in blocks of ``scale_group``.

    At 8 bits as bitsandbytes does on the CPU, bit for bit: ``(scale - mean) / absmax`` of the block is rounded to one
    of 65536 even steps of [-1, 1], whose nearest value in :func:`dynamic_map` is the code (zero is no step: 0 becomes
    1.5e-5 * absmax). Below 8 bits: ``2**scale_bits`` even steps from 0 to 1, with the least scale of the weight
    as offset and the block's largest above it as absmax (LQ-LoRA, arXiv 2311.12023)."""
    what, dtype = q.spec, q.spec.scales_in
    flat = scale.reshape(-1).float()
    pad = -flat.numel() % what.scale_group
    if what.scale_bits == 8:
        table = dynamic_map().to(flat.device)
        offset = flat.mean() if flat.numel() else flat.sum()
        blocks = torch.nn.functional.pad(flat - offset, (0, pad)).view(-1, what.scale_group)
        absmax = blocks.abs().amax(-1)
        unit = (blocks * (1.0 / ops.divisor(absmax, torch.float32))[:, None]).nan_to_num(0.0).clamp(-1, 1)
        u = _dynamic_lookup().to(flat.device)[((unit + 1.0) * 0.5 * 65535 + 0.5).long()]
        u[absmax == 0] = 0
    else:
        table = torch.linspace(0, 1, 2**what.scale_bits, device=flat.device)
        offset = (flat.amin() if flat.numel() else flat.sum()).to(dtype).float()
        blocks = torch.nn.functional.pad(flat - offset, (0, pad)).view(-1, what.scale_group).clamp(min=0)
        absmax = blocks.amax(-1)
        u = ops.table_codes(blocks / ops.divisor(absmax, torch.float32)[:, None], table)
    u = pack_codes(u.reshape(-1)[: flat.numel()], what.scale_bits)
    absmax, offset = absmax.to(dtype), offset.reshape(-1).to(dtype)
    if not bool(torch.isfinite(absmax).all() and torch.isfinite(offset).all()):
        bad("quantize", "w", "finite values", f"scales whose sum or range is beyond {dtype}")
    return replace(
        q,
        scale=u.view(q.scale.shape) if what.scale_bits == 8 else u,
        scale_code=table,
        scale_absmax=absmax,
        scale_offset=offset,
    )


@functools.lru_cache(maxsize=1)
def _dynamic_lookup() -> Tensor:
    return ops.table_codes(torch.arange(65536, dtype=torch.float32) / 65535 * 2 - 1, dynamic_map())


def dequantize(q: QTensor, dtype: torch.dtype | None = None) -> Tensor:
    """The dense weight ``[..., N, K]`` in ``dtype`` (default: the dtype that was quantized): one rounding of
    ``code value * scale`` computed in fp32."""
    out = torch.empty(q.rows, q.cols, dtype=dtype or q.dtype, device=q.device)
    with torch.no_grad():
        torch.ops.lowmem.quant_dequantize_(out, *q.tensors(), q.spec.code, q.cols, 0, 0)
    return out.view(q.shape)


# ---------------------------------------------------------------------------------------------- searching quantizers

Fit = Callable[[Tensor, QuantSpec], tuple[Tensor, Tensor, Tensor]]


def _searched(matrix: Tensor, what: QuantSpec, fit: Fit) -> tuple[Tensor, Tensor, Tensor]:
    """``fit`` over the groups ``[groups, group_size]`` of ``matrix``, a chunk at a time."""
    rows, k = matrix.shape
    size = what.group_size if what.group_size > 0 else k
    flat = matrix.reshape(-1)
    count = what.scale_count(rows, k)
    scale = torch.empty(count, dtype=what.scales_in, device=flat.device)
    codes = torch.empty(count * size, dtype=torch.uint8, device=flat.device)
    zeros = []
    step = max(CHUNK // max(size, 1), 1)
    for start in range(0, count, step):
        part = flat[start * size : (start + step) * size].float()
        part = torch.nn.functional.pad(part, (0, -part.numel() % size)).view(-1, size)
        c, s, z = fit(part, what)
        codes[start * size : start * size + c.numel()] = c.reshape(-1)
        scale[start : start + len(s)] = s
        zeros.append(z)
    codes = codes[: rows * k]
    zero = torch.cat(zeros) if what.zero_point else codes[:0]
    return _pack(codes, what, k), scale, zero


def _start(w: Tensor, what: QuantSpec) -> tuple[Tensor, Tensor]:
    """The absmax quantizer's scale ``[groups]`` and zero (float, before rounding) in fp32."""
    if what.is_table:
        return w.abs().amax(-1), torch.zeros(len(w), device=w.device)
    if not what.zero_point:
        middle = torch.full((len(w),), 2.0 ** (what.bits - 1), device=w.device)
        return w.abs().amax(-1) / (2 ** (what.bits - 1) - 1), middle
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    s = (high - low) / (2**what.bits - 1)
    return s, -low / ops.divisor(s, torch.float32)


def _encode(w: Tensor, s: Tensor, z: Tensor, what: QuantSpec) -> tuple[Tensor, Tensor]:
    """Codes of ``w [groups, size]`` under scales and zeros ``[groups]``, and the values they stand for over s."""
    over = w / ops.divisor(s, torch.float32)[:, None]
    if what.is_table:
        table = code_table(what.format, w.device)
        codes = ops.table_codes(over.clamp(-1, 1), table)
        return codes, table[codes.long()]
    codes = (over + z[:, None]).round().clamp(0, 2**what.bits - 1)
    return codes.to(torch.uint8), codes - z[:, None]


def _stored(s: Tensor, what: QuantSpec) -> Tensor:
    return s.to(what.scales_in).float()


def _mse(w: Tensor, what: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    start, z = _start(w, what)
    z = z.round().clamp(0, 2**what.bits - 1)
    best_error = torch.full_like(start, math.inf)
    best_s = torch.zeros_like(start)
    for i in range(CLIPS):
        s = _stored(start * (1 - 0.65 * i / (CLIPS - 1)), what)
        _, values = _encode(w, s, z, what)
        error = (values * s[:, None] - w).square_().sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_s = torch.where(better, s, best_s)
    codes, _ = _encode(w, best_s, z, what)
    return codes, torch.where(best_error < math.inf, best_s, math.nan), z.to(torch.uint8)


def _shrink(x: Tensor, beta: float) -> Tensor:
    # the generalised soft threshold that solves the l_p term
    size = x.abs()
    return x.sign() * (size - size.clamp(min=1e-12).pow(HQQ_P - 1) / beta).clamp(min=0)


def _hqq(w: Tensor, what: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    start, z = _start(w, what)
    s = _stored(start, what)
    if what.zero_point:
        z = z.to(what.scales_in).float()
    beta = HQQ_BETA
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for _ in range(HQQ_ROUNDS + 1):
        codes, values = _encode(w, s, z, what)
        residual = w - values * s[:, None]
        error = residual.abs().pow(HQQ_P).sum(-1)
        if best is None:
            best = error, s, z
        else:
            better = error < best[0]
            best = (
                torch.where(better, error, best[0]),
                torch.where(better, s, best[1]),
                torch.where(better, z, best[2]),
            )
        target = w - _shrink(residual, beta)
        if what.zero_point:
            z = (codes.float() - target / ops.divisor(s, torch.float32)[:, None]).mean(-1)
            z = z.to(what.scales_in).float()
        else:
            power = values.square().sum(-1)
            fitted = (values * target).sum(-1) / ops.divisor(power, torch.float32)
            s = torch.where((power > 0) & (fitted > 0), _stored(fitted, what), s)
        beta *= HQQ_KAPPA
    assert best is not None
    error, s, z = best
    codes, _ = _encode(w, s, z, what)
    return codes, torch.where(error.isfinite(), s, math.nan), z.to(what.scales_in)
