"""What every benchmark shares: one CSV schema, paired timing, ceilings measured in the same run, a roofline plot.

Columns (``COLUMNS``): ``ms_p20``, ``ms_p50`` and ``ms_p80`` are percentiles of one call's time. ``GB/s`` and
``TFLOP/s`` divide the bytes and operations that the operation needs at the least (not what an implementation moves)
by ``ms_p50``. ``pct_roofline`` is the floor, ``max(bytes / copy bandwidth, operations / GEMM rate)`` at the ceilings of
the same run, as a percentage of ``ms_p50``; where everything fits in a cache it may pass 100. ``peak_MB`` is the most
memory that torch's allocator held during one call beyond what was there before. ``vs_torch``, ``vs_compile`` and
``vs_peer`` are speed-ups over those three, each the median over the rounds of (their time / this time): above 1 this
row is faster. Empty: not measured.

Timing is paired: every round runs every candidate once, in an order that rotates from round to round, so that a slow
second of a shared machine falls on all of them; ratios are taken within a round, and their median is reported.
"""

from __future__ import annotations

import csv
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = (
    "op", "shape", "dtype", "backend", "ms_p20", "ms_p50", "ms_p80", "GB/s", "TFLOP/s", "pct_roofline", "peak_MB",
    "vs_torch", "vs_compile", "vs_peer", "device", "commit",
)  # fmt: skip
MIN_ROUNDS = 15

Call = Callable[[int], Any]  # its argument numbers the round, for rotated buffers
CLOCK = time.perf_counter  # of a CPU: time.process_time on a machine that others use too, with one thread


# ------------------------------------------------------------------------------------------------------------- identity


def commit() -> str:
    """The commit of the sources, ``+dirty`` where a file that could change a result differs from it."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        paths = ["lowmem", "csrc", "triton_kernels", "bench/*.py", "setup.py"]
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno", "--", *paths], cwd=ROOT, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+dirty" if changed.stdout.strip() else "")


def device_name(device: str) -> str:
    """A processor's or GPU's name as its maker gives it, with the number of threads for a CPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    try:
        info = Path("/proc/cpuinfo").read_text()
        model = re.search(r"model name\s*:\s*(.+)", info)[1].strip()  # type: ignore[index]
        isa = (
            "avx512_bf16"
            if " avx512_bf16" in info
            else "avx512"
            if " avx512bw" in info
            else "avx2"
            if " avx2" in info
            else ""
        )
    except (OSError, TypeError):
        isa = ""
    return f"{model} {isa}".strip() + f" {torch.get_num_threads()} threads"


def slug(device: str) -> str:
    """:func:`device_name` as a folder's name: ``cpu-...`` for a CPU."""
    text = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return text if device == "cuda" else f"cpu-{text}"


# --------------------------------------------------------------------------------------------------------------- timing


def once(call: Call, index: int, device: str, inner: int = 1) -> float:
    """Milliseconds of one call: CUDA events on a GPU, the clock on a CPU; ``inner`` calls are averaged."""
    if device != "cuda":
        start = CLOCK()
        for _ in range(inner):
            call(index)
        return (CLOCK() - start) * 1e3 / inner
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    for k in range(inner):
        call(index + k)
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / inner


def paired(
    calls: dict[str, Call],
    device: str,
    *,
    rounds: int = MIN_ROUNDS,
    seconds: float = 0.0,
    inner: int = 1,
    warm: int = 2,
) -> dict[str, list[float]]:
    """Times in ms of every call in every round, ``{name: [round 0, round 1, ...]}``: at least ``rounds`` rounds, more
    while ``seconds`` last (at most ten times as many). The order rotates: no call always follows the same one."""
    names = list(calls)
    for name in names:
        for k in range(warm):
            calls[name](k)
    if device == "cuda":
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in names}
    deadline = time.perf_counter() + seconds
    done = 0
    while done < rounds or (time.perf_counter() < deadline and done < 10 * rounds):
        for k in range(len(names)):
            name = names[(k + done) % len(names)]
            times[name].append(once(calls[name], done, device, inner))
        done += 1
    return times


def speedup(other: Sequence[float], this: Sequence[float]) -> float:
    """The median over the rounds of other / this: above 1, ``this`` is faster."""
    return statistics.median(a / b for a, b in zip(other, this, strict=True))


def overhead(times: Sequence[float], floor: Sequence[float]) -> float:
    """The median over the rounds of what ``times`` cost beyond ``floor``, in ms."""
    return statistics.median(a - b for a, b in zip(times, floor, strict=True))


def percentile(times: Sequence[float], q: float) -> float:
    """Percentile ``q`` in [0, 100], interpolated."""
    ordered = sorted(times)
    at = (len(ordered) - 1) * q / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def rotation(device: str, bytes_per_set: int) -> int:
    """How many sets of inputs to rotate so that a set has left the second-level cache when its turn comes again."""
    if device != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(64, -(-2 * cache // max(1, bytes_per_set))))


def peak_mb(call: Call, device: str) -> float:
    """MB that torch's allocator held at most during one call, beyond what it held before."""
    call(0)
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call(0)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call(0)
    held = most = 0
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / 1e6


# ------------------------------------------------------------------------------------------------------------- ceilings


@dataclass
class Ceilings:
    """What the machine does at best in this run: copy bandwidth, counting bytes read and written, and GEMM rates."""

    device: str
    copy_gbs: float
    gemm_tflops: dict[torch.dtype, float]

    def floor_ms(self, nbytes: float, flops: float, dtype: torch.dtype) -> float:
        """The time under which the operation cannot run at these ceilings."""
        return max(nbytes / (self.copy_gbs * 1e6), flops / (self.gemm_tflops[dtype] * 1e9))


def ceilings(device: str, dtypes: Sequence[torch.dtype], *, quick: bool = False) -> Ceilings:
    """Measure them: the best of several runs of a large copy and, for each dtype, of a large GEMM on random data."""
    repeats = 3 if quick else 25
    size = (1 << 28) if device == "cuda" else (1 << 24 if quick else 1 << 26)
    source = torch.randn(size, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    copy = min(once(lambda _: target.copy_(source), 0, device) for _ in range(repeats))
    rates = {}
    for dtype in dtypes:
        n = 8192 if device == "cuda" else (512 if quick else 2048)
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty(n, n, device=device, dtype=dtype)
        torch.mm(a, b, out=out)
        best = min(once(lambda _, a=a, b=b, out=out: torch.mm(a, b, out=out), 0, device) for _ in range(repeats))
        rates[dtype] = 2 * n**3 / best / 1e9
    return Ceilings(device, 2 * source.nbytes / copy / 1e6, rates)


# -------------------------------------------------------------------------------------------------------------- results


@dataclass
class Results:
    """Rows in the common schema, printed as they come and written as CSV."""

    top: Ceilings
    rows: list[dict[str, Any]] = field(default_factory=list)
    name: str = ""
    commit: str = field(default_factory=commit)

    def __post_init__(self) -> None:
        self.name = device_name(self.top.device)

    def add(
        self,
        op: str,
        shape: str,
        dtype: torch.dtype,
        backend: str,
        times: Sequence[float],
        *,
        nbytes: float | None = None,
        flops: float | None = None,
        peak: float | None = None,
        torch_times: Sequence[float] | None = None,
        compile_times: Sequence[float] | None = None,
        peer_times: Sequence[float] | None = None,
    ) -> None:
        """Add one row and print it; ``nbytes`` and ``flops`` are the least the operation needs."""
        mid = percentile(times, 50)
        row: dict[str, Any] = {"op": op, "shape": shape, "dtype": str(dtype)[6:], "backend": backend}
        row |= {f"ms_p{q}": f"{percentile(times, q):.4g}" for q in (20, 50, 80)}
        row["GB/s"] = f"{nbytes / mid / 1e6:.4g}" if nbytes else ""
        row["TFLOP/s"] = f"{flops / mid / 1e9:.4g}" if flops else ""
        known = nbytes is not None and flops is not None
        row["pct_roofline"] = f"{100 * self.top.floor_ms(nbytes, flops, dtype) / mid:.1f}" if known else ""
        row["peak_MB"] = f"{peak:.1f}" if peak is not None else ""
        for column, other in (("vs_torch", torch_times), ("vs_compile", compile_times), ("vs_peer", peer_times)):
            row[column] = f"{speedup(other, times):.3f}" if other is not None else ""
        row |= {"device": self.name, "commit": self.commit}
        self.rows.append(row)
        line = [f"{row[c]:>{w}}" for c, w in (("ms_p20", 9), ("ms_p50", 9), ("ms_p80", 9), ("GB/s", 8), ("TFLOP/s", 8))]
        line += [f"{row[c]:>{w}}" for c, w in (("pct_roofline", 6), ("peak_MB", 8), ("vs_torch", 8), ("vs_peer", 8))]
        print(f"{op:<22.22} {shape:<26.26} {row['dtype']:<9} {backend:<24.24}" + " ".join(line), flush=True)

    @staticmethod
    def header() -> None:
        """Print the column heads of :meth:`add`'s lines."""
        heads = ("ms_p20", 9), ("ms_p50", 9), ("ms_p80", 9), ("GB/s", 8), ("TFLOP/s", 8), ("roof%", 6), ("peak_MB", 8)
        text = " ".join(f"{name:>{width}}" for name, width in (*heads, ("vs_torch", 8), ("vs_peer", 8)))
        print(f"\n{'op':<22} {'shape':<26} {'dtype':<9} {'backend':<24}{text}", flush=True)

    def write(self, path: Path) -> None:
        """Write the rows as CSV."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)

    def plot(self, path: Path, ours: str) -> None:
        """Draw the rows with GB/s and TFLOP/s on the roofline of this run; backends whose name starts with ``ours`` are
        filled. Needs matplotlib; without it nothing is drawn, with a note."""
        try:
            import matplotlib

            matplotlib.use("Agg")
            import matplotlib.pyplot as plt
        except ImportError:
            print("no roofline plot: matplotlib is not installed")
            return
        figure, axes = plt.subplots(figsize=(8, 5))
        points = [(r, float(r["TFLOP/s"]), float(r["GB/s"])) for r in self.rows if r["TFLOP/s"] and r["GB/s"]]
        if not points:
            return
        xs = [10 ** (e / 10) for e in range(-10, 41)]
        for k, (dtype, rate) in enumerate(self.top.gemm_tflops.items()):
            axes.loglog(
                xs,
                [min(rate, x * self.top.copy_gbs / 1e3) for x in xs],
                color=f"C{k}",
                label=f"ceiling {str(dtype)[6:]}",
            )
            mine = [p for p in points if p[0]["dtype"] == str(dtype)[6:]]
            for row, tflops, gbs in mine:
                filled = row["backend"].startswith(ours)
                axes.plot(tflops / gbs * 1e3, tflops, "o", color=f"C{k}", fillstyle="full" if filled else "none")
        axes.set(xlabel="operations per byte", ylabel="TFLOP/s", title=f"{self.name} (filled: {ours})")
        axes.legend()
        figure.savefig(path, dpi=120, bbox_inches="tight")
        plt.close(figure)
        print(f"wrote {path}")


@dataclass
class Target:
    """One thing that must be reached: the measured value against its limit."""

    what: str
    value: float
    limit: float
    at_most: bool = True

    @property
    def met(self) -> bool:
        return self.value <= self.limit if self.at_most else self.value >= self.limit


def print_targets(targets: Sequence[Target]) -> None:
    """The table of targets: what, measured, limit, and whether it is met."""
    if not targets:
        return
    print(f"\n{'target':<78}{'measured':>9}{'limit':>9}")
    for t in targets:
        sign = "<=" if t.at_most else ">="
        print(f"{t.what:<78}{t.value:>9.3f}{sign + f'{t.limit:.2f}':>9}  {'met' if t.met else 'MISSED'}")
    print(f"{sum(t.met for t in targets)} of {len(targets)} met")
