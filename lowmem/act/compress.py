"""``lowmem.act.compress``: what autograd saves while a module's forward runs, stored compressed."""

from __future__ import annotations

import contextlib
import math
import weakref
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from .._errors import bad
from ..ops.activation_saved import GROUP, Recipe, offered, rebuild
from ..quant.formats import GROUP_SIZES, QuantSpec
from ..quant.qtensor import QTensor, packed_shape, scale_shape
from ..quant.quantize import dequantize

Module = TypeVar("Module", bound=nn.Module)
FORMATS = ("fp8", "int8", "int4")
LEAST = 1024
"""Elements below which a tensor is kept as it came."""
_VIEWS = {
    "ToCopyBackward0",
    "TBackward0",
    "TransposeBackward0",
    "ViewBackward0",
    "UnsafeViewBackward0",
    "AliasBackward0",
}


class _Kept:
    """One compressed storage region; decoded at most once at a time, however many saved tensors it stands for."""

    def __init__(self, what: Any, numel: int, dtype: torch.dtype, rows: int, cols: int) -> None:
        self.what, self.numel, self.dtype, self.rows, self.cols = what, numel, dtype, rows, cols
        self._last: weakref.ref[Tensor] | None = None

    def flat(self) -> Tensor:
        """The region's elements in memory order, ``[numel]``."""
        flat = None if self._last is None else self._last()
        if flat is None:
            with torch.no_grad():
                if isinstance(self.what, Recipe):
                    flat = rebuild(
                        self.what.how, self.what.numbers, self.what.tensors, self.rows, self.cols, self.dtype
                    )
                elif isinstance(self.what, QTensor):
                    flat = dequantize(self.what, self.dtype)
                else:
                    flat = torch.ops.lowmem.fp8_unpack(self.what, self.rows, self.cols, self.dtype)
                flat = flat.reshape(-1)[: self.numel]
            self._last = weakref.ref(flat)
        return flat


def _memory_order(t: Tensor) -> bool:
    """Whether ``t``'s elements fill one region of memory, each place once, in some order of the dimensions."""
    expected = 1
    for stride, size in sorted((t.stride(i), t.shape[i]) for i in range(t.dim()) if t.shape[i] != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _is_weight(t: Tensor) -> bool:
    """A parameter, a view of one, or (under autocast) a cast of one."""
    if isinstance(t, nn.Parameter) or isinstance(t._base, nn.Parameter):
        return True
    node = t.grad_fn
    for _ in range(4):
        if node is None or node.name() not in _VIEWS:
            break
        node = node.next_functions[0][0]
    return node is not None and isinstance(getattr(node, "variable", None), nn.Parameter)


def _recipe(t: Tensor) -> tuple[Recipe, int] | None:
    """The recipe that ``t``, or the tensor of which it is a view of the whole, offers; and that tensor's columns."""
    for whole in (t, t if t._base is None else t._base):
        recipe = offered(whole) if whole.numel() == t.numel() else None
        if recipe is not None and whole.is_contiguous() and t.is_contiguous():
            return recipe, whole.shape[-1]
    return None


class _Compressor:
    def __init__(self, kind: str, group_size: int) -> None:
        self.kind, self.group_size = kind, group_size
        self.memo: dict[tuple[Any, ...], tuple[Any, _Kept]] = {}
        self.open: list[Any] = []

    def pack(self, t: Tensor) -> Any:
        if t.dtype not in (torch.float32, torch.bfloat16, torch.float16) or t.numel() < LEAST:
            return t
        # statistics and masks need no gradient, and a logarithm of a sum must not be rounded to four bits
        if not t.requires_grad or t.layout != torch.strided or _is_weight(t):
            return t
        dense = _memory_order(t)
        region = (t.numel(),) if dense else (tuple(t.shape), t.stride())
        key = (t.untyped_storage()._cdata, t._version, t.storage_offset(), t.dtype, *region)
        storage, kept = self.memo.get(key, (None, None))
        if storage is None or storage() is None:  # the address may have been given to another storage
            with torch.no_grad():
                kept = self._compress(t.detach(), _recipe(t), dense)
            self.memo[key] = (weakref.ref(t.untyped_storage()), kept)
        return kept, tuple(t.shape), t.stride() if dense else None

    def unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        what, shape, stride = kept
        flat = what.flat()
        return flat.view(shape) if stride is None else flat.as_strided(shape, stride)

    def _compress(self, t: Tensor, recipe: tuple[Recipe, int] | None, dense: bool) -> _Kept:
        if recipe is not None:
            return _Kept(recipe[0], t.numel(), t.dtype, t.numel() // recipe[1], recipe[1])
        flat = t.as_strided((t.numel(),), (1,)) if dense else t.reshape(-1)
        cols = t.shape[-1] if t.is_contiguous() else math.gcd(t.numel(), GROUP)
        if self.kind == "fp8":
            rows = t.numel() // cols
            return _Kept(torch.ops.lowmem.fp8_pack(flat.view(rows, cols)), t.numel(), t.dtype, rows, cols)
        size = self.group_size
        matrix = nn.functional.pad(flat, (0, -t.numel() % size)).view(-1, size)
        spec = QuantSpec(self.kind, size, zero_point=self.kind == "int4")
        packed, scale, zero = torch.ops.lowmem.quant_quantize(matrix, spec.code, spec.zero_point, spec.scales_in)
        shape = tuple(matrix.shape)
        q = QTensor(
            packed.view(packed_shape(spec, shape)),
            scale.view(scale_shape(spec, shape)),
            spec,
            shape,
            t.dtype,
            zero=zero.view(scale_shape(spec, shape)) if spec.zero_point else None,
        )
        return _Kept(q, t.numel(), t.dtype, *shape)

    # ------------------------------------------------------------------------------------------------ a module's hooks

    def enter(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            got = "torch.compile, which does not run hooks on saved tensors"
            hint = "modules with save='fp8' are the compiled route: lowmem.convert(model, activations='fp8')"
            bad("act.compress", "module", "eager execution", got, hint=hint, kind=RuntimeError)
        hooks: Any = contextlib.nullcontext()
        if torch.is_grad_enabled() and not _in_checkpoint():
            hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)
        hooks.__enter__()
        self.open.append(hooks)

    def exit(self, *_: Any) -> None:
        if self.open:
            self.open.pop().__exit__(None, None, None)
        if not self.open:
            self.memo.clear()


def _in_checkpoint() -> bool:
    """Whether a checkpoint around here throws away what is saved, to compute it again: then nothing is to be gained."""
    top = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return top is not None and getattr(top[0], "__module__", "") == "torch.utils.checkpoint"


def compress(module: Module, format: Literal["fp8", "int8", "int4"] = "fp8", group_size: int = GROUP) -> Module:  # noqa: A002
    """Keep what autograd saves while ``module.forward`` runs in ``format``; in place, returns ``module``.

    Forward computes what it did; backward works with the decoded tensors. Bytes an element, for groups of G:
    ``"fp8"`` 1 + 1/128 (:mod:`lowmem.ops.activation_saved`; an element's error at most 1/16 of it), ``"int8"`` 1 + 4/G
    (1/254 of the group's largest magnitude), ``"int4"`` 1/2 + 8/G (1/30 of the group's range).

    A tensor that several operations save (one X for q, k and v, also as other views of it) is compressed once and
    decoded once at a time: what counts is the region of memory, its version and its dtype. Kept as they came: weights
    and casts of them, tensors that need no gradient (statistics, masks, a first layer's data), fewer than 1024
    elements,
    and other dtypes than fp32, bf16 and fp16. Outputs of modules that offer to be computed again (``save="fp8"``,
    ``save="recompute"``) are, and cost nothing.

    Inside a non-reentrant checkpoint nothing is compressed, as nothing is kept; a checkpoint inside ``module`` keeps
    its inputs compressed. NaN and infinities decode to NaN: theirs in fp8, their whole group's in the integer formats.
    An exception leaves no hook behind.

    Args:
        module: any ``nn.Module``.
        format: ``"fp8"``, ``"int8"`` (symmetric) or ``"int4"`` (with zero points).
        group_size: elements that share a scale, in memory order; 128 for fp8, a power of two of 16 to 4096 otherwise.

    Raises ValueError, and RuntimeError ``lowmem.act.compress: module: ...`` when it runs under ``torch.compile``.
    """
    op = "act.compress"
    if not isinstance(module, nn.Module):
        bad(op, "module", "an nn.Module", type(module).__name__, kind=TypeError)
    if format not in FORMATS:
        bad(op, "format", "'fp8', 'int8' or 'int4'", repr(format))
    if format == "fp8" and group_size != GROUP:
        bad(op, "group_size", f"{GROUP} for 'fp8'", repr(group_size))
    if group_size not in GROUP_SIZES:
        bad(op, "group_size", "a power of two in [16, 4096]", repr(group_size))
    before: Any = getattr(module, "_lowmem_compressor", None)
    if before is not None:
        bad(op, "module", "a module that is not compressed", f"one compressed to {before.kind!r}")
    compressor = _Compressor(format, group_size)
    module._lowmem_compressor = compressor  # type: ignore[assignment]
    module.register_forward_pre_hook(compressor.enter)
    module.register_forward_hook(compressor.exit, always_call=True)
    return module
