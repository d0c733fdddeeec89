"""Files that are whole or not there."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path


def replace_files(folder: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Write every file under a temporary name in ``folder`` and flush it to the disk; then rename all into place.

    At any failure before the renames the old files stay whole, and no temporary file is left."""
    pending: list[tuple[Path, Path]] = []
    try:
        for filename, write in writers.items():
            temporary = folder / f".{filename}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
            pending.append((temporary, folder / filename))
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        for temporary, target in pending:
            os.replace(temporary, target)
    finally:
        for temporary, _ in pending:
            temporary.unlink(missing_ok=True)
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # the renames themselves
        finally:
            os.close(descriptor)
