"""Collects what a bare GPU machine needs beside the sources into one folder, and checks it: `make gpu-pack`.

    python tools/gpu_pack.py [--out .gpu-pack] [--no-peers]

* ``lowmem/``: the operator libraries as they were built here (x86-64 Linux, any Python, torch 2.11 and newer);
* ``site/``: the peers of constraints-peers.txt, unpacked from their wheels, of bitsandbytes only the library of the
  CUDA release and of torchao no compiled kernels (they are for one GPU each, and no benchmark here calls them);
* ``manifest.json``: versions, sizes, what was checked.

``bench/gpu_run.py`` takes the folder up by itself where it lies in the project's root. Exit status 1 where a check
fails: the folder's size, symbols that a torch 2.11 with CUDA lacks, missing code for the wanted GPU, a C library newer
than that machine's.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT_MB = 60
PYTHON, CUDA, ARCH = "3.12", "130", "sm_90"  # of the machine that it is for
GLIBC = (2, 39)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
PRIVATE = re.compile(r"\b(at|c10|torch)::")


def run(command: list[str]) -> str:
    """A command's output; what it printed to stderr is the error where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"gpu-pack: {' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def wanted(name: str) -> bool:
    """Whether a file of a peer's wheel is taken along."""
    if name.endswith((".so", ".dylib", ".dll")) or ".so." in name:
        return name == f"bitsandbytes/libbitsandbytes_cuda{CUDA}.so"
    return (
        not name.startswith("test/")
        and "/tests/" not in name
        and not name.endswith((".pkl", "_hadamard_matrices.json"))
    )


def peers(out: Path, cache: Path) -> dict[str, str]:
    """Download the wheels (kept in ``cache``) and unpack them; returns versions by name."""
    found = {}
    for line in (ROOT / "constraints-peers.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        name, version = line.split("==")
        stem = name.replace("-", "_")
        if not list(cache.glob(f"{stem}-{version}-*.whl")):
            cache.mkdir(parents=True, exist_ok=True)
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(cache)]
            pip += ["--python-version", PYTHON, "--implementation", "cp", *(f"--platform={p}" for p in PLATFORMS)]
            run([*pip, line])
        (wheel,) = cache.glob(f"{stem}-{version}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(out / "site", [n for n in archive.namelist() if wanted(n)])
        found[name] = version
    return found


def libraries(out: Path) -> list[Path]:
    """Copy the built operator libraries; raises where one is missing."""
    taken = []
    for name in ("_C", "_C_cuda"):
        built = sorted((ROOT / "lowmem").glob(f"{name}.abi3.so"))
        if not built:
            raise SystemExit(f"gpu-pack: lowmem/{name}: expected a built library, got none (make build, with nvcc)")
        (out / "lowmem").mkdir(parents=True, exist_ok=True)
        taken.append(Path(shutil.copy2(built[0], out / "lowmem")))
    return taken


def private_symbols(library: Path) -> list[str]:
    """The undefined C++ symbols of torch that ``library`` needs: none of them is stable."""
    text = run(["nm", "-D", "-C", "--undefined-only", str(library)])
    return [line.split(maxsplit=1)[-1] for line in text.splitlines() if PRIVATE.search(line)]


def newest_glibc(library: Path) -> tuple[int, ...]:
    """The newest C library whose symbols ``library`` needs."""
    versions = re.findall(r"@GLIBC_([\d.]+)", run(["nm", "-D", "--undefined-only", str(library)]))
    return max(tuple(int(part) for part in version.split(".")) for version in versions)


def code_for(path: Path) -> set[str]:
    """The GPUs that a CUDA library holds machine code for; ``sm_90`` for sm_90a too, which older tools call so."""
    import importlib.util

    tool = shutil.which("cuobjdump")
    if tool is None and (spec := importlib.util.find_spec("triton")) and spec.origin:
        tool = str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    if tool is None:
        raise SystemExit("gpu-pack: cuobjdump: expected it on the PATH or in the triton wheel, got neither")
    return set(re.findall(r"\.(sm_\d+)a?\.cubin", run([tool, "--list-elf", str(path)])))


def main(argv: list[str] | None = None) -> int:
    """Build the folder, check it, say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / ".gpu-pack")
    parser.add_argument(
        "--no-peers", dest="peers", action="store_false", help="the libraries alone: nothing is downloaded"
    )
    args = parser.parse_args(argv)
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    taken = libraries(args.out)
    found = peers(args.out, ROOT / ".cache" / "peers") if args.peers else {}
    faults = []
    for path in taken:
        faults += [
            f"{path.name}: {symbol}: expected symbols of the stable ABI alone" for symbol in private_symbols(path)
        ]
        if (needs := newest_glibc(path)) > GLIBC:
            faults.append(f"{path.name}: glibc: expected at most {GLIBC}, got {needs}")
    archs = code_for(taken[-1])
    if ARCH not in archs:
        faults.append(f"{taken[-1].name}: expected machine code for {ARCH}, got {', '.join(sorted(archs)) or 'none'}")
    size = sum(p.stat().st_size for p in args.out.rglob("*") if p.is_file())
    if size > LIMIT_MB * 1e6:
        faults.append(f"{args.out.name}: expected at most {LIMIT_MB} MB, got {size / 1e6:.1f}")
    if args.peers and not (args.out / "site" / "bitsandbytes" / f"libbitsandbytes_cuda{CUDA}.so").exists():
        faults.append(f"bitsandbytes: its wheel holds no library for CUDA {CUDA}")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    manifest = {"commit": commit, "bytes": size, "gpus": sorted(archs), "peers": found, "faults": faults}
    (args.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    print(f"{args.out.name}: {size / 1e6:.1f} MB; lowmem/_C, lowmem/_C_cuda for {', '.join(sorted(archs))}")
    print("peers: " + (", ".join(f"{name} {version}" for name, version in found.items()) or "none"))
    for fault in faults:
        print(f"gpu-pack: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
