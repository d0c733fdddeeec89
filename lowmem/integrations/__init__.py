"""What ties this package to others': adapters in PEFT's folder format."""

from .peft_format import load_adapter, save_adapter

__all__ = ["load_adapter", "save_adapter"]
