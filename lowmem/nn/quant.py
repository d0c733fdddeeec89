"""Modules over packed weights: :class:`QuantLinear`, and :class:`PackedWeight`, what it shares with LoRA layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import bad
from ..ops.quant import qmatmul
from ..quant.formats import QuantSpec, as_spec
from ..quant.qtensor import TENSORS, QTensor
from ..quant.quantize import quantize

PARTS = TENSORS[1:]  # beside `packed`, which is the parameter `weight`: parameters weight_<part>


class PackedWeight(nn.Module):
    """A module whose ``weight`` may be a :class:`lowmem.quant.QTensor`: uint8 bytes in ``weight``, the rest in
    ``weight_scale``, ``weight_zero``, ``weight_scale_code``, ``weight_scale_absmax`` and ``weight_scale_offset``, all
    frozen parameters (so that sharding treats them as it treats weights).

    They keep their dtypes under ``.to(dtype)``, ``.half()`` and the like, and move with ``.to(device)``. ``state_dict``
    carries the spec in its metadata: loading bytes of another format raises instead of reading them wrongly.
    """

    weight: Any
    weight_scale: Any
    weight_zero: Any
    weight_scale_code: Any
    weight_scale_absmax: Any
    weight_scale_offset: Any
    qspec: QuantSpec | None = None
    qshape: tuple[int, ...] = ()
    qdtype: torch.dtype = torch.bfloat16

    def set_qtensor(self, q: QTensor) -> None:
        """Take ``q``'s tensors, without a copy, in the place of the weight."""
        q.check(type(self).__name__)
        self.weight = _frozen(q.packed)
        for part in PARTS:
            value = getattr(q, part)
            self.register_parameter(f"weight_{part}", None if value is None else _frozen(value))
        self.qspec, self.qshape, self.qdtype = q.spec, tuple(q.shape), q.dtype

    @property
    def base(self) -> Tensor | QTensor:
        """The weight as operators take it: a :class:`QTensor` over this module's tensors, or the dense parameter."""
        if self.qspec is None:
            return self.weight
        return QTensor(
            self.weight,
            self.weight_scale,
            self.qspec,
            self.qshape,
            self.qdtype,
            self.weight_zero,
            self.weight_scale_code,
            self.weight_scale_absmax,
            self.weight_scale_offset,
        )

    @property
    def dense_dtype(self) -> torch.dtype:
        """The weight's dtype, or the one that a packed weight was quantized from."""
        return self.weight.dtype if self.qspec is None else self.qdtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if self.qspec is None:
            return super()._apply(fn, recurse)
        names = [f"weight_{part}" for part in PARTS if getattr(self, f"weight_{part}") is not None]
        before = {name: getattr(self, name).data for name in names}
        super()._apply(fn, recurse)
        for name, value in before.items():
            now = getattr(self, name)
            if now.dtype != value.dtype:  # a cast of the module: scales are part of the bytes, not of its arithmetic
                now.data = value.to(now.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None and self.qspec is not None:
            metadata[prefix[:-1]]["quant"] = (self.qspec.format, self.qspec.code, self.qspec.zero_point, self.qshape)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        found = self._why_not_load(state_dict, prefix, local_metadata)
        if found:
            error_msgs.append(f"lowmem.{type(self).__name__}: {prefix}weight: {found}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _why_not_load(self, state_dict: Any, prefix: str, local_metadata: Any) -> str:
        value, told = state_dict.get(prefix + "weight"), local_metadata.get("quant")
        if value is None:
            return ""
        spec = self.qspec
        if spec is None:
            return f"expected a floating dtype, got packed {told[0]}" if told is not None else ""
        mine = (spec.format, spec.code, spec.zero_point, self.qshape)
        if told is not None and tuple(told) != mine:
            return f"expected {spec} of shape {self.qshape}, got {told[0]} (spec {told[1]}) of shape {tuple(told[3])}"
        if value.dtype != torch.uint8:
            return f"expected packed bytes (uint8), got {value.dtype}; quantize the dense layer instead"
        for part in PARTS:
            stored, own = state_dict.get(f"{prefix}weight_{part}"), getattr(self, f"weight_{part}")
            if stored is not None and own is not None and stored.dtype != own.dtype:
                return f"expected weight_{part} in {own.dtype}, got {stored.dtype}"
        return ""


def _frozen(value: Tensor) -> nn.Parameter:
    if isinstance(value, nn.Parameter) and not value.requires_grad:
        return value
    return nn.Parameter(value.detach(), requires_grad=False)


class QuantLinear(PackedWeight, nn.Linear):
    """``y = x W^T + bias`` with a frozen packed ``W [out_features, in_features]``: :func:`lowmem.ops.qmatmul`.

    Make one with :meth:`from_linear` or :meth:`from_qtensor`. ``weight`` holds the bytes (uint8); there is no dense
    copy before, during or after a call beyond the shared scratch, in training and in evaluation alike, and no mode in
    which gradients stop. Saved for backward: nothing but the packed weight itself. Its scales may train
    (:meth:`train_scales_`).

    ``state_dict`` keys: ``weight``, ``weight_scale`` and, where the spec has them, ``weight_zero``,
    ``weight_scale_code``, ``weight_scale_absmax``, ``weight_scale_offset``; ``bias``.
    """

    _version = 1

    def __init__(self, q: QTensor, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        op = "QuantLinear"
        if not isinstance(q, QTensor):
            bad(op, "q", "a QTensor", type(q).__name__, hint="QuantLinear.from_linear quantizes", kind=TypeError)
        if q.dim() != 2:
            bad(op, "q", "a weight [N, K]", f"shape {tuple(q.shape)}", hint="lowmem.ops.qmatmul serves experts")
        self.out_features, self.in_features = q.shape
        self.set_qtensor(q)
        if bias is not None and (tuple(bias.shape) != (self.out_features,) or not bias.is_floating_point()):
            got = f"shape {tuple(bias.shape)} in {bias.dtype}"
            bad(op, "bias", f"a floating tensor [{self.out_features}]", got)
        taken = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        self.register_parameter("bias", taken)

    @classmethod
    def from_qtensor(
        cls, q: QTensor, bias: Tensor | None = None, *, train_scale: bool = False, train_zero: bool = False
    ) -> QuantLinear:
        """A layer over ``q``'s own tensors and ``bias`` (``[N]``), none of them copied but what trains
        (:meth:`train_scales_`)."""
        layer = cls(q, bias)
        return layer.train_scales_(zero=train_zero) if train_scale or train_zero else layer

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        spec: str | QuantSpec,
        *,
        train_scale: bool = False,
        train_zero: bool = False,
        **options: Any,
    ) -> QuantLinear:
        """``linear`` with its weight quantized; its bias parameter is shared. ``options``: ``group_size``,
        ``double_quant`` and ``method`` of :func:`lowmem.quant.quantize`; ``train_scale``, ``train_zero``:
        :meth:`train_scales_`."""
        if type(linear) is not nn.Linear:
            got = type(linear).__name__
            bad("QuantLinear", "linear", "an nn.Linear (no subclass)", got, kind=TypeError)
        q = quantize(linear.weight, as_spec("QuantLinear", spec), **options)
        layer = cls.from_qtensor(q, linear.bias, train_scale=train_scale, train_zero=train_zero)
        return layer.train(linear.training)

    def train_scales_(self, *, zero: bool = False) -> QuantLinear:
        """Make the scales (and with ``zero`` the zeros) fp32 parameters that train; returns self (PEQA, arXiv
        2305.14152). What a task changes is then ``4 N groups`` bytes, and the optimizer holds state for these alone.

        Saved for backward: x, ``[M, K]``; with one scale a row, no bias and ``N < K`` the output, ``[M, N]``, instead.

        Raises ValueError for doubly quantized scales (codes do not train), for groups that cross rows, and for ``zero``
        without zero points.
        """
        op, spec = "QuantLinear", self.qspec
        assert spec is not None
        if spec.double_quant:
            bad(op, "train_scale", "a spec with double_quant=False", spec, hint="codes of scales do not train")
        if spec.is_table and self.in_features % spec.group_size:
            bad(op, "train_scale", f"groups within rows of K = {self.in_features}", f"groups of {spec.group_size}")
        if zero and not spec.zero_point:
            bad(op, "train_zero", "a spec with zero_point=True", spec)
        self.weight_scale = nn.Parameter(self.weight_scale.detach().to(torch.float32, copy=True))
        if zero or (spec.zero_point and self.weight_zero.is_floating_point()):
            zeros = self.weight_zero.detach().to(torch.float32, copy=True)
            self.weight_zero = nn.Parameter(zeros, requires_grad=zero)
        self.qspec = replace(spec, scale_dtype=torch.float32)
        return self

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (nn.Linear's name)
        """``[..., in_features]`` to ``[..., out_features]``."""
        base: Any = self.base
        bias: Tensor | None = self.bias
        if bias is not None and bias.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
            bias = bias.to(input.dtype)
        return qmatmul(input, base, bias=bias)

    def extra_repr(self) -> str:
        """``nn.Linear``'s line and the spec."""
        spec = self.qspec
        assert spec is not None
        group = "row" if spec.group_size < 0 else spec.group_size
        extra = ", double_quant" * spec.double_quant + ", zero_point" * spec.zero_point
        return f"{super().extra_repr()}, {spec.format}, group={group}{extra}"
