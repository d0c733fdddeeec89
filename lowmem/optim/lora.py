"""Parameter groups and steps that belong to LoRA's variants."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import bad
from ..nn.lora_embedding import FusedLoRAEmbedding
from ..nn.lora_layer import lora_layers


def _number(op: str, argument: str, value: Any, expected: str, ok: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not ok:
        bad(op, argument, expected, repr(value))


@torch.no_grad()
def prox_l1_(parameters: Tensor | Iterable[Tensor], threshold: float) -> None:
    """The proximal step of an L1 penalty, in place: ``g <- sign(g) * max(|g| - threshold, 0)`` (SoRA, arXiv
    2311.11696).

    Call it after the optimizer's step with ``threshold = lr * penalty``; gates that reach zero stay there while their
    gradient is smaller than the penalty. A threshold of 0 changes nothing.
    """
    op = "prox_l1_"
    _number(op, "threshold", threshold, "a finite number >= 0", threshold >= 0)
    tensors = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    for tensor in tensors:
        if not tensor.is_floating_point():
            bad(op, "parameters", "floating tensors", tensor.dtype, kind=TypeError)
    for tensor in tensors:
        tensor.copy_(torch.nn.functional.softshrink(tensor, threshold))


def lora_plus_groups(model: nn.Module, lr: float, *, ratio: float = 16.0, **options: Any) -> list[dict[str, Any]]:
    """Parameter groups of LoRA+ (arXiv 2402.12354): B learns with ``lr * ratio``, every other trainable parameter with
    ``lr``, both parts of an embedding's adapter among them (there A is the one that starts at zero).

    ``options`` (weight_decay, ...) go into both groups. Give the list to any torch optimizer. Raises where ``model``
    has no trainable B.
    """
    op = "lora_plus_groups"
    _number(op, "lr", lr, "a finite number > 0", lr > 0)
    _number(op, "ratio", ratio, "a finite number > 0", ratio > 0)
    layers = [layer for _, layer in lora_layers(model) if not isinstance(layer, FusedLoRAEmbedding)]
    fast = {id(b): b for layer in layers for b in layer.lora_B.values() if b.requires_grad}
    if not fast:
        bad(op, "model", "a FusedLoRALinear whose B trains", "none", hint="lowmem.convert(model, r=...) makes them")
    slow = [p for p in model.parameters() if p.requires_grad and id(p) not in fast]
    return [{"params": slow, "lr": lr, **options}, {"params": list(fast.values()), "lr": lr * ratio, **options}]
