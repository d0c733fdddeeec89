"""Which of several ways serves an operator of the ``lora`` family: a rule over measured rates, kept as data.

**The fused GEMM against the composed one.** Composed, the rank-r term is written into the output and cuBLAS
accumulates the base product onto it (``beta = 1``); fused, a Triton GEMM holds it on its accumulator and the output
crosses memory once. The fused kernel saves traffic and loses whatever Triton's GEMM is slower. With

* ``F``: cuBLAS's rate in FLOP/s on this shape, ``BW``: the device's copy bandwidth in bytes/s (read plus written),
* ``eta``: the fused kernel's rate as a fraction of ``F``, the rank-r term included,
* ``K_red``: the depth of the base product, ``passes``: how often the 16-bit output crosses memory besides the base
  GEMM's own write,

the composed way takes ``2 M N K_red / F + passes * 2 M N / BW`` and the fused one ``2 M N K_red / (eta F)``, hence::

    fuse  iff  eta > 1 / (1 + passes * F / (BW * K_red))

``passes`` is 2 where a rank-r update follows the base GEMM (its output is read and written again), and 1 for the way
that is composed here: the output is written first and cuBLAS reads it while its own loop still runs.

**Where the rates come from.** ``MEASURED`` holds one entry per GPU name and shape class. No entry, no fusing: the
composed way is the default. ``LOWMEM_AUTOTUNE=1`` measures the rates of a shape class at its first call on a device
and keeps them in ``$XDG_CACHE_HOME/lowmem/lora_rates.json`` (``~/.cache`` where that is unset).

The dY pass and the masked expand have their own tables below. On a CPU the passes in C++ are weighed against torch's
own GEMMs by rank (:func:`cpu_way`); ``LOWMEM_AUTOTUNE=1`` measures there too.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Rates:
    """What a shape class measured on a device: cuBLAS's FLOP/s, copy bytes/s, the fused kernel's fraction of cuBLAS."""

    gemm: float
    copy: float
    eta: float


MEASURED: dict[str, dict[str, Rates]] = {}
"""``{GPU name: {shape class: Rates}}``. Empty: none of the kernels has been measured on any GPU yet."""

PREFERRED: dict[str, dict[str, str]] = {}
"""``{GPU name: {"lora_dy" or "lora_masked_expand_": "triton", "cuda" or "torch"}}`` where a measurement decided. Empty
for the same reason."""

ONE_READ_RANKS = 64
"""Above this rank the dY pass would read dy more than once, and two cuBLAS GEMMs do no worse."""

CPU_RANKS: dict[str, int] = {"lora_dy": 16, "lora_da": 16}
"""Largest rank at which the pass in C++ beats torch's GEMMs for bf16 on a CPU, without dropout: measured at ranks 16,
32, 64 and 128 (docs/performance.md). In fp32 it does at every rank, and with dropout it saves a copy of x besides."""

PREFILL_PASSES = 1
UPDATE_PASSES = 2


def autotune() -> bool:
    """Whether ``LOWMEM_AUTOTUNE=1`` is set."""
    return os.environ.get("LOWMEM_AUTOTUNE", "0").strip() == "1"


def break_even(gemm: float, copy: float, reduction: int, passes: int = PREFILL_PASSES) -> float:
    """The fraction of cuBLAS's rate above which the fused GEMM wins: ``1 / (1 + passes * F / (BW * K_red))``."""
    return 1.0 / (1.0 + passes * gemm / (copy * reduction))


def shape_class(kind: str, shape: tuple[int, int, int], rank: int, dtype: torch.dtype) -> str:
    """The name under which rates are kept: operator, dtype, powers of two of rows, columns and depth, rank block.

    Rows, columns and depth round to the nearest power of two, from 128 up; ranks to the power of two that holds them,
    from 16 up.
    """
    rows, columns, depth = (1 << max(7, max(size, 1).bit_length() - 1 + _upper_half(size)) for size in shape)
    block = max(16, 1 << (rank - 1).bit_length())
    return f"{kind}/{str(dtype).removeprefix('torch.')}/m{rows}/n{columns}/k{depth}/r{block}"


def _upper_half(size: int) -> int:
    # 1 where size is nearer (by ratio) to the next power of two: its square exceeds 2 * power**2
    power = 1 << (max(size, 1).bit_length() - 1)
    return int(size * size > 2 * power * power)


def fuses(
    kind: str,
    device: str,
    shape: tuple[int, int, int],
    rank: int,
    dtype: torch.dtype,
    measure: Callable[[], Rates] | None = None,
) -> bool:
    """Whether ``kind`` ("expand" or "dx") runs as one fused Triton GEMM.

    Args:
        kind: the operator; device: the GPU's name as torch gives it.
        shape: rows, columns and depth of the base product.
        rank: the adapter's; dtype: the activations'. fp32 never fuses: full-precision dots have no tensor cores.
        measure: called under ``LOWMEM_AUTOTUNE=1`` where nothing is known of the class; None where it cannot be now.
    """
    if dtype.itemsize != 2:
        return False
    key = shape_class(kind, shape, rank, dtype)
    rates = MEASURED.get(device, {}).get(key)
    if rates is None and autotune():
        rates = _cached(device, key)
        if rates is None and measure is not None:
            rates = measure()
            _keep(device, key, rates)
    return rates is not None and rates.eta > break_even(rates.gemm, rates.copy, shape[2])


def dy_way(device: str, rank: int, dtype: torch.dtype, cuda_cpp: bool) -> str:
    """Who serves ``lora_dy``: "triton" (one read of dy), "cuda" (C++) or "torch" (two GEMMs, two reads).

    Unmeasured default: Triton up to :data:`ONE_READ_RANKS` for 16-bit activations, whose products run on tensor cores
    straight from shared memory, else torch.
    """
    way = PREFERRED.get(device, {}).get("lora_dy", "triton")
    if way == "cuda" and cuda_cpp:
        return way
    return "triton" if dtype.itemsize == 2 and rank <= ONE_READ_RANKS and way != "torch" else "torch"


def masked_expand_way(device: str, cuda_cpp: bool) -> str:
    """Who serves ``lora_masked_expand_``: "cuda" (C++) where it has loaded, else "triton"; a measurement overrides."""
    way = PREFERRED.get(device, {}).get("lora_masked_expand_", "cuda")
    return "triton" if way == "cuda" and not cuda_cpp else way


def cpu_way(
    op: str,
    shape: tuple[int, int],
    rank: int,
    dtype: torch.dtype,
    ways: Callable[[], tuple[Callable[[], object], Callable[[], object]]],
) -> str:
    """Who serves ``lora_dy`` or a ``lora_da`` without dropout on a CPU: "cpp", or "torch" (GEMMs).

    Args:
        op: the operator; shape: rows and columns of what it reads; rank, dtype: as they are.
        ways: called under ``LOWMEM_AUTOTUNE=1`` where nothing is known of the class; gives the calls to time, in C++
            and in torch.
    """
    if dtype is not torch.bfloat16:
        return "cpp"
    if not autotune():
        return "cpp" if rank <= CPU_RANKS[op] else "torch"
    key = shape_class(op, (*shape, 1), rank, dtype)
    name = f"cpu of {torch.get_num_threads()} threads"
    rates = _cached(name, key)
    if rates is None:
        cpp, gemms = ways()
        rates = measure(gemms, cpp, lambda: None, flops=1.0, copied_bytes=1.0, seconds=cpu_seconds, rounds=7)
        _keep(name, key, rates)
    return "cpp" if rates.eta >= 1 else "torch"


# ----------------------------------------------------------------------------------------------------------- measuring


def measure(
    base: Callable[[], object],
    fused: Callable[[], object],
    copy: Callable[[], object],
    *,
    flops: float,
    copied_bytes: float,
    seconds: Callable[[Callable[[], object]], float],
    rounds: int = 15,
) -> Rates:
    """Rates from interleaved rounds: ``seconds(f)`` times one call of ``f``; the median of each decides.

    ``base`` is the base product in cuBLAS, ``fused`` the whole fused kernel, ``copy`` a copy of ``copied_bytes`` (read
    plus written).
    """
    for call in (base, fused, copy):  # compile, choose algorithms, warm up
        call()
    times: tuple[list[float], ...] = ([], [], [])
    for _ in range(rounds):
        for call, into in zip((base, fused, copy), times, strict=True):
            into.append(seconds(call))
    t_base, t_fused, t_copy = (statistics.median(t) for t in times)
    return Rates(gemm=flops / t_base, copy=copied_bytes / t_copy, eta=t_base / t_fused)


def cpu_seconds(call: Callable[[], object]) -> float:
    """Seconds that one call takes by the clock."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start + 1e-9  # of a clock that has not moved


def cuda_seconds(call: Callable[[], object]) -> float:
    """Seconds that one call takes on the current CUDA stream, by events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


# ------------------------------------------------------------------------------------------------------- kept rates

_memory: dict[tuple[str, str], Rates] = {}


def cache_file() -> Path:
    """Where measured rates are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowmem" / "lora_rates.json"


def _read() -> dict[str, dict[str, dict[str, float]]]:
    try:
        stored = json.loads(cache_file().read_text())
    except (OSError, ValueError):  # none yet, unreadable, or not JSON: measured again
        return {}
    return stored if isinstance(stored, dict) else {}


def _cached(device: str, key: str) -> Rates | None:
    if (device, key) not in _memory:
        try:
            found = Rates(**{name: float(value) for name, value in _read()[device][key].items()})
        except (KeyError, TypeError, ValueError, AttributeError):
            return None
        _memory[device, key] = found
    return _memory[device, key]


def _keep(device: str, key: str, rates: Rates) -> None:
    _memory[device, key] = rates
    stored = _read()
    entries = stored.get(device)
    stored[device] = {**(entries if isinstance(entries, dict) else {}), key: asdict(rates)}
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(stored, file, indent=1, sort_keys=True)
            os.replace(name, path)  # readers see the old file or the new one, never half of one
        except BaseException:
            os.unlink(name)
            raise
    except OSError:
        pass  # a read-only home: the rates live as long as the process
