"""What every launcher asks of a device: its entry in the families' tables of tiles, its size, which tensors a kernel
takes. One place, so that tests can put another GPU, or none, in its place.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import triton
from torch import Tensor

ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")
"""Architectures with entries. sm_86 stands for every GPU with 99 KB of shared memory (8.6, 8.9, 12.x)."""

SHARED_LIMIT = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
"""Bytes of shared memory that one block may take."""

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes that kernels take; fp64 is for gradcheck and stays with the references."""


@triton.jit
def _nothing() -> None:
    pass


def entry(major: int, minor: int, hip: str = "") -> str | None:
    """The entry that serves a GPU: CUDA capability ``major.minor``, or AMD's ``gfx...`` name; None: no entry."""
    if hip:
        return "gfx942" if hip.split(":")[0] in ("gfx90a", "gfx942", "gfx950") else None
    if major >= 12 or (major == 8 and minor in (6, 7, 9)):
        return "sm_86"
    return {8: "sm_80", 9: "sm_90", 10: "sm_100"}.get(major)


@functools.cache
def _entry(index: int) -> str | None:
    properties = torch.cuda.get_device_properties(index)
    return entry(properties.major, properties.minor, properties.gcnArchName if torch.version.hip else "")


@functools.cache
def _programs(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def architecture(device: torch.device) -> str | None:
    """The entry that serves ``device``; "interpreter" under ``TRITON_INTERPRET=1``; None: none does."""
    if not isinstance(_nothing, triton.JITFunction):
        return "interpreter"
    return _entry(device.index or 0) if device.type == "cuda" else None


def programs(device: torch.device) -> int:
    """Multiprocessors of ``device``: how many programs run at once, at least."""
    return _programs(device.index or 0) if device.type == "cuda" else 3


def serves(x: Tensor, *others: Tensor | None) -> str | None:
    """The entry for a call over these tensors, or None: the reference then computes it."""
    arch = architecture(x.device)
    floats = all(t is None or t.dtype in FLOATS for t in (x, *others))
    # Triton's interpreter gets bf16 products wrong
    right = arch != "interpreter" or x.dtype is not torch.bfloat16
    return arch if floats and right and x.numel() else None


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes ``device`` the current one for launches inside."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def rows(t: Tensor) -> Tensor:
    """``t`` with columns that lie side by side: itself where they do."""
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def precision(x: Tensor) -> str:
    """How fp32 products are made, the only ones with a choice: TF32 where the user allowed it, else full precision."""
    return "tf32" if x.dtype is torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


def small(*tensors: Tensor) -> bool:
    """Loads cannot be 16 bytes wide: fp32 (slow dots), or columns, rows or an address that 16 does not divide."""
    return tensors[0].dtype.itemsize == 4 or any(
        t.shape[1] % 16 or t.stride(0) % 16 or t.data_ptr() % 16 for t in tensors
    )
