"""The `quant` operators for `smoke.py`: every kind of format, one product forward and one backward."""

from __future__ import annotations

from functools import partial

import torch
from quant_cases import SPECS, packed
from smoke import Smoke
from test_quant_ops import check_matmul, inputs

from lowmem.ops import quant as ops


def _unpack(q: object, check: bool) -> None:
    n, k = q.shape
    out = torch.empty(n, k, device=q.packed.device)
    torch.ops.lowmem.quant_dequantize_(out, *q.tensors(), q.spec.code, k, 0, 0)
    if check:
        want = torch.empty_like(out)
        ops.dequantize_reference(want, *q.tensors(), q.spec.code, k, 0, 0)
        assert torch.equal(out, want), "not the reference's bits"


def _multiply(q: object, x: torch.Tensor, transposed: bool) -> None:
    torch.ops.lowmem.quant_matmul(x, *q.tensors(), q.spec.code, *q.shape, 0, None, transposed)


def smokes(device: str) -> list[Smoke]:
    """Every format small and with an odd number of rows; products of few and of many rows."""
    found = []
    for name, spec in SPECS.items():
        q = packed(spec, 33, 64, device=device)
        found.append(Smoke(f"quant_dequantize_ {name}", partial(_unpack, q, True), partial(_unpack, q, False)))
        for m in (2, 70):
            for transposed in (False, True):
                x, _ = inputs(q, m, torch.bfloat16, transposed, device)
                check = partial(check_matmul, "quant_matmul", q, x, None, transposed)
                label = f"quant_matmul {name} bf16 M{m}{' transposed' if transposed else ''}"
                found.append(Smoke(label, check, partial(_multiply, q, x, transposed)))
    return found
