"""Everything worth knowing from a GPU that is at hand for a few minutes, in order of value and never past the time.

    python bench/gpu_run.py --minutes 9 --out out/gpu [--only smoke,tests] [--device cuda]

Parts, in order: ``load`` (versions, devices, which libraries load and why others do not; builds what is missing),
``smoke`` (every operator against its float64 reference), ``tests`` (``pytest -m gpu``), ``sanitizer``
(compute-sanitizer's memcheck and racecheck over every operator), ``ceilings`` (copy bandwidth and GEMM rate) and
``bench`` (the families' benchmarks). `gpu_parts.py` holds them. Each is a process of its own: it may crash, hang or
lose the device, and the next one still runs. A part gets its share of the time that is left, so what one does not need
goes to the others.

What `make gpu-pack` collected (libraries built elsewhere, peers) is taken from ``.gpu-pack`` in the root, if there.

Written to ``--out``, flat and few (results come back from some machines by the file):

* ``results.jsonl``: one JSON object a result, appended as it comes
* ``summary.txt``: the table, rewritten after every part, and printed at the end
* ``log.txt``: what the parts printed (shortened in the middle where it is long)
* ``bench.csv``, ``bench-*.png``: the benchmark's rows and its roofline, where it ran

``--device cpu`` runs the same thing without a GPU, so that this file itself is tested. Exit status: 0 where nothing
failed, 1 otherwise; a part that was skipped, with its reason, is no failure.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "bench")]

import gpu_parts  # noqa: E402
from gpu_parts import LOST, Sink, results, short  # noqa: E402

# part: its weight in sharing out the time
PARTS = {"load": 3, "smoke": 2, "tests": 5, "sanitizer": 3, "ceilings": 1, "bench": 5}
PACK = ROOT / ".gpu-pack"  # what tools/gpu_pack.py collected, where it was brought along
LOG_BYTES = 1 << 20  # of each part in log.txt


# ------------------------------------------------------------------------------------------------------------- the run


def run_part(part: str, args: argparse.Namespace, seconds: float, skip: list[str]) -> tuple[str, float]:
    """One part in a process (and session) of its own; returns its status and how long it took."""
    command = [sys.executable, __file__, "--part", part, "--device", args.device, "--out", str(args.out)]
    command += ["--seconds", str(seconds), *(["--no-build"] if not args.build else [])]
    command += [f"--skip={s}" for s in skip] + [f"--tests={t}" for t in args.tests or []]
    start, log = time.time(), args.out / "part.log"
    paths = [str(ROOT), str(PACK / "site"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
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


def unpack() -> None:
    """Put the pack's operator libraries where they belong, unless there are some already."""
    for library in sorted((PACK / "lowmem").glob("*.so")) if PACK.exists() else ():
        target = ROOT / "lowmem" / library.name
        if not target.exists():
            shutil.copy2(library, target)


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
        getattr(gpu_parts, f"part_{args.part}")(Sink(args.out, args.part), args)
        return 0
    unpack()
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
