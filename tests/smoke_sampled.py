"""The `sampled` operators for `smoke.py`: the choice against the CPU's, products against the masked one."""

from __future__ import annotations

from functools import partial

import torch
from smoke import Smoke

from lowmem.ops import sampled
from lowmem.testing import assert_close_to_reference, reference_pair, terms_of

OPS = torch.ops.lowmem


def _choose(mode: str, device: str, check: bool) -> None:
    p = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 4
    seed = torch.tensor([77])
    rows, scale = OPS.sampled_choose(p.to(device), 300, mode, seed.to(device))
    if check:
        want = sampled.choose_reference(p, 300, mode, seed)
        assert torch.equal(rows.cpu(), want[0])
        torch.testing.assert_close(scale.cpu(), want[1], rtol=1e-6, atol=0)


def _dw(dtype: torch.dtype, device: str, check: bool) -> None:
    g = torch.Generator().manual_seed(0)
    dy, x = (torch.randn(200, k, generator=g).to(device, dtype) for k in (65, 100))
    rows, scale = sampled.choose_reference(torch.ones(200), 60, "systematic", torch.tensor([1]))
    rows, scale = rows.to(device), scale.to(device)
    args = (dy, OPS.sampled_gather(x, rows, None), rows, scale)
    got, entries = OPS.sampled_dw(*args), OPS.sampled_dw_coo(dy, x, rows % 65, rows % 100)
    if check:
        for value, fn, a in (
            (got, sampled.dw_reference, args),
            (entries, sampled.dw_coo_reference, (dy, x, rows % 65, rows % 100)),
        ):
            exact, low = reference_pair(fn, *a)
            assert_close_to_reference(value, exact, low, terms=terms_of(fn, *a), rounded=[terms_of(fn, *a)])


def smokes(device: str) -> list[Smoke]:
    """Every mode; dW and entries in two dtypes."""
    found = [
        Smoke(f"sampled_choose {mode}", partial(_choose, mode, device, True), partial(_choose, mode, device, False))
        for mode in sampled.MODES
    ]
    return found + [
        Smoke(f"sampled_dw {str(d)[6:]}", partial(_dw, d, device, True), partial(_dw, d, device, False))
        for d in (torch.float32, torch.bfloat16)
    ]
