"""Modules over the operators of :mod:`lowmem.ops`."""

from .lora import FusedLoRALinear
from .lora_conv import FusedLoRAConv2d
from .lora_embedding import FusedLoRAEmbedding
from .lora_group import FusedLoRAGroup
from .lora_layer import LoRALayer, disabled, lora_layers, set_adapter
from .lora_multi import MultiLoRALinear, route, routed, train_adapters
from .lrqat import LRQATLinear
from .quant import QuantLinear
from .randlora import RandLoRALinear
from .sampled import SampledGroup, SampledLinear, sampled_rows

__all__ = [
    "FusedLoRAConv2d",
    "FusedLoRAEmbedding",
    "FusedLoRAGroup",
    "FusedLoRALinear",
    "LRQATLinear",
    "LoRALayer",
    "MultiLoRALinear",
    "QuantLinear",
    "RandLoRALinear",
    "SampledGroup",
    "SampledLinear",
    "disabled",
    "lora_layers",
    "route",
    "routed",
    "sampled_rows",
    "set_adapter",
    "train_adapters",
]
