"""Quantizing a checkpoint on the disk, one tensor at a time, and reading it again.

Layout of ours (``layout="lowmem"``): a quantized ``x.weight`` is ``x.weight`` (uint8), ``x.weight_scale`` and the other
parts that its format has, as :class:`lowmem.nn.QuantLinear`'s ``state_dict`` names them; each file's metadata say the
formats (``lowmem.quant``: JSON). ``layout="bitsandbytes"`` writes bitsandbytes' keys and a ``quantization_config``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .._errors import bad
from ..quant.formats import SCALE_DTYPES, QuantSpec, as_spec, row_bytes
from ..quant.qtensor import TENSORS, QTensor, packed_shape, scale_shape
from ..quant.quantize import METHODS, quantize
from ._files import replace_files
from ._stream import Entry, header_bytes, read_header, read_tensor, write_tensors
from .bitsandbytes_format import STATE, from_bitsandbytes, to_bitsandbytes

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SKIP = r"(^|\.)(embed\w*|wte|wpe|lm_head|\w*norm\w*|router|gate)(\.|$)"  # kept as they are: not linear layers, or heads
STATE_BYTES = 384  # bitsandbytes' JSON, padded with spaces: its size is planned before its numbers are known
FORMATS, DIGEST = "lowmem.quant", "lowmem.settings"

Specs = str | QuantSpec | Mapping[str, str | QuantSpec]


def _shards(op: str, source: Path) -> dict[str, list[str] | None]:
    """File to the tensors that the index says it holds (None: no index)."""
    if not source.is_dir():
        bad(op, "source", "a folder with a safetensors checkpoint", repr(str(source)), kind=FileNotFoundError)
    if (source / INDEX).is_file():
        try:
            found = json.loads((source / INDEX).read_text())["weight_map"]
            shards: dict[str, list[str] | None] = {}
            for name, file in found.items():
                names = shards.setdefault(str(file), [])
                assert names is not None
                names.append(name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            bad(op, "source", f"{INDEX} with a weight_map", f"{type(error).__name__} in it")
    elif (source / SINGLE).is_file():
        shards = {SINGLE: None}
    else:
        bad(op, "source", f"{INDEX} or {SINGLE} in it", "neither", kind=FileNotFoundError)
    for file in shards:
        if Path(file).name != file or not (source / file).is_file():
            bad(op, "source", f"the file {file!r} of {INDEX}", "none", kind=FileNotFoundError)
    return shards


def _spec_of(specs: Specs, name: str, entry: Entry, skip: re.Pattern[str]) -> QuantSpec | None:
    layer = name.removesuffix(".weight")
    if isinstance(specs, Mapping):
        found = specs.get(name, specs.get(layer))
        return None if found is None else as_spec("quantize_checkpoint", found)
    fits = name.endswith(".weight") and len(entry.shape) in (2, 3) and entry.dtype.is_floating_point
    if not fits or skip.search(layer) or entry.dtype.itemsize == 1:
        return None
    return as_spec("quantize_checkpoint", specs)


def _planned(name: str, entry: Entry, spec: QuantSpec | None, layout: str) -> dict[str, Entry]:
    """The tensors that ``name`` becomes, before it is read."""
    if spec is None:
        return {name: Entry(entry.dtype, entry.shape)}
    rows, k = math.prod(entry.shape[:-1]), entry.shape[-1]
    count, floats = spec.scale_count(rows, k), spec.scales_in
    second = -(-count // spec.scale_group)
    if layout == "bitsandbytes":
        plan = {name: Entry(torch.uint8, (spec.packed_bytes(rows, k), 1))}
        plan[f"{name}.absmax"] = Entry(torch.uint8 if spec.double_quant else torch.float32, (count,))
        plan[f"{name}.quant_map"] = Entry(torch.float32, (16,))
        if spec.double_quant:
            plan[f"{name}.nested_absmax"] = Entry(torch.float32, (second,))
            plan[f"{name}.nested_quant_map"] = Entry(torch.float32, (256,))
        plan[f"{name}.{STATE}{spec.format}"] = Entry(torch.uint8, (STATE_BYTES,))
        return plan
    groups = scale_shape(spec, entry.shape)
    plan = {name: Entry(torch.uint8, packed_shape(spec, entry.shape)), f"{name}_scale": Entry(floats, groups)}
    if spec.zero_point:
        plan[f"{name}_zero"] = Entry(torch.uint8, groups)
    if spec.double_quant:
        small = (row_bytes(spec.scale_bits, count),)
        plan[f"{name}_scale"] = Entry(torch.uint8, groups if spec.scale_bits == 8 else small)
        plan[f"{name}_scale_code"] = Entry(torch.float32, (2**spec.scale_bits,))
        plan[f"{name}_scale_absmax"] = Entry(floats, (second,))
        plan[f"{name}_scale_offset"] = Entry(floats, (1,))
    return plan


def _parts(name: str, q: QTensor, layout: str) -> dict[str, Tensor]:
    if layout == "lowmem":
        keys = {part: name if part == "packed" else f"{name}_{part}" for part in TENSORS}
        return {keys[part]: t for part, t in zip(TENSORS, q.tensors(), strict=True) if t is not None}
    tensors = to_bitsandbytes(q, name=name)
    key = f"{name}.{STATE}{q.spec.format}"
    spaces = torch.full((STATE_BYTES - tensors[key].numel(),), ord(" "), dtype=torch.uint8)
    return {**tensors, key: torch.cat([tensors[key], spaces])}


def _json(spec: QuantSpec, entry: Entry) -> dict[str, Any]:
    plain = {**asdict(spec), "scale_dtype": str(spec.scales_in).removeprefix("torch.")}
    return {**plain, "shape": list(entry.shape), "dtype": str(entry.dtype).removeprefix("torch.")}


def quantize_checkpoint(
    source: str | Path,
    target: str | Path,
    spec: Specs,
    *,
    skip: str = SKIP,
    method: Literal["absmax", "mse"] = "absmax",
    layout: Literal["lowmem", "bitsandbytes"] = "lowmem",
    device: torch.device | str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> dict[str, int]:
    """Quantize the safetensors checkpoint in folder ``source`` into folder ``target``, file by file.

    At any time one tensor is in memory in high precision. A file is written beside its place, flushed and renamed, so
    what stands under its name is whole; a second call with the same settings goes on after the files that are there.
    Files that are no weights (configuration, tokenizer) are copied.

    Args:
        source: holds ``model.safetensors``, or ``model.safetensors.index.json`` and its files.
        target: another folder, made where needed.
        spec: one for all weights ``*.weight`` of two or three dimensions that ``skip`` does not match, or names (of
            weights or layers, as :func:`lowmem.quant.assign_bits` gives them) to specs for these alone.
        skip: a regular expression, searched in a layer's name.
        method: of :func:`lowmem.quant.quantize`.
        layout: ``"lowmem"``, or ``"bitsandbytes"`` (nf4 and fp4) for what reads its keys.
        device: where weights are quantized.
        progress: called with each tensor's name when it is done.

    Returns the bytes ``{"before": ..., "after": ...}`` of all tensors.

    Raises ValueError, TypeError or OSError ``lowmem.quantize_checkpoint: <argument>: expected ..., got ...``;
    headers and formats of all files are checked before the first is written.
    """
    op = "quantize_checkpoint"
    folder, out = Path(source), Path(target)
    if method not in METHODS[:2]:
        bad(op, "method", "'absmax' or 'mse'", repr(method))
    if layout not in ("lowmem", "bitsandbytes"):
        bad(op, "layout", "'lowmem' or 'bitsandbytes'", repr(layout))
    shards = _shards(op, folder)
    if out.exists() and (not out.is_dir() or out.resolve() == folder.resolve()):
        bad(op, "target", "another folder", repr(str(target)))
    pattern = re.compile(skip)
    work: dict[str, tuple[dict[str, Entry], dict[str, QuantSpec | None]]] = {}
    for file, names in shards.items():
        entries, _ = read_header(op, folder / file)
        if names is not None and set(names) != entries.keys():
            bad(op, "source", f"the tensors that {INDEX} says are in {file!r}", f"{len(entries)} others")
        work[file] = entries, {n: _spec_of(spec, n, e, pattern) for n, e in entries.items()}
        for name, found in work[file][1].items():
            _check(op, name, entries[name], found, layout)
    used = {n for entries, specs in work.values() for n, s in specs.items() if s is not None}
    if isinstance(spec, Mapping):
        lost = [n for n in spec if n not in used and f"{n}.weight" not in used]
        if lost:
            bad(op, "spec", "names of weights or layers of the checkpoint", repr(lost[0]))
    if not used:
        bad(op, "spec", "weights to quantize", "none that skip leaves")
    out.mkdir(parents=True, exist_ok=True)
    bytes_before = bytes_after = 0
    where: dict[str, str] = {}
    for file, (entries, specs) in work.items():
        plans = {n: _planned(n, e, specs[n], layout) for n, e in entries.items()}
        flat = {key: e for plan in plans.values() for key, e in plan.items()}
        formats = {n: _json(s, entries[n]) for n, s in specs.items() if s is not None}
        stat = (folder / file).stat()
        told = json.dumps([formats, method, layout, sorted(flat), stat.st_size, stat.st_mtime_ns], sort_keys=True)
        metadata = {"format": "pt", FORMATS: json.dumps(formats), DIGEST: hashlib.sha256(told.encode()).hexdigest()}
        where |= dict.fromkeys(flat, file)
        bytes_before += sum(e.nbytes for e in entries.values())
        bytes_after += sum(e.nbytes for e in flat.values())
        if _done(op, out / file, metadata[DIGEST]):
            continue

        def write(
            path: Path,
            head: bytes = header_bytes(flat, metadata),
            shard: Path = folder / file,
            held: dict[str, Entry] = entries,
            plans: dict[str, dict[str, Entry]] = plans,
            specs: dict[str, QuantSpec | None] = specs,
        ) -> None:
            with open(path, "wb") as stream:
                stream.write(head)
                for name, entry in held.items():
                    _write(op, stream, shard, name, entry, specs[name], plans[name], method, layout, device)
                    if progress is not None:
                        progress(name)

        replace_files(out, {file: write})
    _finish(folder, out, where, bytes_after, layout, next(s for _, m in work.values() for s in m.values() if s))
    return {"before": bytes_before, "after": bytes_after}


def _check(op: str, name: str, entry: Entry, spec: QuantSpec | None, layout: str) -> None:
    if spec is None:
        return
    if len(entry.shape) not in (2, 3) or not entry.dtype.is_floating_point or entry.dtype.itemsize == 1:
        bad(op, "spec", "floating weights of two or three dimensions", f"{name!r}: {entry.dtype} {list(entry.shape)}")
    k = entry.shape[-1]
    if not spec.is_table and spec.group_size > 0 and k % spec.group_size:
        bad(op, "spec", f"a group size that divides K = {k} of {name!r}", spec.group_size)
    if layout == "bitsandbytes":
        to_bitsandbytes(quantize(torch.zeros(1, max(spec.group_size, 2)), spec))  # says what it cannot write


def _done(op: str, path: Path, digest: str) -> bool:
    if not path.is_file():
        return False
    _, metadata = read_header(op, path)
    if metadata.get(DIGEST) != digest:
        got = "another one of the same name"
        bad(op, "target", f"no file {path.name!r}, or one of these settings", got, hint="remove it or choose another")
    return True


def _write(
    op: str,
    stream: Any,
    path: Path,
    name: str,
    entry: Entry,
    spec: QuantSpec | None,
    plan: dict[str, Entry],
    method: Any,
    layout: str,
    device: torch.device | str,
) -> None:
    tensor = read_tensor(path, entry)
    if spec is None:
        parts = {name: tensor}
    else:
        try:
            parts = _parts(name, quantize(tensor.to(device), spec, method=method), layout)
        except ValueError as error:
            bad(op, "source", f"a weight {name!r} that can be quantized", str(error))
    write_tensors(stream, list(plan.items()), parts)


def _finish(folder: Path, out: Path, where: dict[str, str], total: int, layout: str, spec: QuantSpec) -> None:
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.endswith((".safetensors", ".index.json", ".bin")):
            shutil.copyfile(path, out / path.name)
    config = out / "config.json"
    if layout == "bitsandbytes" and config.is_file():
        found = json.loads(config.read_text())
        found["quantization_config"] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": spec.format,
            "bnb_4bit_use_double_quant": spec.double_quant,
        }
        replace_files(out, {config.name: lambda path: path.write_text(json.dumps(found, indent=2))})
    if (folder / INDEX).is_file():
        index = {"metadata": {"total_size": total}, "weight_map": where}
        replace_files(out, {INDEX: lambda path: path.write_text(json.dumps(index, indent=2))})


def read_checkpoint(source: str | Path) -> Iterator[tuple[str, Tensor | QTensor]]:
    """Name and tensor of each weight in a folder that :func:`quantize_checkpoint` wrote (in either layout) or in any
    other safetensors checkpoint, one after the other: a :class:`QTensor` where it is quantized.

    Raises ValueError ``lowmem.read_checkpoint: <key>: expected ..., got ...`` for damaged files and metadata.
    """
    op, folder = "read_checkpoint", Path(source)
    for file in _shards(op, folder):
        path = folder / file
        entries, metadata = read_header(op, path)
        try:
            formats = json.loads(metadata.get(FORMATS, "{}"))
            assert isinstance(formats, dict)
        except (ValueError, RecursionError, AssertionError):
            bad(op, FORMATS, "a JSON object in the file's metadata", repr(metadata[FORMATS][:80]))
        taken: set[str] = set()
        for name in formats:
            own = {name, *(f"{name}_{part}" for part in TENSORS)}
            mine = [n for n in entries if n in own or n.startswith(f"{name}.")]
            taken |= set(mine)
            tensors = {n: read_tensor(path, entries[n]) for n in mine}
            foreign = any(STATE in n for n in mine)
            yield name, from_bitsandbytes(tensors, name=name) if foreign else _own(op, name, formats[name], tensors)
        for name, entry in entries.items():
            if name not in taken:
                yield name, read_tensor(path, entry)


def _own(op: str, name: str, told: Any, tensors: dict[str, Tensor]) -> QTensor:
    from . import _foreign as foreign

    if not isinstance(told, dict):
        bad(op, name, "its format as a JSON object", repr(told)[:80])
    keys = ("format", "group_size", "double_quant", "zero_point", "scale_bits", "scale_group")
    missing = [key for key in (*keys, "scale_dtype", "shape", "dtype") if key not in told]
    if missing:
        bad(op, name, f"{missing[0]} in its format", repr(told)[:80])
    scale_dtype = foreign.dtype_of(op, name, told["scale_dtype"])
    assert scale_dtype in SCALE_DTYPES
    try:
        spec = QuantSpec(**{key: told[key] for key in keys}, scale_dtype=scale_dtype)
    except (TypeError, ValueError) as error:
        bad(op, name, "a format of this package", str(error)[:200])
    shape = foreign.shape_of(op, name, told["shape"])
    parts = {part: tensors.get(name if part == "packed" else f"{name}_{part}") for part in TENSORS}
    for part in ("packed", "scale"):
        if parts[part] is None:
            bad(op, name, part, "none")
    dtype = torch.float64 if told["dtype"] == "float64" else foreign.dtype_of(op, name, told["dtype"])
    return QTensor(spec=spec, shape=shape, dtype=dtype, **parts).check(op)  # type: ignore[arg-type]
