"""Number formats of quantized weights: :class:`QuantSpec`, the code tables, and how codes are packed into bytes.

``docs/quant.md`` gives the layout byte by byte; ``csrc/common/nf.h`` and ``csrc/common/intk.h`` are the same in C++.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .._errors import bad

FORMATS = ("nf4", "fp4", "nf3", "nf2", "int8", "int4", "int3", "int2")
"""Every format; a format's place here is its number in :attr:`QuantSpec.code`."""

BITS = {"nf4": 4, "fp4": 4, "nf3": 3, "nf2": 2, "int8": 8, "int4": 4, "int3": 3, "int2": 2}

PER_CHANNEL = -1
"""``group_size`` of one scale for each output row (int formats)."""

GROUP_SIZES = tuple(2**i for i in range(4, 13))
"""Elements that may share a scale, besides ``PER_CHANNEL``: powers of two, 16 to 4096."""

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

GRANULE = 32
"""Elements of one granule of a 3-bit row: three 32-bit words, word p holds bit p of each element."""

# NF4 and NF3/NF2 are quantiles of the normal distribution at offset 0.9677083 (QLoRA, arXiv 2305.14314, appendix E;
# LQ-LoRA, arXiv 2311.12023), rounded to fp32 as bitsandbytes' own table has them.
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_NF3 = (-1.0, -0.4786292016506195, -0.217141792178154, 0.0, _NF4[9], _NF4[11], _NF4[13], 1.0)
_NF2 = (-1.0, 0.0, _NF4[11], 1.0)
# one sign bit, then the magnitude's three bits in bitsandbytes' order, divided by the largest (12)
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_TABLES = {"nf4": _NF4, "nf3": _NF3, "nf2": _NF2}


@functools.lru_cache(maxsize=64)
def _table(format: str, device: torch.device) -> Tensor:  # noqa: A002 (the public argument's name)
    if format == "fp4":
        half = torch.tensor(_FP4_MAGNITUDES, dtype=torch.float32)
        return (torch.cat([half, -half]) / 12.0).to(device)
    return torch.tensor(_TABLES[format], dtype=torch.float32, device=device)


def code_table(format: str, device: torch.device | str = "cpu") -> Tensor:  # noqa: A002
    """fp32 ``[2**bits]``: the value of each code of a table format (nf4, nf3, nf2, fp4), within [-1, 1]."""
    if format not in ("nf4", "nf3", "nf2", "fp4"):
        bad("code_table", "format", "nf4, nf3, nf2 or fp4", repr(format))
    return _table(format, torch.device(device)).clone()


@functools.lru_cache(maxsize=8)
def _dynamic() -> Tensor:
    values = [0.0, 1.0]
    for exponent in range(7):  # 2**exponent fractions, the midpoints of an even division of [0.1, 1], in each decade
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        positive = 10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        values += positive.tolist() + (-positive).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def dynamic_map() -> Tensor:
    """fp32 ``[256]``, ascending: the signed dynamic 8-bit type (Dettmers, arXiv 1511.04561), the code of doubly
    quantized scales; equal to bitsandbytes' ``create_dynamic_map()``."""
    return _dynamic().clone()


@dataclass(frozen=True)
class QuantSpec:
    """How a weight is quantized.

    Args:
        format: ``"nf4" "nf3" "nf2" "fp4"`` (a table of values, scaled by the group's absolute maximum) or
            ``"int8" "int4" "int3" "int2"`` (``scale * (code - zero)``).
        group_size: elements that share a scale: a power of two from 16 to 4096. Table formats count them over the
            flattened weight, as bitsandbytes does, so any shape is served and the last group may be short; int
            formats along K, which the group size must divide. ``-1`` (int formats): one scale for each output row.
        double_quant: store the scales as codes too: ``scale[i] = scale_code[u[i]] * scale_absmax[i // scale_group] +
            scale_offset``. By default bitsandbytes' own: 8-bit dynamic codes in blocks of 256.
        zero_point: int formats: a zero for each group instead of the middle code ``2**(bits - 1)``.
        scale_dtype: of scales (or of ``scale_absmax`` and ``scale_offset``); None means fp32 for table formats (as
            bitsandbytes) and bf16 for int formats.
        scale_bits: of a doubly quantized scale's code: 8, 4, 3 or 2.
        scale_group: scales in a block of the second level: a power of two, 16 to 4096.

    Raises ValueError ``lowmem.QuantSpec: <argument>: expected ..., got ...``.
    """

    format: str
    group_size: int = 64
    double_quant: bool = False
    zero_point: bool = False
    scale_dtype: torch.dtype | None = None
    scale_bits: int = 8
    scale_group: int = 256

    def __post_init__(self) -> None:
        """Refuse what no kernel serves."""
        op = "QuantSpec"
        if self.format not in FORMATS:
            bad(op, "format", f"one of {', '.join(FORMATS)}", repr(self.format))
        if isinstance(self.group_size, bool) or self.group_size not in (*GROUP_SIZES, PER_CHANNEL):
            bad(op, "group_size", "a power of two from 16 to 4096, or -1 (a scale per row)", repr(self.group_size))
        if self.is_table and self.group_size == PER_CHANNEL:
            bad(op, "group_size", f"a power of two from 16 to 4096 for {self.format}", "-1")
        if self.is_table and self.zero_point:
            bad(op, "zero_point", f"False for {self.format} (int formats have zero points)", True)
        if self.scale_dtype is not None and self.scale_dtype not in SCALE_DTYPES:
            bad(op, "scale_dtype", "float32, bfloat16, float16 or None", self.scale_dtype)
        if self.scale_bits not in (2, 3, 4, 8):
            bad(op, "scale_bits", "2, 3, 4 or 8", repr(self.scale_bits))
        if isinstance(self.scale_group, bool) or self.scale_group not in GROUP_SIZES:
            bad(op, "scale_group", "a power of two from 16 to 4096", repr(self.scale_group))

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return BITS[self.format]

    @property
    def is_table(self) -> bool:
        """Whether codes index a table (nf4, nf3, nf2, fp4): flat groups, no zero points."""
        return not self.format.startswith("int")

    @property
    def scales_in(self) -> torch.dtype:
        """``scale_dtype`` with its default filled in."""
        return self.scale_dtype or (torch.float32 if self.is_table else torch.bfloat16)

    @property
    def code(self) -> int:
        """This spec as the one integer that operators take (``csrc/common/quant.h`` reads it): format in bits 0-3,
        log2(group_size) in 4-8 (31: per row), bits of a scale's code in 9-12 (0: scales are floats),
        log2(scale_group) in 13-17."""
        group = 31 if self.group_size == PER_CHANNEL else self.group_size.bit_length() - 1
        second = self.scale_bits | (self.scale_group.bit_length() - 1) << 4 if self.double_quant else 0
        return FORMATS.index(self.format) | group << 4 | second << 9

    @classmethod
    def from_code(cls, code: int) -> QuantSpec:
        """The spec of :attr:`code`, without what the tensors themselves tell (``zero_point``, ``scale_dtype``)."""
        group, bits = code >> 4 & 31, code >> 9 & 15
        return cls(
            FORMATS[code & 15],
            PER_CHANNEL if group == 31 else 1 << group,
            double_quant=bits > 0,
            scale_bits=bits or 8,
            scale_group=1 << (code >> 13 & 31) if bits else 256,
        )

    def row_groups(self, k: int) -> int:
        """Scales of one row of an int format."""
        return 1 if self.group_size == PER_CHANNEL else k // self.group_size

    def scale_count(self, rows: int, k: int) -> int:
        """Scales of a weight ``[rows, k]``."""
        return -(-rows * k // self.group_size) if self.is_table else rows * self.row_groups(k)

    def packed_bytes(self, rows: int, k: int) -> int:
        """Bytes of the codes of a weight ``[rows, k]``: table formats pack the flattened weight, int formats each
        row."""
        return row_bytes(self.bits, rows * k) if self.is_table else rows * row_bytes(self.bits, k)

    def storage_bytes(self, rows: int, k: int) -> int:
        """Bytes that a weight ``[rows, k]`` takes, all tensors together: codes; ``scale_dtype`` (or ``scale_bits``)
        for each scale; one byte for each integer zero; for doubly quantized scales one ``scale_dtype`` for each
        ``scale_group`` of them, one offset and the table (``4 * 2**scale_bits`` bytes)."""
        scales, item = self.scale_count(rows, k), self.scales_in.itemsize
        total = self.packed_bytes(rows, k) + (scales if self.zero_point else 0)
        if not self.double_quant:
            return total + scales * item
        second = -(-scales // self.scale_group) + 1
        return total + row_bytes(self.scale_bits, scales) + second * item + 4 * 2**self.scale_bits

    def bits_per_weight(self, rows: int, k: int) -> float:
        """``8 * storage_bytes / (rows * k)``: 4.127 for doubly quantized nf4 in groups of 64."""
        return 8 * self.storage_bytes(rows, k) / (rows * k)


def as_spec(op: str, value: str | QuantSpec) -> QuantSpec:
    """``value`` as a spec: a format's name stands for ``QuantSpec(name)``."""
    if isinstance(value, QuantSpec):
        return value
    if not isinstance(value, str):
        bad(op, "spec", "a format's name or a QuantSpec", type(value).__name__, kind=TypeError)
    return QuantSpec(value)


def row_bytes(bits: int, count: int) -> int:
    """Bytes of ``count`` packed codes: 3-bit codes in granules of 32 elements, the others rounded up to a byte."""
    return 12 * -(-count // GRANULE) if bits == 3 else -(-count * bits // 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """``[..., n]`` codes below ``2**bits`` to ``[..., row_bytes(bits, n)]`` uint8; spare bits are 0.

    8, 4 and 2 bits: the first element of a byte in its highest bits. 3 bits: granules of 32 elements, twelve bytes;
    bit ``i % 8`` of byte ``4 * p + i // 8`` is bit p of element i."""
    codes = codes.to(torch.uint8)
    n = codes.shape[-1]
    if bits == 8:
        return codes.contiguous()
    per = GRANULE if bits == 3 else 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -n % per)).unflatten(-1, (-1, per))
    if bits == 3:
        planes = torch.stack([codes >> p & 1 for p in range(3)], -2).unflatten(-1, (4, 8))
        weights = 1 << torch.arange(8, device=codes.device)
        return (planes * weights).sum(-1).to(torch.uint8).flatten(-3)
    shifts = torch.arange(8 - bits, -1, -bits, device=codes.device, dtype=torch.uint8)
    return (codes << shifts).sum(-1).to(torch.uint8)


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of :func:`pack_codes`: ``[..., row_bytes(bits, count)]`` to uint8 ``[..., count]``."""
    if bits == 8:
        return packed[..., :count]
    if bits == 3:
        planes = packed.unflatten(-1, (-1, 3, 4)).unsqueeze(-1)
        ones = planes >> torch.arange(8, device=packed.device, dtype=torch.uint8) & 1
        ones = ones.flatten(-2)
        return (ones[..., 0, :] | ones[..., 1, :] << 1 | ones[..., 2, :] << 2).flatten(-2)[..., :count]
    shifts = torch.arange(8 - bits, -1, -bits, device=packed.device, dtype=torch.uint8)
    return (packed.unsqueeze(-1) >> shifts & (1 << bits) - 1).flatten(-2)[..., :count]
