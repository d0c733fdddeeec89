"""Everything worth knowing from a GPU that is at hand for a few minutes, in order of value and never past the time.

    python bench/gpu_run.py --minutes 9 --out out/gpu [--only smoke,tests] [--device cuda]

Parts, in order: ``load`` (versions, devices, which libraries load and why others do not; builds what is missing),
``smoke`` (every operator against its float64 reference), ``tests`` (``pytest -m gpu``), ``sanitizer``
(compute-sanitizer's memcheck and racecheck over every operator), ``ceilings`` (copy bandwidth and GEMM rate) and
``bench`` (bench/bench_lora.py). Each part is a process of its own: it may crash, hang or lose the device, and the next
one still runs. A part gets its share of the time that is left, so what one does not need goes to the others.

Written to ``--out``, flat and few (results come back from some machines by the file):

* ``results.jsonl``: one JSON object a result, appended as it comes
* ``summary.txt``: the table, rewritten after every part, and printed at the end
* ``log.txt``: what the parts printed (shortened in the middle where it is long)
* ``bench.csv``, ``bench-layer-*.png``: the benchmark's rows and its roofline, where it ran

``--device cpu`` runs the same thing without a GPU, so that this file itself is tested. Exit status: 0 where nothing
failed, 1 otherwise; a part that was skipped, with its reason, is no failure.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# part: its weight in sharing out the time
PARTS = {"load": 3, "smoke": 2, "tests": 5, "sanitizer": 3, "ceilings": 1, "bench": 5}
LOG_BYTES = 1 << 20  # of each part in log.txt
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


def smoke_cases(args: argparse.Namespace) -> list[Any]:
    """Small odd cases first, then one of real size."""
    from lora_cases import Case

    odd = Case(m=33, k=100, n=65, r=7, device=args.device)
    cases = [odd.but(precision=precision) for precision in ("fp32", "bf16", "bf16+fp32", "fp16", "fp64")]
    cases += [
        odd.but(precision="bf16", **change) for change in ({"p": 0.0}, {"bits": False}, {"layout": "padded"}, {"r": 64})
    ]
    size = {"m": 2048, "k": 4096, "n": 4096} if args.device == "cuda" else {"m": 64, "k": 256, "n": 192}
    cases += [Case(**size, r=16, precision=p, device=args.device) for p in ("bf16", "bf16+fp32")]
    return cases


def part_smoke(sink: Sink, args: argparse.Namespace) -> None:
    """Every operator, and the whole linear with its gradients, against the float64 reference on the device."""
    import torch
    from lora_cases import OPERATORS, check_case, check_linear

    from lowmem.testing import poison_empties

    failed = 0
    for case in smoke_cases(args):
        for name in (*OPERATORS, "lora_linear"):
            label = f"{name} {case.precision} M{case.m} K{case.k} N{case.n} r{case.r} p{case.p:g} {case.layout}"
            label += " bits" if case.bits else " seed"
            if label in args.skip:
                continue
            start = time.time()
            try:
                with poison_empties():
                    check_linear(case) if name == "lora_linear" else check_case(name, case)
                if args.device == "cuda":
                    torch.cuda.synchronize()
                sink(label, "ok", seconds=round(time.time() - start, 2))
            except Exception as error:
                failed += 1
                sink(label, "failed", error=short(error))
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
    from lora_cases import OPERATORS, Case, arguments, served

    for case in (
        Case(m=33, k=100, n=65, r=7, precision="bf16", device=args.device),
        Case(m=33, k=100, n=65, r=7, precision="fp32", bits=False, layout="padded", device=args.device),
        Case(m=130, k=264, n=136, r=16, precision="bf16+fp32", device=args.device),
    ):
        for name in OPERATORS:
            served(name)(*arguments(name, case))
            if args.device == "cuda":
                torch.cuda.synchronize()
            print(name, case.precision, "ran", flush=True)


def part_sanitizer(sink: Sink, args: argparse.Namespace) -> None:
    """compute-sanitizer's memcheck, then racecheck, over ``part_case``."""
    case = [sys.executable, __file__, "--part", "case", "--device", args.device, "--out", str(args.out)]
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


def part_bench(sink: Sink, args: argparse.Namespace) -> None:
    """bench/bench_lora.py piece by piece, the most telling first; rows join ``bench.csv`` as each piece ends."""
    script = ROOT / "bench" / "bench_lora.py"
    pieces = [("layer", "bf16"), ("kernel", "bf16"), ("overhead", "bf16"), ("layer", "fp32"), ("kernel", "fp32")]
    if args.device == "cpu":
        pieces = [("layer,kernel,overhead", "bf16")]
    failed = 0
    for only, dtypes in pieces:
        start, part = time.time(), args.out / "piece.csv"
        command = [sys.executable, str(script), "--device", args.device, "--only", only, "--dtypes", dtypes]
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
        plot = part.with_suffix(".png")
        if plot.exists():
            plot.replace(args.out / f"bench-{only.split(',')[0]}-{dtypes}.png") if only.startswith(
                "layer"
            ) else plot.unlink()
        status, took = ("failed" if child.returncode else "ok"), round(time.time() - start, 1)
        error = short("\n".join(said[-12:])) if child.returncode else ""
        targets = [line for line in said if line.endswith((" met", " MISSED")) and not line[:1].isdigit()]
        sink(f"{only} {dtypes}", status, seconds=took, rows=max(len(rows) - 1, 0), targets=targets, error=error)
    raise SystemExit(1 if failed else 0)


# ------------------------------------------------------------------------------------------------------------- the run


def run_part(part: str, args: argparse.Namespace, seconds: float, skip: list[str]) -> tuple[str, float]:
    """One part in a process (and session) of its own; returns its status and how long it took."""
    command = [sys.executable, __file__, "--part", part, "--device", args.device, "--out", str(args.out)]
    command += ["--seconds", str(seconds), *(["--no-build"] if not args.build else [])]
    command += [f"--skip={s}" for s in skip] + [f"--tests={t}" for t in args.tests or []]
    start, log = time.time(), args.out / "part.log"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)}
    env["PYTHONUNBUFFERED"] = "1"
    with open(log, "wb") as output:
        child = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            rc: int | None = child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            rc = None
        finally:
            if child.poll() is None:
                for end in (signal.SIGTERM, signal.SIGKILL):
                    os.killpg(child.pid, end)  # the child's own session: it and what it started
                    try:
                        child.wait(timeout=5)
                        break
                    except subprocess.TimeoutExpired:
                        continue
    text = log.read_bytes()
    log.unlink()
    if len(text) > LOG_BYTES:
        text = text[: LOG_BYTES // 2] + b"\n[...]\n" + text[-LOG_BYTES // 2 :]
    with open(args.out / "log.txt", "ab") as whole:
        whole.write(f"\n===== {part}\n".encode() + text)
    status = {None: "timeout", 0: "ok", LOST: "lost the device"}.get(rc, f"failed (exit {rc})")
    return status, time.time() - start


def summary(out: Path, done: dict[str, tuple[str, float]]) -> str:
    """The table of parts, what failed, and the figures."""
    rows = results(out)
    lines = [f"{'part':10s} {'status':18s} {'seconds':>8s} {'ok':>5s} {'failed':>7s} {'skipped':>8s}"]
    for part, (status, taken) in done.items():
        mine = [r for r in rows if r["part"] == part]
        count = {s: sum(r["status"] == s for r in mine) for s in ("ok", "failed", "skipped")}
        tests = [r for r in mine if r["name"] in ("progress", "counts")]
        if tests:
            count = {"ok": tests[-1]["passed"], **{s: tests[-1][s] for s in ("failed", "skipped")}}
        lines.append(
            f"{part:10s} {status:18s} {taken:8.1f} {count['ok']:5d} {count['failed']:7d} {count['skipped']:8d}"
        )
    for r in rows:
        if r["name"] == "versions":
            keys = ("device", "python", "torch", "triton", "commit")
            lines.append("  ".join(f"{k} {r[k]}" for k in keys if k in r))
        elif r["part"] in ("ceilings", "sanitizer", "bench") or (r["part"] == "load" and r["status"] == "skipped"):
            extra = {
                k: v for k, v in r.items() if k not in ("part", "name", "error", "targets") and v not in ("", None)
            }
            lines.append(f"{r['part']}: {r['name']}: " + ", ".join(f"{k} {v}" for k, v in extra.items()))
            lines += [f"  {line}" for line in r.get("targets", ())]
    bad = [r for r in rows if r["status"] in ("failed", "timeout", "lost")]
    lines += [f"FAILED {r['part']}: {r['name']}: {short(r.get('error', ''), 200)}".replace("\n", " ") for r in bad[:25]]
    if len(bad) > 25:
        lines.append(f"... and {len(bad) - 25} more in results.jsonl")
    text = "\n".join(lines) + "\n"
    (out / "summary.txt").write_text(text)
    return text


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="all parts together take no longer (default 9)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out" / "gpu", help="folder for the results (default out/gpu)"
    )
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts to run, of {','.join(PARTS)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tests", action="append", help="path (or node) for pytest instead of tests/; may repeat")
    parser.add_argument(
        "--no-build", dest="build", action="store_false", help="do not build libraries that are missing"
    )
    for internal in ("--part", "--seconds"):
        parser.add_argument(internal, help=argparse.SUPPRESS, type=float if internal == "--seconds" else str)
    parser.add_argument("--skip", action="append", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.out = args.out.resolve()
    args.only = [part.strip() for part in args.only.split(",") if part.strip()]
    unknown = [part for part in args.only if part not in PARTS]
    if unknown or args.minutes <= 0:
        parser.error(
            f"--only: expected parts of {', '.join(PARTS)}, got {unknown}" if unknown else "--minutes: not positive"
        )
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the parts; see the module's text."""
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part:
        args.seconds = args.seconds or 600.0
        globals()[f"part_{args.part}"](Sink(args.out, args.part), args)
        return 0
    deadline = time.time() + args.minutes * 60
    for pattern in ("results.jsonl", "summary.txt", "log.txt", "part.log", "bench*.csv", "bench*.png", "piece.*"):
        for old in args.out.glob(pattern):
            old.unlink()
    done: dict[str, tuple[str, float]] = {}
    parts = [part for part in PARTS if part in args.only]
    for i, part in enumerate(parts):
        left = deadline - time.time() - 2
        share = left * PARTS[part] / sum(PARTS[p] for p in parts[i:])
        skip: list[str] = []
        losses = 0
        status, taken = ("no time left", 0.0) if share < 1 else run_part(part, args, share, skip)
        while status == "lost the device" and losses < 4 and share - taken > 10:
            losses += 1  # the last result tells which case it was: go on behind it, in a new process
            skip = [r["name"] for r in results(args.out) if r["part"] == part]
            status, more = run_part(part, args, share - taken, skip)
            taken += more
        failed = [r for r in results(args.out) if r["part"] == part and r["status"] == "failed"]
        done[part] = ("failed" if failed and status == "ok" else status, taken)
        text = summary(args.out, done)
        print(f"== {part}: {done[part][0]} in {taken:.1f} s", flush=True)
        if part == "load" and status.startswith("failed"):
            break  # nothing after it could run
    print(text)
    return 0 if all(status == "ok" for status, _ in done.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
