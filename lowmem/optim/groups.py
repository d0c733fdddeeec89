"""Which parameters of a model a projected optimizer projects."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from .._errors import bad
from ..convert import _targets
from ..nn.projected import ProjectedLinear


def lowrank_groups(
    model: nn.Module, *, target_modules: str | Collection[str] = "all-linear", **options: Any
) -> list[dict[str, Any]]:
    """Two parameter groups for :class:`ProjAdamW`: the weights of the linear layers that ``target_modules`` names
    (PEFT's rules; ``"all-linear"`` leaves the output head out), with ``options``, and every other trainable parameter
    (embeddings, norms, biases, the head) with ``project=False``, for AdamW. Parameters come with their names, which
    ``report()`` shows. After :func:`project_` its layers' ``lowrank_grad`` are in the first group. Raises
    ValueError where no target trains."""
    op = "optim.lowrank_groups"
    targets = {id(module.weight) for module in _targets(model, target_modules).values() if module.weight.requires_grad}
    targets |= {id(layer.lowrank_grad) for layer in model.modules() if isinstance(layer, ProjectedLinear)}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    projected = [(name, p) for name, p in named if id(p) in targets]
    if not projected:
        bad(op, "target_modules", "linear layers whose weight trains", repr(target_modules))
    rest = [(name, p) for name, p in named if id(p) not in targets]
    groups: list[dict[str, Any]] = [{"params": projected, **options}]
    return groups + ([{"params": rest, "project": False}] if rest else [])
