"""``lowmem.backends`` and ``lowmem.report``: what is served by what, and why not by something faster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import _dispatch
from .act import structure
from .convert import output_head, why_not
from .nn.lora import FusedLoRALinear
from .nn.lora_embedding import FusedLoRAEmbedding
from .nn.lora_layer import LoRALayer
from .nn.quant import PackedWeight, QuantLinear
from .ops.activation_saved import packed_bytes


@dataclass(frozen=True)
class Table:
    """Rows of strings under column names; ``str()`` aligns them."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    footer: str = ""

    def __str__(self) -> str:
        """The table as aligned text."""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        text = "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
        )
        return f"{text}\n{self.footer}" if self.footer else text

    __repr__ = __str__


def backends() -> Table:
    """Which backend serves each operator on the CPU and on a CUDA device, and why a faster one does not."""
    return Table(("operator", "device", "backend", "why not more"), tuple(_dispatch.table()))


@dataclass(frozen=True)
class Report(Table):
    """A :class:`Table` of a model's layers, with its totals as numbers."""

    converted: int = 0
    trainable: int = 0
    total: int = 0


def saved_bytes_per_row(layer: LoRALayer) -> tuple[int, int]:
    """Bytes that ``layer`` saves for backward per row of its input while training: ``(x, which siblings over the same x
    share, S and mask)``: ``K * itemsize``, or ``K + ceil(K / 128)``
    in FP8 groups, and ``r * itemsize + 4 * ceil(K / 32)`` (the last only with dropout and
    bits). A convolution's rows are pixels of its input, then of its output; an embedding's are ids of 8 bytes."""
    name, item = layer.active_adapter, layer.dense_dtype.itemsize
    if isinstance(layer, FusedLoRAEmbedding):
        return 8, 0
    if not isinstance(layer, FusedLoRALinear):
        return layer.weight.shape[1] * item, layer.r[name] * item
    bits = 4 * ((layer.in_features + 31) // 32) if layer.dropout[name] > 0 and layer.mask == "bits" else 0
    k = layer.in_features
    return packed_bytes(1, k) if layer.save == "fp8" else k * item, layer.r[name] * item + bits


def _bits(layer: PackedWeight) -> str:
    base: Any = layer.base
    return f"{base.spec.format} at {base.bits_per_weight:.3f} bits"


def report(model: nn.Module) -> Report:
    """A row for every linear layer of ``model``, and every other that has an adapter: the adapter, the backend, bytes
    saved for backward per row of input (``x``, shared by layers over one input, ``+`` what is the layer's own), or why
    the layer is not converted; then its norms and gated MLPs, where some were replaced."""
    head, rows, converted = output_head(model), [], 0
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            converted += 1
            operator = "lora_shrink" if isinstance(module, FusedLoRALinear) else "lora_masked_expand_"
            backend, reason = _dispatch.serving(operator, "cuda" if module.weight.is_cuda else "cpu")
            if module.merged:
                backend, reason = "torch", f"adapter {module.merged!r} is merged: one GEMM"
            elif module.weight.dtype == torch.float64 and module.weight.is_cuda:
                backend, reason = "reference", "float64 is not served on CUDA"
            adapter = module.active_adapter
            shared, own = saved_bytes_per_row(module)
            group = f", group of {len(module.group.layers)}" if module.group else ""
            group += f", over {_bits(module)}" if module.qspec is not None else ""
            rows.append((name, f"{adapter} r={module.r[adapter]}{group}", backend, f"{shared}+{own}", reason))
        elif isinstance(module, QuantLinear):
            backend, reason = _dispatch.serving("quant_matmul", "cuda" if module.weight.is_cuda else "cpu")
            rows.append((name, f"none, {_bits(module)}", backend, "0", reason))
        elif isinstance(module, nn.Linear):
            rows.append((name, "-", "torch", "-", why_not(module, head) or "not a target"))
    footer = f"{converted} of {len(rows)} layers converted; "
    kept = [(name, m, structure.why_not(m)) for name, m in model.named_modules()]
    kept = [(name, m, why) for name, m, why in kept if why is not None]
    if any(isinstance(m, structure.REPLACEMENTS) for _, m, _ in kept):  # else nobody asked for them
        ours = [m for _, m, _ in kept if isinstance(m, structure.REPLACEMENTS)]
        for name, module, why in kept:
            rows.append((name, *structure.report_row(module, why)))
        footer += f"{len(ours)} of {len(kept)} norms and gated MLPs replaced; "
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    footer += f"{trainable:,} of {total:,} parameters train"
    return Report(
        ("layer", "adapter", "backend", "saved B/row", "why not more"), tuple(rows), footer, converted, trainable, total
    )
