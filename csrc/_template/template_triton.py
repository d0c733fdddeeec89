"""Family ``template`` in Triton: kernels and launchers, no autograd, no modules. Copy to triton_kernels/<family>.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def scale_kernel(x_ptr, y_ptr, alpha, rows, cols, row_stride, col_stride, BLOCK: tl.constexpr):
    """``y = alpha * x``, one program a tile of ``BLOCK`` elements in y's order; products in fp32."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # 64-bit: m * row_stride passes 2**31
    inside = at < rows * cols
    m, k = at // cols, at % cols
    x = tl.load(x_ptr + m * row_stride + k * col_stride, mask=inside)
    # casts are written out: the interpreter and the compiler promote differently
    tl.store(y_ptr + at, (x.to(tl.float32) * alpha).to(y_ptr.dtype.element_ty), mask=inside)


def scale(x: Tensor, alpha: float) -> Tensor:
    """Launcher of :func:`scale_kernel`: ``x [M, K]`` in fp32, fp16 or bf16, any strides; returns ``[M, K]``."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:  # an empty grid is a launch error
        return y
    with torch.cuda.device_of(x):  # the tensor's device, whatever the current one is
        scale_kernel[(triton.cdiv(y.numel(), 1024),)](x, y, alpha, *x.shape, *x.stride(), BLOCK=1024, num_warps=4)
    return y
