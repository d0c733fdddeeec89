"""Every Triton kernel compiled ahead of time for each GPU architecture, and what came out held against its budget.

No GPU is needed. Per configuration: registers, local memory (spills), shared memory within the architecture's limit,
and the instructions meant (tensor cores, 16-byte loads, descriptor copies), read from the machine code.
`tests/budgets/<family>.triton.json` holds what each may take with the pinned Triton; `LOWMEM_UPDATE_BUDGETS=1` rewrites
the entries that are compiled (in one process: -n 0); `LOWMEM_COMPILE_FULL=1` compiles the whole matrix, not only what
`make test` does (a configuration beyond it that has no entry yet is held to the rules for all kernels).
The kernels are those of `triton_cases_<family>.py`; `triton_compile.py` compiles and measures.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import cubin
import pytest
from triton_compile import measured, usable

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = Path(__file__).parent / "budgets"
CACHE = ROOT / ".cache" / "compile_targets"
FULL = os.environ.get("LOWMEM_COMPILE_FULL") == "1"
UPDATE = os.environ.get("LOWMEM_UPDATE_BUDGETS") == "1"

pytestmark = pytest.mark.compile

PRODUCTS = {"sm_80": "HMMA", "sm_86": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
"""The instruction by which each architecture is meant to multiply."""


def _cases() -> list[Any]:
    if not usable():
        return []
    import triton_case

    return triton_case.cases(FULL)


CASES = _cases()


def _lora(name: str) -> Any:
    (case,) = [case for case in CASES if (case.family, case.id) == ("lora", name)]
    return case


# ----------------------------------------------------------------------------------------------------------- budgets


def budgets(family: str) -> dict[str, Any]:
    path = BUDGETS / f"{family}.triton.json"
    return json.loads(path.read_text()) if path.exists() else {"triton": "", "kernels": {}}


# -------------------------------------------------------------------------------------------------------------- rules


def problems(case: Any, got: dict[str, Any]) -> list[str]:
    """What is wrong with a compiled kernel whatever its budget says."""
    from lowmem.triton_kernels.device import SHARED_LIMIT

    found = []
    has = got["instructions"]
    if got["shared"] > SHARED_LIMIT[case.arch]:
        found.append(f"{got['shared']} bytes of shared memory: {case.arch} has {SHARED_LIMIT[case.arch]}")
    if got["local"]:
        found.append(f"{got['local']} bytes of local memory a thread: it spills")
    if case.products != "none" and case.dtype in ("bf16", "fp16"):
        # 16 or 32 rows do not fill a warpgroup's 64; tcgen05 wants 128
        small = not case.aligned or case.constants["BM"] < (128 if case.arch == "sm_100" else 64)
        allowed = {PRODUCTS[case.arch]} | ({"HMMA", "HGMMA"} if small or case.arch == "sm_100" else set())
        if not allowed & set(has):
            found.append(f"no {' or '.join(sorted(allowed))}: products do not run on the tensor cores meant")
        if case.products == "gemm" and PRODUCTS[case.arch] not in has:
            found.append(f"no {PRODUCTS[case.arch]}")
    if case.aligned and case.wide and not has.get("wide") and "UTMALDG" not in has:
        found.append("no 16-byte load")
    if case.descriptors:
        found += [f"no {name}" for name in ("UTMALDG", "UTMASTG") if name not in has]
    return found


def over_budget(got: dict[str, Any], budget: dict[str, Any]) -> list[str]:
    """Where a compiled kernel takes more than its budget, or lost instructions that it had."""
    found = [
        f"{what}: {got[what]} > {budget[what]}"
        for what in ("registers", "local", "shared", "loop")
        if got[what] > budget[what]
    ]
    for name, count in budget["instructions"].items():
        now = got["instructions"].get(name, 0)
        if name in ("STL", "LDL"):
            found += [f"{name}: {now} > {count}"] if now > count else []
        elif not now:
            found.append(f"{name}: none left of {count}")
    return found


@pytest.mark.skipif(not usable(), reason="needs Triton, and TRITON_INTERPRET unset")
def test_there_is_something_to_compile():
    assert len(CASES) >= 100
    assert len({(case.family, case.id) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.family}-{case.id}")
def test_kernel(case):
    if "gfx" not in case.arch and cubin.have("cuobjdump"):
        pytest.skip(cubin.have("cuobjdump"))
    import triton

    got = measured(case)
    if UPDATE:
        _note(case, got)
    else:
        held = budgets(case.family)
        if held["triton"] == triton.__version__:
            assert case.id in held["kernels"] or FULL, "no budget: LOWMEM_UPDATE_BUDGETS=1 writes one"
            over = over_budget(got, held["kernels"].get(case.id, got))
            assert not over, f"{case.id}: over its budget: {'; '.join(over)}"
    wrong = problems(case, got)
    assert not wrong, f"{case.id}: {'; '.join(wrong)}"


def _note(case: Any, got: dict[str, Any]) -> None:
    import triton

    held = budgets(case.family)
    held["triton"] = triton.__version__
    held["kernels"][case.id] = got
    held["kernels"] = dict(sorted(held["kernels"].items()))
    BUDGETS.mkdir(exist_ok=True)
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in held["kernels"].items())
    path = BUDGETS / f"{case.family}.triton.json"
    path.write_text(f'{{\n "triton": {json.dumps(held["triton"])},\n "kernels": {{\n{rows}\n }}\n}}\n')


@pytest.mark.skipif(not usable(), reason="needs Triton, and TRITON_INTERPRET unset")
@pytest.mark.parametrize("name, most", [("shrink-bits-bf16-r16", 14.0), ("shrink-seed-bf16-r16", 14.0)])
def test_instructions_an_element_of_shrink(name, most):
    """Dropout, the mask's bits and the product: reading x at an H200's bandwidth leaves 14 instructions an element."""
    case = _lora(f"sm_90-{name}")
    elements = case.constants["BM"] * case.constants["BK"] / (32 * case.warps)
    assert 0 < measured(case)["loop"] / elements <= most


# --------------------------------------------------------------------------------------- what the rules have to catch


def _spill(columns: int) -> Any:
    from broken_triton import spilling_kernel
    from triton_case import Case

    constants = {"ROWS": 128, "COLS": columns}
    name = f"spill-bf16-{columns}"
    return Case(name, "sm_90", spilling_kernel, "bf16", constants, 4, 1, products="none", wide=False)


@pytest.mark.skipif(not usable(), reason="needs Triton, and TRITON_INTERPRET unset")
def test_a_spill_is_caught():
    case = _spill(512)
    got = measured(case)
    assert got["local"] > 0 and got["instructions"]["STL"] > 0
    assert any("it spills" in problem for problem in problems(case, got))
    assert over_budget(got, {**got, "local": 0})
    roomy = _spill(64)  # an eighth of the values a thread fits
    assert not problems(roomy, measured(roomy))


@pytest.mark.skipif(not usable(), reason="needs Triton, and TRITON_INTERPRET unset")
def test_regressions_are_caught():
    case = _lora("sm_90-expand_descriptor-bias-bf16-r16")
    good = measured(case)
    assert not problems(case, good) and not over_budget(good, good)

    def without(*names):
        return {**good, "instructions": {k: v for k, v in good["instructions"].items() if k not in names}}

    assert problems(case, without("HGMMA")) and over_budget(without("HGMMA"), good)
    assert problems(case, without("UTMALDG", "wide"))
    assert problems(case, {**good, "shared": 240_000})
    assert over_budget({**good, "registers": good["registers"] + 1}, good)
    assert over_budget({**good, "loop": good["loop"] + 1}, good)
