"""``QTensor``: a quantized weight as plain tensors and a spec."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._errors import bad
from .formats import QuantSpec, row_bytes

TENSORS = ("packed", "scale", "zero", "scale_code", "scale_absmax", "scale_offset")
"""The tensor fields, in the order in which operators take them."""


@dataclass(frozen=True, eq=False)
class QTensor:
    """A quantized weight ``[..., N, K]``: no tensor subclass, nothing computed, nothing hidden.

    Args:
        packed: uint8, the codes (``docs/quant.md``). ``[..., N, row_bytes]``, or flat ``[bytes]`` for a table format
            whose rows end inside a byte (or, at 3 bits, inside a granule).
        scale: ``[..., N, groups]`` in ``spec.scales_in``; flat ``[groups]`` for a table format whose groups cross rows;
            doubly quantized: uint8 codes, in the same shape at 8 bits and packed flat below.
        zero: ``[..., N, groups]``, uint8 or ``spec.scales_in``; None without zero points.
        scale_code: fp32 ``[2**scale_bits]``, the values of the scales' codes.
        scale_absmax: ``[ceil(scales / scale_group)]`` in ``spec.scales_in``.
        scale_offset: ``[1]``, or one for each block as ``scale_absmax``.
        spec: the format.
        shape: of the dense weight, two dimensions or more.
        dtype: floating dtype that :func:`lowmem.quant.dequantize` returns.

    Nothing is checked at construction, which runs in every forward; :meth:`check` does it, and loaders call it.
    """

    packed: Tensor
    scale: Tensor
    spec: QuantSpec
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    zero: Tensor | None = None
    scale_code: Tensor | None = None
    scale_absmax: Tensor | None = None
    scale_offset: Tensor | None = None

    @property
    def rows(self) -> int:
        """Rows of the weight flattened to two dimensions: N, or experts * N."""
        return math.prod(self.shape[:-1])

    @property
    def cols(self) -> int:
        """K."""
        return self.shape[-1]

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.packed.device

    def dim(self) -> int:
        """Dimensions of the dense weight."""
        return len(self.shape)

    def numel(self) -> int:
        """Elements of the dense weight."""
        return math.prod(self.shape)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """The operators' arguments ``packed, scale, zero, scale_code, scale_absmax, scale_offset``."""
        return self.packed, self.scale, self.zero, self.scale_code, self.scale_absmax, self.scale_offset

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(t.nbytes for t in self.tensors() if t is not None)

    @property
    def bits_per_weight(self) -> float:
        """``8 * nbytes / numel``."""
        return 8 * self.nbytes / max(self.numel(), 1)

    def map(self, change: Any) -> QTensor:
        """The same weight with ``change`` applied to every tensor."""
        return replace(self, **{n: change(t) for n in TENSORS if (t := getattr(self, n)) is not None})

    def to(self, device: torch.device | str) -> QTensor:
        """The same weight on ``device``."""
        return self.map(lambda t: t.to(device))

    def check(self, op: str) -> QTensor:
        """Raise ValueError or TypeError ``lowmem.<op>: <field>: expected ..., got ...`` unless every tensor has the
        dtype, size and device that shape and spec ask for; returns self. Kernels rely on it for their bounds."""
        if len(self.shape) < 2 or any(s < 0 for s in self.shape):
            bad(op, "shape", "two dimensions or more", self.shape)
        if not self.dtype.is_floating_point:
            bad(op, "dtype", "a floating dtype", self.dtype, kind=TypeError)
        check_parts(op, self.spec, self.rows, self.cols, *self.tensors())
        return self


def packed_shape(spec: QuantSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of ``packed`` of a weight of ``shape``."""
    rows, k = math.prod(shape[:-1]), shape[-1]
    whole = k % 32 == 0 if spec.bits == 3 else k * spec.bits % 8 == 0
    if spec.is_table and not whole:
        return (row_bytes(spec.bits, rows * k),)
    return (*shape[:-1], row_bytes(spec.bits, k))


def scale_shape(spec: QuantSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales (before double quantization) of a weight of ``shape``."""
    k = shape[-1]
    if spec.is_table:
        whole = k % spec.group_size == 0
        return (*shape[:-1], k // spec.group_size) if whole else (spec.scale_count(math.prod(shape[:-1]), k),)
    return (*shape[:-1], spec.row_groups(k))


def check_parts(
    op: str,
    spec: QuantSpec,
    rows: int,
    k: int,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    scale_code: Tensor | None,
    scale_absmax: Tensor | None,
    scale_offset: Tensor | None,
) -> None:
    """The checks of :meth:`QTensor.check` on the operators' arguments."""
    if not spec.is_table and spec.group_size > 0 and k % spec.group_size:
        bad(op, "group_size", f"a divisor of K = {k}, or -1 (a scale per row)", spec.group_size)
    scales, second = spec.scale_count(rows, k), 0
    floats = spec.scales_in
    wanted: list[tuple[str, Tensor | None, tuple[torch.dtype, ...], tuple[int, ...]]] = [
        ("packed", packed, (torch.uint8,), (spec.packed_bytes(rows, k),))
    ]
    if spec.double_quant:
        second = -(-scales // spec.scale_group)
        wanted.append(("scale", scale, (torch.uint8,), (row_bytes(spec.scale_bits, scales),)))
        wanted.append(("scale_code", scale_code, (torch.float32,), (2**spec.scale_bits,)))
        wanted.append(("scale_absmax", scale_absmax, (floats,), (second,)))
        wanted.append(("scale_offset", scale_offset, (floats,), (1, second)))
    else:
        wanted.append(("scale", scale, (floats,), (scales,)))
    if spec.zero_point:
        wanted.append(("zero", zero, (torch.uint8, floats), (scales,)))
    elif zero is not None:
        bad(op, "zero", "None (the spec has zero_point=False)", f"{zero.numel()} elements")
    for name, tensor, dtypes, sizes in wanted:
        if tensor is None:
            bad(op, name, f"a tensor of {' or '.join(map(str, sizes))} elements", None)
        if tensor.dtype not in dtypes:
            bad(op, name, " or ".join(map(str, dtypes)), tensor.dtype, kind=TypeError)
        if tensor.numel() not in sizes or not tensor.is_contiguous():
            got = f"{tensor.numel()} elements of shape {tuple(tensor.shape)}, strides {tensor.stride()}"
            bad(op, name, f"{' or '.join(map(str, sizes))} contiguous elements", got)
        if tensor.device != packed.device:
            bad(op, name, f"device {packed.device} (packed's)", tensor.device)
