"""bitsandbytes' NF4 and FP4 weights, as its ``Linear4bit`` writes them into a state dict: read and written bit for bit.

A weight called ``weight`` is the tensors ``weight`` (uint8 ``[ceil(n / 2), 1]``, the even element in the high nibble),
``weight.absmax`` (fp32, one for each block of the flattened weight, or uint8 codes), ``weight.quant_map`` (the table),
for doubly quantized ones ``weight.nested_absmax`` and ``weight.nested_quant_map``, and
``weight.quant_state.bitsandbytes__nf4`` (or ``fp4``): the bytes of a JSON object with the block sizes, the shape, the
dtype and ``nested_offset``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._errors import bad
from ..quant.formats import QuantSpec, code_table
from ..quant.qtensor import QTensor, packed_shape, scale_shape
from . import _foreign as foreign

STATE = "quant_state.bitsandbytes__"
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # what bitsandbytes' own kernels take
NESTED_BLOCK = 256


def to_bitsandbytes(q: QTensor, *, name: str = "weight") -> dict[str, Tensor]:
    """The tensors of ``q`` under bitsandbytes' keys, for ``safetensors`` or a state dict: no codes change, bytes are
    shared where the dtype agrees.

    Args:
        q: nf4 or fp4 in groups of 32 to 4096; doubly quantized only as bitsandbytes does (8 bits, blocks of 256).
        name: of the weight: keys are ``<name>``, ``<name>.absmax``, ...

    Raises ValueError ``lowmem.to_bitsandbytes: q: expected ..., got ...`` for any other format.
    """
    op = "to_bitsandbytes"
    spec = q.check(op).spec
    if spec.format not in ("nf4", "fp4"):
        bad(op, "q", "nf4 or fp4", spec.format)
    if spec.group_size not in BLOCKS:
        bad(op, "q", f"a group size of {BLOCKS[0]} to {BLOCKS[-1]}", spec.group_size)
    if spec.double_quant and (spec.scale_bits, spec.scale_group) != (8, NESTED_BLOCK):
        got = f"{spec.scale_bits} bits in blocks of {spec.scale_group}"
        bad(op, "q", f"doubly quantized scales of 8 bits in blocks of {NESTED_BLOCK}", got)
    state: dict[str, Any] = {
        "quant_type": spec.format,
        "blocksize": spec.group_size,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    scale = q.scale.detach().reshape(-1)
    tensors = {
        name: q.packed.detach().reshape(-1, 1),
        f"{name}.absmax": scale if spec.double_quant else scale.float(),
        f"{name}.quant_map": code_table(spec.format, q.device),
    }
    if spec.double_quant:
        assert q.scale_code is not None and q.scale_absmax is not None and q.scale_offset is not None
        if q.scale_offset.numel() != 1:
            bad(op, "q", "one offset for all scales", f"{q.scale_offset.numel()} offsets")
        state |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": float(q.scale_offset),
        }
        tensors[f"{name}.nested_absmax"] = q.scale_absmax.detach().float()
        tensors[f"{name}.nested_quant_map"] = q.scale_code.detach().clone()
    data = json.dumps(state).encode()
    tensors[f"{name}.{STATE}{spec.format}"] = torch.tensor(list(data), dtype=torch.uint8, device=q.device)
    return tensors


def from_bitsandbytes(tensors: Mapping[str, Tensor], *, name: str = "weight") -> QTensor:
    """The weight ``name`` among ``tensors`` (a state dict, or what safetensors loaded), sharing their bytes.

    The table must be bitsandbytes' own; a nested table may be any. Raises ValueError or TypeError
    ``lowmem.from_bitsandbytes: <key>: expected ..., got ...`` for missing, damaged or contradictory tensors: sizes are
    checked against each other before anything is read through them.
    """
    op = "from_bitsandbytes"
    found = [key for key in tensors if key.startswith(f"{name}.{STATE}")]
    if len(found) != 1:
        expected = f"{name}.{STATE}nf4 or {name}.{STATE}fp4"
        bad(op, "tensors", expected, " and ".join(found) or f"neither among {len(tensors)} keys")
    key = found[0]
    state = _parse(op, key, tensors[key])
    format = key.removeprefix(f"{name}.{STATE}")  # noqa: A001 (the format's own word)
    if format not in ("nf4", "fp4") or state.get("quant_type", format) != format:
        bad(op, key, "quant_type nf4 or fp4, as in the key", repr(state.get("quant_type"))[:80])
    shape = foreign.shape_of(op, key, state.get("shape"))
    block = _power(op, key, "blocksize", state.get("blocksize"))
    nested = f"{name}.nested_absmax" in tensors
    spec = QuantSpec(
        format,
        block,
        double_quant=nested,
        scale_dtype=torch.float32,
        scale_group=_power(op, key, "nested_blocksize", state.get("nested_blocksize")) if nested else NESTED_BLOCK,
    )
    numel = math.prod(shape)
    packed = tensors.get(name)
    if not isinstance(packed, Tensor):
        bad(op, "tensors", repr(name), "none")
    if packed.nbytes != (numel + 1) // 2:  # any dtype: bitsandbytes' quant_storage
        bad(op, name, f"{(numel + 1) // 2} bytes for shape {list(shape)}", f"{packed.nbytes} bytes")
    packed = packed.detach().contiguous().reshape(-1).view(torch.uint8)
    count = -(-numel // block)
    scale = foreign.take(
        op, tensors, f"{name}.absmax", (torch.uint8,) if nested else (torch.float32, torch.float16, torch.bfloat16)
    )
    if scale.numel() != count:
        bad(op, f"{name}.absmax", f"{count} elements for shape {list(shape)}", scale.numel())
    table = foreign.take(op, tensors, f"{name}.quant_map", (torch.float32,), (16,))
    if not torch.allclose(table.cpu(), code_table(format), atol=1e-6, rtol=0):
        bad(op, f"{name}.quant_map", f"bitsandbytes' table of {format}", "another one")
    extra: dict[str, Any] = {}
    if nested:
        blocks = -(-count // spec.scale_group)
        absmax = foreign.take(op, tensors, f"{name}.nested_absmax", (torch.float32,), (blocks,))
        code = foreign.take(op, tensors, f"{name}.nested_quant_map", (torch.float32,), (256,))
        offset = state.get("nested_offset")
        if isinstance(offset, bool) or not isinstance(offset, (int, float)) or not abs(offset) < 3.4e38:
            bad(op, key, "nested_offset: a finite number", repr(offset)[:80])
        extra = {
            "scale_absmax": foreign.finite(op, f"{name}.nested_absmax", absmax).contiguous(),
            "scale_code": foreign.finite(op, f"{name}.nested_quant_map", code).contiguous(),
            "scale_offset": torch.tensor([offset], dtype=torch.float32, device=packed.device),
        }
    else:
        scale = foreign.finite(op, f"{name}.absmax", scale).float()
    q = QTensor(
        packed.view(packed_shape(spec, shape)),
        scale.contiguous().view(scale_shape(spec, shape)),
        spec,
        shape,
        foreign.dtype_of(op, key, state.get("dtype")),
        **extra,
    )
    return q.check(op)


def _parse(op: str, key: str, value: Any) -> dict[str, Any]:
    text = foreign.text_of(op, key, value)
    try:
        state = json.loads(text)
    except (ValueError, RecursionError) as error:
        bad(op, key, "JSON", f"{text[:40]!r}: {type(error).__name__}")
    if not isinstance(state, dict):
        bad(op, key, "a JSON object", type(state).__name__)
    return state


def _power(op: str, key: str, what: str, value: Any) -> int:
    size = foreign.whole(op, f"{key}: {what}", value, 16, 4096)
    if size & (size - 1):
        bad(op, key, f"{what}: a power of two", size)
    return size
