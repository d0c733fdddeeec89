"""What ties this package to others': adapters in PEFT's folder format, quantized weights of other packages."""

from .bitsandbytes_format import from_bitsandbytes, to_bitsandbytes
from .peft_format import load_adapter, save_adapter
from .quant_checkpoint import quantize_checkpoint, read_checkpoint
from .quant_formats import from_awq, from_gptq, from_hqq, from_torchao
from .quant_model import load_quantized, save_quantized

__all__ = [
    "from_awq",
    "from_bitsandbytes",
    "from_gptq",
    "from_hqq",
    "from_torchao",
    "load_adapter",
    "load_quantized",
    "quantize_checkpoint",
    "read_checkpoint",
    "save_adapter",
    "save_quantized",
    "to_bitsandbytes",
]
