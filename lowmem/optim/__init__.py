"""Optimizers and what goes beside them."""

from .lora import lora_plus_groups, prox_l1_

__all__ = ["lora_plus_groups", "prox_l1_"]
