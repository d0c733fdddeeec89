"""Which backend serves an operator: one definition form for all operators, library loading, and the ``backends()``
table.

A schema is written once, here, from Python (``define``). The plain-torch reference serves every device under the
dispatcher's default key; ``lowmem/_C`` (C++, CPU) and ``lowmem/_C_cuda`` (CUDA C++) add kernels when they load, and
Triton launchers are registered for CUDA devices where Triton can be imported.

``LOWMEM_BACKEND`` is read once, at import:

=============  ====================================================================================
``auto``       (default) everything that loads on this machine
``reference``  plain torch only
``cpu``        ``lowmem/_C`` must load; nothing else is used
``triton``     Triton must be importable; CUDA C++ is left out
``cuda``       ``lowmem/_C_cuda`` must load; Triton serves what CUDA C++ does not
=============  ====================================================================================
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

CHOICES = ("auto", "reference", "cpu", "triton", "cuda")
REQUESTED = os.environ.get("LOWMEM_BACKEND", "auto").strip().lower() or "auto"
_PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Library:
    """A compiled operator library: where it is (or None) and why it is not loaded (or '')."""

    name: str
    path: Path | None
    why_not: str

    @property
    def loaded(self) -> bool:
        return not self.why_not


@dataclass
class Operator:
    """One operator's registrations, kept for :func:`table`."""

    name: str
    schema: str
    cpp: tuple[str, ...] = ()
    launchers: dict[str, str] = field(default_factory=dict)


OPERATORS: dict[str, Operator] = {}
_LIBRARY = torch.library.Library("lowmem", "FRAGMENT")  # kept alive: its registrations go with it


def _library_path(name: str) -> Path | None:
    found = sorted(_PACKAGE.glob(f"{name}.*so")) + sorted(_PACKAGE.glob(f"{name}.pyd"))
    return found[0] if found else None


def _load(name: str, wanted: bool, reason: str, build_hint: str) -> Library:
    path = _library_path(name)
    if not wanted:
        return Library(name, path, reason)
    if path is None:
        return Library(name, None, f"lowmem/{name} is not built ({build_hint})")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Library(name, path, f"lowmem/{path.name} does not load: {str(error).splitlines()[0]}")
    return Library(name, path, "")


def _triton_missing() -> str:
    if REQUESTED in ("reference", "cpu"):
        return f"LOWMEM_BACKEND={REQUESTED}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (Linux: pip install 'triton>=3.6')"
    return ""


def _require(ok: bool, why: str) -> None:
    if not ok:
        raise ImportError(f"lowmem: LOWMEM_BACKEND={REQUESTED} was asked for and cannot run: {why}")


if REQUESTED not in CHOICES:
    raise ImportError(f"lowmem: LOWMEM_BACKEND: expected one of {', '.join(CHOICES)}, got {REQUESTED!r}")

CPU = _load("_C", REQUESTED != "reference", "LOWMEM_BACKEND=reference", "pip install . with a C++17 compiler builds it")
CUDA = _load(
    "_C_cuda",
    REQUESTED in ("auto", "cuda") and torch.version.cuda is not None,
    f"LOWMEM_BACKEND={REQUESTED}" if REQUESTED not in ("auto", "cuda") else f"torch {torch.__version__} is a CPU build",
    "pip install . with nvcc on the PATH builds it",
)
TRITON_WHY_NOT = _triton_missing()
if REQUESTED == "cpu":
    _require(CPU.loaded, CPU.why_not)
if REQUESTED == "triton":
    _require(not TRITON_WHY_NOT, TRITON_WHY_NOT)
if REQUESTED == "cuda":
    _require(CUDA.loaded, CUDA.why_not)


def define(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    cpp: tuple[str, ...] = (),
    cuda_kernels: tuple[str, ...] = (),
    cpu: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
) -> None:
    """Define ``lowmem::<name>``.

    ``fake`` gives output shapes, ``reference`` is the plain-torch kernel of every device. ``cpp`` names the
    libraries whose sources hold an IMPL block for it: ``"cpu"`` (``lowmem/_C``) and ``"cuda"`` (``lowmem/_C_cuda``,
    which registers ``lowmem_c::<name>`` for a launcher to choose from, or one of each name in ``cuda_kernels``).
    ``cpu`` and ``cuda`` are Python kernels for those devices, over other operators or Triton; the first is left out
    for ``LOWMEM_BACKEND=reference`` and where ``lowmem/_C`` has the kernel, the second where neither Triton nor
    ``lowmem/_C_cuda`` can serve. The operator has no derivative of its own: differentiating through it raises,
    instead of torch's silent zero.
    """
    qual = f"lowmem::{name}"
    torch.library.define(qual, schema)
    torch.library.register_fake(qual)(fake)
    torch.library.register_kernel(qual, "default")(reference)
    operator = Operator(name, schema, cpp)
    for kernel in (cuda_kernels or (name,)) if "cuda" in cpp else ():
        torch.library.define(f"lowmem_c::{kernel}", schema)
        torch.library.register_fake(f"lowmem_c::{kernel}")(fake)
    if cpu is not None and REQUESTED != "reference" and not ("cpu" in cpp and CPU.loaded):
        torch.library.register_kernel(qual, "cpu")(cpu)
        operator.launchers["cpu"] = cpu.__name__
    if cuda is not None and (CUDA.loaded or not TRITON_WHY_NOT):
        torch.library.register_kernel(qual, "cuda")(cuda)
        operator.launchers["cuda"] = cuda.__name__
    _register_no_autograd(name)
    OPERATORS[name] = operator


def _flat(args: Any) -> Iterator[Any]:
    for arg in args:
        if isinstance(arg, (list, tuple)):
            yield from arg
        else:
            yield arg


def triton_launcher(module: str, name: str) -> Callable[..., Any]:
    """``lowmem.triton_kernels.<module>.<name>`` for :func:`define`'s ``cuda``: Triton is imported at the first call on
    a CUDA device, never before."""

    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(f"lowmem.triton_kernels.{module}"), name)(*args)

    launch.__name__ = f"triton_kernels.{module}.{name}"
    return launch


def _register_no_autograd(name: str) -> None:
    op = getattr(torch.ops.lowmem, name).default

    def kernel(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in _flat(args)):
            raise RuntimeError(
                f"lowmem.{name}: the operator has no derivative of its own; differentiate through the public function "
                f"(lowmem.ops), or call it under torch.no_grad()"
            )
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def serving(name: str, device: str) -> tuple[str, str]:
    """``(backend, reason)``: which backend serves ``lowmem::<name>`` on ``device`` ('cpu' or 'cuda'); the reason is why
    a faster one does not, or ''."""
    operator = OPERATORS[name]
    if device == "cpu":
        if "cpu" in operator.cpp and CPU.loaded:
            return "C++", ""
        return "composed" if "cpu" in operator.launchers else "reference", CPU.why_not
    if not torch.cuda.is_available():
        return "none", f"torch {torch.__version__} sees no such device"
    if "cuda" not in operator.launchers:
        return "reference", TRITON_WHY_NOT or CUDA.why_not
    parts = [("Triton", TRITON_WHY_NOT)] + ([("CUDA C++", CUDA.why_not)] if "cuda" in operator.cpp else [])
    on = [part for part, why in parts if not why]
    off = [f"{part}: {why}" for part, why in parts if why]
    return " + ".join(on), "; ".join(off)


def table() -> list[tuple[str, str, str, str]]:
    """Rows ``(operator, device, backend, why not a faster one)`` for every operator and device."""
    return [(name, device, *serving(name, device)) for name in OPERATORS for device in ("cpu", "cuda")]
