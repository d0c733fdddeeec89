"""The public functions of every operator family; ``torch.ops.lowmem.*`` are the operators below them."""

from .lora import Adapted, lora_group, lora_linear
from .lora_multi import multi_lora_linear
from .quant import qmatmul, qscale_grad

__all__ = ["Adapted", "lora_group", "lora_linear", "multi_lora_linear", "qmatmul", "qscale_grad"]
