"""Kernels for training transformers on too little memory. See the README for the two commands and a ten-line use."""

from . import _dispatch, nn, ops
from .convert import convert
from .report import backends, report

__version__ = "0.1.0"

__all__ = ["__version__", "backends", "convert", "nn", "ops", "report"]
