"""A quantized model as one safetensors file: its ``state_dict``, with the formats in the file's metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._errors import bad
from ..nn.quant import PackedWeight, QuantLinear
from ..quant.qtensor import TENSORS, QTensor
from ._files import replace_files
from ._stream import NAMES, Entry, header_bytes, read_header, read_tensor, write_tensors
from .quant_checkpoint import FORMATS, _json, _own

Model = TypeVar("Model", bound=nn.Module)


def _keys(name: str) -> dict[str, str]:
    return {part: name if part == "packed" else f"{name}_{part}" for part in TENSORS}


def save_quantized(model: nn.Module, path: str | Path) -> int:
    """Write ``model.state_dict()`` to the safetensors file ``path``, packed weights as their bytes; returns its size.

    The file is written beside its place, flushed and renamed: what stands at ``path`` is whole, the old one or the new
    one. Adapters, where there are any, are in it too. :func:`load_quantized` and :func:`read_checkpoint` read it.

    Raises TypeError ``lowmem.save_quantized: model: expected ..., got ...`` for a dtype that safetensors lacks.
    """
    state: dict[str, Tensor] = model.state_dict()
    formats: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight) and module.qspec is not None:
            key = f"{name}.weight" if name else "weight"
            formats[key] = _json(module.qspec, Entry(module.qdtype, tuple(module.qshape)))
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in NAMES:
            got = getattr(tensor, "dtype", type(tensor).__name__)
            bad("save_quantized", "model", "tensors that safetensors can hold", f"{key}: {got}", kind=TypeError)
    entries = {key: Entry(tensor.dtype, tuple(tensor.shape)) for key, tensor in state.items()}
    target = Path(path)

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            file.write(header_bytes(entries, {"format": "pt", FORMATS: json.dumps(formats)}))
            write_tensors(file, list(entries.items()), state)

    replace_files(target.parent, {target.name: write})
    return target.stat().st_size


def load_quantized(model: Model, path: str | Path) -> Model:
    """Read what :func:`save_quantized` wrote into ``model``, in place, and return it.

    Plain linear layers whose weight is quantized in the file become :class:`lowmem.nn.QuantLinear` (their dense weight
    is let go); layers that are packed already must have the file's format. A tensor is in memory twice at the most one
    at a time. Headers, names, shapes, dtypes and formats are all checked before the first write.

    Raises ValueError, TypeError or OSError ``lowmem.load_quantized: <argument>: expected ..., got ...``.
    """
    op, file = "load_quantized", Path(path)
    if not file.is_file():
        bad(op, "path", "a file that save_quantized wrote", repr(str(file)), kind=FileNotFoundError)
    entries, metadata = read_header(op, file)
    try:
        formats = json.loads(metadata[FORMATS])
        assert isinstance(formats, dict)
    except (KeyError, ValueError, RecursionError, AssertionError):
        bad(op, "path", f"a file with {FORMATS} in its metadata", "none that can be read")
    state = model.state_dict()
    packed: dict[str, set[str]] = {}
    for name in formats:
        packed[name] = {key for key in _keys(name).values() if key in entries}
        layer = _module(op, model, name)
        dense = type(layer) is nn.Linear
        if not dense and not (isinstance(layer, PackedWeight) and layer.qspec is not None):
            bad(op, "model", f"a linear layer at {name!r}", type(layer).__name__)
        shell = _shell(op, name, formats[name], {key: entries[key] for key in packed[name]})
        wanted = (layer.out_features, layer.in_features) if dense else tuple(layer.qshape)
        if shell.shape != wanted:
            bad(op, name, f"shape {wanted}", f"shape {shell.shape}")
        if not dense and shell.spec.code != layer.qspec.code:
            bad(op, name, f"{layer.qspec}, the model's", f"{shell.spec}")
    taken = set().union(*packed.values()) if packed else set()
    rest = sorted(key for key in entries if key not in taken)
    known = sorted(key for key in state if not any(key in _keys(name).values() for name in formats))
    if rest != known:
        lost, extra = sorted(set(known) - set(rest)), sorted(set(rest) - set(known))
        got = f"none for {lost[0]!r}" if lost else f"also {extra[0]!r}"
        bad(op, "path", f"tensors for the model's {len(known)} other entries", got)
    for key in rest:
        if entries[key].shape != tuple(state[key].shape) or entries[key].dtype != state[key].dtype:
            want = f"shape {tuple(state[key].shape)} in {state[key].dtype}"
            bad(op, key, want, f"shape {entries[key].shape} in {entries[key].dtype}")
    with torch.no_grad():
        for name in formats:
            q = _own(op, name, formats[name], {key: read_tensor(file, entries[key]) for key in packed[name]})
            _put(model, name, q)
        for key in rest:
            state[key].copy_(read_tensor(file, entries[key]))
    return model


def _module(op: str, model: nn.Module, name: str) -> Any:
    try:
        return model.get_submodule(name.removesuffix("weight").removesuffix("."))
    except AttributeError:
        bad(op, "path", "weights of the model's layers", f"{name!r}, which it has not")


def _shell(op: str, name: str, told: Any, entries: dict[str, Entry]) -> QTensor:
    """The QTensor that a file holds, without its numbers: everything but them is checked."""
    return _own(op, name, told, {key: torch.empty(e.shape, dtype=e.dtype, device="meta") for key, e in entries.items()})


def _put(model: nn.Module, name: str, q: QTensor) -> None:
    place = name.removesuffix("weight").removesuffix(".")
    layer: Any = model.get_submodule(place)
    if isinstance(layer, PackedWeight):
        for part in TENSORS:
            if (value := getattr(q, part)) is not None:
                getattr(layer, "weight" if part == "packed" else f"weight_{part}").copy_(value)
        return
    made = QuantLinear.from_qtensor(q.to(layer.weight.device), layer.bias).train(layer.training)
    for where in [n for n, m in model.named_modules(remove_duplicate=False) if m is layer]:
        parent, _, child = where.rpartition(".")
        setattr(model.get_submodule(parent), child, made)
