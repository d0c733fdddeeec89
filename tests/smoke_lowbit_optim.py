"""The 8-bit AdamW step and the codecs for `smoke.py`: the reference's bits."""

from __future__ import annotations

from functools import partial

import torch
from smoke import Smoke
from test_lowbit_optim_ops import LISTS, check_pairs, copies, options, tensors

PAIRS = (("de8", "log8"), ("e4m3+exp", "e4m3+exp"), ("e4m3", "e5m2"), ("int8", "int4"))


def _step(m: str, v: str, device: str) -> None:
    args = copies(tensors(m, v))
    lists = [[t.to(device) for t in one] for one in args[:LISTS]]
    torch.ops.lowmem.lowbit_adamw_(*lists, args[LISTS], *options(m, v, device=device))
    torch.ops.lowmem.lowbit_grad_norm(lists[1])


def smokes(device: str) -> list[Smoke]:
    """Tensors of every kind in one call, four pairs of formats."""
    return [
        Smoke(f"lowbit_adamw_ {m} {v}", partial(check_pairs, [(m, v)], device), partial(_step, m, v, device))
        for m, v in PAIRS
    ]
