"""The family's dropout mask as a tensor, for layers whose A is no thin matrix (convolutions, RandLoRA)."""

from __future__ import annotations

import torch
from torch import Tensor


def kept(rows: int, cols: int, p: float, seed: Tensor, child: int, dtype: torch.dtype) -> Tensor:
    """:func:`lowmem.ops.philox.keep_mask`, bool ``[rows, cols]``, drawn by the kernel that serves
    ``lora_masked_expand_`` on the seed's device: the mask over a matrix of ones. ``dtype`` is what it writes, a
    temporary of ``rows * cols`` elements."""
    out = torch.empty(rows, cols, device=seed.device, dtype=dtype)
    column, row = (torch.ones(shape, device=seed.device, dtype=dtype) for shape in ((rows, 1), (1, cols)))
    torch.ops.lowmem.lora_masked_expand_(out, column, row, None, p, seed, child, False)
    return out != 0
