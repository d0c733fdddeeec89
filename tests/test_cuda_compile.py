"""Every CUDA kernel compiled by nvcc for each architecture, and what came out held against its budget.

No GPU is needed. Per kernel and architecture: registers, local memory (spills, runtime-indexed arrays), static shared
memory, and the instructions meant (tensor cores, cp.async, 16-byte loads and stores), read from the machine code.
A family is a file ``tests/cpp/<family>_kernels.cu``. ``tests/budgets/<family>.cuda.json`` holds what each of its
kernels may take with the nvcc release named there (``LOWMEM_UPDATE_BUDGETS=1`` rewrites that part, in one process:
-n 0) and, by hand: ``meant``, instructions that kernels whose name matches must have; ``resident``, ``[threads,
blocks]`` of which so many blocks must fit on a multiprocessor; ``names``, replacements that make names readable.
Results are kept in ``.cache/cuda_compile/`` by a hash of the sources and nvcc's version: a second run compiles nothing.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import cubin
import pytest

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = Path(__file__).parent / "budgets"
CACHE = ROOT / ".cache" / "cuda_compile"
UPDATE = os.environ.get("LOWMEM_UPDATE_BUDGETS") == "1"
ARCHS = ("80", "90a", "100a")
FLAGS = ("-std=c++17", "-O3")  # as setup.py
FAMILIES = sorted(p.name.removesuffix("_kernels.cu") for p in (ROOT / "tests" / "cpp").glob("*_kernels.cu"))

WHY_NOT = cubin.have("nvcc", "cuobjdump")
pytestmark = [pytest.mark.compile, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]


# ------------------------------------------------------------------------------------------------ compile and measure


@functools.cache
def nvcc_version() -> str:
    text = subprocess.run([cubin.tool("nvcc"), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release \S+, (\S+)", text)[1]


def compile_cubin(source: Path, arch: str, out: Path, *more: str) -> None:
    command = [str(cubin.tool("nvcc")), *FLAGS, f"-I{ROOT / 'csrc'}", "-cubin", f"-arch=sm_{arch}", *more]
    done = subprocess.run([*command, str(source), "-o", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def measure(path: Path, names: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Per kernel, by its readable name: resource usage and the counts of its instructions."""
    found = {}
    code = cubin.sass_by_kernel(path)
    for name, usage in cubin.resource_usage(path).items():
        readable = cubin.demangle(name)
        for long, short in names.items():
            readable = readable.replace(long, short)
        assert readable not in found, f"two kernels are called {readable}"
        found[readable] = {**usage, "instructions": cubin.instructions(code[name])}
    return found


def sources(family: str) -> list[Path]:
    folders = [ROOT / "csrc" / "common", ROOT / "csrc" / "cuda"]
    headers = [p for folder in folders for p in folder.iterdir() if p.suffix in (".h", ".cuh")]
    return [*sorted(headers), ROOT / "tests" / "cpp" / f"{family}_kernels.cu"]


@functools.cache
def measured(family: str, arch: str) -> dict[str, dict[str, Any]]:
    """:func:`measure` of a family's kernels for one architecture, from the cache where nothing has changed."""
    names = budgets(family)["names"]
    digest = hashlib.sha256(f"{nvcc_version()} {FLAGS} {arch} {names}".encode())
    for path in (*sources(family), Path(cubin.__file__)):
        digest.update(path.name.encode() + path.read_bytes())
    kept = CACHE / f"{family}.{arch}.{digest.hexdigest()[:24]}.json"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{family}.{arch}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes side by side compile once
        if not kept.exists():
            for old in CACHE.glob(f"{family}.{arch}.*.json"):
                old.unlink()
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "kernels.cubin"
                compile_cubin(sources(family)[-1], arch, path)
                kept.write_text(json.dumps(measure(path, names)))
    return json.loads(kept.read_text())


def faults(name: str, got: dict[str, Any], table: dict[str, Any], budget: dict[str, int] | None) -> list[str]:
    """What is wrong with a kernel's machine code: local memory, missing instructions, figures beyond the budget."""
    wrong = []
    if got["local_bytes"]:
        wrong.append(f"{got['local_bytes']} bytes of local memory: it spills, or indexes an array at run time")
    for pattern, wanted in table["meant"].items():
        if re.fullmatch(pattern, name):
            for want in wanted:
                if not any(re.match(want, instruction) for instruction in got["instructions"]):
                    wrong.append(f"no {want} among its instructions")
    for pattern, (threads, blocks) in table["resident"].items():
        if re.fullmatch(pattern, name):
            # registers are given out to warps in units of 256
            warp = -(-got["registers"] * 32 // 256) * 256
            fit = 65536 // (warp * threads // 32)
            if fit < blocks:
                wrong.append(f"{got['registers']} registers: {fit} blocks fit on a multiprocessor, expected {blocks}")
    for figure, limit in (budget or {}).items():
        if got[figure] > limit:
            wrong.append(f"{figure}: expected at most {limit}, got {got[figure]}")
    return wrong


def budgets(family: str) -> dict[str, Any]:
    """``tests/budgets/<family>.cuda.json``, every part of it there."""
    path = BUDGETS / f"{family}.cuda.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    return {"nvcc": "", "names": {}, "meant": {}, "resident": {}, "kernels": {}} | table


def write(family: str, table: dict[str, Any]) -> None:
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(table["kernels"].items()))
    head = json.dumps({key: value for key, value in table.items() if key != "kernels"}, indent=1)
    BUDGETS.mkdir(exist_ok=True)
    (BUDGETS / f"{family}.cuda.json").write_text(f'{head[:-2]},\n "kernels": {{\n{rows}\n }}\n}}\n')


# ------------------------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_keep_their_budgets(family, arch):
    found = measured(family, arch)
    assert found
    table = budgets(family)
    if UPDATE:
        for name, got in found.items():
            figures = {key: got[key] for key in ("registers", "local_bytes", "shared_bytes")}
            table["kernels"].setdefault(name, {})[f"sm_{arch}"] = figures
        table["nvcc"] = nvcc_version()
        write(family, table)
    same_compiler = table["nvcc"] == nvcc_version()  # another one allots registers otherwise; the rest holds for all
    problems = []
    for name, got in found.items():
        budget = table["kernels"].get(name, {}).get(f"sm_{arch}")
        if budget is None:
            problems.append(f"{name}: no budget; LOWMEM_UPDATE_BUDGETS=1 writes one")
        problems += [f"{name}: {fault}" for fault in faults(name, got, table, budget if same_compiler else None)]
    assert not problems, f"sm_{arch}:\n" + "\n".join(problems)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_budget_has_its_kernel(family):
    table, present = budgets(family), measured(family, ARCHS[0])
    assert set(table["kernels"]) == set(present)
    for pattern in (*table["meant"], *table["resident"]):
        assert any(re.fullmatch(pattern, name) for name in present), f"{pattern} meets no kernel"


def test_every_budget_file_has_its_family():
    assert {path.name.removesuffix(".cuda.json") for path in BUDGETS.glob("*.cuda.json")} == set(FAMILIES)


# ---------------------------------------------------------------------------------------------- what must be caught

SPILLING = """
__global__ void spilling(const float* in, float* out, int n) {
  float v[80];
  for (int i = 0; i < 80; ++i) v[i] = in[threadIdx.x + i * n];
  for (int k = 0; k < n; ++k) {
    for (int i = 0; i < 80; ++i) v[i] = v[i] * v[(i + 7) % 80] + in[k];
  }
  float sum = 0.f;
  for (int i = 0; i < 80; ++i) sum += v[i];
  out[threadIdx.x] = sum;
}
"""
INDEXED = """
__global__ void indexed(const float* in, float* out, int n) {
  float v[64];
  for (int i = 0; i < 64; ++i) v[i] = in[i * n];
  for (int i = 0; i < n; ++i) v[(i * n) & 63] += v[(i + threadIdx.x) & 63];
  out[threadIdx.x] = v[(n * threadIdx.x) & 63];
}
"""
NARROW = """
namespace lm {
template <typename T>
__global__ void dy_reduce_kernel(const T* in, T* out) { out[threadIdx.x] = in[threadIdx.x]; }
template __global__ void dy_reduce_kernel<float>(const float*, float*);
}
"""


LORA = budgets("lora")


def compiled(tmp_path: Path, text: str, *more: str) -> tuple[str, dict[str, Any]]:
    source, out = tmp_path / "broken.cu", tmp_path / "broken.cubin"
    source.write_text(text)
    compile_cubin(source, "90a", out, *more)
    ((name, got),) = measure(out, {}).items()
    return name, got


def test_spills_are_caught(tmp_path):
    name, got = compiled(tmp_path, SPILLING, "-maxrregcount=40")
    assert any("it spills" in fault for fault in faults(name, got, LORA, None)) and got["registers"] <= 40
    name, got = compiled(tmp_path, SPILLING)
    assert faults(name, got, LORA, None) == []


def test_an_array_indexed_at_run_time_is_caught(tmp_path):
    name, got = compiled(tmp_path, INDEXED)
    assert got["local_bytes"] == 256 and any("local memory" in fault for fault in faults(name, got, LORA, None))


def test_narrow_loads_are_caught(tmp_path):
    name, got = compiled(tmp_path, NARROW)
    assert name == "lm::dy_reduce_kernel<float>"
    assert faults(name, got, LORA, None) == ["no LDG.E.128 among its instructions"]


def test_a_register_more_is_caught(tmp_path):
    name, got = compiled(tmp_path, NARROW)
    tight = {"registers": got["registers"] - 1}
    assert f"registers: expected at most {tight['registers']}, got {got['registers']}" in faults(name, got, LORA, tight)
