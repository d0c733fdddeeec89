"""What `gpu_run.py` runs: each ``part_<name>`` in a process of its own, writing results as they come."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOST = 3  # exit status of a part that lost the device


class Sink:
    """Appends results to ``results.jsonl``, each line whole and on disk before the next thing is tried."""

    def __init__(self, out: Path, part: str) -> None:
        self.path, self.part = out / "results.jsonl", part

    def __call__(self, name: str, status: str, **fields: Any) -> None:
        line = json.dumps({"part": self.part, "name": name, "status": status, **fields}, default=str)
        with open(self.path, "a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(line[:400], flush=True)


def results(out: Path) -> list[dict[str, Any]]:
    """All results written so far; a line cut short by a crash is left out."""
    found = []
    for line in (out / "results.jsonl").read_text().splitlines() if (out / "results.jsonl").exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def short(error: BaseException | str, length: int = 600) -> str:
    """An error's text, shortened in the middle."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"


def lost_device(error: BaseException) -> bool:
    """Whether the CUDA context is gone: nothing after it in this process can work."""
    text = str(error)
    return "CUDA error" in text or "illegal memory access" in text or "unspecified launch failure" in text


# -------------------------------------------------------------------------------------------------------------- parts


def part_load(sink: Sink, args: argparse.Namespace) -> None:
    """Versions, the device, the libraries; a build where they are missing and a compiler is there."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        sink("device", "failed", error=f"torch {torch.__version__} sees no CUDA device")
        raise SystemExit(1)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    for package in ("triton", "numpy", "transformers", "peft"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["commit"] = commit.stdout.strip() or "unknown"
    found["nvcc"] = shutil.which("nvcc") or next((p for p in ["/usr/local/cuda/bin/nvcc"] if os.path.exists(p)), "none")
    if args.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "sm": f"{properties.major}.{properties.minor}"}
        found |= {
            "memory_GiB": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
        }
    else:
        found |= {"device": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    sink("versions", "ok", **found)

    missing = libraries(sink, "before")
    if missing and args.build:
        start = time.time()
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        print(done.stdout, flush=True)
        ok = done.returncode == 0
        sink(
            "build",
            "ok" if ok else "failed",
            seconds=round(time.time() - start, 1),
            error="" if ok else short(done.stdout),
        )
        missing = libraries(sink, "after")


def libraries(sink: Sink, when: str) -> list[str]:
    """Which operator libraries load, in a fresh process; returns the names of those that do not and could."""
    code = (
        "import json; from lowmem import _dispatch as d;"
        "libraries = [[x.name, str(x.path), x.why_not] for x in (d.CPU, d.CUDA)];"
        "print('@' + json.dumps([*libraries, d.table(), d.TRITON_WHY_NOT]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith("@")), None)
    if line is None:
        sink(f"import lowmem ({when})", "failed", error=short(done.stderr))
        raise SystemExit(1)
    cpu, cuda, table, triton = json.loads(line[1:])
    missing = []
    for name, path, why in (cpu, cuda):
        sink(f"{name} ({when})", "ok" if not why else "skipped", path=path, why_not=why)
        if why and "is a CPU build" not in why and "LOWMEM_BACKEND" not in why:
            missing.append(name)
    for operator, device, backend, why in table:
        sink(f"{operator} on {device} ({when})", "ok", backend=backend, why_not=why)
    sink(f"triton ({when})", "ok" if not triton else "skipped", why_not=triton)
    return missing


def part_smoke(sink: Sink, args: argparse.Namespace) -> None:
    """Every operator of every family, and what stands on them, against float64 references on the device."""
    import torch
    from smoke import smokes

    from lowmem.testing import poison_empties

    failed = 0
    for case in smokes(args.device):
        if case.name in args.skip:
            continue
        start = time.time()
        try:
            with poison_empties():
                case.check()
            if args.device == "cuda":
                torch.cuda.synchronize()
            sink(case.name, "ok", seconds=round(time.time() - start, 2))
        except Exception as error:
            failed += 1
            sink(case.name, "failed", error=short(error))
            if lost_device(error):
                raise SystemExit(LOST) from None
    raise SystemExit(1 if failed else 0)


class Recorder:
    """A pytest plugin: failures as they come, and counts often enough that a killed run leaves them."""

    def __init__(self, sink: Sink) -> None:
        self.sink, self.counts, self.last = sink, dict.fromkeys(("passed", "failed", "skipped"), 0), time.time()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.failed or (report.skipped and report.when == "setup"):
            self.counts[report.outcome] += 1
            if report.failed:
                self.sink(report.nodeid, "failed", error=short(report.longreprtext))
        if time.time() - self.last > 20:
            self.last = time.time()
            self.sink("progress", "ok", **self.counts)

    def pytest_sessionfinish(self, session: Any, exitstatus: int) -> None:
        if not hasattr(session.config, "workerinput"):
            self.sink("counts", "ok", exitstatus=int(exitstatus), **self.counts)


def part_tests(sink: Sink, args: argparse.Namespace) -> None:
    """``pytest -m gpu``; on the CPU, the tests that need none."""
    import pytest

    command = ["-q", "--tb=short", "-p", "no:cacheprovider", "--maxfail=40", f"--rootdir={ROOT}"]
    command += ["-m", "gpu" if args.device == "cuda" else "not gpu and not slow and not interpret"]
    if args.device == "cuda":
        try:
            import xdist  # noqa: F401

            command += ["-n", "4"]
        except ImportError:
            pass
    os.chdir(ROOT)
    raise SystemExit(pytest.main([*command, *(args.tests or [str(ROOT / "tests")])], plugins=[Recorder(sink)]))


def part_case(sink: Sink, args: argparse.Namespace) -> None:
    """What runs under the sanitizer: every operator once in each way, small and odd."""
    import torch
    from smoke import smokes

    for case in smokes(args.device):
        if case.run is not None:
            case.run()
            if args.device == "cuda":
                torch.cuda.synchronize()
            print(case.name, "ran", flush=True)


def part_sanitizer(sink: Sink, args: argparse.Namespace) -> None:
    """compute-sanitizer's memcheck, then racecheck, over ``part_case``."""
    script = str(ROOT / "bench" / "gpu_run.py")
    case = [sys.executable, script, "--part", "case", "--device", args.device, "--out", str(args.out)]
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if args.device != "cuda" or not os.path.exists(tool):
        reason = "no CUDA device" if args.device != "cuda" else "compute-sanitizer is not installed"
        plain = subprocess.run(case, capture_output=True, text=True)
        print(plain.stdout, plain.stderr)
        sink("case without the sanitizer", "ok" if plain.returncode == 0 else "failed", error=short(plain.stderr))
        sink("sanitizer", "skipped", why_not=reason)
        raise SystemExit(1 if plain.returncode else 0)
    failed = 0
    deadline = time.time() + args.seconds
    # caching allocator off: its pools hide a read past the end of a tensor
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for check in ("memcheck", "racecheck"):
        start = time.time()
        # the compiled kernels are cached by then; each tool gets half of what is left, at least
        limit = (deadline - start) / (2 if check == "memcheck" else 1) - 2
        command = [tool, "--tool", check, "--error-exitcode", "9", "--print-limit", "20", *case]
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=max(limit, 1))
        except subprocess.TimeoutExpired:
            sink(check, "timeout", seconds=round(time.time() - start, 1))
            continue
        print(done.stdout[-200_000:], done.stderr[-20_000:], flush=True)
        line = next((x for x in done.stdout.splitlines() if "SUMMARY" in x), "no summary")
        ok = done.returncode == 0 and re.search(r"\b0 (errors|hazards)", line)
        failed += not ok
        first = "" if ok else short("\n".join(x for x in done.stdout.splitlines() if x.startswith("========="))[:2000])
        sink(
            check,
            "ok" if ok else "failed",
            seconds=round(time.time() - start, 1),
            summary=line.strip("= "),
            error=first,
        )
    raise SystemExit(1 if failed else 0)


def seconds_of(fn: Callable[[], Any], device: str, repeats: int) -> float:
    """Median seconds of ``fn`` after two warm-ups, by device events on a GPU."""
    import torch

    times = []
    for i in range(repeats + 2):
        if device == "cuda":
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            fn()
            b.record()
            b.synchronize()
            taken = a.elapsed_time(b) / 1e3
        else:
            start = time.perf_counter()
            fn()
            taken = time.perf_counter() - start
        if i >= 2:
            times.append(taken)
    return statistics.median(times)


def part_ceilings(sink: Sink, args: argparse.Namespace) -> None:
    """What this device can do: copy bandwidth (bytes read plus written) and GEMM rates on random data."""
    import torch

    gpu, repeats = args.device == "cuda", 20 if args.device == "cuda" else 3
    source = torch.randn((1 << 30 if gpu else 1 << 24) // 4, device=args.device)
    target = torch.empty_like(source)
    taken = seconds_of(lambda: target.copy_(source), args.device, repeats)
    sink("copy", "ok", GBps=round(2 * source.nbytes / taken / 1e9, 1), MiB=source.nbytes >> 20)
    n = 8192 if gpu else 512
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(n, n, device=args.device).to(dtype) for _ in range(2))
        c = torch.empty(n, n, device=args.device, dtype=dtype)
        taken = seconds_of(lambda a=a, b=b, c=c: torch.mm(a, b, out=c), args.device, repeats)
        sink(f"gemm {str(dtype)[6:]} {n}", "ok", TFLOPs=round(2 * n**3 / taken / 1e12, 2))


# script and arguments, the most telling first; each ends by itself in a minute or two
BENCHES = (
    ("bench_lora.py", "--only", "layer", "--dtypes", "bf16"),
    ("bench_lora.py", "--only", "kernel", "--dtypes", "bf16"),
    ("bench_lora.py", "--only", "overhead", "--dtypes", "bf16"),
    ("bench_lora.py", "--only", "layer", "--dtypes", "fp32"),
    ("bench_lora.py", "--only", "kernel", "--dtypes", "fp32"),
    ("bench_lowrank.py", "--only", "step"),
    ("bench_activation.py", "--only", "loss", "--dtypes", "bf16"),
    ("bench_activation.py", "--only", "kernel", "--dtypes", "bf16"),
    ("bench_lora_dora.py", "--dtypes", "bf16"),
    ("bench_lowrank.py", "--only", "refresh"),
)
QUICK = (("bench_lora.py", "--only", "layer,kernel,overhead", "--dtypes", "bf16"),)
"""The same on a CPU, to see that it runs."""


def part_bench(sink: Sink, args: argparse.Namespace) -> None:
    """The families' benchmarks piece by piece; rows join ``bench.csv`` as each piece ends."""
    failed = 0
    for script, *options in BENCHES if args.device == "cuda" else QUICK:
        start, part = time.time(), args.out / "piece.csv"
        command = [sys.executable, str(ROOT / "bench" / script), "--device", args.device, *options]
        command += ["--csv", str(part), *(["--quick"] if args.device == "cpu" else [])]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        said = []
        for line in child.stdout or ():
            print(line, end="", flush=True)
            said.append(line.rstrip())
        failed += child.wait() != 0
        rows = part.read_text().splitlines() if part.exists() else []
        with open(args.out / "bench.csv", "a") as whole:
            whole.writelines(f"{row}\n" for row in rows[whole.tell() > 0 :])  # one header
        part.unlink(missing_ok=True)
        name = " ".join([script.removeprefix("bench_").removesuffix(".py"), *(o for o in options if o[:2] != "--")])
        plot = part.with_suffix(".png")
        if plot.exists():
            plot.replace(args.out / f"bench-{re.sub('[^a-z0-9]+', '-', name)}.png")
        status, took = ("failed" if child.returncode else "ok"), round(time.time() - start, 1)
        error = short("\n".join(said[-12:])) if child.returncode else ""
        targets = [line for line in said if line.endswith((" met", " MISSED")) and not line[:1].isdigit()]
        sink(name, status, seconds=took, rows=max(len(rows) - 1, 0), targets=targets, error=error)
    raise SystemExit(1 if failed else 0)
