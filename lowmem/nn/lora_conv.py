""":class:`FusedLoRAConv2d`, a drop-in ``nn.Conv2d`` with named low-rank adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._errors import bad
from ..ops.lora_conv import lora_conv2d
from .lora_layer import LoRALayer


class FusedLoRAConv2d(LoRALayer, nn.Conv2d):
    """``y = conv(x, W) + bias + scale * B conv(drop_p(x), A)`` over ``base``'s own weight and bias, frozen and not
    copied; A ``[r, C, kh, kw]`` has W's kernel, stride, padding and dilation, B ``[N, r, 1, 1]`` mixes channels.

    Saved for backward: ``x`` (as it came), ``r`` numbers a pixel of the output, and the dropout's seed. Merging adds
    ``scale * B A``, A and B as matrices over channels. No DoRA and no gate.

    Args:
        base: a plain ``nn.Conv2d`` with ``groups=1`` and ``padding_mode="zeros"``.
        name: the first adapter's name.
        adapter: r, alpha and the rest of :meth:`add_adapter`'s options.

    ``state_dict`` keys: ``weight``, ``bias``, ``lora_A.<name>``, ``lora_B.<name>``.

    Raises ValueError or TypeError ``lowmem.FusedLoRAConv2d: <argument>: expected ..., got ...``.
    """

    op = "FusedLoRAConv2d"
    only_plain = "a convolution has plain adapters"

    def __init__(self, base: nn.Conv2d, *, name: str = "default", **adapter: Any) -> None:
        if type(base) is not nn.Conv2d:
            got = type(base).__name__
            bad(self.op, "base", "an nn.Conv2d (no subclass: its own forward would be lost)", got, kind=TypeError)
        if base.groups != 1:
            hint = "A reads all channels, so that W of a grouped convolution cannot take the adapter in"
            bad(self.op, "base", "groups=1", f"groups={base.groups}", hint=hint)
        if base.padding_mode != "zeros":
            bad(self.op, "base", "padding_mode='zeros'", repr(base.padding_mode))
        nn.Module.__init__(self)
        for attribute in base.__constants__:
            setattr(self, attribute, getattr(base, attribute))
        self._reversed_padding_repeated_twice = base._reversed_padding_repeated_twice
        self.weight = base.weight
        self.bias = base.bias
        self._init_adapters("seed")
        self.add_adapter(name, **adapter)
        self.set_adapter(name)
        self.train(base.training)

    def adapter_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """``[r, C, kh, kw]`` and ``[N, r, 1, 1]``."""
        return (r, self.in_channels, *self.kernel_size), (self.out_channels, r, 1, 1)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (nn.Conv2d's name)
        """``[batch, C, H, W]`` or ``[C, H, W]``; see :func:`lowmem.ops.lora_conv2d`."""
        name = self.active_adapter
        if self._disabled and self.merged is not None:
            return self._with(input, -self.scaling(name), 0.0)
        if self._disabled or self.merged is not None:
            return super().forward(input)
        return self._with(input, self.scaling(name), self.dropout[name] if self.training else 0.0)

    def _with(self, x: Tensor, scale: float, p: float) -> Tensor:
        name = self.active_adapter
        return lora_conv2d(
            x,
            self.weight,
            self.lora_A[name],
            self.lora_B[name],
            scale,
            bias=self.bias,
            stride=self.stride,  # type: ignore[arg-type]
            padding=self.padding,  # type: ignore[arg-type]
            dilation=self.dilation,  # type: ignore[arg-type]
            p=p,
            seed=torch.randint(0, 2**62, (1,), device=x.device) if p > 0 else None,
        )
