"""Every Triton kernel compiled ahead of time for each GPU architecture, and what came out held against its budget.

No GPU is needed. Per configuration: registers, local memory (spills), shared memory within the architecture's limit,
and the instructions meant (tensor cores, 16-byte loads, descriptor copies), read from the machine code.
`tests/budgets/triton.json` holds what each may take with the pinned Triton; `LOWMEM_UPDATE_BUDGETS=1` rewrites the
entries that are compiled (in one process: -n 0); `LOWMEM_COMPILE_FULL=1` compiles the whole matrix, not only what
`make test` does (a configuration beyond it that has no entry yet is held to the rules for all kernels).
Results are kept in `.cache/compile_targets/` by a hash of the kernel's source, its configuration and Triton's version.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import cubin
import pytest

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = Path(__file__).parent / "budgets" / "triton.json"
CACHE = ROOT / ".cache" / "compile_targets"
FULL = os.environ.get("LOWMEM_COMPILE_FULL") == "1"
UPDATE = os.environ.get("LOWMEM_UPDATE_BUDGETS") == "1"

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
HAVE_TRITON = importlib.util.find_spec("triton") is not None

pytestmark = pytest.mark.compile

# instructions that are counted, by the start of their name
COUNTED = ("HGMMA", "HMMA", "UTCHMMA", "FFMA", "UTMALDG", "UTMASTG", "LDGSTS", "LDG", "STL", "LDL", "v_mfma")
PRODUCTS = {"sm_80": "HMMA", "sm_86": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
"""The instruction by which each architecture is meant to multiply."""


def _usable() -> bool:
    return HAVE_TRITON and not INTERPRETING


def _cases() -> list[Any]:
    if not _usable():
        return []
    import triton_cases

    return triton_cases.every() if FULL else triton_cases.usual()


CASES = _cases()


# ------------------------------------------------------------------------------------------------ compile and measure


def _compile(case: Any) -> Any:
    import triton

    with tempfile.TemporaryDirectory() as folder:  # Triton's own cache would keep every binary
        with triton.knobs.cache.scope():
            triton.knobs.cache.dir = folder
            return triton.compile(case.source(), target=case.target, options=case.options())


_SASS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", re.M)


def longest_loop(sass: str) -> int:
    """Instructions of the longest innermost-or-not loop body: from a backward branch's target to the branch."""
    lines = [(int(at, 16), name, rest) for at, name, rest in _SASS.findall(sass)]
    longest = 0
    for at, name, rest in lines:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target and int(target[1], 16) < at:
            start = int(target[1], 16)
            longest = max(longest, sum(1 for a, n, _ in lines if start <= a <= at and n != "NOP"))
    return longest


def _count(names: dict[str, int]) -> dict[str, int]:
    found = {start: sum(n for name, n in names.items() if name.startswith(start)) for start in COUNTED}
    found["wide"] = sum(n for name, n in names.items() if name.startswith("LDG") and ".128" in name)
    return {name: n for name, n in found.items() if n}


def _measure_cubin(kernel: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        (usage,) = cubin.resource_usage(file.name).values()
        sass = cubin.sass(file.name)
    names = cubin.instructions(sass)
    return {
        "registers": usage["registers"],
        "local": usage["local_bytes"],
        "shared": kernel.metadata.shared,
        "loop": longest_loop(sass),
        "instructions": _count(names),
    }


def _measure_amd(kernel: Any) -> dict[str, Any]:
    text = kernel.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    names: dict[str, int] = {}
    for name in re.findall(r"^\s+([sv]_\w+|global_\w+|buffer_\w+|ds_\w+)", text, re.M):
        names[name] = names.get(name, 0) + 1
    found = {"v_mfma": sum(n for name, n in names.items() if name.startswith("v_mfma"))}
    found["wide"] = sum(n for name, n in names.items() if re.match(r"(global|buffer)_load_dwordx4", name))
    return {
        "registers": field("vgpr_count"),
        "local": field("private_segment_fixed_size"),
        "shared": kernel.metadata.shared,
        "loop": 0,
        "instructions": {name: n for name, n in found.items() if n},
    }


def measured(case: Any) -> dict[str, Any]:
    """What ``case`` compiles to, from the cache where nothing that matters has changed."""
    import triton

    what = (case.kernel.cache_key, case.id, case.constants, case.signature(), case.options(), triton.__version__)
    readers = (cubin, _measure_cubin, _measure_amd, _count, longest_loop)
    text = repr((what, COUNTED)) + "".join(inspect.getsource(reader) for reader in readers)
    key = hashlib.sha256(text.encode()).hexdigest()[:24]
    kept = CACHE / f"{key}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    kernel = _compile(case)
    result = _measure_cubin(kernel) if "cubin" in kernel.asm else _measure_amd(kernel)
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=CACHE, delete=False) as file:
        json.dump(result, file)
    os.replace(file.name, kept)
    return result


@functools.cache
def budgets() -> dict[str, Any]:
    return json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {"triton": "", "kernels": {}}


# -------------------------------------------------------------------------------------------------------------- rules


def problems(case: Any, got: dict[str, Any]) -> list[str]:
    """What is wrong with a compiled kernel whatever its budget says."""
    from lowmem.triton_kernels import lora_configs as configs

    found = []
    has = got["instructions"]
    if got["shared"] > configs.SHARED_LIMIT[case.arch]:
        found.append(f"{got['shared']} bytes of shared memory: {case.arch} has {configs.SHARED_LIMIT[case.arch]}")
    if got["local"]:
        found.append(f"{got['local']} bytes of local memory a thread: it spills")
    family = case.name.split("-")[0]
    multiplies = family not in ("draw", "reduce", "spill")
    if multiplies and case.dtype in ("bf16", "fp16"):
        # 16 or 32 rows do not fill a warpgroup's 64; tcgen05 wants 128
        small = not case.aligned or case.constants["BM"] < (128 if case.arch == "sm_100" else 64)
        allowed = {PRODUCTS[case.arch]} | ({"HMMA", "HGMMA"} if small or case.arch == "sm_100" else set())
        if not allowed & set(has):
            found.append(f"no {' or '.join(sorted(allowed))}: products do not run on the tensor cores meant")
        gemm = case.aligned and family.split("_")[0] in ("expand", "dx")
        if gemm and PRODUCTS[case.arch] not in has:
            found.append(f"no {PRODUCTS[case.arch]}")
    if case.aligned and multiplies and not has.get("wide") and "UTMALDG" not in has:
        found.append("no 16-byte load")
    if family.endswith("_descriptor"):
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


@pytest.mark.skipif(not _usable(), reason="needs Triton, and TRITON_INTERPRET unset")
def test_there_is_something_to_compile():
    assert len(CASES) >= 100
    assert len({case.id for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_kernel(case):
    if "gfx" not in case.arch and cubin.have("cuobjdump"):
        pytest.skip(cubin.have("cuobjdump"))
    import triton

    got = measured(case)
    if UPDATE:
        _note(case, got)
    else:
        held = budgets()
        if held["triton"] == triton.__version__:
            assert case.id in held["kernels"] or FULL, "no budget: LOWMEM_UPDATE_BUDGETS=1 writes one"
            over = over_budget(got, held["kernels"].get(case.id, got))
            assert not over, f"{case.id}: over its budget: {'; '.join(over)}"
    wrong = problems(case, got)
    assert not wrong, f"{case.id}: {'; '.join(wrong)}"


def _note(case: Any, got: dict[str, Any]) -> None:
    import triton

    held = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {"kernels": {}}
    held["triton"] = triton.__version__
    held["kernels"][case.id] = got
    held["kernels"] = dict(sorted(held["kernels"].items()))
    BUDGETS.parent.mkdir(exist_ok=True)
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in held["kernels"].items())
    BUDGETS.write_text(f'{{\n "triton": {json.dumps(held["triton"])},\n "kernels": {{\n{rows}\n }}\n}}\n')


@pytest.mark.skipif(not _usable(), reason="needs Triton, and TRITON_INTERPRET unset")
@pytest.mark.parametrize("name, most", [("shrink-bits-bf16-r16", 14.0), ("shrink-seed-bf16-r16", 14.0)])
def test_instructions_an_element_of_shrink(name, most):
    """Dropout, the mask's bits and the product: reading x at an H200's bandwidth leaves 14 instructions an element."""
    (case,) = [case for case in CASES if case.id == f"sm_90-{name}"]
    elements = case.constants["BM"] * case.constants["BK"] / (32 * case.warps)
    assert 0 < measured(case)["loop"] / elements <= most


# ------------------------------------------------------------------------------- the launchers' own calls, compiled


class _Driver:
    """Enough of a driver for Triton to compile a call for a GPU that is not there."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        raise AssertionError("nothing may touch a device")

    def get_active_torch_device(self) -> Any:
        raise AssertionError("nothing may touch a device")


@pytest.fixture
def compile_calls(monkeypatch):
    """``compile_calls(arch)``: from then on a launcher's call compiles its kernels for ``arch`` from the call's real
    arguments and does not launch them. Returns the list of ``(kernel's name, compiled kernel)``."""
    import triton
    import triton_cases
    from triton.runtime import driver

    from lowmem.triton_kernels import lora

    before = driver._active
    compiled: list[tuple[str, Any]] = []
    real = triton.JITFunction.run

    def run(self, *args, grid, warmup, **options):
        assert all(size >= 1 for size in grid)
        compiled.append((self.fn.__name__, real(self, *args, grid=grid, warmup=True, **options)))

    def prepare(arch: str) -> list[tuple[str, Any]]:
        driver.set_active(_Driver(triton_cases.TARGETS[arch]))
        monkeypatch.setattr(lora, "architecture", lambda device: arch)
        monkeypatch.setattr(lora, "programs", lambda device: 132)
        return compiled

    monkeypatch.setattr(triton.JITFunction, "run", run)
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(CACHE / "calls")
        yield prepare
    driver._active = before


@pytest.mark.skipif(not _usable(), reason="needs Triton, and TRITON_INTERPRET unset")
@pytest.mark.parametrize(
    "arch, m, k, n, r",
    [
        ("sm_90", 1024, 512, 512, 16),
        ("sm_90", 1000, 504, 520, 5),  # rows of 16 bytes, but not of 32
        ("sm_90", 999, 333, 77, 130),
        ("sm_90", 1, 1, 1, 1),  # sizes and strides of 1 become constants
        ("sm_90", 1, 512, 512, 1),
        ("sm_80", 1024, 512, 512, 16),
        ("sm_100", 1024, 512, 512, 16),
    ],
)
def test_what_the_launchers_call_compiles(arch, m, k, n, r, compile_calls):
    import torch

    from lowmem.triton_kernels import lora
    from lowmem.triton_kernels import lora_configs as configs

    cpu = torch.device("cpu")
    assert lora.architecture(cpu) is None
    compiled = compile_calls(arch)
    half = {"dtype": torch.bfloat16}
    x, dy, w = torch.zeros(m, k, **half), torch.zeros(m, n, **half), torch.zeros(n, k, **half)
    a, b, seed = torch.zeros(r, k), torch.zeros(n, r), torch.zeros(1, dtype=torch.int64)
    s, bits = lora.shrink(x, a, 2.0, 0.1, seed, 1, True)
    lora.shrink(x[:64], a, 2.0, 0.0, None, 0, False)
    ds, _ = lora.dy_fused(dy, b, s, 2.0)
    lora.da(ds, x, bits, 0.1, None, 1)
    lora.da(ds, x, None, 0.1, seed, 1)
    lora.masked_expand_fused(x, ds, a, bits, 0.1, None, 1, False)
    lora.expand_fused(x, w, s, b, torch.zeros(n, **half))
    lora.dx_fused(dy, w, ds, a, bits, 0.1, None, 1)
    names = [name for name, _ in compiled]
    assert {"shrink_kernel", "dy_kernel", "da_kernel", "draw_kernel", "masked_expand_kernel"} <= set(names)
    assert "reduce_kernel" in names or m == 1, "no sum was split"
    by_descriptor = arch != "sm_80" and k % 8 == 0 and n % 8 == 0
    for name in ("expand", "dx"):
        assert (f"{name}_descriptor_kernel" in names) is by_descriptor
        assert (f"{name}_kernel" in names) is not by_descriptor
    for name, kernel in compiled:
        assert kernel.metadata.shared <= configs.SHARED_LIMIT[arch], name
        assert _measure_cubin(kernel)["local"] == 0, f"{name} spills"


# --------------------------------------------------------------------------------------- what the rules have to catch


def _spill(columns: int) -> Any:
    import triton_cases
    from broken_triton import spilling_kernel

    constants = {"ROWS": 128, "COLS": columns}
    return triton_cases.Case(f"spill-bf16-{columns}", "sm_90", spilling_kernel, "bf16", constants, 4, 1)


@pytest.mark.skipif(not _usable(), reason="needs Triton, and TRITON_INTERPRET unset")
def test_a_spill_is_caught():
    case = _spill(512)
    got = measured(case)
    assert got["local"] > 0 and got["instructions"]["STL"] > 0
    assert any("it spills" in problem for problem in problems(case, got))
    assert over_budget(got, {**got, "local": 0})
    roomy = _spill(64)  # an eighth of the values a thread fits
    assert not problems(roomy, measured(roomy))


@pytest.mark.skipif(not _usable(), reason="needs Triton, and TRITON_INTERPRET unset")
def test_regressions_are_caught():
    (case,) = [case for case in CASES if case.id == "sm_90-expand_descriptor-bias-bf16-r16"]
    good = measured(case)
    assert not problems(case, good) and not over_budget(good, good)

    def without(*names):
        return {**good, "instructions": {k: v for k, v in good["instructions"].items() if k not in names}}

    assert problems(case, without("HGMMA")) and over_budget(without("HGMMA"), good)
    assert problems(case, without("UTMALDG", "wide"))
    assert problems(case, {**good, "shared": 240_000})
    assert over_budget({**good, "registers": good["registers"] + 1}, good)
    assert over_budget({**good, "loop": good["loop"] + 1}, good)
