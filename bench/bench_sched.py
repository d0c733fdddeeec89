"""The microbatch packer: time and quality, against what jobs need alone and against scipy's MILP.

    python bench/bench_sched.py [--repeat 5] [--csv FILE] [--plain] [--milp-seconds 10]

``alone`` packs each job by itself and runs one after the other; ``in order`` also keeps the samples in their order and
closes a microbatch when the next one does not fit. Lengths are lognormal (median 665, sigma 0.8), clipped to 16-4096,
from a fixed seed. ``--plain`` times the plain-Python packer too, which gives the same schedules.
"""

from __future__ import annotations

import argparse
import csv
import platform
import subprocess
import time
from pathlib import Path

import numpy as np

from lowmem.sched import pack, pack_microbatches

CASES = [  # jobs, samples a job, global batch, capacity, pipeline depth
    (4, 25_000, 32, 16384, 1),
    (4, 25_000, 32, 16384, 4),
    (4, 25_000, 8, 4096, 4),
    (8, 12_500, 16, 8192, 4),
    (1, 100_000, 16, 8192, 1),
    (1, 100_000, 100_000, 8192, 1),
    (1000, 100, 16, 8192, 4),
    (100_000, 1, 1, 8192, 1),
]
FIELDS = "op case backend ms_p20 ms_p50 ms_p80 microbatches lower_bound empty utilisation alone in_order device commit"


def lengths_of(jobs: int, samples: int) -> list[np.ndarray]:
    """The same lengths on every machine."""
    rng = np.random.default_rng(0)
    return [np.clip(rng.lognormal(6.5, 0.8, samples), 16, 4096).astype(np.int64) for _ in range(jobs)]


def in_order(lengths: list[np.ndarray], size: int, capacity: int, depth: int) -> int:
    """Microbatches of jobs one after the other, next fit, the gaps left empty."""
    slots = 0
    for part in lengths:
        for start in range(0, len(part), size):
            slots, room = slots + (depth - 1 if start else 0), 0
            for length in part[start : start + size].tolist():
                if length > room:
                    slots, room = slots + 1, capacity
                room -= length
    return slots


def milp_slots(lengths: list[list[int]], size: int, capacity: int, seconds: float) -> tuple[str, float]:
    """Fewest microbatches by HiGHS for jobs of one global batch each, and the seconds it took."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    flat = [length for part in lengths for length in part]
    n, bins = len(flat), pack_microbatches(lengths, capacity, global_batch_size=size).stats.microbatches + 1
    rows = np.zeros((n + bins, n * bins + bins))
    for i in range(n):
        rows[i, i * bins : (i + 1) * bins] = 1
    for b in range(bins):
        rows[n + b, b : n * bins : bins] = flat
        rows[n + b, n * bins + b] = -capacity
    low, high = np.r_[np.ones(n), np.full(bins, -np.inf)], np.r_[np.ones(n), np.zeros(bins)]
    cost = np.r_[np.zeros(n * bins), np.ones(bins)]
    start = time.perf_counter()
    found = milp(
        cost,
        constraints=LinearConstraint(rows, low, high),
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, 1),
        options={"time_limit": seconds},
    )
    took = time.perf_counter() - start
    answer = "none" if found.fun is None else f"{round(found.fun)}{'' if found.status == 0 else ' (not proven)'}"
    return answer, took


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plain", action="store_true", help="time the plain-Python packer too (once)")
    parser.add_argument("--milp-seconds", type=float, default=10.0)
    args = parser.parse_args()
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    rows = []
    columns = "backend ms slots bound empty filled alone in-order".split()
    print(f"{'jobs x samples, batch, capacity, depth':40s}", *(f"{column:>8s}" for column in columns))
    host = pack._host
    for jobs, samples, size, capacity, depth in CASES:
        lengths = lengths_of(jobs, samples)
        kwargs = {"global_batch_size": size, "pipeline_depth": depth}
        alone = sum(pack_microbatches([part], capacity, **kwargs).stats.microbatches for part in lengths)
        naive = in_order(lengths, size, capacity, depth)
        backends = [("host", host)] if host is not None else []
        backends += [("plain", None)] if args.plain or host is None else []
        for backend, module in backends:
            pack._host = module
            times = []
            for _ in range(args.repeat if module else 1):
                start = time.perf_counter()
                schedule = pack_microbatches(lengths, capacity, **kwargs)
                times.append(1e3 * (time.perf_counter() - start))
            schedule.validate()
            q = schedule.stats
            name = f"{jobs} x {samples}, {size}, {capacity}, {depth}"
            p20, p50, p80 = np.percentile(times, [20, 50, 80])
            figures = [f"{p50:.0f}", q.microbatches, q.lower_bound, q.empty, f"{q.utilisation:.4f}", alone, naive]
            print(f"{name:40s}", *(f"{figure:>8}" for figure in (backend, *figures)), flush=True)
            values = ["pack_microbatches", name, backend, f"{p20:.2f}", f"{p50:.2f}", f"{p80:.2f}", q.microbatches]
            values += [
                q.lower_bound,
                q.empty,
                f"{q.utilisation:.5f}",
                alone,
                naive,
                platform.machine(),
                git.stdout.strip(),
            ]
            rows.append(values)
        pack._host = host
    print("\nexact search against scipy.optimize.milp: 4 jobs of one global batch each, 1500-4096 in 8192")
    columns = "samples slots proven nodes ms milp milp-ms".split()
    print(*(f"{column:>16s}" for column in columns))
    for samples in (12, 16, 24, 32, 48):
        rng = np.random.default_rng(samples)
        lengths = [rng.integers(1500, 4097, samples // 4).tolist() for _ in range(4)]
        start = time.perf_counter()
        q = pack_microbatches(lengths, 8192, global_batch_size=samples).stats
        took = 1e3 * (time.perf_counter() - start)
        try:
            answer, seconds = milp_slots(lengths, samples, 8192, args.milp_seconds)
        except ImportError:
            answer, seconds = "no scipy", float("nan")
        figures = [samples, q.microbatches, q.optimal, q.nodes, f"{took:.1f}", answer, f"{1e3 * seconds:.0f}"]
        print(*(f"{figure!s:>16}" for figure in figures), flush=True)
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with args.csv.open("w", newline="") as file:
            csv.writer(file).writerows([FIELDS.split(), *rows])


if __name__ == "__main__":
    main()
