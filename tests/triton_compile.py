"""Triton kernels compiled for GPUs that are not there, and what their machine code takes.

Results are kept in `.cache/compile_targets/` by a hash of the kernel's source, its configuration and Triton's version.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import inspect
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cubin

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "compile_targets"

# instructions that are counted, by the start of their name
COUNTED = ("HGMMA", "HMMA", "UTCHMMA", "FFMA", "UTMALDG", "UTMASTG", "LDGSTS", "LDG", "STL", "LDL", "v_mfma")


def usable() -> bool:
    """Triton is there, and compiles rather than interprets."""
    return importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") != "1"


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


def measure_cubin(kernel: Any) -> dict[str, Any]:
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
    readers = (cubin, measure_cubin, _measure_amd, _count, longest_loop)
    text = repr((what, COUNTED)) + "".join(inspect.getsource(reader) for reader in readers)
    key = hashlib.sha256(text.encode()).hexdigest()[:24]
    kept = CACHE / f"{key}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    kernel = _compile(case)
    result = measure_cubin(kernel) if "cubin" in kernel.asm else _measure_amd(kernel)
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=CACHE, delete=False) as file:
        json.dump(result, file)
    os.replace(file.name, kept)
    return result


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


@contextlib.contextmanager
def calls_compiled_for(arch: str) -> Iterator[list[tuple[str, Any]]]:
    """Inside, a launcher's call compiles its kernels for ``arch`` from the call's real arguments and does not launch
    them. Yields the list of ``(kernel's name, compiled kernel)``, which grows as they are called."""
    import triton
    import triton_case
    from triton.runtime import driver

    from lowmem.triton_kernels import device as gpu

    before = driver._active
    compiled: list[tuple[str, Any]] = []
    real, architecture, programs = triton.JITFunction.run, gpu.architecture, gpu.programs

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        assert all(size >= 1 for size in grid)
        compiled.append((self.fn.__name__, real(self, *args, grid=grid, warmup=True, **options)))

    driver.set_active(_Driver(triton_case.TARGETS[arch]))
    gpu.architecture, gpu.programs = lambda device: arch, lambda device: 132
    triton.JITFunction.run = run
    try:
        with triton.knobs.cache.scope():
            triton.knobs.cache.dir = str(CACHE / "calls")
            yield compiled
    finally:
        triton.JITFunction.run, gpu.architecture, gpu.programs = real, architecture, programs
        driver._active = before
