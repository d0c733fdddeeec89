"""Modules over the operators of :mod:`lowmem.ops`."""

from .lora import FusedLoRALinear, disabled, lora_layers, set_adapter

__all__ = ["FusedLoRALinear", "disabled", "lora_layers", "set_adapter"]
