"""Reads compiled GPU code: registers, local memory, shared memory and instructions of each kernel of a cubin.

The tools are the ``cuobjdump`` and ``nvdisasm`` of Triton's wheel, or those of a CUDA toolkit: no GPU is needed.
Both budget tests (``test_cuda_compile.py``, ``test_compile_targets.py``) read cubins here and nowhere else.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path


class ToolMissingError(RuntimeError):
    """A binary tool is on none of the places searched; the message says which and where it could come from."""


def cuda_home() -> Path | None:
    """The CUDA toolkit: ``$CUDA_HOME``, ``$CUDA_PATH``, that of the PATH's ``nvcc``, or /usr/local/cuda.

    A place counts only with compiler and headers: the ``nvcc`` of a PATH may be a wrapper far from its toolkit.
    """
    on_path = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places += [str(Path(on_path).resolve().parent.parent) if on_path else None, "/usr/local/cuda"]
    for place in places:
        if place and all((Path(place) / file).exists() for file in ("bin/nvcc", "include/cuda_runtime.h")):
            return Path(place)
    return None


def _places(name: str) -> list[Path]:
    places = []
    spec = importlib.util.find_spec("triton")  # found, not imported
    if spec is not None and spec.origin is not None:
        places.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name)
    home = cuda_home()
    if home is not None:
        places.append(home / "bin" / name)
    on_path = shutil.which(name)
    if on_path:
        places.append(Path(on_path))
    return places


@functools.cache
def tool(name: str) -> Path:
    """The path of ``cuobjdump``, ``nvdisasm``, ``nvcc`` or ``ptxas``, or a :class:`ToolMissingError`.

    ``nvcc`` and ``ptxas`` come from the toolkit only: Triton's ``ptxas`` is another version.
    """
    places = _places(name)
    if name in ("nvcc", "ptxas"):
        places = [place for place in places if "triton" not in place.parts]
    for place in places:
        if os.access(place, os.X_OK):
            return place
    raise ToolMissingError(f"{name} was not found: the CUDA toolkit has it (cuobjdump and nvdisasm: triton, too)")


def have(*names: str) -> str:
    """'' where all tools are found, else the sentence that says which is not (for ``pytest.skip``)."""
    for name in names:
        try:
            tool(name)
        except ToolMissingError as error:
            return str(error)
    return ""


_FUNCTION = re.compile(r"Function (\S+):\s*\n\s*(.*)")
_FIELD = re.compile(r"\b(REG|STACK|SHARED|LOCAL):(\d+)")


def parse_resource_usage(text: str) -> dict[str, dict[str, int]]:
    """Parses what ``cuobjdump --dump-resource-usage`` prints; see :func:`resource_usage`."""
    found = {}
    for name, line in _FUNCTION.findall(text):
        fields = {key: int(value) for key, value in _FIELD.findall(line)}
        if "REG" not in fields or "STACK" not in fields:
            raise ValueError(f"no REG and STACK in cuobjdump's line for {name}: {line!r}")
        # spills and runtime-indexed arrays both live in the stack frame, which is local memory
        found[name] = {
            "registers": fields["REG"],
            "local_bytes": fields["STACK"] + fields.get("LOCAL", 0),
            "shared_bytes": fields.get("SHARED", 0),
        }
    return found


def resource_usage(cubin_path: str | Path) -> dict[str, dict[str, int]]:
    """``{kernel's mangled name: {"registers", "local_bytes", "shared_bytes"}}`` of a cubin.

    ``local_bytes`` is the stack frame per thread: spills and arrays that could not stay in registers.
    ``shared_bytes`` is static shared memory as the tool reports it: from sm_90 on 1024 bytes that the system reserves
    are in it, and dynamic shared memory never is (Triton's ``metadata.shared`` holds that).
    """
    return parse_resource_usage(_run("cuobjdump", "--dump-resource-usage", str(cubin_path)))


def sass(cubin_path: str | Path) -> str:
    """The machine code of a cubin as text, one ``Function : <mangled name>`` section a kernel."""
    return _run("cuobjdump", "-sass", str(cubin_path))


def sass_by_kernel(cubin_path: str | Path) -> dict[str, str]:
    """:func:`sass` by the kernel's mangled name: the tool reads the whole file at each call, so it is called once."""
    sections = re.split(r"^\s*Function : (\S+)\s*$", sass(cubin_path), flags=re.M)
    return dict(zip(sections[1::2], sections[2::2], strict=True))


_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.M)


def instructions(text: str) -> dict[str, int]:
    """How often each instruction, with its suffixes (``LDG.E.128.CONSTANT``), stands in SASS text."""
    counts: dict[str, int] = {}
    for name in _INSTRUCTION.findall(text):
        counts[name] = counts.get(name, 0) + 1
    return counts


def demangle(name: str) -> str:
    """A C++ name as source would write it, without the return type and parameters; unmangled names stay."""
    if not name.startswith("_Z"):
        return name
    plain = subprocess.run([_filt(), name], capture_output=True, text=True, check=True).stdout.strip()
    plain = re.sub(r"^void ", "", plain)
    depth = 0
    for i, char in enumerate(plain):  # cut at the parameter list: the first '(' outside template arguments
        depth += (char == "<") - (char == ">")
        if char == "(" and depth == 0:
            return plain[:i]
    return plain


def _filt() -> str:
    found = shutil.which("c++filt")
    if not found:
        raise ToolMissingError("c++filt was not found: it comes with binutils, as the compiler's linker does")
    return found


def _run(name: str, *args: str) -> str:
    done = subprocess.run([str(tool(name)), *args], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{name} {' '.join(args)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
