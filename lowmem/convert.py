"""``lowmem.convert``: put this package's layers in the place of a model's own."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from ._errors import bad
from .act import structure
from .nn.lora import FusedLoRALinear
from .nn.lora_conv import FusedLoRAConv2d
from .nn.lora_embedding import FusedLoRAEmbedding
from .nn.lora_group import FusedLoRAGroup, groups
from .nn.lora_layer import PARTS, LoRALayer, check_adapter, lora_layers
from .nn.quant import QuantLinear
from .nn.sampled import SampledGroup, SampledLinear
from .quant import QuantSpec
from .quant.formats import as_spec
from .sampling import budget_rows

Model = TypeVar("Model", bound=nn.Module)
KINDS = (nn.Linear, nn.Embedding, nn.Conv2d)  # what an adapter goes on


def output_head(model: nn.Module) -> nn.Module | None:
    """The model's output embedding where it names one (transformers' ``get_output_embeddings``)."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def why_not(module: nn.Module, head: nn.Module | None = None) -> str:
    """Why ``module`` cannot take an adapter; '' where it can."""
    if isinstance(module, LoRALayer):
        return "already converted"
    if module is head:
        return "the output head"
    if type(module) is QuantLinear:
        return ""
    for kind in KINDS:
        if type(module) is kind:
            break
        if isinstance(module, kind):
            return f"{type(module).__name__} is a subclass of nn.{kind.__name__} with a forward of its own"
    else:
        return f"{type(module).__name__} is not an nn.Linear, nn.Embedding or nn.Conv2d"
    if not module.weight.is_floating_point():
        return f"a weight in {module.weight.dtype}"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "an embedding with max_norm"
    if isinstance(module, nn.Conv2d) and (module.groups != 1 or module.padding_mode != "zeros"):
        return f"a convolution with groups={module.groups}, padding_mode={module.padding_mode!r}"
    return ""


def _targets(model: nn.Module, target_modules: str | Collection[str]) -> dict[str, nn.Module]:
    """Name to module of everything that ``target_modules`` names, PEFT's matching rules."""
    head = output_head(model)
    candidates = dict(model.named_modules(remove_duplicate=False))
    if target_modules == "all-linear":
        linears = {name: m for name, m in candidates.items() if name and isinstance(m, nn.Linear)}
        return {name: m for name, m in linears.items() if not why_not(m, head)}
    if isinstance(target_modules, str):
        pattern = re.compile(target_modules)
        matched = {name: m for name, m in candidates.items() if pattern.fullmatch(name)}
    else:
        wanted = set(target_modules)
        matched = {name: m for name, m in candidates.items() if name in wanted or _suffix_in(name, wanted)}
    for name, module in matched.items():
        reason = why_not(module)
        if reason:
            want = "names of nn.Linear, nn.Embedding or nn.Conv2d layers"
            bad("convert", "target_modules", want, f"{name!r}: {reason}", kind=TypeError)
    return matched


def _suffix_in(name: str, wanted: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[i:]) in wanted for i in range(1, len(parts)))


def _shares(other: nn.Module, module: nn.Module) -> bool:
    weight = module.weight
    return any(p is weight for p in other.parameters(recurse=False))


def _quant_specs(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    quant: str | QuantSpec | Mapping[str, str | QuantSpec] | None,
) -> dict[str, QuantSpec]:
    """The spec of every layer to quantize, with everything that could make one fail looked at before any is."""
    if quant is None:
        return {}
    op = "convert"
    dense = {n: m for n, m in targets.items() if type(m) is nn.Linear}
    if isinstance(quant, Mapping):
        specs = {n.removesuffix(".weight"): as_spec(op, spec) for n, spec in quant.items()}
        lost = [n for n in specs if n not in dense]
        if lost:
            bad(op, "quant", "names of dense linear layers among target_modules", repr(lost[0]))
    else:
        one = as_spec(op, quant)
        specs = dict.fromkeys(dense, one)
    if not specs:
        bad(op, "quant", "dense linear layers among target_modules", "none")
    for name, spec in specs.items():
        module = dense[name]
        k = module.in_features
        if not spec.is_table and spec.group_size > 0 and k % spec.group_size:
            bad(op, "quant", f"a group size that divides K = {k} of {name!r}", spec.group_size)
        if any(m is not module and _shares(m, module) for m in model.modules()):
            bad(op, "quant", "weights that no other module reads", f"{name!r}, which is tied", hint="untie or leave it")
        if not bool(torch.isfinite(module.weight).all()):
            bad(op, "quant", "finite weights", f"NaN or infinity in {name!r}")
    return specs


def _quantize_layers(model: nn.Module, targets: dict[str, nn.Module], specs: Mapping[str, QuantSpec]) -> None:
    """Put a QuantLinear in the place of each layer that ``specs`` names, in ``model`` and in ``targets``."""
    for name, spec in specs.items():
        module = targets[name]
        if type(module) is not nn.Linear:
            continue  # the same module under another name, done there
        layer = QuantLinear.from_linear(module, spec)
        for place in [n for n, m in model.named_modules(remove_duplicate=False) if m is module]:
            parent, _, child = place.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
            if place in targets:
                targets[place] = layer


def _attention_output(model: nn.Module, name: str) -> bool:
    """Whether ``name`` is the projection behind an attention: beside projections for q, k and v, and none of them."""
    parent, _, child = name.rpartition(".")
    beside = dict(model.get_submodule(parent).named_children())
    return {"q_proj", "k_proj", "v_proj"} <= set(beside) and child not in ("q_proj", "k_proj", "v_proj")


def convert(
    model: Model,
    *,
    r: int | None = None,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: str | Collection[str] = "all-linear",
    quant: str | QuantSpec | Mapping[str, str | QuantSpec] | None = None,
    use_rslora: bool = False,
    adapter_dtype: torch.dtype | None = None,
    mask: Literal["bits", "seed"] = "bits",
    use_dora: bool = False,
    gate: bool = False,
    train: Collection[str] = PARTS,
    name: str = "default",
    activations: Literal["fp8", "recompute"] | None = None,
    sample_budget: float | None = None,
    example_inputs: Any = None,
) -> Model:
    """Replace layers by :class:`lowmem.nn.FusedLoRALinear`, and where ``target_modules`` names such by
    :class:`lowmem.nn.FusedLoRAEmbedding` and :class:`lowmem.nn.FusedLoRAConv2d`, in place; freeze everything but the
    adapters; return ``model``.

    The layers share the weights they had: no copy of the model is made. Nothing is changed unless all of it can be.

    With ``quant`` the linear layers' weights are quantized first, one after the other, and their dense ones let go:
    QLoRA (arXiv 2305.14314) with ``r``; without, the layers become :class:`lowmem.nn.QuantLinear`.

    Args:
        model: any ``nn.Module``.
        r: rank of every adapter; None puts in none (then ``quant``, ``activations`` or ``sample_budget`` is needed; the
            last two freeze nothing without ``r`` and ``quant``).
        alpha: numerator of the scale ``alpha / r``; None means ``r``, a scale of 1.
        dropout: drop probability of the adapters' input while training.
        target_modules: ``"all-linear"`` (every plain ``nn.Linear`` but the output head), another string as a regular
            expression that must match a module's whole name, or a collection of names or dotted suffixes of names, as
            in PEFT.
        quant: a format of :mod:`lowmem.quant` or a :class:`lowmem.quant.QuantSpec` for the linear layers among the
            targets, or names of such layers to formats (:func:`lowmem.quant.assign_bits` makes one), the others staying
            dense. Refused, with nothing changed, where a weight is not finite, is shared with another module, or has a
            K that a group size does not divide.
        use_rslora, adapter_dtype, mask, use_dora, gate, train, name: see :class:`lowmem.nn.FusedLoRALinear`. ``mask``
            is for linear layers; embeddings and convolutions take neither ``use_dora`` nor ``gate``.
        activations: what backward keeps of activations. Norms over one weight and gated MLPs (SiLU) are replaced by
            :class:`lowmem.nn.RMSNorm`, :class:`lowmem.nn.LayerNorm` and :class:`lowmem.nn.GatedMLP` of the same
            parameters with this ``save``, found by structure and by trying what they compute; the new
            :class:`lowmem.nn.FusedLoRALinear` get it too, but for an attention's output projection, whose input
            attention keeps anyway. ``lowmem.report`` names what was left out. Parameters keep their names.
        sample_budget: share of the rows, in (0, 1], that weight gradients are estimated from without bias (WTA-CRS and
            better, :mod:`lowmem.sampling`): of A with ``r``, else of the weights themselves, the linear layers becoming
            :class:`lowmem.nn.SampledLinear`. Layers over one input share their rows.
        example_inputs: arguments for one call of ``model`` (a dict of keywords, a tuple, or a tensor), made here once
            in eval mode without gradients, to see which layers read the same tensor: those are grouped
            (:class:`lowmem.nn.FusedLoRAGroup`). None groups q/k/v and gate/up projections by their usual names.

    A layer whose weight another module shares (an embedding tied to the output head) is converted, with a warning, and
    refuses to merge.

    Raises ValueError or TypeError ``lowmem.convert: <argument>: expected ..., got ...``: nothing matches, a match is
    none of the three kinds, or the model is converted already.
    """
    if activations not in (None, "fp8", "recompute"):
        bad("convert", "activations", "'fp8', 'recompute' or None", repr(activations))
    if sample_budget is not None:
        budget_rows(1, sample_budget)
    if r is None and quant is None:
        if activations is None and sample_budget is None:
            bad("convert", "r", "a rank, or quant=..., or activations=..., or sample_budget=...", None)
        if sample_budget is not None:
            _sample(model, target_modules, sample_budget, example_inputs)
        if activations is not None and not structure.replace(model, activations):
            bad("convert", "activations", "a model with norms or gated MLPs that can be replaced", "none")
        return model
    if r is None and sample_budget is not None:
        bad("convert", "sample_budget", "None without r, since packed weights do not train", sample_budget)
    if r is not None:
        check_adapter("convert", name, r, r if alpha is None else alpha, dropout)
    present = [layer_name for layer_name, _ in lora_layers(model)]
    if present:
        got = f"{len(present)} of lowmem's layers ({present[0]!r}, ...)"
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
    specs = _quant_specs(model, targets, quant)
    adapter: dict[str, Any] = {
        "r": r,
        "alpha": r if alpha is None else alpha,
        "dropout": dropout,
        "use_rslora": use_rslora,
        "adapter_dtype": adapter_dtype,
        "use_dora": use_dora,
        "gate": gate,
        "train": train,
        "name": name,
    }
    plain = [layer_name for layer_name, module in targets.items() if not isinstance(module, nn.Linear)]
    if plain and (use_dora or gate):
        bad("convert", "use_dora, gate", f"False, since {plain[0]!r} is no nn.Linear", (use_dora, gate))
    if r is not None and specs:  # the adapters' settings are tried out before a weight is quantized
        FusedLoRALinear(1, 1, mask=mask, **adapter)
    _quantize_layers(model, targets, specs)
    if activations is not None:
        structure.replace(model, activations)
    if r is None:
        return model
    layers: dict[int, LoRALayer] = {}  # one layer for a module that is used in several places
    for layer_name, module in targets.items():
        if id(module) in layers:
            continue
        made: LoRALayer
        if isinstance(module, nn.Embedding):
            made = FusedLoRAEmbedding(module, **adapter)
        elif isinstance(module, nn.Conv2d):
            made = FusedLoRAConv2d(module, **adapter)
        else:
            assert isinstance(module, nn.Linear)
            # attention keeps its output, which is this layer's input, as it came: one copy serves both
            of_attention = activations is not None and _attention_output(model, layer_name)
            keeps = activations is None or of_attention or sample_budget is not None
            save = "bf16" if activations is None or keeps else activations
            options = {"mask": mask, "save": save, "sample_budget": sample_budget}
            made = FusedLoRALinear.from_linear(module, **options, **adapter)
        layers[id(module)] = made
        others = [other for other, m in model.named_modules() if m is not module and _shares(m, module)]
        if others:
            made.tied_to = ", ".join(others)
            warnings.warn(
                f"lowmem.convert: {layer_name!r} shares its weight with {made.tied_to!r}: its adapter acts on the one "
                f"alone, and merge() will refuse",
                stacklevel=2,
            )
    model.requires_grad_(False)  # the adapters are not in it yet
    for qualified, module in targets.items():
        parent, _, child = qualified.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[id(module)])
    for caller, members in groups(model, FusedLoRALinear, example_inputs):
        FusedLoRAGroup(members).attach(caller)
    return model


def _sample(model: nn.Module, target_modules: str | Collection[str], budget: float, example_inputs: Any) -> None:
    """Put a SampledLinear in the place of each dense linear layer among the targets."""
    targets = {n: m for n, m in _targets(model, target_modules).items() if type(m) is nn.Linear}
    if not targets or any(isinstance(m, SampledLinear) for m in model.modules()):
        got = "none" if not targets else "a model with SampledLinear layers"
        bad("convert", "target_modules", "dense linear layers that are not converted", got)
    made = {id(m): SampledLinear.from_linear(m, budget=budget) for m in targets.values()}
    for qualified, module in targets.items():
        parent, _, child = qualified.rpartition(".")
        setattr(model.get_submodule(parent), child, made[id(module)])
    for caller, members in groups(model, SampledLinear, example_inputs):
        SampledGroup(members).attach(caller)
