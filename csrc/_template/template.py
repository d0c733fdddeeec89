"""The ``template`` family: ``y = alpha * x``. Copy to lowmem/ops/<family>.py; everything of a family starts here.

Say in this place what the family computes, in formulas with shapes; where the graph is cut; what is saved for backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._dispatch import CUDA, define
from .._errors import bad

# -------------------------------------------------------------------------------------------------------------- scale

# The schema stands here and nowhere else; C++ only implements it. Mutated arguments: `Tensor(a!) out`, and `-> ()`.
SCALE = "(Tensor x, float alpha) -> Tensor"


def scale_fake(x: Tensor, alpha: float) -> Tensor:
    """Shape of ``lowmem::template_scale``."""
    return x.new_empty(x.shape)  # shape, dtype and strides as every kernel returns them: opcheck compares


def scale_reference(x: Tensor, alpha: float) -> Tensor:
    """``y = alpha * x``: ``[M, K]`` in ``x.dtype``. Plain torch, any device and dtype: what tests compare with."""
    return (x * alpha).contiguous()


def _scale_cuda(x: Tensor, alpha: float) -> Tensor:
    # The rule between the kernels of one device, said where it is made: float64 is for gradcheck and stays with torch;
    # CUDA C++ where it was built; else Triton, which is imported at the first call, never at the package's import.
    if x.dtype == torch.float64:
        return scale_reference(x, alpha)
    if CUDA.loaded:
        return torch.ops.lowmem_c.template_scale(x, alpha)
    from ..triton_kernels import template as kernels

    return kernels.scale(x, alpha)


# cpp=: the libraries that hold an IMPL block for it. cuda=: the launcher of CUDA devices.
define("template_scale", SCALE, fake=scale_fake, reference=scale_reference, cpp=("cpu", "cuda"), cuda=_scale_cuda)


# ---------------------------------------------------------------------------------------------------------- autograd


class _Scale(torch.autograd.Function):
    # The operators above have no derivative (they raise if one is asked for); this composes them. Everything between
    # forward and backward is a tensor or a number, so that torch.compile(fullgraph=True) traces it.
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        ctx.alpha = alpha  # numbers on ctx, tensors in save_for_backward
        y = torch.ops.lowmem.template_scale(x.reshape(-1, x.shape[-1]), alpha)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        dx = torch.ops.lowmem.template_scale(grad.reshape(-1, grad.shape[-1]), ctx.alpha)
        return dx.view(grad.shape), None  # one gradient an input of forward


def template_scale(x: Tensor, alpha: float) -> Tensor:
    """``y = alpha * x`` for ``x [..., K]``, any floating dtype; returns ``x``'s shape and dtype.

    Raises ValueError or TypeError (``lowmem.template_scale: <argument>: expected ..., got ...``) before it computes.
    """
    if not x.is_floating_point():
        bad("template_scale", "x", "a floating dtype", x.dtype, kind=TypeError)
    if x.dim() < 1:
        bad("template_scale", "x", "at least one dimension [..., K]", f"shape {tuple(x.shape)}")
    return _Scale.apply(x, alpha)
