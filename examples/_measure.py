"""What the examples measure: peak memory of a step, and bytes held by parameters, gradients and optimizer."""

from __future__ import annotations

import ctypes
import gc
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.numel() * t.element_size() for t in tensors if t.numel()}.values())


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of the frozen and the trained parameters, and of the optimizer's state tensors."""
    parameters = list(model.parameters())
    return {
        "frozen": storage_bytes(p for p in parameters if not p.requires_grad),
        "trained": storage_bytes(p for p in parameters if p.requires_grad),
        "optimizer": storage_bytes(t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)),
    }


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of the gradients that are there now."""
    return storage_bytes(p.grad for p in model.parameters() if p.grad is not None)


def _status(key: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in {_STATUS}")


def _release_free_memory() -> None:
    """Give freed heap back to the system, so that resident memory is what is in use."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        pass  # not glibc: a little more counts as resident before the step


def _kernel_peak(fn: Callable[[], object]) -> int:
    _release_free_memory()
    _CLEAR.write_text("5")  # the high-water mark starts again at what is resident now
    before = _status("VmRSS")
    fn()
    return max(_status("VmHWM") - before, 0)


def _sampled_peak(fn: Callable[[], object]) -> int:
    import psutil

    _release_free_memory()
    process, done, seen = psutil.Process(), threading.Event(), [0]
    before = process.memory_info().rss

    def sample() -> None:
        while not done.is_set():
            seen[0] = max(seen[0], process.memory_info().rss - before)
            time.sleep(0.001)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        fn()
    finally:
        done.set()
        thread.join()
    return seen[0]


def peak_method(device: torch.device) -> str:
    """How :func:`peak_bytes` measures on this machine, in words."""
    if device.type == "cuda":
        return "torch.cuda.max_memory_allocated above what was allocated before"
    if _CLEAR.exists():
        return "the kernel's high-water mark of resident memory (VmHWM) above what was resident before"
    return "resident memory sampled every millisecond, above what was resident before"


def peak_bytes(fn: Callable[[], object], device: torch.device) -> int:
    """Most memory in use at once during ``fn()``, above what was in use before it."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        return _kernel_peak(fn)
    except (OSError, ValueError):
        return _sampled_peak(fn)


def alternating_peaks(steps: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, int]:
    """The median :func:`peak_bytes` of each step over ``rounds`` rounds, in turns, after one that does not count."""
    for fn in steps.values():
        fn()
    peaks: dict[str, list[int]] = {name: [] for name in steps}
    for i in range(rounds):
        for name in list(steps) if i % 2 == 0 else list(steps)[::-1]:
            peaks[name].append(peak_bytes(steps[name], device))
    return {name: int(statistics.median(values)) for name, values in peaks.items()}
