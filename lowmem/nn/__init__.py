"""Modules over the operators of :mod:`lowmem.ops`."""

from .lora import FusedLoRALinear, disabled, lora_layers, set_adapter
from .lora_group import FusedLoRAGroup

__all__ = ["FusedLoRAGroup", "FusedLoRALinear", "disabled", "lora_layers", "set_adapter"]
