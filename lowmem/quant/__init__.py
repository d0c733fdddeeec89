"""Quantized weights: formats, :class:`QTensor`, quantizers. The products are in :mod:`lowmem.ops`."""

from .formats import QuantSpec
from .qtensor import QTensor
from .quantize import dequantize, quantize

__all__ = ["QTensor", "QuantSpec", "dequantize", "quantize"]
