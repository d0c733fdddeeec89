"""Norms and gated MLPs of a model, found by what they are made of and what they compute, and replaced by modules whose
backward keeps little: ``lowmem.convert(model, activations=...)``."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from .. import _dispatch
from ..nn.activation import GatedMLP, LayerNorm, RMSNorm
from ..ops.activation_saved import packed_bytes

REPLACEMENTS = (RMSNorm, LayerNorm, GatedMLP)
WIDTH, HIDDEN = 16, 24  # of the small copies on which a module's arithmetic is tried


def _eps(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps"):
        value = getattr(module, name, None)
        if isinstance(value, float) and value >= 0:
            return value
    return None


def norm_like(module: nn.Module) -> bool:
    """A norm over one weight vector, by its name and its parameters."""
    parameters = dict(module.named_parameters(recurse=False))
    names = type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
    return names and "weight" in parameters and parameters["weight"].dim() == 1 and not list(module.children())


def mlp_like(module: nn.Module) -> bool:
    """A gated MLP in Llama's names: ``down_proj(act_fn(gate_proj(x)) * up_proj(x))``."""
    parts = dict(module.named_children())
    linear = all(isinstance(parts.get(name), nn.Linear) for name in ("gate_proj", "up_proj", "down_proj"))
    return linear and len(parts) in (3, 4) and callable(getattr(module, "act_fn", None))


def _norm(module: nn.Module, save: Any) -> nn.Module:
    weight: Any = module.weight
    bias = getattr(module, "bias", None)
    eps = _eps(module)
    assert eps is not None
    made: nn.Module
    if bias is None and type(module).__name__.endswith("RMSNorm"):
        made = RMSNorm(weight.shape[0], eps, save=save, device="meta")
    else:
        made = LayerNorm(weight.shape[0], eps, bias=bias is not None, save=save, device="meta")
        if bias is not None:
            made.bias = bias
    made.weight = weight
    return made.train(module.training)


def _same_numbers(ours: nn.Module, theirs: nn.Module, width: int) -> bool:
    x = torch.linspace(-2.0, 3.0, 3 * width, dtype=torch.float32).view(1, 3, width)
    try:
        with torch.no_grad():
            return torch.allclose(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    except Exception:  # whatever it wants to be called with, it is not what we replace
        return False


def _small_norm(module: nn.Module) -> nn.Module:
    """The same module over WIDTH numbers on the CPU, its weight and bias different everywhere."""
    small = copy.copy(module)
    small._parameters = {
        name: None if p is None else nn.Parameter(torch.linspace(0.5, 1.5, WIDTH), requires_grad=False)
        for name, p in module._parameters.items()
    }
    small._forward_hooks, small._forward_pre_hooks = OrderedDict(), OrderedDict()
    if isinstance(getattr(small, "normalized_shape", None), tuple):
        small.normalized_shape = (WIDTH,)  # type: ignore[assignment]
    return small


def _small_mlp(module: nn.Module) -> nn.Module:
    small = copy.copy(module)
    small._modules = dict(module._modules)
    for i, name in enumerate(("gate_proj", "up_proj", "down_proj")):
        sizes = (HIDDEN, WIDTH) if name == "down_proj" else (WIDTH, HIDDEN)
        layer = nn.Linear(*sizes, bias=False, device="meta")
        values = torch.sin(torch.arange(WIDTH * HIDDEN, dtype=torch.float32) * (i + 1)).view(sizes[1], sizes[0])
        layer.weight = nn.Parameter(values, requires_grad=False)
        small._modules[name] = layer
    small._forward_hooks, small._forward_pre_hooks = OrderedDict(), OrderedDict()
    return small


def why_not(module: nn.Module) -> str | None:
    """Why a norm or MLP cannot be replaced; '' where it can; None where ``module`` is neither."""
    if isinstance(module, REPLACEMENTS):
        return f"{type(module).__name__} of lowmem, save={module.save!r}"
    if norm_like(module):
        if _eps(module) is None:
            return f"{type(module).__name__} has no eps"
        weight: Any = module.weight
        if not weight.is_floating_point():
            return f"a weight in {weight.dtype}"
        small = _small_norm(module)
        same = _same_numbers(_norm(small, "bf16"), small, WIDTH)
        return "" if same else f"{type(module).__name__} computes something else than x rstd w"
    if mlp_like(module):
        small = _small_mlp(module)
        same = _same_numbers(GatedMLP.from_module(small, save="bf16"), small, WIDTH)
        return "" if same else f"{type(module).__name__} is not down(silu(gate(x)) * up(x))"
    return None


def replace(model: nn.Module, save: str) -> int:
    """Put :class:`RMSNorm`, :class:`LayerNorm` and :class:`GatedMLP` in the places of ``model``'s own, sharing their
    parameters and layers; the number of places."""
    made: dict[int, nn.Module] = {}
    places = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if name and why_not(m) == ""]
    for name, module in places:
        if id(module) not in made:
            if norm_like(module):
                made[id(module)] = _norm(module, save)
            else:
                made[id(module)] = GatedMLP.from_module(module, save=save)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[id(module)])
    return len(places)


def report_row(module: nn.Module, why: str | None) -> tuple[str, str, str, str]:
    """Of ``lowmem.report``: what is kept, the backend, bytes per row, and the reason where it was not replaced."""
    if not isinstance(module, REPLACEMENTS):
        return "-", "torch", "-", why or "not asked for"
    weight: Any = module.weight if not isinstance(module, GatedMLP) else next(module.parameters())
    backend, reason = _dispatch.serving("swiglu_forward", "cuda" if weight.is_cuda else "cpu")
    item = weight.element_size()
    if isinstance(module, GatedMLP):
        width = getattr(module.gate_proj, "out_features", 0)
        each = 2 * (packed_bytes(1, width) if module.save == "fp8" else width * item)
    else:
        width = module.normalized_shape
        stats = 4 if isinstance(module, RMSNorm) else 8
        each = stats + (packed_bytes(1, width) if module.save == "fp8" else width * item)
    return f"save={module.save}", backend, f"{each}", reason
