"""Launcher of ``lowmem::cross_entropy_rows_``; dtypes and strides as in :mod:`lowmem.triton_kernels.activation`."""

from __future__ import annotations

from torch import Tensor

from ..ops import activation_loss as family
from . import activation_kernels as kernels
from . import device as gpu

BLOCK, WARPS = 4096, 8


def rows_(
    logits: Tensor,
    loss: Tensor,
    target: Tensor,
    bias: Tensor | None,
    factor: Tensor | None,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
) -> None:
    """Two reads of a row and one write; a row's logits are in the second-level cache at the second."""
    arch = gpu.serves(logits, bias)
    if arch is None or logits.stride(1) != 1:
        family.rows_reference(logits, loss, target, bias, factor, ignore_index, smoothing, z_loss, softcap)
        return
    weights = loss if factor is None else factor
    with gpu.on(logits.device):
        kernels.loss_kernel[(logits.shape[0],)](
            logits, loss, target, logits if bias is None else bias.contiguous(), weights, logits.shape[1],
            logits.stride(0), target.stride(0), weights.stride(0), ignore_index, smoothing, z_loss,
            softcap if softcap > 0 else 1.0, BIAS=bias is not None, GRAD=factor is not None, CAP=softcap > 0,
            BLOCK=256 if arch == "interpreter" else BLOCK, num_warps=WARPS,
        )  # fmt: skip
