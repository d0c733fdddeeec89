"""What the readers of other packages' quantized weights share: checked access to a mapping of tensors, bit streams."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._errors import bad
from ..quant.formats import QuantSpec, pack_codes
from ..quant.qtensor import QTensor, packed_shape, scale_shape

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def take(
    op: str,
    tensors: Mapping[str, Tensor],
    key: str,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int | None, ...] | None = None,
) -> Tensor:
    """``tensors[key]`` with a dtype of ``dtypes`` and, None standing for any size, ``shape``."""
    value = tensors.get(key)
    if not isinstance(value, Tensor):
        have = ", ".join(sorted(map(str, tensors))[:8]) or "none"
        bad(op, "tensors", f"{key!r}", f"keys {have}" if value is None else type(value).__name__)
    if value.dtype not in dtypes:
        bad(op, key, " or ".join(map(str, dtypes)), value.dtype, kind=TypeError)
    fits = shape is None or (
        value.dim() == len(shape) and all(want in (None, got) for want, got in zip(shape, value.shape, strict=True))
    )
    if not fits:
        want = ["any" if s is None else s for s in shape or ()]
        bad(op, key, f"shape {want}", f"shape {list(value.shape)}")
    return value.detach()


def finite(op: str, key: str, value: Tensor) -> Tensor:
    """``value`` unless it holds NaN or infinity."""
    if not bool(torch.isfinite(value).all()):
        bad(op, key, "finite values", "NaN or infinity")
    return value


def whole(op: str, key: str, value: Any, least: int = 0, most: int = 2**40) -> int:
    """``value`` as an integer of a file's metadata, within ``[least, most]``."""
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else value.tolist()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        bad(op, key, f"an integer in [{least}, {most}]", repr(value)[:80])
    return value


def shape_of(op: str, key: str, value: Any) -> tuple[int, ...]:
    """A dense weight's shape from a file's metadata: two or three dimensions, at most 2**40 elements."""
    sizes = value.tolist() if isinstance(value, Tensor) else value
    if not isinstance(sizes, (list, tuple)) or len(sizes) not in (2, 3):
        bad(op, key, "the two or three sizes of a weight", repr(sizes)[:80])
    shape = tuple(whole(op, key, s, 1) for s in sizes)
    if math.prod(shape) > 2**40:
        bad(op, key, "at most 2**40 elements", list(shape))
    return shape


def text_of(op: str, key: str, value: Any, limit: int = 1 << 16) -> str:
    """Text that a file keeps as a uint8 tensor."""
    if isinstance(value, str):
        return value
    if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.dim() != 1 or value.numel() > limit:
        got = f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        bad(op, key, f"at most {limit} bytes of text, uint8", got)
    try:
        return bytes(value.tolist()).decode("utf-8")
    except UnicodeDecodeError as error:
        bad(op, key, "UTF-8 text", str(error))


def dtype_of(op: str, key: str, name: Any) -> torch.dtype:
    """A floating dtype from its name, with or without ``torch.``."""
    found = {str(d).removeprefix("torch."): d for d in FLOATS}.get(str(name).removeprefix("torch."))
    if found is None:
        bad(op, key, "float32, bfloat16 or float16", repr(name)[:80])
    return found


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 ``[rows, ceil(count * bits / 32)]``, each row a little-endian bit stream, to uint8 ``[rows, count]``."""
    data = words.contiguous().view(torch.uint8)
    if bits == 8:
        return data[:, :count]
    shifts = torch.arange(8, dtype=torch.uint8, device=words.device)
    out = torch.empty(len(words), count, dtype=torch.uint8, device=words.device)
    step = max(1, (1 << 22) // max(data.shape[1], 1))
    for start in range(0, len(words), step):
        ones = (data[start : start + step, :, None] >> shifts & 1).flatten(1)[:, : count * bits]
        fields = ones.unflatten(1, (count, bits))
        part = fields[..., 0].clone()
        for place in range(1, bits):
            part |= fields[..., place] << place
        out[start : start + step] = part
    return out


def int_tensor(
    op: str,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    *,
    bits: int,
    group: int,
    dtype: torch.dtype,
) -> QTensor:
    """A :class:`QTensor` of codes ``[..., N, K]``, scales and zeros ``[..., N, K / group]``; integer zeros that are all
    the middle code are left out."""
    shape = tuple(codes.shape)
    if f"int{bits}" not in ("int8", "int4", "int3", "int2"):
        bad(op, "bits", "8, 4, 3 or 2", bits)
    if zero is not None and zero.dtype == torch.uint8 and bool((zero == 2 ** (bits - 1)).all()):
        zero = None
    spec = QuantSpec(
        f"int{bits}",
        -1 if group == shape[-1] else group,
        zero_point=zero is not None,
        scale_dtype=scale.dtype,
    )
    q = QTensor(
        pack_codes(codes, bits).view(packed_shape(spec, shape)),
        finite(op, "scale", scale).contiguous().view(scale_shape(spec, shape)),
        spec,
        shape,
        dtype,
        None if zero is None else finite(op, "zero", zero).contiguous().view(scale_shape(spec, shape)),
    )
    return q.check(op)
