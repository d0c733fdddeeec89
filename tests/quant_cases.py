"""Cases of the quant family: specs, weights in every format, and the checks that every backend goes through."""

from __future__ import annotations

from dataclasses import replace

import torch

from lowmem.quant import QTensor, QuantSpec, quantize
from lowmem.quant.formats import FORMATS

TABLES = ("nf4", "fp4", "nf3", "nf2")
INTS = ("int8", "int4", "int3", "int2")

# every format, with every kind of scale and zero somewhere
SPECS = {
    **{f: QuantSpec(f) for f in TABLES},
    **{f"{f}-g16-nested": QuantSpec(f, 16, double_quant=True) for f in TABLES},
    **{f"{f}-g32": QuantSpec(f, 32) for f in INTS},
    **{f"{f}-row": QuantSpec(f, -1) for f in INTS},
    **{f"{f}-g32-zero": QuantSpec(f, 32, zero_point=True) for f in INTS},
    "int4-g16-fp16": QuantSpec("int4", 16, zero_point=True, scale_dtype=torch.float16),
    "int3-g32-nested": QuantSpec("int3", 32, double_quant=True, scale_group=16),
    "nf3-scales4": QuantSpec("nf3", 32, double_quant=True, scale_bits=4, scale_group=16),
    "nf2-scales3-bf16": QuantSpec(
        "nf2", 64, double_quant=True, scale_bits=3, scale_group=32, scale_dtype=torch.bfloat16
    ),
    "int2-scales2": QuantSpec("int2", 16, double_quant=True, scale_bits=2, scale_group=64, zero_point=True),
}


def weight(*shape: int, draw: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Weights of about order ``1 / sqrt(K)``, each row with its own spread and mean."""
    g = torch.Generator().manual_seed(draw + 1)
    w = torch.randn(*shape, generator=g) * shape[-1] ** -0.5
    spread = torch.rand(*shape[:-1], 1, generator=g) + 0.5
    return (w * spread + 0.1 * spread * shape[-1] ** -0.5).to(dtype)


def packed(spec: QuantSpec, *shape: int, device: str = "cpu", float_zero: bool = False, draw: int = 0) -> QTensor:
    """A quantized weight of ``shape``; with ``float_zero`` its zeros are floats between codes."""
    q = quantize(weight(*shape, draw=draw), spec)
    if float_zero and q.zero is not None:
        q = replace(q, zero=(q.zero.float() + 0.25).to(spec.scales_in))
    return q.to(device)


def fits(spec: QuantSpec, k: int) -> bool:
    """Whether a weight with ``k`` columns can be stored in ``spec``."""
    return spec.is_table or spec.group_size < 0 or k % spec.group_size == 0


def value_by_hand(q: QTensor, row: int, col: int) -> float:
    """``W[row, col]`` in Python's integers and floats, from the bytes and docs/quant.md."""
    spec, k = q.spec, q.cols
    data = bytes(q.packed.reshape(-1).tolist())
    tables = {
        "nf2": [-1.0, 0.0, 0.33791524171829224, 1.0],
        "nf3": [-1.0, -0.4786292016506195, -0.217141792178154, 0.0, 0.16093020141124725, 0.33791524171829224]
        + [0.5626170039176941, 1.0],
        "nf4": [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
        + [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
        + [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
        "fp4": [0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4],
    }
    tables["fp4"] += [-v for v in tables["fp4"]]

    def bits_of(run: bytes, bits: int, i: int) -> int:
        if bits == 3:
            words = [int.from_bytes(run[12 * (i // 32) + 4 * p :][:4], "little") for p in range(3)]
            return sum((words[p] >> (i % 32) & 1) << p for p in range(3))
        whole = int.from_bytes(run, "big") >> (8 * len(run) - bits * (i + 1))
        return whole & ((1 << bits) - 1)

    flat = row * k + col
    if spec.is_table:
        code, group = bits_of(data, spec.bits, flat), flat // spec.group_size
    else:
        size = len(data) // q.rows
        code = bits_of(data[row * size : (row + 1) * size], spec.bits, col)
        group = row if spec.group_size < 0 else row * (k // spec.group_size) + col // spec.group_size
    if spec.double_quant:
        u = bits_of(bytes(q.scale.reshape(-1).tolist()), spec.scale_bits, group)
        block = group // spec.scale_group
        offset = q.scale_offset[block if q.scale_offset.numel() > 1 else 0]
        s = float(q.scale_code[u]) * float(q.scale_absmax[block]) + float(offset)
    else:
        s = float(q.scale.reshape(-1)[group])
    if spec.is_table:
        return tables[spec.format][code] * s
    z = 2 ** (spec.bits - 1) if q.zero is None else float(q.zero.reshape(-1)[group])
    return (code - z) * s


assert set(TABLES + INTS) == set(FORMATS)
