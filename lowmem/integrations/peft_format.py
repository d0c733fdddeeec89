"""Adapters in PEFT's folder format: ``adapter_config.json`` and ``adapter_model.safetensors``.

``peft.PeftModel.from_pretrained(base, folder)`` reads what :func:`save_adapter` wrote, and :func:`load_adapter` reads
what ``PeftModel.save_pretrained`` wrote. Neither needs PEFT; both need ``safetensors``. The weights are keyed
``base_model.model.<layer>.lora_A.weight`` (``[r, in_features]``) and ``base_model.model.<layer>.lora_B.weight``
(``[out_features, r]``), and for DoRA ``base_model.model.<layer>.lora_magnitude_vector`` (``[out_features]``);
convolutions have 4-D ones, and embeddings ``lora_embedding_A`` ``[r, V]`` and ``lora_embedding_B`` ``[N, r]``.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import bad
from ..nn.lora import FusedLoRALinear
from ..nn.lora_embedding import FusedLoRAEmbedding
from ..nn.lora_layer import LoRALayer
from . import _peft_config
from ._files import replace_files
from ._peft_config import CONFIG, WEIGHTS, Settings

_PREFIX = "base_model.model."
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # what wrappers put in module names


def _modules(op: str, model: nn.Module) -> tuple[nn.Module, dict[str, nn.Module], dict[str, LoRALayer]]:
    """The model without its wrappers, its modules by the names they have without them, and the LoRA layers of those."""
    if not isinstance(model, nn.Module):
        bad(op, "model", "a torch.nn.Module", type(model).__name__, kind=TypeError)
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            break
    modules = {
        ".".join(part for part in name.split(".") if part not in _WRAPPERS): module
        for name, module in model.named_modules()
    }
    layers = {name: module for name, module in modules.items() if isinstance(module, LoRALayer)}
    if not layers:
        hint = "lowmem.convert it first"
        bad(op, "model", "FusedLoRALinear layers in it", f"a {type(model).__name__} without any", hint=hint)
    if "" in layers:
        bad(op, "model", "a module that holds FusedLoRALinear layers by name", "such a layer itself")
    return model, modules, layers


MAGNITUDE = "lora_magnitude_vector"
SIDES, EMBEDDING_SIDES = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")


def _key(layer: str, side: str) -> str:
    return f"{_PREFIX}{layer}.{side}" + (".weight" if side in SIDES else "")


def _sides(embedding: bool) -> tuple[str, str]:
    return EMBEDDING_SIDES if embedding else SIDES


def _parameters(layer: LoRALayer, name: str) -> dict[str, Tensor]:
    """The file's name of each part of adapter ``name`` to the parameter."""
    a, b = _sides(isinstance(layer, FusedLoRAEmbedding))
    parts = {a: layer.lora_A[name], b: layer.lora_B[name]}
    return parts | ({MAGNITUDE: layer.lora_magnitude[name]} if name in layer.lora_magnitude else {})


def _shapes(layer: LoRALayer, s: Settings) -> dict[str, tuple[int, ...]]:
    sides = _sides(isinstance(layer, FusedLoRAEmbedding))
    shapes = dict(zip(sides, layer.adapter_shapes(s.r), strict=True))
    return shapes | ({MAGNITUDE: (layer.adapter_shapes(s.r)[1][0],)} if s.use_dora else {})


def _check_storage(op: str, what: str, tensor: Tensor) -> None:
    if type(tensor).__name__ == "DTensor":
        bad(op, "model", "whole parameters", f"{what} sharded as a DTensor", hint="gather it first")
    if tensor.is_meta:
        bad(op, "model", "parameters with storage", f"{what} on the meta device")


def _need_safetensors(op: str) -> Any:
    try:
        import safetensors
    except ImportError:
        bad(op, "safetensors", "the package to be installed", "none", hint="pip install safetensors", kind=ImportError)
    return safetensors


# ---------------------------------------------------------------------------------------------------------------- save


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str = "default",
    base_model_name_or_path: str | None = None,
) -> None:
    """Write adapter ``name`` of ``model`` into the folder ``path`` (made where needed) in PEFT's format.

    Every layer that has the adapter is written, in its parameters' dtype, merged or not. A gate, which PEFT's format
    has no place for, is multiplied into lora_B: the file computes the same. Both files are written in full
    beside the old ones before either is replaced: a failure (a full disk, a killed process) leaves the old ones whole.

    Args:
        model: holds :class:`lowmem.nn.FusedLoRALinear` layers; wrappers (DDP, ``torch.compile``) are seen through.
        path: a folder; other files in it are left alone.
        name: which adapter. PEFT's files do not hold the name.
        base_model_name_or_path: what the config names as the base; None takes the model's ``name_or_path``, if any.

    Raises ValueError or TypeError ``lowmem.save_adapter: <argument>: expected ..., got ...``; OSError where a file
    cannot be written.
    """
    op = "save_adapter"
    _need_safetensors(op)
    from safetensors.torch import save_file

    inner, modules, layers = _modules(op, model)
    chosen = {key: layer for key, layer in layers.items() if name in layer.lora_A}
    if not chosen:
        known = sorted({adapter for layer in layers.values() for adapter in layer.lora_A})
        bad(op, "name", f"one of {', '.join(known)}", repr(name))
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        bad(op, "path", "a folder", f"the file {str(path)!r}", kind=NotADirectoryError)
    tensors: dict[str, Tensor] = {}
    for key, layer in chosen.items():
        for side, parameter in _parameters(layer, name).items():
            _check_storage(op, f"{key}.{side}", parameter)
            if side == "lora_B" and name in layer.lora_gate:
                parameter = parameter * layer.lora_gate[name]
            # a copy: safetensors takes no two tensors over one storage, as adapters tied between layers are
            tensors[_key(key, side)] = parameter.detach().to("cpu", copy=True).contiguous()
    others = {n for n in modules if n and n not in chosen and n.rpartition(".")[0] not in chosen}
    config = _peft_config.make(inner, chosen, others, name, base_model_name_or_path)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    replace_files(
        folder,
        {
            WEIGHTS: lambda file: save_file(tensors, file, metadata={"format": "pt"}),
            CONFIG: lambda file: file.write_text(text, encoding="utf-8"),
        },
    )


# ---------------------------------------------------------------------------------------------------------------- load


def _shown(names: Iterable[str], limit: int = 4) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _check_folder(folder: Path) -> None:
    op = "load_adapter"
    if not folder.is_dir():
        got = f"{str(folder)!r}, which is not a folder"
        bad(op, "path", f"a folder with {CONFIG} and {WEIGHTS}", got, kind=FileNotFoundError)
    for needed in (CONFIG, WEIGHTS):
        if not (folder / needed).is_file():
            got = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing in it"
            pickled = needed == WEIGHTS and (folder / "adapter_model.bin").exists()
            hint = "pickles are not read: save it again from PEFT, as safetensors" if pickled else ""
            bad(op, "path", f"{needed} in {str(folder)!r}", got, hint=hint, kind=FileNotFoundError)


def _read_weights(file: Path) -> dict[str, Tensor]:
    safetensors = _need_safetensors("load_adapter")
    try:
        with safetensors.safe_open(file, "pt") as data:
            return {key: data.get_tensor(key) for key in data.keys()}
    except (safetensors.SafetensorError, ValueError) as error:
        got = f"{file.stat().st_size} bytes that are not one: {error}"
        bad("load_adapter", "path", f"a whole safetensors file {WEIGHTS}", got, hint="truncated or corrupt")


def _split(tensors: dict[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], set[str]]:
    """Layer name to its A, B and magnitude under the file's names, and the keys that are none of them."""
    pairs: dict[str, dict[str, Tensor]] = defaultdict(dict)
    extra = set()
    for key, tensor in tensors.items():
        sides = rf"(?:(lora_[AB])\.weight|(lora_embedding_[AB]|{MAGNITUDE}))"
        if found := re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.{sides}", key):
            pairs[found[1]][found[2] or found[3]] = tensor
        else:
            extra.add(key)
    return dict(pairs), extra


def _same_embeddings(tensors: dict[str, Tensor], extra: set[str], layers: Mapping[str, LoRALayer]) -> set[str]:
    """Keys of whole base embeddings, which PEFT writes beside their adapters: taken where they are the model's own."""
    taken = set()
    for name, layer in layers.items():
        key = f"{_PREFIX}{name}.base_layer.weight"
        if isinstance(layer, FusedLoRAEmbedding) and key in extra:
            theirs = tensors[key].to(layer.weight)
            if layer.merged is None and not torch.equal(theirs, layer.weight):
                got = "another one" if theirs.shape == layer.weight.shape else f"shape {list(theirs.shape)}"
                bad("load_adapter", "path", f"the model's own embedding as {key}", got, hint="load it into the model")
            taken.add(key)
    return taken


def _check_pair(layer: LoRALayer, name: str, key: str, pair: dict[str, Tensor], s: Settings) -> None:
    op = "load_adapter"
    if s.use_dora and layer.only_plain:
        bad(op, "path", f"no DoRA on {key} ({layer.only_plain})", f"use_dora=true in {CONFIG}")
    for side, shape in _shapes(layer, s).items():
        tensor = pair[side]
        if tuple(tensor.shape) != shape:
            sizes = f"{layer.in_features} -> {layer.out_features}" if isinstance(layer, FusedLoRALinear) else ""
            why = f"r={s.r} in {CONFIG}, the layer is {sizes or list(layer.weight.shape)}"
            bad(op, "path", f"{_key(key, side)} of shape {list(shape)} ({why})", f"shape {list(tensor.shape)}")
        if not tensor.is_floating_point():
            bad(op, "path", f"{_key(key, side)} in a floating dtype", tensor.dtype, kind=TypeError)
    if layer.merged is not None:
        bad(op, "model", "layers that are not merged", f"{key} with {layer.merged!r} merged", hint="unmerge() first")
    if name in layer.lora_A:
        if layer.r[name] != s.r:
            hint = "load it under another name, or convert the model with the file's rank"
            bad(op, "path", f"r={layer.r[name]} for {key}, whose adapter {name!r} has it", f"r={s.r}", hint=hint)
        parameters = _parameters(layer, name)
        if name in layer.lora_gate or (MAGNITUDE in parameters) != s.use_dora:
            kind = "a gate" if name in layer.lora_gate else "a magnitude" if MAGNITUDE in parameters else "no magnitude"
            want = f"an adapter of the file's kind (use_dora={s.use_dora}, no gate) as {name!r} of {key}"
            bad(op, "name", want, kind, hint="load it under another name")
        for side, parameter in parameters.items():
            _check_storage(op, f"{key}.{side}", parameter)
    else:
        _check_storage(op, f"{key}.weight", layer.weight)


def load_adapter(model: nn.Module, path: str | os.PathLike[str], *, name: str = "default", strict: bool = True) -> None:
    """Read the PEFT adapter in folder ``path`` into ``model`` as adapter ``name``; make it the active, trainable one.

    Layers without an adapter of that name get one, with the file's rank, alpha, dropout and rsLoRA flag. Where layers
    have one, its weights, alpha and rsLoRA flag are replaced; rank must agree, dropout stays as it is. Weights are cast
    to the parameters' dtype. Everything is checked before the first write: an error leaves the model as it was.

    Args:
        model: holds :class:`lowmem.nn.FusedLoRALinear` layers (see :func:`lowmem.convert`).
        path: a folder that PEFT's ``save_pretrained`` or :func:`save_adapter` wrote.
        name: what the adapter is called in ``model``.
        strict: the file must hold weights for exactly the model's FusedLoRALinear layers and the layers that its config
            targets, and its config nothing unknown. False ignores what is more, leaves layers without weights as they
            are, and warns of both; wrong shapes, damaged files and unsupported settings stay errors.

    Raises ValueError, TypeError or FileNotFoundError ``lowmem.load_adapter: <argument>: expected ..., got ...``.
    """
    op = "load_adapter"
    if not isinstance(name, str) or not name or "." in name:
        bad(op, "name", "a non-empty string without dots", repr(name))
    _, modules, layers = _modules(op, model)
    folder = Path(path)
    _check_folder(folder)
    config = _peft_config.read(folder, strict)
    tensors = _read_weights(folder / WEIGHTS)
    pairs, extra = _split(tensors)
    extra -= _same_embeddings(tensors, extra, layers)
    kinds = (nn.Linear, nn.Embedding, nn.Conv2d)
    plain = {key for key, module in modules.items() if isinstance(module, kinds) and key not in layers}

    sides = {}  # of each layer: the names that must be there
    for key, pair in pairs.items():
        ab = _sides(isinstance(layers[key], FusedLoRAEmbedding) if key in layers else EMBEDDING_SIDES[0] in pair)
        sides[key] = (*ab, MAGNITUDE) if config.get("use_dora") else ab
        torn = [_key(key, side) for side in sides[key] if side not in pair]
        if torn:
            bad(op, "path", f"{', '.join(sides[key][:-1])} and {sides[key][-1]} of every layer", f"no {_shown(torn)}")
    extra |= {_key(key, side) for key, pair in pairs.items() for side in pair.keys() - set(sides[key])}
    if unconverted := plain & pairs.keys():
        hint = "lowmem.convert them first"
        kind = type(modules[min(unconverted)]).__name__
        got = f"nn.{kind} at {_shown(unconverted)}"
        bad(op, "model", "FusedLoRALinear where the file has weights", got, hint=hint)
    extra |= {_key(key, side) for key in pairs.keys() - layers.keys() for side in sides[key]}
    missing = (layers.keys() | _peft_config.targeted(config, plain)) - pairs.keys()
    chosen = {key: pair for key, pair in pairs.items() if key in layers}
    if not chosen:
        bad(op, "path", "weights for the model's layers", f"none, but {_shown(extra) or 'an empty file'}")
    if strict and missing:
        hint = "strict=False leaves those layers as they are"
        bad(op, "path", f"weights for {len(missing | chosen.keys())} layers", f"none for {_shown(missing)}", hint=hint)
    if strict and extra:
        hint = "strict=False ignores them"
        bad(op, "path", "weights for the model's layers alone", f"also {_shown(extra)}", hint=hint)
    settings = {key: _peft_config.settings(config, key) for key in chosen}
    for key, pair in chosen.items():
        _check_pair(layers[key], name, key, pair, settings[key])
    if missing:
        warnings.warn(f"lowmem.load_adapter: no weights for {_shown(missing)}: left as they are", stacklevel=2)
    if extra:
        warnings.warn(f"lowmem.load_adapter: ignored {_shown(extra)}", stacklevel=2)

    for key, pair in chosen.items():  # nothing is written before this line, nothing is checked after it
        layer, s = layers[key], settings[key]
        if name not in layer.lora_A:
            layer.add_adapter(
                name, r=s.r, alpha=s.alpha, dropout=s.dropout, use_rslora=s.use_rslora, use_dora=s.use_dora
            )
        layer.alpha[name], layer.use_rslora[name] = s.alpha, s.use_rslora
        with torch.no_grad():
            for side, parameter in _parameters(layer, name).items():
                parameter.copy_(pair[side])
        layer.set_adapter(name)
