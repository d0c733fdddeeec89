"""The `lowrank` operators for `smoke.py`: projection, Adam in the subspace, the updates of W, on both sides."""

from __future__ import annotations

from functools import partial

import torch
from smoke import Smoke
from test_lowrank_ops import ADAM, OPS, adam_all, adam_case, check_adam, check_update, inputs, mutated

from lowmem.ops import lowrank
from lowmem.testing import to64


def smokes(device: str) -> list[Smoke]:
    """One odd shape, a side each."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for left in (True, False):
            w, g, p, thin, _, f = inputs(65, 100, 16, left, dtype, device)
            m, v, r = adam_case(dtype, thin.shape, device)
            product = [0.3 * lowrank._back(*to64(p, thin), left)]
            label = f"{str(dtype)[6:]} {'left' if left else 'right'}"
            adam = (m, v, r, *ADAM)
            both = (m, v, g, p, left, *ADAM)
            for name, args, reference in (
                ("lowrank_adam_", adam, lowrank.adam_reference),
                ("lowrank_project_adam_", both, lowrank.project_adam_reference),
            ):
                op = getattr(OPS, name)
                found.append(
                    Smoke(f"{name} {label}", partial(check_adam, op, reference, args), partial(adam_all, op, *args))
                )
            for name, args in (
                ("lowrank_update_", (p, thin, left, 0.3, 0.98, None)),
                ("lowrank_update_scaled_", (g, p, thin, f, left, 0.3, 0.98, None)),
            ):
                check = partial(check_update, name, w, *args, rounded=product)
                found.append(Smoke(f"{name} {label}", check, partial(mutated, getattr(OPS, name), w, *args)))
    return found
