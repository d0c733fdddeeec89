"""Kernels for training transformers on too little memory. See the README for the two commands and a ten-line use."""

from . import nn, ops, optim
from .convert import convert
from .integrations import load_adapter, save_adapter
from .report import backends, report

__version__ = "0.1.0"

__all__ = ["__version__", "backends", "convert", "load_adapter", "nn", "ops", "optim", "report", "save_adapter"]
