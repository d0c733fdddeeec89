"""Modules over the operators of :mod:`lowmem.ops`."""

from .lora import FusedLoRALinear, disabled, lora_layers, set_adapter
from .lora_group import FusedLoRAGroup
from .lora_multi import MultiLoRALinear, route, routed, train_adapters

__all__ = [
    "FusedLoRAGroup",
    "FusedLoRALinear",
    "MultiLoRALinear",
    "disabled",
    "lora_layers",
    "route",
    "routed",
    "set_adapter",
    "train_adapters",
]
