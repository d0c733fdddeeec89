"""Quantized weights: formats, :class:`QTensor`, quantizers, decompositions. The products are in :mod:`lowmem.ops`."""

from .budget import assign_bits, lq_specs
from .formats import QuantSpec
from .lq import loftq_init, lq_decompose
from .qtensor import QTensor
from .quantize import dequantize, quantize

__all__ = [
    "QTensor",
    "QuantSpec",
    "assign_bits",
    "dequantize",
    "loftq_init",
    "lq_decompose",
    "lq_specs",
    "quantize",
]
