"""Every operator once, small and odd: what `bench/gpu_run.py` runs first on a device, and under compute-sanitizer.

A family is a file ``tests/smoke_<family>.py`` with ``smokes(device)``, a list of :class:`Smoke` in the order in which
they should be tried.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FAMILIES = sorted(p.stem.removeprefix("smoke_") for p in Path(__file__).parent.glob("smoke_*.py"))


@dataclass(frozen=True)
class Smoke:
    """``check()`` raises where the device's result is wrong. ``run()``, where given, only calls the kernels: a memory
    checker slows every access down, so it gets no references to compute and small sizes alone."""

    name: str
    check: Callable[[], object]
    run: Callable[[], object] | None = None


def smokes(device: str) -> list[Smoke]:
    """All families' cases for ``device``, each name with its family in front."""
    found = []
    for family in FAMILIES:
        cases = importlib.import_module(f"smoke_{family}").smokes(device)
        found += [Smoke(f"{family}: {case.name}", case.check, case.run) for case in cases]
    return found
