"""``LRQATLinear``: low-rank quantization-aware training (arXiv 2406.06385), merged into a packed layer without loss."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from .._errors import bad
from ..ops.quant_lattice import BITS, PANEL, lattice_linear
from ..quant.formats import QuantSpec, pack_codes
from ..quant.qtensor import QTensor
from ..quant.quantize import quantize
from .quant import QuantLinear


class LRQATLinear(nn.Module):
    """``y = x W^T + bias``, ``W = s * clip(round(Phi + (alpha / r) B A))``: weights on an integer lattice, moved by
    low-rank factors, so that :meth:`merge` gives a :class:`QuantLinear` with exactly these weights and no adapter.

    ``Phi = W0 / s0`` is frozen; ``lora_A``, ``lora_B`` and the scales train, in fp32, straight through the rounding.
    ``B`` starts at 0. Saved for backward: x. Bytes of the weight: ``N K`` (int8) or ``2 N K`` (bf16), and
    ``4 (r (N + K) + N groups)`` that train.

    Args:
        in_features, out_features, bias: as in ``nn.Linear``.
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale, or -1 for one scale a row.
        r, alpha: rank and scale of the factors; ``alpha`` defaults to ``r``.
        phi: ``"int8"``: fixed point with ``8 - bits`` fractional bits, wrong by at most ``2**-(9 - bits)`` steps;
            ``"bf16"``.
        device, dtype: of the layer before it is quantized; outputs have x's dtype.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 4,
        group_size: int = -1,
        r: int = 16,
        alpha: float | None = None,
        phi: Literal["int8", "bf16"] = "int8",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._take(linear, bits, group_size, r, alpha, phi)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        bits: int = 4,
        group_size: int = -1,
        r: int = 16,
        alpha: float | None = None,
        phi: Literal["int8", "bf16"] = "int8",
    ) -> LRQATLinear:
        """``linear``'s weight on the lattice whose scales fit it with the least squared error; its bias is shared."""
        if type(linear) is not nn.Linear:
            bad("LRQATLinear", "linear", "an nn.Linear (no subclass)", type(linear).__name__, kind=TypeError)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take(linear, bits, group_size, r, alpha, phi)
        return layer.train(linear.training)

    def _take(self, linear: nn.Linear, bits: int, group_size: int, r: int, alpha: float | None, phi: str) -> None:
        op = "LRQATLinear"
        if bits not in BITS:
            bad(op, "bits", "2, 3, 4 or 8", repr(bits))
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            bad(op, "r", "an integer >= 1", repr(r))
        if phi not in ("int8", "bf16"):
            bad(op, "phi", "'int8' or 'bf16'", repr(phi))
        alpha = float(r) if alpha is None else alpha
        if not math.isfinite(alpha):
            bad(op, "alpha", "a finite number", repr(alpha))
        spec = QuantSpec(f"int{bits}", group_size, scale_dtype=torch.float32)
        w = linear.weight.detach()
        n, k = w.shape
        scale = quantize(w, spec, method="mse").scale
        steps = (w.float().view(n, scale.shape[1], -1) / torch.where(scale == 0, 1.0, scale)[..., None]).view(n, k)
        half, unit = 2 ** (bits - 1), 2 ** (8 - bits)
        kept = steps.clamp_(-half, half - 1 / unit)
        stored = kept.mul_(unit).round_().clamp_(-128, 127).to(torch.int8) if phi == "int8" else kept.bfloat16()
        self.in_features, self.out_features, self.bits, self.r, self.alpha = k, n, bits, r, alpha
        self.group_size = group_size
        self.dtype = w.dtype
        self.weight_phi = nn.Parameter(stored, requires_grad=False)
        self.weight_scale = nn.Parameter(scale)
        self.lora_A = nn.Parameter(torch.empty(r, k, device=w.device))
        self.lora_B = nn.Parameter(torch.zeros(n, r, device=w.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.register_parameter("bias", linear.bias)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (nn.Linear's name)
        """``[..., in_features]`` to ``[..., out_features]``."""
        bias: Tensor | None = self.bias
        if bias is not None and bias.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
            bias = bias.to(input.dtype)
        return lattice_linear(
            input,
            self.weight_phi,
            self.lora_A,
            self.lora_B,
            self.weight_scale,
            self.alpha / self.r,
            self.bits,
            bias=bias,
        )

    @torch.no_grad()
    def merge(self) -> QuantLinear:
        """A :class:`QuantLinear` with the weights that this layer computes with, to the bit: their codes in ``bits``
        bits, the scales in fp32, no factors. This layer stays as it is; the bias is shared."""
        half, n = 2 ** (self.bits - 1), self.out_features
        parts = []
        for at in range(0, n, PANEL):
            rows = min(PANEL, n - at)
            codes = torch.ops.lowmem.quant_lattice_codes(
                self.weight_phi, self.lora_A, self.lora_B, self.alpha / self.r, self.bits, at, rows
            )
            parts.append(pack_codes((codes.clamp_(-half, half - 1) + half).to(torch.uint8), self.bits))
        spec = QuantSpec(f"int{self.bits}", self.group_size, scale_dtype=torch.float32)
        scale = self.weight_scale.detach().float().clone()
        q = QTensor(torch.cat(parts), scale, spec, (n, self.in_features), self.dtype)
        return QuantLinear.from_qtensor(q, self.bias).train(self.training)

    def extra_repr(self) -> str:
        """Sizes, bits, group and rank."""
        group = "row" if self.group_size < 0 else self.group_size
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, group={group}, r={self.r}, alpha={self.alpha:g}"
        )
