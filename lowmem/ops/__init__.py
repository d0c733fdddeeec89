"""The public functions of every operator family; ``torch.ops.lowmem.*`` are the operators below them."""

# no public functions: optim.ProjAdamW and nn.ProjectedLinear call them
from . import lowrank, projected
from .activation import act, swiglu
from .activation_fp8 import fp8_linear
from .activation_loss import linear_cross_entropy
from .activation_norm import layer_norm, rms_norm
from .lora import Adapted, lora_group, lora_linear
from .lora_conv import lora_conv2d
from .lora_embedding import lora_embedding
from .lora_multi import multi_lora_linear
from .lowbit_optim import group_decode, group_encode
from .quant import qmatmul, qscale_grad
from .quant_lattice import lattice_linear
from .randlora import randlora_linear
from .sampled import sampled_dw, sampled_linear

__all__ = [
    "Adapted",
    "act",
    "fp8_linear",
    "group_decode",
    "group_encode",
    "lattice_linear",
    "layer_norm",
    "linear_cross_entropy",
    "lora_conv2d",
    "lora_embedding",
    "lora_group",
    "lora_linear",
    "lowrank",
    "multi_lora_linear",
    "projected",
    "qmatmul",
    "qscale_grad",
    "randlora_linear",
    "rms_norm",
    "sampled_dw",
    "sampled_linear",
    "swiglu",
]
