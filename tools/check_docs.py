"""Checks what the pages say against the tree: relative links, `make` targets, environment flags, files.

    python tools/check_docs.py

Prints one line a fault, `<page>:<line>: <what>`, and exits with 1 where there is any.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
TARGET = re.compile(r"`make ([a-z-]+)")
FLAG = re.compile(r"\bLOWMEM_[A-Z0-9_]+\b")
PATH = re.compile(r"`((?:csrc|lowmem|tests|bench|triton_kernels|examples|tools|docs)/[\w./-]+)`")
BUILT = ("lowmem/_C", "lowmem/_host")  # what a build leaves
# macros of csrc/module.cpp: not read from the environment
NOT_FLAGS = {"LOWMEM_PASTE", "LOWMEM_PASTE_", "LOWMEM_TEXT", "LOWMEM_TEXT_"}


def pages() -> list[Path]:
    """Every Markdown page of the project."""
    return sorted(
        page for where in ("*.md", "docs/**/*.md", "bench/**/*.md", "tests/**/*.md") for page in ROOT.glob(where)
    )


def sources() -> Iterator[Path]:
    """Every file that may read an environment flag."""
    yield from (ROOT / name for name in ("setup.py", "Makefile"))
    for folder in ("lowmem", "triton_kernels", "tests", "bench", "examples", "tools", "csrc"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"} and "__pycache__" not in path.parts:
                yield path


def faults() -> Iterator[str]:
    """One line for everything that a page names and that is not there, and for every flag that ENV.md leaves out."""
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    read = {flag for path in sources() for flag in FLAG.findall(path.read_text(errors="replace"))}
    for page in pages():
        name = page.relative_to(ROOT)
        for number, line in enumerate(page.read_text().splitlines(), 1):
            here = f"{name}:{number}"
            for link in LINK.findall(line):
                if "://" not in link and not link.startswith("mailto:") and not (page.parent / link).exists():
                    yield f"{here}: link to {link}, which is not there"
            for target in TARGET.findall(line):
                if target not in targets:
                    yield f"{here}: `make {target}`, which the Makefile does not have"
            for flag in FLAG.findall(line):
                if flag not in read:
                    yield f"{here}: {flag}, which nothing reads"
            for path in PATH.findall(line):
                if not path.startswith(BUILT) and not (ROOT / path).exists():
                    yield f"{here}: {path}, which is not there"
    documented = set(FLAG.findall((ROOT / "ENV.md").read_text()))
    for flag in sorted(read - documented - NOT_FLAGS):
        yield f"ENV.md: {flag} is read and not described"


def main() -> int:
    """Print the faults."""
    found = list(faults())
    print("\n".join(found) if found else f"{len(pages())} pages agree with the tree")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
