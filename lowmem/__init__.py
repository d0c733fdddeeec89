"""Kernels for training transformers on too little memory. See the README for the two commands and a ten-line use."""

from . import act, memory, nn, ops, optim, quant, sampling
from .convert import convert
from .integrations import load_adapter, load_quantized, save_adapter, save_quantized
from .report import backends, report

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "act",
    "backends",
    "convert",
    "load_adapter",
    "load_quantized",
    "memory",
    "nn",
    "ops",
    "optim",
    "quant",
    "report",
    "sampling",
    "save_adapter",
    "save_quantized",
]
