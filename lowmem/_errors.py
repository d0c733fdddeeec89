"""The one form of every error about bad input: ``lowmem.<op>: <argument>: expected <what>, got <what>``."""

from __future__ import annotations

from typing import NoReturn


def bad(
    op: str, argument: str, expected: str, got: object, *, hint: str = "", kind: type[Exception] = ValueError
) -> NoReturn:
    """Raise ``kind`` with the package's error form; ``hint`` says how to fix it, where there is one way."""
    tail = f" ({hint})" if hint else ""
    raise kind(f"lowmem.{op}: {argument}: expected {expected}, got {got}{tail}")
