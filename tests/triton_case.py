"""What `test_compile_targets.py` compiles: :class:`Case`, and where a family's cases are.

A family is a file ``tests/triton_cases_<family>.py`` with ``every()``, the full matrix, and ``usual()``, what
`make test` compiles of it; both return lists of cases whose configurations are those that the launchers would use.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from triton.backends.compiler import GPUTarget

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Case:
    """One compilation, and what its machine code must be made of.

    ``types`` gives the types of arguments that are not what their names say (``*_ptr``: a pointer to ``dtype``; any
    other: i32). ``aligned``: sizes, strides and pointers are multiples of 16, as Triton's specialisation would find;
    ``indivisible`` names the integers that are not. ``products``: "none"; "any", on tensor cores where the dtype has
    16 bits; "gemm", by the instruction meant for the architecture alone. ``wide``: aligned loads are 16 bytes.
    """

    name: str
    arch: str
    kernel: Any
    dtype: str
    constants: dict[str, Any]
    warps: int
    stages: int
    aligned: bool = True
    types: dict[str, str] = field(default_factory=dict)
    indivisible: tuple[str, ...] = ()
    products: str = "any"
    wide: bool = True
    descriptors: bool = False
    family: str = ""

    @property
    def target(self) -> GPUTarget:
        return TARGETS[self.arch]

    @property
    def id(self) -> str:
        return f"{self.arch}-{self.name}"

    def signature(self) -> tuple[dict[str, str], dict[tuple[int], list[list[Any]]]]:
        """Types by argument name, and the divisibility by 16 of pointers and (where aligned) of integers."""
        types: dict[str, str] = {}
        divisible: dict[tuple[int], list[list[Any]]] = {}
        for i, name in enumerate(self.kernel.arg_names):
            if name in self.constants:
                types[name] = "constexpr"
                continue
            types[name] = self.types.get(name, f"*{self.dtype}" if name.endswith("_ptr") else "i32")
            number = types[name] in ("i32", "i64") and self.aligned and name not in self.indivisible
            if types[name].startswith("*") or number:
                divisible[(i,)] = [["tt.divisibility", 16]]
        return types, divisible

    def source(self) -> Any:
        """The ``ASTSource`` to hand to ``triton.compile``."""
        from triton.compiler import ASTSource

        types, divisible = self.signature()
        return ASTSource(self.kernel, types, constexprs=dict(self.constants), attrs=divisible)

    def options(self) -> dict[str, Any]:
        return {"num_warps": self.warps, "num_stages": self.stages}


FAMILIES = sorted(p.stem.removeprefix("triton_cases_") for p in Path(__file__).parent.glob("triton_cases_*.py"))


def cases(full: bool) -> list[Case]:
    """Every family's cases, each knowing its family."""
    found = []
    for family in FAMILIES:
        module = importlib.import_module(f"triton_cases_{family}")
        found += [replace(case, family=family) for case in (module.every() if full else module.usual())]
    return found
