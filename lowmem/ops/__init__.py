"""The public functions of every operator family; ``torch.ops.lowmem.*`` are the operators below them."""

from .lora import lora_linear

__all__ = ["lora_linear"]
