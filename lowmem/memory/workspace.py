"""The scratch buffers that layers share: bounded, visible, and safe across threads and CUDA streams.

A quantized layer dequantizes a panel (or all) of its weight into scratch, multiplies, and gives the scratch back: no
dense copy of a weight outlives the call. A fresh buffer costs page faults on the CPU (at 4096 x 4096 more than the
dequantization itself), so returned buffers are kept, up to :attr:`Workspace.limit` bytes, and lent again.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .._errors import bad

DEFAULT_LIMIT_MB = 256


@dataclass(frozen=True)
class WorkspaceState:
    """Bytes of a :class:`Workspace`: kept and free, lent now, the most that were alive at once, and the limit on what
    is kept."""

    held: int
    lent: int
    peak: int
    limit: int


class Workspace:
    """A pool of byte buffers, one list of free ones for each device and CUDA stream.

    A buffer is lent to one borrower at a time and returns when its ``with`` block ends; on CUDA it is lent again only
    on the stream that used it, so the stream's own order keeps it safe. During CUDA graph capture nothing is pooled:
    the graph's own memory pool owns the buffer. Returned buffers are kept while all of them together stay within
    ``limit`` bytes; beyond it the smallest are freed first.
    """

    def __init__(self, limit: int) -> None:
        self._lock = threading.Lock()
        self._free: dict[tuple[str, int, int], list[Tensor]] = {}
        self._held = self._lent = self._peak = 0
        self._limit = limit

    @property
    def limit(self) -> int:
        """Bytes that may be kept free; setting it frees what is beyond."""
        return self._limit

    @limit.setter
    def limit(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            bad("memory.Workspace", "limit", "bytes, an integer >= 0", repr(value))
        with self._lock:
            self._limit = value
            self._trim()

    def state(self) -> WorkspaceState:
        """What the pool holds now."""
        with self._lock:
            return WorkspaceState(self._held, self._lent, self._peak, self._limit)

    def release(self) -> int:
        """Free every buffer that is not lent; returns the bytes freed."""
        with self._lock:
            freed, self._held = self._held, 0
            self._free.clear()
        return freed

    @contextmanager
    def borrow(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
        """A tensor of ``shape`` with arbitrary contents, valid inside the ``with`` block alone."""
        size = math.prod(shape) * dtype.itemsize
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            yield torch.empty(shape, dtype=dtype, device=device)
            return
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = (device.type, device.index or 0, stream)
        buffer = self._take(key, size)
        if buffer is None:
            buffer = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
        with self._lock:
            self._lent += buffer.numel()
            self._peak = max(self._peak, self._held + self._lent)
        try:
            yield buffer[:size].view(dtype).view(shape)
        finally:
            with self._lock:
                self._lent -= buffer.numel()
                self._free.setdefault(key, []).append(buffer)
                self._held += buffer.numel()
                self._trim()

    def _take(self, key: tuple[str, int, int], size: int) -> Tensor | None:
        with self._lock:
            fitting = [b for b in self._free.get(key, ()) if b.numel() >= size]
            if not fitting:
                # grow rather than collect: what is too small for the newest layer makes room for one that fits all
                small = self._free.pop(key, [])
                self._held -= sum(b.numel() for b in small)
                return None
            best = min(fitting, key=Tensor.numel)
            self._free[key] = [b for b in self._free[key] if b is not best]
            self._held -= best.numel()
            return best

    def _trim(self) -> None:
        while self._held > self._limit:
            key, index = min(
                ((k, i) for k, buffers in self._free.items() for i in range(len(buffers))),
                key=lambda at: self._free[at[0]][at[1]].numel(),
            )
            self._held -= self._free[key].pop(index).numel()


def _limit_from_environment() -> int:
    text = os.environ.get("LOWMEM_WORKSPACE_MB", str(DEFAULT_LIMIT_MB))
    if not text.strip().isdigit():
        bad("memory", "LOWMEM_WORKSPACE_MB", "a number of MiB", repr(text))
    return int(text) << 20


WORKSPACE = Workspace(_limit_from_environment())
"""The pool of every operator in the process."""


def workspace() -> WorkspaceState:
    """Bytes of the shared scratch pool: ``held`` free, ``lent`` now, ``peak``, and the ``limit`` on ``held``
    (``LOWMEM_WORKSPACE_MB`` at import, or ``lowmem.memory.WORKSPACE.limit = bytes``)."""
    return WORKSPACE.state()


def release_workspace() -> int:
    """Free the shared scratch that is not in use; returns the bytes freed."""
    return WORKSPACE.release()
