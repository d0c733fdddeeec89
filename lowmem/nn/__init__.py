"""Modules over the operators of :mod:`lowmem.ops`."""

from .activation import GELU, FP8Linear, FusedLinearCrossEntropy, GatedMLP, LayerNorm, RMSNorm, SiLU, SwiGLU
from .lora import FusedLoRALinear
from .lora_conv import FusedLoRAConv2d
from .lora_embedding import FusedLoRAEmbedding
from .lora_group import FusedLoRAGroup
from .lora_layer import LoRALayer, disabled, lora_layers, set_adapter
from .lora_multi import MultiLoRALinear, route, routed, train_adapters
from .lrqat import LRQATLinear
from .projected import ProjectedLinear
from .quant import QuantLinear
from .randlora import RandLoRALinear
from .sampled import SampledGroup, SampledLinear, sampled_rows

__all__ = [
    "FP8Linear",
    "FusedLinearCrossEntropy",
    "FusedLoRAConv2d",
    "FusedLoRAEmbedding",
    "FusedLoRAGroup",
    "FusedLoRALinear",
    "GELU",
    "GatedMLP",
    "LRQATLinear",
    "LayerNorm",
    "LoRALayer",
    "MultiLoRALinear",
    "ProjectedLinear",
    "QuantLinear",
    "RMSNorm",
    "RandLoRALinear",
    "SampledGroup",
    "SampledLinear",
    "SiLU",
    "SwiGLU",
    "disabled",
    "lora_layers",
    "route",
    "routed",
    "sampled_rows",
    "set_adapter",
    "train_adapters",
]
