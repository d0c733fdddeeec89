"""The emulator as tests see it: builds the module where it is out of date, and gives kernels torch tensors.

``emulator()`` returns a :class:`Rig`. Each call runs a kernel in ascending, descending and shuffled order of threads
and blocks, compares the bits, and returns torch tensors; arguments lie between pages that nobody may touch.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from cubin import cuda_home
from torch import Tensor

from lowmem.ops.philox import inv_keep, threshold

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "emulator"
TAGS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}
TAGS[torch.uint8] = "u8"
BITS = {1: torch.uint8, 4: torch.int32, 2: torch.int16, 8: torch.int64}
ORDERS = (0, 1, 77)  # ascending, descending, shuffled


class BuildError(RuntimeError):
    """The emulator's module could not be built; the message is the compiler's."""


def missing() -> str:
    """Why the emulator cannot be built here, or ''."""
    home = cuda_home()
    if home is None or not (home / "include" / "cuda_bf16.h").exists():
        return "the CUDA toolkit's headers are not here (CUDA_HOME, or nvcc on the PATH): kernels cannot be emulated"
    if sys.platform != "linux":
        return "the emulator needs Linux"
    for program in ("cmake", "c++"):
        if _program(program) is None:
            return f"{program} was not found: the emulator cannot be built"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed: the emulator cannot be built"
    return ""


def _program(name: str) -> str | None:
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def _digest() -> str:
    """Of everything that the module is made from."""
    files = [p for folder in (HERE, ROOT / "csrc" / "cuda", ROOT / "csrc" / "common") for p in folder.rglob("*")]
    digest = hashlib.sha256(f"{sys.version} {cuda_home()}".encode())
    for path in sorted(p for p in files if p.suffix in (".h", ".cuh", ".cpp", ".txt") and p.name != "README.md"):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes side by side build once
        yield


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")


def build() -> Path:
    """The module's path, built where a source is newer than it."""
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    module, stamp = BUILD / f"lowmem_emulator{suffix}", BUILD / "stamp"
    with _locked(BUILD / "lock"):
        digest = _digest()
        if not (module.exists() and stamp.exists() and stamp.read_text() == digest):
            ninja = _program("ninja")
            cmake = str(_program("cmake"))
            generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
            include = f"-DLOWMEM_CUDA_INCLUDE={cuda_home()}/include"
            python = f"-DPython_EXECUTABLE={sys.executable}"
            _run([cmake, "-S", str(HERE), "-B", str(BUILD), *generator, include, python])
            jobs = os.environ.get("MAX_JOBS") or str(min(os.cpu_count() or 1, 4))
            _run([cmake, "--build", str(BUILD), "--target", "lowmem_emulator", "-j", jobs])
            stamp.write_text(digest)
    return module


@functools.cache
def emulator() -> Rig:
    """The rig over the built module; raises :class:`BuildError`."""
    path = build()
    spec = importlib.util.spec_from_file_location("lowmem_emulator", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Rig(module)


def _packed(t: Tensor, *, strides: tuple[int, int] | None = None, place: str = "start") -> tuple[Any, ...]:
    """The tuple that binding.h reads: values, dtype, strides (the tensor's own unless given), place."""
    bits = t.contiguous().view(BITS[t.element_size()]).numpy()
    row, col = strides if strides is not None else (t.stride(0), t.stride(1))
    return bits, TAGS[t.dtype], row, col, place


class Rig:
    """Kernels by name, on torch tensors of the CPU."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.Error = module.EmulationError

    def once(self, kernel: Callable[..., Any], *args: Any, order: int = 0, multiprocessors: int = 2) -> Any:
        """One run in one order."""
        self.module.configure(order, multiprocessors)
        return kernel(*args)

    def run(self, kernel: Callable[..., Any], *args: Any, multiprocessors: int = 2, orders: Any = ORDERS) -> list[Any]:
        """The arrays that ``kernel`` returns, after every order has given the same bits; twice in the first order."""
        results = []
        for order in (orders[0], *orders):
            arrays = self.once(kernel, *args, order=order, multiprocessors=multiprocessors)
            results.append(list(arrays) if isinstance(arrays, tuple) else [arrays])
            for i, (first, now) in enumerate(zip(results[0], results[-1], strict=True)):
                if first.tobytes() != now.tobytes():
                    differ = int((first != now).sum())
                    raise AssertionError(f"result {i}: {differ} of {first.size} elements depend on the order ({order})")
        return results[0]

    def features(self, name: str, *tensors: Tensor, out: Tensor, extra: tuple[Any, ...] = ()) -> Tensor:
        """A kernel of bind_features.cpp; ``out`` gives the result's shape, dtype and first values."""
        args = [_packed(t) for t in (*tensors, out)]
        return _tensor(self.run(getattr(self.module, name), *args, *extra)[0], out)

    def masked_expand(
        self,
        out: Tensor,
        ds: Tensor,
        a: Tensor,
        mask: Tensor | None,
        p: float,
        seed: Tensor | None,
        child: int,
        accumulate: bool,
        *,
        place: str = "start",
        strides: dict[str, tuple[int, int]] | None = None,
        multiprocessors: int = 2,
    ) -> Tensor:
        """``lora_masked_expand_`` through csrc/cuda/lora.cuh, as lora.cu calls it; returns the new ``out``."""
        at = strides or {}

        def pack(name: str, t: Tensor | None) -> Any:
            return None if t is None else _packed(t, strides=at.get(name), place=place)

        key = None if seed is None else pack("seed", seed.view(1, 1))
        args = (pack("out", out), pack("ds", ds), pack("a", a), pack("mask", mask), key)
        more = (threshold(p), child, inv_keep(p), accumulate)
        kernel = self.module.masked_expand
        return _tensor(self.run(kernel, *args, *more, multiprocessors=multiprocessors)[0], out)

    def dy(
        self,
        dy: Tensor,
        b: Tensor,
        s: Tensor,
        scale: float,
        *,
        place: str = "start",
        strides: dict[str, tuple[int, int]] | None = None,
        multiprocessors: int = 2,
    ) -> tuple[Tensor, Tensor]:
        """``lora_dy`` through csrc/cuda/lora.cuh: ``(dS, dB)``, poisoned with NaN before the kernel writes them."""
        at = strides or {}
        ds = torch.full((dy.shape[0], b.shape[1]), torch.nan, dtype=dy.dtype)
        db = torch.full((b.shape[0], b.shape[1]), torch.nan, dtype=torch.float32)
        named = {"dy": dy, "b": b, "s": s}
        args = [_packed(t, strides=at.get(name), place=place) for name, t in named.items()]
        outs = [_packed(t, place=place) for t in (ds, db)]
        got = self.run(self.module.dy, *args, scale, *outs, multiprocessors=multiprocessors)
        return _tensor(got[0], ds), _tensor(got[1], db)

    def quant_dequantize(
        self,
        out: Tensor,
        weight: tuple[Tensor | None, ...],
        spec: int,
        k: int,
        row0: int,
        col0: int,
        *,
        place: str = "start",
        strides: tuple[int, int] | None = None,
    ) -> Tensor:
        """``quant_dequantize_`` through csrc/cuda/quant.cuh; returns the new ``out``."""
        args = (_packed(out, strides=strides, place=place), _weight(weight, place), spec, k, row0, col0)
        return _tensor(self.run(self.module.quant_dequantize, *args)[0], out)

    def quant_small(
        self,
        kernel: str,
        x: Tensor,
        weight: tuple[Tensor | None, ...],
        spec: int,
        n: int,
        row0: int,
        bias: Tensor | None,
        *,
        place: str = "start",
        strides: tuple[int, int] | None = None,
        multiprocessors: int = 2,
    ) -> Tensor:
        """``quant_matmul_small``, not transposed, by ``kernel`` "quant_gemv" or "quant_mma" of csrc/cuda/quant.cuh;
        x ``[M, K]`` or ``[E, M, K]``."""
        experts = x.shape[0] if x.dim() == 3 else 1
        rows = x.reshape(-1, x.shape[-1])
        y = torch.full((rows.shape[0], n), torch.nan, dtype=x.dtype)
        extra = None if bias is None else _packed(bias.view(1, -1), place=place)
        args = (_packed(rows, strides=strides, place=place), _weight(weight, place), spec, row0, extra, experts)
        got = self.run(getattr(self.module, kernel), *args, _packed(y, place=place), multiprocessors=multiprocessors)
        return _tensor(got[0], y).view(*x.shape[:-1], n)


def _weight(tensors: tuple[Tensor | None, ...], place: str) -> tuple[Any, ...]:
    """A packed weight's six tensors, each flat."""
    return tuple(None if t is None else _packed(t.reshape(1, -1), place=place) for t in tensors)


def _tensor(array: Any, like: Tensor) -> Tensor:
    return torch.from_numpy(array.copy()).view(like.dtype)
