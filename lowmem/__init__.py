"""Kernels for training transformers on too little memory. See the README for the two commands and a ten-line use."""

from . import _dispatch, ops

__version__ = "0.1.0"

__all__ = ["__version__", "ops"]
