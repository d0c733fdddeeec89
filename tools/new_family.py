"""Starts a kernel family from csrc/_template: copies its files to where they belong, under the family's name.

    python tools/new_family.py <family> [--root FOLDER]

Refuses a name that is taken or that is no lower-case identifier, and writes nothing then. CONTRIBUTING.md, "Add a
kernel", says what remains to be done by hand.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACES = {
    "template.py": "lowmem/ops/{}.py",
    "template.cpp": "csrc/cpu/{}.cpp",
    "template.cuh": "csrc/cuda/{}.cuh",
    "template.cu": "csrc/cuda/{}.cu",
    "template_triton.py": "triton_kernels/{}.py",
    "test_template.py": "tests/test_{}.py",
}


def main() -> int:
    """Copy the files; 2 for a name that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", help="the family's one name at every layer, for instance lora")
    parser.add_argument("--root", type=Path, default=ROOT, help="the project's folder")
    args = parser.parse_args()
    if not re.fullmatch(r"[a-z][a-z0-9_]*", args.family):
        parser.error(f"family: expected a lower-case identifier, got {args.family!r}")
    templates = args.root / "csrc" / "_template"
    targets = {templates / name: args.root / place.format(args.family) for name, place in PLACES.items()}
    taken = [str(target.relative_to(args.root)) for target in targets.values() if target.exists()]
    if taken:
        parser.error(f"family: expected a name that is free, got {args.family!r}: {', '.join(taken)} exists")
    for source, target in targets.items():
        text = source.read_text()
        text = re.sub(r" Copy to [^\n]*?\.(?=\s|$|\")", "", text)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(re.sub(r"template(?! ?<|d\b|s\b)", args.family, text))  # not the C++ word
        print(f"wrote {target.relative_to(args.root)}")
    print(f"next: `make build`, then pytest tests/test_{args.family}.py; public names go into lowmem/ops/__init__.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
