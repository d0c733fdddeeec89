"""The `lora` operators and `lora_linear` with its gradients, for `smoke.py`."""

from __future__ import annotations

from functools import partial

from lora_cases import OPERATORS, Case, arguments, check_case, check_linear, served
from smoke import Smoke


def _run(name: str, case: Case) -> None:
    served(name)(*arguments(name, case))


def smokes(device: str) -> list[Smoke]:
    """Small odd cases first, then one of real size."""
    odd = Case(m=33, k=100, n=65, r=7, device=device)
    cases = [odd.but(precision=precision) for precision in ("fp32", "bf16", "bf16+fp32", "fp16", "fp64")]
    cases += [
        odd.but(precision="bf16", **change) for change in ({"p": 0.0}, {"bits": False}, {"layout": "padded"}, {"r": 64})
    ]
    cases.append(Case(m=130, k=264, n=136, r=16, precision="bf16+fp32", device=device))
    size = {"m": 2048, "k": 4096, "n": 4096} if device == "cuda" else {"m": 64, "k": 256, "n": 192}
    cases += [Case(**size, r=16, precision=p, device=device) for p in ("bf16", "bf16+fp32")]
    found = []
    for case in cases:
        label = f"{case.precision} M{case.m} K{case.k} N{case.n} r{case.r} p{case.p:g} {case.layout}"
        label += " bits" if case.bits else " seed"
        for name in OPERATORS:
            run = partial(_run, name, case) if case.m < 2048 and case.precision != "fp64" else None
            found.append(Smoke(f"{name} {label}", partial(check_case, name, case), run))
        found.append(Smoke(f"lora_linear {label}", partial(check_linear, case)))
    return found
