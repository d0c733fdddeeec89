"""Runs the parts of `make test` and says at the end, in one line each, what became of them.

    python tools/run_tests.py [--jobs N] [--fix] [lint] [cpp] [cpu] [interpret] [emulate] [compile]

No part named means all of them, each in its own process: a failure in one does not hide the others. The exit status is
0 only where every part passed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def tool(name: str) -> str:
    """A program of this environment, or the one on the PATH."""
    return str(BIN / name) if (BIN / name).exists() else name


def run(command: list[str], env: dict[str, str] | None = None) -> tuple[int, str]:
    """Run in the project's root, show the output as it comes; returns the exit status and the last line of it."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    last = ""
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    return process.wait(), last


def pytest_part(name: str, marks: str, env: dict[str, str] | None = None) -> Callable[[int], tuple[bool, str]]:
    """A part that is one pytest run over the tests that ``marks`` selects."""

    def part(jobs: int) -> tuple[bool, str]:
        threads = str(max(1, (os.cpu_count() or 1) // jobs))
        settings = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **(env or {})}
        settings["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that wait must not spin on the other process's core
        command = [sys.executable, "-m", "pytest", "-q", "-m", marks, "tests"]
        command += ["-n", str(jobs), "--dist", "loadgroup"] if jobs > 1 else []
        status, last = run(command, settings)
        text = re.sub(r"^=+ | =+$", "", last)
        return status == 0, text if status != 5 else f"no test is marked for it ({marks})"

    part.__doc__ = name
    return part


def cpp_sources() -> list[str]:
    """Every C++ and CUDA file of the project, as clang-format wants them."""
    folders = [ROOT / "csrc", ROOT / "tests"]
    kinds = {".h", ".cpp", ".cu", ".cuh"}
    return sorted(str(p.relative_to(ROOT)) for f in folders for p in f.rglob("*") if p.suffix in kinds)


def lint(fix: bool) -> tuple[bool, str]:
    """ruff, clang-format, mypy and the pages' links, all of them even where one fails."""
    commands = {
        "ruff check": [tool("ruff"), "check", *(["--fix"] if fix else []), "."],
        "ruff format": [tool("ruff"), "format", *([] if fix else ["--check"]), "."],
        "clang-format": [tool("clang-format"), *(["-i"] if fix else ["--dry-run", "-Werror"]), *cpp_sources()],
        "mypy": [sys.executable, "-m", "mypy"],
        "pages": [sys.executable, "tools/check_docs.py"],
    }
    failed = []
    for name, command in commands.items():
        print(f"-- {name}", flush=True)
        if run(command)[0] != 0:
            failed.append(name)
    return not failed, f"failed: {', '.join(failed)}" if failed else ", ".join(commands)


def cpp(jobs: int) -> tuple[bool, str]:
    """The C++ unit tests of csrc/common, through CMake."""
    build = ROOT / "build" / "cmake"
    ninja = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"] if shutil.which(tool("ninja")) else []
    configure = [tool("cmake"), "-S", ".", "-B", str(build), "-DCMAKE_BUILD_TYPE=Release", *ninja]
    configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    steps = [
        configure,
        [tool("cmake"), "--build", str(build), "--target", "unit_tests", "-j", str(jobs)],
        [tool("ctest"), "--test-dir", str(build), "--output-on-failure", "--no-tests=error"],
    ]
    for step in steps:
        status, last = run(step)
        if status != 0:
            return False, last
    return True, "csrc/common"


def main() -> int:
    """Parse the command line, run the parts, print the summary."""
    parts: dict[str, Callable[[int], tuple[bool, str]]] = {
        "cpp": cpp,
        "cpu": pytest_part("cpu", "not interpret and not emulate and not compile and not gpu"),
        "interpret": pytest_part("interpret", "interpret and not gpu", {"TRITON_INTERPRET": "1"}),
        "emulate": pytest_part("emulate", "emulate and not interpret and not gpu"),
        "compile": pytest_part("compile", "compile and not interpret and not emulate and not gpu"),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="processes at once (at most 8 are used)")
    parser.add_argument("--fix", action="store_true", help="lint: rewrite the files instead of only looking")
    parser.add_argument("parts", nargs="*", metavar="part", help=f"lint, {', '.join(parts)}; default: all")
    args = parser.parse_args()
    parts = {"lint": lambda jobs: lint(args.fix), **parts}
    unknown = [name for name in args.parts if name not in parts]
    if unknown:
        parser.error(f"part: expected some of {', '.join(parts)}, got {' '.join(unknown)}")
    jobs = max(1, min(args.jobs, 8))
    results = []
    for name in args.parts or parts:
        print(f"== {name}", flush=True)
        start = time.monotonic()
        good, text = parts[name](jobs)
        results.append((name, good, f"{text} [{time.monotonic() - start:.0f} s]"))
    print("== summary")
    for name, good, text in results:
        print(f"   {name:10s} {'passed' if good else 'FAILED'}: {text}")
    bad = [name for name, good, _ in results if not good]
    print(f"FAILED: {', '.join(bad)}" if bad else f"passed: {', '.join(name for name, _, _ in results)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
