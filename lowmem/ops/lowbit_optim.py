"""The ``lowbit_optim`` family: AdamW whose moments are 8-bit codes in groups, and the codecs themselves.

One step on a tensor with gradient g (times ``grad_scale``; negative for ``maximize``), all of it fp32, t = ``step``::

    m <- beta1 m + (1 - beta1) g
    v <- beta2 v + (1 - beta2) g^2
    p <- p - lr (weight_decay p + (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps))

m and v are decoded before and encoded after (``ops/codecs.py`` holds the formats); p is written from the m and v that
have not been rounded yet. Weights are fp32, or bf16 in one of two forms:

* bf16 and a 16-bit remainder: ``master = (p << 16) + remainder`` as integers, p the master rounded to bf16. Exact fp32
  training in 2 + 2 bytes.
* bf16 alone: the new weight is rounded stochastically. Element ``e`` (its index plus the tensor's ``offset``) takes the
  16-bit half ``e % 2`` of word ``(e % 8) // 2`` of the Philox4x32-10 block at counter ``(e // 8, e // 2^35, t, 0)``
  under the tensor's seed; it is added to the fp32 bits, of which the upper half is kept. A weight that this would
  make infinite is truncated.

Every operation is one IEEE operation in a fixed order, so each backend gives the reference's bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._dispatch import CUDA, define
from .._errors import bad
from . import codecs
from .codecs import CODECS, GROUP_SIZES, WITH_SPAN, decode_reference, encode_reference, fma, groups_of
from .philox import philox4x32

# ------------------------------------------------------------------------------------------------------------- codecs

ENCODE = "(Tensor x, str codec, int group_size, bool signed) -> (Tensor, Tensor, Tensor)"
DECODE = "(Tensor codes, Tensor scale, Tensor span, int numel, str codec, int group_size, bool signed) -> Tensor"


def encode_fake(x: Tensor, codec: str, group_size: int, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of ``lowmem::group_encode``."""
    n = x.numel()
    groups = groups_of(n, group_size)
    shape = ((n + 1) // 2,) if codec == "int4" else x.shape
    codes = x.new_empty(shape, dtype=torch.uint8)
    return codes, x.new_empty(groups), x.new_empty(groups if codec in WITH_SPAN else 0, dtype=torch.uint8)


def decode_fake(
    codes: Tensor, scale: Tensor, span: Tensor, numel: int, codec: str, group_size: int, signed: bool
) -> Tensor:
    """Shape of ``lowmem::group_decode``."""
    return scale.new_empty(numel)


define("group_encode", ENCODE, fake=encode_fake, reference=encode_reference, cpp=("cpu",))
define("group_decode", DECODE, fake=decode_fake, reference=decode_reference, cpp=("cpu",))


def check_codec(op: str, argument: str, codec: str) -> None:
    """Raises unless ``codec`` is one of :data:`codecs.CODECS`."""
    if codec not in CODECS:
        bad(op, argument, f"one of {', '.join(CODECS)}", repr(codec))


def check_group_size(op: str, group_size: int) -> None:
    """Raises unless ``group_size`` is one that every backend serves."""
    if isinstance(group_size, bool) or group_size not in GROUP_SIZES:
        bad(op, "group_size", f"one of {', '.join(map(str, GROUP_SIZES))}", repr(group_size))


def group_encode(x: Tensor, codec: str, *, group_size: int = 128, signed: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` in 8-bit (``int4``: 4-bit) codes: ``(codes, scale, span)``.

    ``x``: any shape, fp32, bf16 or fp16; taken flat, in groups of ``group_size`` neighbours, so the groups of a matrix
    lie within rows where its row length is a multiple of ``group_size``. ``codes``: uint8 in x's shape (``int4``: flat,
    ``ceil(n / 2)`` bytes); ``scale``: fp32 ``[ceil(n / group_size)]``; ``span``: uint8 of as many for ``e4m3+exp``,
    ``de8+exp`` and ``log8``, else empty. Bytes: ``n + 4 G`` or ``n + 5 G`` for ``G`` groups (``int4``: ``n / 2 + 4
    G``). ``signed=False`` for values >= 0 (a sign is dropped). Formats: :mod:`lowmem.ops.codecs`.

    Raises ValueError or TypeError (``lowmem.group_encode: <argument>: expected ..., got ...``).
    """
    op = "group_encode"
    check_codec(op, "codec", codec)
    check_group_size(op, group_size)
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        bad(op, "x", "float32, bfloat16 or float16", x.dtype, kind=TypeError)
    with torch.no_grad():
        return torch.ops.lowmem.group_encode(x.detach().float().contiguous(), codec, group_size, signed)


def group_decode(
    codes: Tensor,
    scale: Tensor,
    span: Tensor,
    codec: str,
    *,
    group_size: int = 128,
    signed: bool = True,
    numel: int | None = None,
) -> Tensor:
    """The fp32 values of :func:`group_encode`'s result, in the codes' shape.

    ``int4`` codes do not know their shape: the result is flat and has ``numel`` elements (default: all that the codes
    hold). Raises ValueError where the sizes do not belong together.
    """
    op = "group_decode"
    check_codec(op, "codec", codec)
    check_group_size(op, group_size)
    for name, t, dtype in (("codes", codes, torch.uint8), ("scale", scale, torch.float32), ("span", span, torch.uint8)):
        if t.dtype != dtype:
            bad(op, name, str(dtype), t.dtype, kind=TypeError)
    packed = codec == "int4"
    n = numel if numel is not None else (2 if packed else 1) * codes.numel()
    if codes.numel() != ((n + 1) // 2 if packed else n):
        bad(op, "numel", f"a number that {codes.numel()} bytes of codes hold", n)
    groups = groups_of(n, group_size)
    for name, t, count in (("scale", scale, groups), ("span", span, groups if codec in WITH_SPAN else 0)):
        if t.numel() != count:
            bad(op, name, f"{count} elements", t.numel())
    with torch.no_grad():
        flat = torch.ops.lowmem.group_decode(
            codes.contiguous(), scale.contiguous(), span.contiguous(), n, codec, group_size, signed
        )
    return flat if packed else flat.view(codes.shape)


# --------------------------------------------------------------------------------------------------------------- norm

NORM = "(Tensor[] grads) -> Tensor"


def grad_norm_fake(grads: list[Tensor]) -> Tensor:
    """Shape of ``lowmem::lowbit_grad_norm``."""
    return grads[0].new_empty(2, dtype=torch.float64)


def grad_norm_reference(grads: list[Tensor]) -> Tensor:
    """``[sum of squares, 1 where an element is infinite or NaN]`` over all gradients: float64 ``[2]``."""
    total = sum(g.double().square().sum() for g in grads)
    finite = torch.stack([g.isfinite().all() for g in grads]).all()
    return torch.stack([torch.as_tensor(total), (~finite).double()])


define("lowbit_grad_norm", NORM, fake=grad_norm_fake, reference=grad_norm_reference, cpp=("cpu",))

# --------------------------------------------------------------------------------------------------------------- step

ADAMW = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] remainders, "
    "Tensor(c!)[] m_codes, Tensor(d!)[] m_scales, Tensor(e!)[] m_spans, "
    "Tensor(f!)[] v_codes, Tensor(g!)[] v_scales, Tensor(h!)[] v_spans, Tensor[] steps, Tensor[] seeds, int[] offsets, "
    "Tensor lr, Tensor? grad_scale, Tensor? found_inf, float beta1, float beta2, float eps, float weight_decay, "
    "str m, str v, int group_size, bool maximize) -> ()"
)


def adamw_fake(*args: object) -> None:
    """``lowmem::lowbit_adamw_`` returns nothing."""


def _power(base: float, exponent: Tensor) -> Tensor:
    """``base ** exponent`` for whole numbers below 2**24, by repeated squaring in float64, as the kernels do."""
    result, e = torch.ones_like(exponent, dtype=torch.float64), exponent.long()
    for _ in range(24):
        result = torch.where(e & 1 == 1, result * base, result)
        base, e = base * base, e >> 1
    return result


def unbias(beta1: float, beta2: float, step: Tensor) -> tuple[Tensor, Tensor]:
    """``1 / (1 - beta1^t)`` and ``1 / sqrt(1 - beta2^t)``, fp32."""
    return (1.0 / (1.0 - _power(beta1, step))).float(), (1.0 / (1.0 - _power(beta2, step)).sqrt()).float()


def join_reference(p: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 master of bf16 weights and their int16 remainders."""
    return ((p.view(torch.int16).int() << 16) + remainder.int()).view(torch.float32)


def split_reference(master: Tensor) -> tuple[Tensor, Tensor]:
    """``(p, remainder)`` of an fp32 master: bf16, rounded to nearest (ties away from zero), and int16."""
    bits = master.view(torch.int32)
    p = (bits + 0x8000) >> 16
    return p.to(torch.int16).view(torch.bfloat16), (bits - (p << 16)).to(torch.int16)


def dither_reference(master: Tensor, seed: Tensor, offset: int, step: Tensor) -> Tensor:
    """``master`` (fp32, flat) rounded stochastically to bf16."""
    lead = offset % 8
    block = torch.arange(offset // 8, (offset + master.numel() + 7) // 8, device=master.device)
    words = torch.stack(philox4x32(seed.reshape(1), block & 0xFFFFFFFF, block >> 32, step.long().reshape(1), 0), -1)
    halves = torch.stack((words & 0xFFFF, words >> 16), -1).view(-1)[lead : lead + master.numel()]
    bits = master.view(torch.int32)
    up = bits + halves.int()
    up = torch.where(up & 0x7F800000 == 0x7F800000, bits, up)
    return (up >> 16).to(torch.int16).view(torch.bfloat16)


def adamw_reference(
    params: list[Tensor],
    grads: list[Tensor],
    remainders: list[Tensor],
    m_codes: list[Tensor],
    m_scales: list[Tensor],
    m_spans: list[Tensor],
    v_codes: list[Tensor],
    v_scales: list[Tensor],
    v_spans: list[Tensor],
    steps: list[Tensor],
    seeds: list[Tensor],
    offsets: list[int],
    lr: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    m: str,
    v: str,
    group_size: int,
    maximize: bool,
) -> None:
    """One step on every tensor, in place, in plain torch: what each backend reproduces bit for bit.

    ``params``: fp32 or bf16; ``grads``: fp32 or bf16 of equal numel; ``remainders``: int16 like a bf16 parameter that
    keeps one, empty tensors (or an empty list) otherwise. ``m_codes`` and ``v_codes``: uint8 codes with their scales
    and spans as of ``group_encode``, or fp32 moments, whose scales and spans are not read. ``steps``: fp32, counted
    already. ``found_inf``: where it is not 0 nothing is written.
    """
    skip = found_inf.reshape(()) != 0 if found_inf is not None else None

    def put(to: Tensor, value: Tensor) -> None:
        value = value.view(to.shape)
        to.copy_(value if skip is None else torch.where(skip, to, value))

    def moment(codes: Tensor, scale: Tensor, span: Tensor, n: int, codec: str, signed: bool) -> Tensor:
        if codes.dtype == torch.float32:
            return codes.reshape(-1)
        return decode_reference(codes, scale, span, n, codec, group_size, signed)

    def keep(codes: Tensor, scale: Tensor, span: Tensor, value: Tensor, codec: str, signed: bool) -> None:
        if codes.dtype == torch.float32:
            put(codes, value)
            return
        for to, new in zip((codes, scale, span), encode_reference(value, codec, group_size, signed), strict=True):
            put(to, new)

    def number(x: float) -> Tensor:
        return torch.tensor(x, dtype=torch.float32, device=params[0].device)

    for i, p in enumerate(params):
        n = p.numel()
        rest = remainders[i] if remainders and remainders[i].numel() > 0 else None
        old = p.reshape(-1)
        old = join_reference(old, rest.reshape(-1)) if rest is not None else old.float()
        factor = number(-1.0 if maximize else 1.0)
        if grad_scale is not None:
            factor = factor * grad_scale.reshape(())
        g = grads[i].reshape(-1).float() * factor
        unbias1, unbias2 = unbias(beta1, beta2, steps[i].reshape(()))
        first = moment(m_codes[i], m_scales[i], m_spans[i], n, m, True)
        second = moment(v_codes[i], v_scales[i], v_spans[i], n, v, False)
        first = fma(number(beta1), first, number(1.0 - beta1) * g)
        second = fma(number(beta2), second, number(1.0 - beta2) * g * g)
        root = second.double().sqrt().float()  # one rounding, where torch's fp32 root may be a unit off
        ratio = (first * unbias1) / fma(root, unbias2, number(eps))
        new = fma(-lr.reshape(()), fma(number(weight_decay), old, ratio), old)
        keep(m_codes[i], m_scales[i], m_spans[i], first, m, True)
        keep(v_codes[i], v_scales[i], v_spans[i], second, v, False)
        if p.dtype == torch.float32:
            put(p, new)
        elif rest is not None:
            high, low = split_reference(new)
            put(p, high)
            put(rest, low)
        else:
            put(p, dither_reference(new, seeds[i], offsets[i], steps[i]))


def _adamw_cuda(*args: Any) -> None:
    # CUDA C++ where it was built; there is no Triton kernel, so else plain torch
    (torch.ops.lowmem_c.lowbit_adamw_ if CUDA.loaded else adamw_reference)(*args)


define("lowbit_adamw_", ADAMW, fake=adamw_fake, reference=adamw_reference, cpp=("cpu", "cuda"), cuda=_adamw_cuda)

__all__ = ["codecs", "group_decode", "group_encode"]
