"""safetensors files one tensor at a time: a header is read or written, then bytes are, and nothing is mapped or kept.

A file is eight bytes (the header's length, little-endian), a JSON header ``{name: {dtype, shape, data_offsets}}`` with
``__metadata__`` of strings, and the tensors' bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._errors import bad

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MOST_HEADER = 100 << 20  # safetensors' own limit


class Entry(NamedTuple):
    """A tensor that a file holds: dtype, shape, and where its bytes start in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(op: str, path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Name to entry of a safetensors file, and its metadata; every entry lies within the file."""

    def damaged(got: str) -> None:
        bad(op, "source", f"a whole safetensors file {path.name!r}", got, hint="truncated or corrupt")

    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MOST_HEADER, size - 8):
            damaged(f"{size} bytes whose header would have {length}")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        damaged(f"a header that is not JSON: {type(error).__name__}")
    if not isinstance(header, dict):
        damaged(f"a header that is a {type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        damaged("metadata that is not text")
    entries = {}
    for name, value in header.items():
        try:
            dtype, shape, (start, stop) = DTYPES[value["dtype"]], tuple(value["shape"]), value["data_offsets"]
            whole = all(type(n) is int and n >= 0 for n in (*shape, start, stop))
            entry = Entry(dtype, shape, 8 + length + start)
            fits = whole and stop - start == entry.nbytes and entry.start + entry.nbytes <= size
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            damaged(f"{name!r}: {str(value)[:120]}")
        entries[name] = entry
    return entries, metadata


def read_tensor(path: Path, entry: Entry) -> Tensor:
    """The tensor of ``entry``, its own memory."""
    with open(path, "rb") as file:
        file.seek(entry.start)
        data = bytearray(entry.nbytes)
        if file.readinto(data) != entry.nbytes:
            raise OSError(f"{path}: ends before its tensors do")
    if not data:
        return torch.empty(entry.shape, dtype=entry.dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(entry.dtype).view(entry.shape)


def header_bytes(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """The length and the header of a file that holds ``entries`` in their order."""
    at, header = 0, {"__metadata__": dict(metadata)} if metadata else {}
    for name, entry in entries.items():
        where = [at, at + entry.nbytes]
        header[name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": where}  # type: ignore[dict-item]
        at += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(file: Any, planned: Sequence[tuple[str, Entry]], tensors: Mapping[str, Tensor]) -> None:
    """The bytes of ``tensors``, which must be as planned."""
    for name, entry in planned:
        value = tensors[name].detach().cpu().contiguous()
        assert value.dtype == entry.dtype and value.numel() == math.prod(entry.shape), name
        if value.numel():
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)
