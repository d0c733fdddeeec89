"""The `activation` operators for `smoke.py`: norms, gates, FP8 groups and their gradients, as `test_activation.py`."""

from __future__ import annotations

from functools import partial

import torch
from smoke import Smoke
from test_activation import check_all, problem


def smokes(device: str) -> list[Smoke]:
    """One odd and one even shape, three dtypes."""
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for m, k in ((7, 100), (33, 256)):
            run = partial(check_all, *problem(m, k, dtype, device))
            found.append(Smoke(f"all of it {str(dtype)[6:]} M{m} K{k}", run, run))
    return found
