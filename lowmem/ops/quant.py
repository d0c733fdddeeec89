"""The ``quant`` family: products with a frozen weight that is stored in 2 to 8 bits.

A weight ``W [N, K]`` (or experts ``[E, N, K]``, flattened to ``E * N`` rows) is a :class:`lowmem.quant.QTensor`::

    table formats (nf4 nf3 nf2 fp4)   w[i] = table[code[i]] * s[i // g]                    i = n * K + k, flat
    int formats (int8 int4 int3 int2)  w[n, k] = s[n, k // g] * (code[n, k] - z[n, k // g])   z = 2**(bits - 1) without
    doubly quantized                    s[j] = scale_code[u[j]] * scale_absmax[j // G] + scale_offset[j // G, or 0]

each product and sum rounded to fp32, then once to the output's dtype. Forward is ``y = x W^T + bias``, backward
``dx = dy W`` from the same bytes: there is no second copy, transposed or dense. Large M: panels of W are dequantized
into shared scratch (:mod:`lowmem.memory`) that the BLAS multiplies; few rows: the bytes are multiplied as they lie.

Saved for backward: the weight's own tensors, which are no copies; ``x`` only where the scales train.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._dispatch import CPU, define, triton_launcher
from .._dtypes import accumulate_dtype
from .._errors import bad
from ..memory.workspace import WORKSPACE
from ..quant.formats import PER_CHANNEL, QuantSpec, code_table, pack_codes, row_bytes, unpack_codes

if TYPE_CHECKING:
    from ..quant.qtensor import QTensor

Maybe = Tensor | None

WEIGHT = (
    "Tensor packed, Tensor scale, Tensor? zero, Tensor? scale_code, Tensor? scale_absmax, Tensor? scale_offset, "
    "int spec"
)
"""A weight among an operator's arguments: :meth:`QTensor.tensors` and :attr:`QuantSpec.code`."""

SMALL_M = 32
"""Rows of bf16 x up to which the CPU multiplies the packed bytes as they lie; a quarter of it for fp32 and fp16."""

PANEL = 1024
"""Rows (forward) or columns (backward) of W that the CPU dequantizes at a time."""


# ---------------------------------------------------------------------------------------------------------- dequantize

DEQUANTIZE = f"(Tensor(a!) out, {WEIGHT}, int k, int row0, int col0) -> ()"


def scales_reference(
    scale: Tensor, scale_code: Maybe, scale_absmax: Maybe, scale_offset: Maybe, spec: QuantSpec, index: Tensor
) -> Tensor:
    """The scales ``s[index]`` in fp32 (fp64 where the stored ones are)."""
    if not spec.double_quant:
        s = scale.reshape(-1)[index]
        return s.to(accumulate_dtype(s.dtype))
    assert scale_code is not None and scale_absmax is not None and scale_offset is not None
    flat = scale.reshape(-1)
    u = unpack_codes(flat, spec.scale_bits, flat.numel() * 8 // spec.scale_bits)[index]
    block = index // spec.scale_group
    absmax = scale_absmax[block]
    offset = scale_offset[block] if scale_offset.numel() > 1 else scale_offset
    wide = accumulate_dtype(absmax.dtype)
    return scale_code[u.long()].to(wide) * absmax.to(wide) + offset.to(wide)


def codes_reference(packed: Tensor, spec: QuantSpec, k: int, row0: int, rows: int) -> Tensor:
    """The codes of rows ``row0 .. row0 + rows - 1``: uint8 ``[rows, k]``."""
    bits = spec.bits
    if not spec.is_table:
        return unpack_codes(packed.reshape(-1, row_bytes(bits, k))[row0 : row0 + rows], bits, k)
    start, stop = row0 * k, (row0 + rows) * k
    per = 32 if bits == 3 else 8 // bits
    first = start // per * per
    part = packed.reshape(-1)[row_bytes(bits, first) : row_bytes(bits, stop)]
    return unpack_codes(part, bits, stop - first)[start - first :].view(rows, k)


def group_index(spec: QuantSpec, k: int, row0: int, rows: int, device: torch.device) -> Tensor:
    """int64 ``[rows, k]``: which scale each element of these rows has."""
    row = torch.arange(row0, row0 + rows, device=device)[:, None]
    col = torch.arange(k, device=device)
    if spec.is_table:
        return (row * k + col) // spec.group_size
    return row * spec.row_groups(k) + (col * 0 if spec.group_size == PER_CHANNEL else col // spec.group_size)


def unit_values(codes: Tensor, zero: Maybe, spec: QuantSpec, index: Tensor, dtype: torch.dtype) -> Tensor:
    """What codes stand for over their scales, in ``dtype``: ``table[code]``, or ``code - zero[index]``."""
    if spec.is_table:
        return code_table(spec.format, codes.device).to(dtype)[codes.long()]
    z = 2 ** (spec.bits - 1) if zero is None else zero.reshape(-1)[index].to(dtype)
    return codes.to(dtype) - z


def dequantize_fake(
    out: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Maybe,
    scale_code: Maybe,
    scale_absmax: Maybe,
    scale_offset: Maybe,
    spec: int,
    k: int,
    row0: int,
    col0: int,
) -> None:
    """``lowmem::quant_dequantize_`` writes ``out`` and returns nothing."""


def dequantize_reference(
    out: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Maybe,
    scale_code: Maybe,
    scale_absmax: Maybe,
    scale_offset: Maybe,
    spec: int,
    k: int,
    row0: int,
    col0: int,
) -> None:
    """``out[i, j] = W[row0 + i, col0 + j]`` for ``out [rows, cols]`` of any floating dtype and any strides; ``k`` is
    W's number of columns."""
    what = QuantSpec.from_code(spec)
    rows, cols = out.shape
    block = slice(col0, col0 + cols)
    codes = codes_reference(packed, what, k, row0, rows)[:, block]
    index = group_index(what, k, row0, rows, packed.device)[:, block]
    s = scales_reference(scale, scale_code, scale_absmax, scale_offset, what, index)
    out.copy_(unit_values(codes, zero, what, index, s.dtype) * s)


# ------------------------------------------------------------------------------------------------------------- product

MATMUL = f"(Tensor x, {WEIGHT}, int n, int k, int row0, Tensor? bias, bool transposed) -> Tensor"


def matmul_fake(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Maybe,
    scale_code: Maybe,
    scale_absmax: Maybe,
    scale_offset: Maybe,
    spec: int,
    n: int,
    k: int,
    row0: int,
    bias: Maybe,
    transposed: bool,
) -> Tensor:
    """Shape of ``lowmem::quant_matmul``."""
    return x.new_empty((*x.shape[:-1], k if transposed else n))


def matmul_reference(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Maybe,
    scale_code: Maybe,
    scale_absmax: Maybe,
    scale_offset: Maybe,
    spec: int,
    n: int,
    k: int,
    row0: int,
    bias: Maybe,
    transposed: bool,
) -> Tensor:
    """``x W^T + bias`` (``x [M, k]``) or, transposed, ``x W`` (``x [M, n]``), with ``W`` the ``n`` rows from ``row0``
    on, rounded to x's dtype; ``x [E, M, .]`` multiplies E weights that follow each other."""
    experts = x.shape[0] if x.dim() == 3 else 1
    w = x.new_empty(experts * n, k)
    dequantize_reference(w, packed, scale, zero, scale_code, scale_absmax, scale_offset, spec, k, row0, 0)
    w = w.view(experts, n, k) if x.dim() == 3 else w
    y = x @ w if transposed else x @ w.mT
    return y if bias is None else y.add_(bias)


def _through_scratch(x: Tensor, args: tuple[Any, ...], panel: int) -> Tensor:
    """The product through shared scratch: ``panel`` rows of W (or columns, transposed) are dequantized at a time, into
    one buffer, row-major both ways, and multiplied by the BLAS."""
    *weight, n, k, row0, bias, transposed = args
    y = x.new_empty((*x.shape[:-1], k if transposed else n))
    xs, ys = (x, y) if x.dim() == 3 else (x[None], y[None])
    long = k if transposed else n
    size = min(panel, long)
    with WORKSPACE.borrow((n * size,) if transposed else (size * k,), x.dtype, x.device) as scratch:
        for expert in range(xs.shape[0]):
            row = row0 + expert * n
            for at in range(0, long, max(size, 1)):
                part = min(size, long - at)
                out = ys[expert][:, at : at + part]
                w = scratch[: n * part].view(n, part) if transposed else scratch[: part * k].view(part, k)
                torch.ops.lowmem.quant_dequantize_(w, *weight, k, *((row, at) if transposed else (row + at, 0)))
                if bias is not None and x.is_cuda:  # cuBLAS adds it in its epilogue
                    torch.addmm(bias[at : at + part], xs[expert], w if transposed else w.T, out=out)
                else:
                    torch.mm(xs[expert], w if transposed else w.T, out=out)
    return y if bias is None or x.is_cuda else y.add_(bias)


def _few(x: Tensor) -> bool:
    if not CPU.loaded or x.dtype == torch.float64:
        return False
    return x.shape[-2] <= (SMALL_M if x.dtype == torch.bfloat16 else SMALL_M // 4)


def _matmul_cpu(x: Tensor, *args: Any) -> Tensor:
    """Panels (``PANEL``), or for at most ``SMALL_M`` rows the packed bytes as they lie."""
    if _few(x):
        return torch.ops.lowmem.quant_matmul_small(x, *args)
    return _through_scratch(x, args, PANEL)


def matmul_scratch(x: Tensor, *args: Any) -> Tensor:
    """``lowmem::quant_matmul`` for many rows on a GPU: one launch dequantizes the whole W (one expert's) into shared
    scratch, and one GEMM reads it; panels only where W in x's dtype is beyond the workspace's limit, for each costs a
    launch and the GEMM's last wave.

    The scratch is :data:`lowmem.memory.WORKSPACE`'s: one buffer for all layers of a device and stream, lent for this
    call and lent again only on the same stream, whose order keeps its readers and writers apart."""
    n, k, transposed = args[7], args[8], args[-1]
    long, other = (k, n) if transposed else (n, k)
    fits = WORKSPACE.limit // max(other * x.dtype.itemsize, 1)
    return _through_scratch(x, args, long if fits >= long else max(fits // PANEL * PANEL, PANEL))


# --------------------------------------------------------------------------------------------------------- scale grads

SCALE_GRAD = f"(Tensor dy, Tensor x, {WEIGHT}, int n, int k, int row0) -> (Tensor, Tensor)"


def scale_grad_fake(
    dy: Tensor,
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Maybe,
    scale_code: Maybe,
    scale_absmax: Maybe,
    scale_offset: Maybe,
    spec: int,
    n: int,
    k: int,
    row0: int,
) -> tuple[Tensor, Tensor]:
    """Shapes of ``lowmem::quant_scale_grad``."""
    groups = QuantSpec.from_code(spec).scale_count(1, k)
    wide = accumulate_dtype(x.dtype)
    shape = (*dy.shape[:-2], n, groups)
    return x.new_empty(shape, dtype=wide), x.new_empty(shape if zero is not None else (0,), dtype=wide)


def scale_grad_reference(
    dy: Tensor,
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Maybe,
    scale_code: Maybe,
    scale_absmax: Maybe,
    scale_offset: Maybe,
    spec: int,
    n: int,
    k: int,
    row0: int,
) -> tuple[Tensor, Tensor]:
    """With ``dW = dy^T x`` (``dy [M, n]``, ``x [M, k]``, or both with experts in front): ``ds[n, g]``, the sum over
    the group's ``k`` of ``dW * (code - zero)`` (or ``dW * table[code]``), and, with zero points, ``dz = -s * sum dW``;
    both ``[.., n, groups]`` in the accumulation dtype. Groups must not cross rows."""
    what = QuantSpec.from_code(spec)
    wide = accumulate_dtype(x.dtype)
    experts = dy.shape[0] if dy.dim() == 3 else 1
    rows, groups = experts * n, what.scale_count(1, k)
    dw = (dy.to(wide).mT @ x.to(wide)).reshape(rows, groups, -1)
    codes = codes_reference(packed, what, k, row0, rows)
    index = group_index(what, k, row0, rows, packed.device)
    values = unit_values(codes, zero, what, index, wide)
    shape = (*dy.shape[:-2], n, groups)
    ds = (dw * values.view(dw.shape)).sum(-1).view(shape)
    if zero is None:
        return ds, x.new_empty(0, dtype=wide)
    s = scales_reference(scale, scale_code, scale_absmax, scale_offset, what, index.view(dw.shape)[..., 0]).to(wide)
    return ds, (-s * dw.sum(-1)).view(shape)


def _scale_grad_cpu(*args: Any) -> tuple[Tensor, Tensor]:
    """In panels that are reduced at once: dW is never stored."""
    from .quant_scale import scale_grad_panels

    return scale_grad_panels(*args)


# ------------------------------------------------------------------------------------------------------------ quantize

QUANTIZE = "(Tensor w, int spec, bool zero_point, ScalarType scale_dtype) -> (Tensor, Tensor, Tensor)"


def quantize_fake(w: Tensor, spec: int, zero_point: bool, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of ``lowmem::quant_quantize``."""
    what = QuantSpec.from_code(spec)
    scales = what.scale_count(*w.shape)
    return (
        w.new_empty(what.packed_bytes(*w.shape), dtype=torch.uint8),
        w.new_empty(scales, dtype=scale_dtype),
        w.new_empty(scales if zero_point else 0, dtype=torch.uint8),
    )


def table_codes(scaled: Tensor, table: Tensor) -> Tensor:
    """The code of the nearest table value, uint8; a tie goes to the smaller value, as in bitsandbytes."""
    ordered, order = torch.sort(table, stable=True)
    middle = (ordered[:-1] + ordered[1:]) / 2
    return order.to(torch.uint8)[torch.bucketize(scaled, middle)]


def pack_flat(codes: Tensor, spec: QuantSpec) -> Tensor:
    """Codes of a table format, flat, as bytes: the spare places of the last byte (granule, at 3 bits) hold the code of
    0, as in bitsandbytes."""
    per = 32 if spec.bits == 3 else 8 // spec.bits
    zero = int((code_table(spec.format) == 0).nonzero()[0])
    return pack_codes(torch.nn.functional.pad(codes, (0, -codes.numel() % per), value=zero), spec.bits)


def quantize_reference(
    w: Tensor, spec: int, zero_point: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The absmax quantizer: ``w [N, K]`` to flat ``(packed, scale, zero)``, computed in fp32; the scales are not yet
    doubly quantized.

    Table formats: ``s = max|w|`` of the group, the code nearest to ``w * (1 / s)``; bit-equal to bitsandbytes, in which
    a short last group divides by s instead. Int formats: ``s = max|w| / (2**(bits-1) - 1)``, code
    ``round(w / s) + 2**(bits-1)``; with zero points, over the group's range widened to hold 0,
    ``s = (max - min) / (2**bits - 1)``, ``z = round(-min / s)``, code ``round(w / s) + z``. A group of zeros has
    ``s = 0``."""
    what = QuantSpec.from_code(spec)
    rows, k = w.shape
    wide = w.to(torch.float32)
    empty = w.new_empty(0, dtype=torch.uint8)
    if what.is_table:
        table = code_table(what.format, w.device).to(wide.dtype)
        flat = wide.reshape(-1)
        full = flat.numel() // what.group_size * what.group_size
        groups = flat[:full].view(-1, what.group_size)
        absmax = groups.abs().amax(-1) if full else flat[:0]
        scaled = (groups * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1).reshape(-1)
        if full < flat.numel():
            last = flat[full:].abs().amax().clamp(min=1e-38)
            absmax = torch.cat([absmax, last[None]])
            scaled = torch.cat([scaled, (flat[full:] / last).clamp(-1, 1)])
        return pack_flat(table_codes(scaled, table), what), absmax.to(scale_dtype), empty
    groups = wide.reshape(rows, what.row_groups(k), -1)
    top = 2**what.bits - 1
    if zero_point:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        s = ((high - low) / top).to(scale_dtype)
        z = (-low / divisor(s, wide.dtype)).round().clamp(0, top)
    else:
        s = (groups.abs().amax(-1) / (2 ** (what.bits - 1) - 1)).to(scale_dtype)
        z = torch.full_like(groups[..., 0], 2 ** (what.bits - 1))
    codes = ((groups / divisor(s, wide.dtype)[..., None]).round() + z[..., None]).clamp(0, top)
    packed = pack_codes(codes.to(torch.uint8).view(rows, k), what.bits).reshape(-1)
    return packed, s.reshape(-1), z.to(torch.uint8).reshape(-1) if zero_point else empty


def divisor(s: Tensor, dtype: torch.dtype) -> Tensor:
    """``s`` with 1 in the place of 0: 0 / 1 is the code of 0, where 0 / 0 would be NaN."""
    return torch.where(s == 0, 1, s.to(dtype))


define(
    "quant_dequantize_",
    DEQUANTIZE,
    fake=dequantize_fake,
    reference=dequantize_reference,
    cpp=("cpu", "cuda"),
    cuda=triton_launcher("quant", "dequantize_"),
)
define(
    "quant_matmul",
    MATMUL,
    fake=matmul_fake,
    reference=matmul_reference,
    cpu=_matmul_cpu,
    cuda=triton_launcher("quant", "matmul"),
)
# the same product without scratch, for the few rows of decoding: a kernel of its own, to be chosen by quant_matmul
define(
    "quant_matmul_small",
    MATMUL,
    fake=matmul_fake,
    reference=matmul_reference,
    cpp=("cpu", "cuda"),
    cuda_kernels=("quant_gemv", "quant_mma"),
    cuda=triton_launcher("quant", "matmul_small"),
)
define(
    "quant_scale_grad",
    SCALE_GRAD,
    fake=scale_grad_fake,
    reference=scale_grad_reference,
    cpu=_scale_grad_cpu,
    cuda=triton_launcher("quant", "scale_grad"),
)
define("quant_quantize", QUANTIZE, fake=quantize_fake, reference=quantize_reference, cpp=("cpu",))


# ------------------------------------------------------------------------------------------------------------ autograd


def _product(x: Tensor, *args: Any) -> Tensor:
    # Inside the Function nothing is recorded, yet an operator would still pass through the Autograd key and its check
    # in Python, and quant_matmul on the CPU through a second kernel in Python: tens of microseconds, where decoding a
    # token takes a few hundred. Not while compiling, where the tracer must see the operator.
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return torch.ops.lowmem.quant_matmul(x, *args)
    with torch._C._AutoDispatchBelowAutograd():
        if x.device.type == "cpu" and _few(x):
            return torch.ops.lowmem.quant_matmul_small(x, *args)
        return torch.ops.lowmem.quant_matmul(x, *args)


class _QMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Maybe,
        spec: int,
        n: int,
        k: int,
        row0: int,
        packed: Tensor,
        scale: Tensor,
        zero: Maybe,
        scale_code: Maybe,
        scale_absmax: Maybe,
        scale_offset: Maybe,
    ) -> Tensor:
        weight = (packed, scale, zero, scale_code, scale_absmax, scale_offset)
        ctx.save_for_backward(*weight)
        ctx.numbers = (spec, n, k, row0)
        return _product(x, *weight, spec, n, k, row0, bias, False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            spec, n, k, row0 = ctx.numbers
            dx = _product(grad, *ctx.saved_tensors, spec, n, k, row0, None, True)
        if ctx.needs_input_grad[1]:
            dbias = grad.sum(tuple(range(grad.dim() - 1)))
        return dx, dbias, *[None] * 10


def check_input(op: str, x: Tensor, q: QTensor, *, argument: str = "x") -> None:
    """Raise unless ``x [..., K]`` can be multiplied with ``q``."""
    if not x.is_floating_point():
        bad(op, argument, "a floating dtype", x.dtype, kind=TypeError)
    if x.dim() < 1 or x.shape[-1] != q.cols:
        bad(op, argument, f"shape [..., {q.cols}] (K of the weight)", f"shape {tuple(x.shape)}")
    if x.device != q.device:
        bad(op, argument, f"device {q.device} (the weight's)", f"device {x.device}")


def qmatmul(x: Tensor, q: QTensor, *, bias: Maybe = None, expert: int | None = None) -> Tensor:
    """``y = x W^T + bias`` with a frozen quantized ``W`` (QLoRA, arXiv 2305.14314: forward and ``dx = dy W`` read the
    same bytes; there is no gradient for the weight). Where ``q.scale`` or ``q.zero`` requires a gradient they get
    theirs (PEQA, arXiv 2305.14152; :mod:`lowmem.ops.quant_scale`).

    Args:
        x: ``[..., K]``, float. For ``q`` of three dimensions ``[E, ..., K]``: each expert's rows.
        q: ``[N, K]`` or ``[E, N, K]``.
        bias: ``[N]`` in x's dtype.
        expert: multiply with this one of ``q [E, N, K]`` alone; then ``x`` is ``[..., K]``.

    Returns ``[..., N]`` in x's dtype. Under ``torch.autocast`` x and bias are cast, as ``F.linear`` does. Saved for
    backward: the weight's tensors themselves, no activation (x or y where scales train). Scratch
    (:func:`lowmem.memory.workspace`): ``PANEL`` rows of W at a time on the CPU, W whole within the limit on a GPU.

    Raises ValueError or TypeError ``lowmem.qmatmul: <argument>: expected ..., got ...`` before anything is computed.
    """
    op, kind = "qmatmul", x.device.type
    if torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return qmatmul(x.to(dtype), q, bias=None if bias is None else bias.to(dtype), expert=expert)
    check_input(op, x, q)
    n, k, row0 = q.shape[-2], q.shape[-1], 0
    experts = None
    if expert is not None:
        count = q.shape[0] if q.dim() == 3 else 0
        if not 0 <= expert < count:
            bad(op, "expert", f"an index below {count}" if count else "None for a weight [N, K]", expert)
        row0 = expert * n
    elif q.dim() == 3:
        experts = q.shape[0]
        if x.dim() < 2 or x.shape[0] != experts:
            bad(op, "x", f"shape [{experts}, ..., {k}] (experts first)", f"shape {tuple(x.shape)}")
    elif q.dim() != 2:
        bad(op, "q", "two or three dimensions", f"shape {q.shape}")
    if bias is not None and (tuple(bias.shape) != (n,) or bias.dtype != x.dtype):
        bad(op, "bias", f"shape [{n}] in {x.dtype}", f"shape {tuple(bias.shape)} in {bias.dtype}")
    rows = x.reshape(-1, k) if experts is None else x.reshape(experts, -1, k)
    if q.scale.requires_grad or (q.zero is not None and q.zero.requires_grad):
        from .quant_scale import _ScaledMatmul

        _rows_hold_groups(op, q)
        y = _ScaledMatmul.apply(rows, bias, q.spec.code, n, k, row0, q.packed, q.scale, q.zero)
    elif torch.is_grad_enabled():
        y = _QMatmul.apply(rows, bias, q.spec.code, n, k, row0, *q.tensors())
    else:
        y = _product(rows, *q.tensors(), q.spec.code, n, k, row0, bias, False)
    return y.view(*x.shape[:-1], n)


def _rows_hold_groups(op: str, q: QTensor) -> None:
    if q.spec.is_table and q.cols % q.spec.group_size:
        bad(op, "q", f"a group size that divides K = {q.cols}", q.spec.group_size, hint="scales train by rows")


def qscale_grad(dy: Tensor, x: Tensor, q: QTensor) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``y = x W^T`` for the scales and zero points of ``q`` (PEQA, arXiv 2305.14152), without storing
    ``dW``: ``ds[n, g] = sum_k dW[n, k] (code - zero)``, ``dz[n, g] = -s sum_k dW[n, k]``, ``dW = dy^T x``.

    Args:
        dy: ``[..., N]``; x: ``[..., K]``, the same leading shape and dtype (``[E, ..., N]`` and ``[E, ..., K]`` for
            experts).
        q: groups must lie within rows: an int format, or a table format with K a multiple of the group size.

    Returns ``(ds, dz)``, ``[..., N, groups]`` in the accumulation dtype (fp32 for 16-bit floats); dz is None without
    zero points. For doubly quantized scales ds is the gradient of the scales they stand for.

    Raises ValueError or TypeError ``lowmem.qscale_grad: <argument>: expected ..., got ...``.
    """
    op = "qscale_grad"
    check_input(op, x, q)
    n, k = q.shape[-2:]
    if dy.shape != (*x.shape[:-1], n) or dy.dtype != x.dtype or dy.device != x.device:
        want = f"shape {(*x.shape[:-1], n)} in {x.dtype} on {x.device}"
        bad(op, "dy", want, f"shape {tuple(dy.shape)} in {dy.dtype} on {dy.device}")
    _rows_hold_groups(op, q)
    lead = (q.shape[0], -1) if q.dim() == 3 else (-1,)
    with torch.no_grad():
        ds, dz = torch.ops.lowmem.quant_scale_grad(
            dy.reshape(*lead, n), x.reshape(*lead, k), *q.tensors(), q.spec.code, n, k, 0
        )
    return ds, dz if q.zero is not None else None
