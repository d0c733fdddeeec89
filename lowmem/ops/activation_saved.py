"""What activations are kept as for backward: FP8 groups, and recipes by which a tensor is computed again.

**FP8 groups** of ``x [M, K]``: 128 neighbours of a row share the scale ``2^e``, the smallest power of two for which
``max|x| / 2^e <= 448``; an element is ``x / 2^e`` rounded to E4M3 (nearest even). One flat uint8 tensor holds the codes
``[M, K]`` and then the bytes ``e + 127`` ``[M, ceil(K / 128)]``: ``M (K + ceil(K / 128))`` bytes, 1.0078 an element.
Scaling by powers of two is exact, so all backends make the same bits. The error of an element is at most
``max(|x| / 16, 2^e / 1024)``, and ``2^e < max|x| / 223``. NaN and infinities are kept as NaN and do not count for the
scale; a group of zeros stays zero; magnitudes below ``2^-136`` become zero. The definition: csrc/common/fp8.h.

**Recipes.** A module whose output can be computed again from what its backward keeps anyway (a norm, SwiGLU) *offers*
the recipe on the output tensor; a consumer that would save that tensor (:class:`lowmem.nn.FusedLoRALinear` with
``save="fp8"`` or ``"recompute"``, :func:`lowmem.act.compress`) keeps the recipe's tensors instead, which are shared
with the producer's own. An offer holds while the tensor object lives and is not written to.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dispatch import define

GROUP = 128
FORMS = {"bf16": 0, "recompute": 0, "fp8": 1, "deriv4": 2, "deriv2": 3}
"""``save=`` to the operators' ``form``: the tensor as it came, FP8 groups, 4-bit or 2-bit derivative codes."""
INPUT_SAVES = ("bf16", "fp8", "recompute")
"""``save=`` of a layer that keeps its input."""
PLAIN, FP8, DERIV4, DERIV2 = 0, 1, 2, 3


def packed_bytes(rows: int, cols: int) -> int:
    """Bytes of a matrix in FP8 groups."""
    return rows * (cols + (cols + GROUP - 1) // GROUP)


# --------------------------------------------------------------------------------------------------------- FP8 groups


def pack_fake(x: Tensor) -> Tensor:
    """Shape of ``lowmem::fp8_pack``."""
    return x.new_empty(packed_bytes(x.shape[0], x.shape[1]), dtype=torch.uint8)


def pack_reference(x: Tensor) -> Tensor:
    """``x [M, K]`` in FP8 groups: flat uint8, codes and then the scales' bytes."""
    m, k = x.shape
    groups = -(-k // GROUP)
    wide = F.pad(x.float(), (0, groups * GROUP - k)).view(m, groups, GROUP)
    finite = wide.isfinite()
    most = torch.where(finite, wide.abs(), 0).amax(2) if wide.numel() else wide.new_zeros(m, groups)
    bits = most.contiguous().view(torch.int32)
    exponent = (bits >> 23) - 135 + ((bits & 0x7FFFFF) > 0x600000).int()  # 448 = 1.75 * 2^8
    scale_bytes = exponent.clamp_(min=-126) + 127
    inverse = ((254 - scale_bytes) << 23).view(torch.float32)
    codes = torch.where(finite, wide * inverse[:, :, None], 0).to(torch.float8_e4m3fn).view(torch.uint8)
    codes = torch.where(finite, codes, 0x7F).view(m, groups * GROUP)[:, :k]
    return torch.cat([codes.reshape(-1), scale_bytes.to(torch.uint8).reshape(-1)])


UNPACK = "(Tensor packed, int rows, int cols, ScalarType dtype) -> Tensor"


def unpack_fake(packed: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Shape of ``lowmem::fp8_unpack``."""
    return packed.new_empty((rows, cols), dtype=dtype)


def unpack_reference(packed: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """``[rows, cols]`` in ``dtype`` from FP8 groups. bf16 and fp32 hold every value exactly."""
    groups = -(-cols // GROUP)
    codes = packed[: rows * cols].view(torch.float8_e4m3fn).view(rows, cols).float()
    scale_bytes = packed[rows * cols :].view(rows, groups).int()
    scales = (scale_bytes << 23).view(torch.float32).repeat_interleave(GROUP, 1)[:, :cols]
    return (codes * scales).to(dtype)


def _pack_cuda(x: Tensor) -> Tensor:
    from ..triton_kernels import activation as kernels

    return kernels.pack(x)


def _unpack_cuda(packed: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    from ..triton_kernels import activation as kernels

    return kernels.unpack(packed, rows, cols, dtype)


define("fp8_pack", "(Tensor x) -> Tensor", fake=pack_fake, reference=pack_reference, cpp=("cpu",), cuda=_pack_cuda)
define("fp8_unpack", UNPACK, fake=unpack_fake, reference=unpack_reference, cpp=("cpu",), cuda=_unpack_cuda)


# ------------------------------------------------------------------------------------------------------------- recipes


class Recipe(NamedTuple):
    """How ``[rows, cols]`` is computed again: the operator's name, its tensors, and its numbers."""

    how: str
    tensors: tuple[Tensor | None, ...]
    numbers: tuple[float, ...] = ()


def rebuild(
    how: str, numbers: tuple[float, ...], tensors: tuple[Tensor | None, ...], rows: int, cols: int, dtype: torch.dtype
) -> Tensor:
    """The matrix ``[rows, cols]`` in ``dtype`` that a recipe stands for."""
    ops = torch.ops.lowmem
    first = tensors[0]
    assert first is not None
    if how == "fp8":
        return ops.fp8_unpack(first, rows, cols, dtype)
    if how == "norm":  # of x itself
        x, weight, bias = first, tensors[1], tensors[2]
        eps, center = numbers
        return ops.norm_forward(x.reshape(rows, cols), None, weight, bias, eps, bool(center), PLAIN)[0]
    if how == "norm_fp8":  # of the packed normalised rows
        acc = torch.promote_types(dtype, torch.float32)
        y = ops.fp8_unpack(first, rows, cols, acc)
        y = y if tensors[1] is None else y * tensors[1].to(acc)
        return (y if tensors[2] is None else y + tensors[2].to(acc)).to(dtype)
    if how == "act":
        return ops.act_forward(first.reshape(rows, cols), int(numbers[0]), PLAIN)[0]
    if how == "act_fp8":
        return ops.act_forward(ops.fp8_unpack(first, rows, cols, dtype), int(numbers[0]), PLAIN)[0]
    second = tensors[1]
    assert second is not None
    if how == "swiglu":
        return ops.swiglu_forward(first.reshape(rows, cols), second.reshape(rows, cols), PLAIN)[0]
    assert how == "swiglu_fp8", how
    return ops.swiglu_from_fp8(first, second, rows, cols, dtype)


def offer(y: Tensor, recipe: Recipe) -> Tensor:
    """Note on ``y`` how it is computed again. Not while compiling: there equal work is found by the compiler."""
    if not torch.compiler.is_compiling() and torch.is_grad_enabled() and not y.is_inference():
        y._lowmem_recipe = (y._version, recipe)  # type: ignore[attr-defined]
        if y._base is not None and y._base.numel() == y.numel():  # the rows, of which further views are made
            y._base._lowmem_recipe = (y._version, recipe)  # type: ignore[attr-defined]
    return y


def offered(y: Tensor) -> Recipe | None:
    """The recipe on ``y``, where there is one and ``y`` has not been written to since."""
    if torch.compiler.is_compiling():
        return None
    version, recipe = getattr(y, "_lowmem_recipe", (None, None))
    return recipe if recipe is not None and version == y._version else None
