"""``lowmem.convert``: put this package's layers in the place of a model's own."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from ._errors import bad
from .nn.lora import PARTS, FusedLoRALinear, _check_adapter, lora_layers
from .nn.lora_group import FusedLoRAGroup, groups_by_call, groups_by_name

Model = TypeVar("Model", bound=nn.Module)


def output_head(model: nn.Module) -> nn.Module | None:
    """The model's output embedding where it names one (transformers' ``get_output_embeddings``)."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def why_not(module: nn.Module, head: nn.Module | None = None) -> str:
    """Why ``module`` cannot become a :class:`FusedLoRALinear`; '' where it can."""
    if isinstance(module, FusedLoRALinear):
        return "already converted"
    if module is head:
        return "the output head"
    if type(module) is nn.Linear:
        return "" if module.weight.is_floating_point() else f"a weight in {module.weight.dtype}"
    if isinstance(module, nn.Linear):
        return f"{type(module).__name__} is a subclass of nn.Linear with a forward of its own"
    return f"{type(module).__name__} is not an nn.Linear"


def _targets(model: nn.Module, target_modules: str | Collection[str]) -> dict[str, nn.Linear]:
    """Name to module of every ``nn.Linear`` that ``target_modules`` names, PEFT's matching rules."""
    head = output_head(model)
    candidates = dict(model.named_modules(remove_duplicate=False))
    if target_modules == "all-linear":
        return {name: m for name, m in candidates.items() if name and not why_not(m, head)}
    if isinstance(target_modules, str):
        pattern = re.compile(target_modules)
        matched = {name: m for name, m in candidates.items() if pattern.fullmatch(name)}
    else:
        wanted = set(target_modules)
        matched = {name: m for name, m in candidates.items() if name in wanted or _suffix_in(name, wanted)}
    for name, module in matched.items():
        reason = why_not(module)
        if reason:
            bad("convert", "target_modules", "names of nn.Linear layers", f"{name!r}: {reason}", kind=TypeError)
    return matched


def _suffix_in(name: str, wanted: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[i:]) in wanted for i in range(1, len(parts)))


def convert(
    model: Model,
    *,
    r: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: str | Collection[str] = "all-linear",
    use_rslora: bool = False,
    adapter_dtype: torch.dtype | None = None,
    mask: Literal["bits", "seed"] = "bits",
    use_dora: bool = False,
    gate: bool = False,
    train: Collection[str] = PARTS,
    name: str = "default",
    example_inputs: Any = None,
) -> Model:
    """Replace linear layers by :class:`lowmem.nn.FusedLoRALinear` in place, freeze everything but the adapters, return
    ``model``.

    The layers share the weights they had: no copy of the model is made. Nothing is changed unless all of it can be.

    Args:
        model: any ``nn.Module``.
        r: rank of every adapter.
        alpha: numerator of the scale ``alpha / r``; None means ``r``, a scale of 1.
        dropout: drop probability of the adapters' input while training.
        target_modules: ``"all-linear"`` (every plain ``nn.Linear`` but the output head), another string as a regular
            expression that must match a module's whole name, or a collection of names or dotted suffixes of names, as
            in PEFT.
        use_rslora, adapter_dtype, mask, use_dora, gate, train, name: see :class:`lowmem.nn.FusedLoRALinear`.

        example_inputs: arguments for one call of ``model`` (a dict of keywords, a tuple, or a tensor), made here once
            in
            eval mode without gradients, to see which layers read the same tensor: those are grouped
            (:class:`lowmem.nn.FusedLoRAGroup`). None groups q/k/v and gate/up projections by their usual names.

    Raises ValueError or TypeError ``lowmem.convert: <argument>: expected ..., got ...``: nothing matches, a match is no
    plain ``nn.Linear``, or the model is converted already.
    """
    _check_adapter(name, r, r if alpha is None else alpha, dropout)
    present = [layer_name for layer_name, _ in lora_layers(model)]
    if present:
        got = f"{len(present)} FusedLoRALinear ({present[0]!r}, ...)"
        bad("convert", "model", "a model that is not converted", got, hint="layer.add_adapter adds another adapter")
    targets = _targets(model, target_modules)
    if not targets:
        linears = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        bad(
            "convert",
            "target_modules",
            f"names of nn.Linear layers (there are: {', '.join(linears) or 'none'})",
            repr(target_modules),
        )
    layers: dict[int, FusedLoRALinear] = {}  # one layer for a module that is used in several places
    for module in targets.values():
        if id(module) not in layers:
            layers[id(module)] = FusedLoRALinear.from_linear(
                module,
                r=r,
                alpha=r if alpha is None else alpha,
                dropout=dropout,
                use_rslora=use_rslora,
                adapter_dtype=adapter_dtype,
                mask=mask,
                use_dora=use_dora,
                gate=gate,
                train=train,
                name=name,
            )
    model.requires_grad_(False)  # the adapters are not in it yet
    for qualified, module in targets.items():
        parent, _, child = qualified.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[id(module)])
    found = groups_by_name(model) if example_inputs is None else groups_by_call(model, example_inputs)
    for caller, members in found:
        FusedLoRAGroup(members).attach(caller)
    return model
