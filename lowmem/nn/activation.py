"""Modules of the activation family: norms, activations, SwiGLU and the fused output layer with its loss."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._errors import bad
from ..ops.activation import ACT_SAVES, GLU_SAVES, act, check_save, swiglu
from ..ops.activation_fp8 import SCALINGS, fp8_linear
from ..ops.activation_loss import check_options, linear_cross_entropy
from ..ops.activation_norm import NORM_SAVES, layer_norm, rms_norm

NormSave = Literal["bf16", "fp8", "recompute"]
ActSave = Literal["bf16", "fp8", "deriv4", "deriv2", "recompute"]


class _Norm(nn.Module):
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int,
        eps: float,
        elementwise_affine: bool,
        bias: bool,
        save: NormSave,
        share_output: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        if isinstance(normalized_shape, bool) or not isinstance(normalized_shape, int) or normalized_shape < 1:
            bad(op, "normalized_shape", "an integer >= 1 (the last dimension)", repr(normalized_shape))
        check_save(op, save, NORM_SAVES)
        if share_output and save != "bf16":
            bad(op, "share_output", "save='bf16' (the other forms keep no output to share)", f"save={save!r}")
        self.normalized_shape, self.eps, self.save, self.share_output = normalized_shape, eps, save, share_output
        for name, wanted, make in (("weight", True, torch.ones), ("bias", bias, torch.zeros)):
            there = elementwise_affine and wanted
            value = nn.Parameter(make(normalized_shape, device=device, dtype=dtype)) if there else None
            self.register_parameter(name, value)

    def extra_repr(self) -> str:
        """Width, eps and what backward keeps."""
        return f"{self.normalized_shape}, eps={self.eps}, save={self.save!r}"


class RMSNorm(_Norm):
    """:func:`lowmem.ops.rms_norm` with a weight ``[normalized_shape]`` of ones (``elementwise_affine=False``: none).

    ``forward(x)`` returns y; ``forward(x, residual)`` returns ``(y, x + residual)``. ``eps`` is 1e-6. With
    ``save="fp8"`` the normalised rows are quantized in the same pass. ``state_dict`` keys: ``weight``.
    """

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-6,
        elementwise_affine: bool = True,
        *,
        save: NormSave = "bf16",
        share_output: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, False, save, share_output, device, dtype)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """``[..., K]``; see :func:`lowmem.ops.rms_norm`."""
        return rms_norm(x, self.weight, residual=residual, eps=self.eps, save=self.save, share_output=self.share_output)


class LayerNorm(_Norm):
    """:func:`lowmem.ops.layer_norm` with weight and bias; arguments as for :class:`RMSNorm`, ``eps`` 1e-5."""

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        save: NormSave = "bf16",
        share_output: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, save, share_output, device, dtype)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """``[..., K]``; see :func:`lowmem.ops.layer_norm`."""
        return layer_norm(
            x,
            self.weight,
            self.bias,
            residual=residual,
            eps=self.eps,
            save=self.save,
            share_output=self.share_output,
        )


class SiLU(nn.Module):
    """:func:`lowmem.ops.act` of kind ``"silu"``; ``save`` is ``"bf16"``, ``"fp8"``, ``"deriv4"``, ``"deriv2"`` or
    ``"recompute"``."""

    kind = "silu"

    def __init__(self, save: ActSave = "bf16") -> None:
        super().__init__()
        check_save(type(self).__name__, save, ACT_SAVES)
        self.save = save

    def forward(self, x: Tensor) -> Tensor:
        """``f(x)``, any shape ``[..., K]``."""
        return act(x, self.kind, save=self.save)

    def extra_repr(self) -> str:
        """What backward keeps."""
        return f"save={self.save!r}"


class GELU(SiLU):
    """:func:`lowmem.ops.act` of kind ``"gelu"``, or ``"gelu_tanh"`` with ``approximate="tanh"``; ``save`` as for
    :class:`SiLU`."""

    def __init__(self, approximate: Literal["none", "tanh"] = "none", save: ActSave = "bf16") -> None:
        super().__init__(save)
        if approximate not in ("none", "tanh"):
            bad("GELU", "approximate", "'none' or 'tanh'", repr(approximate))
        self.kind = "gelu_tanh" if approximate == "tanh" else "gelu"


class SwiGLU(nn.Module):
    """:func:`lowmem.ops.swiglu`: ``forward(gate, up)`` is ``silu(gate) * up``; ``save`` is ``"bf16"``, ``"fp8"`` or
    ``"recompute"``."""

    def __init__(self, save: NormSave = "bf16") -> None:
        super().__init__()
        check_save("SwiGLU", save, GLU_SAVES)
        self.save = save

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """Both ``[..., K]``."""
        return swiglu(gate, up, save=self.save)

    def extra_repr(self) -> str:
        """What backward keeps."""
        return f"save={self.save!r}"


class GatedMLP(nn.Module):
    """``down_proj(silu(gate_proj(x)) * up_proj(x))`` over three given layers, under the names that Llama gives them,
    with :class:`SwiGLU` between; ``save`` is ``"bf16"``, ``"fp8"`` or ``"recompute"``.

    With the last two, a ``down_proj`` that is a :class:`FusedLoRALinear` with a ``save`` of its own keeps no input: it
    is computed again from what SwiGLU keeps.
    """

    def __init__(
        self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module, *, save: NormSave = "bf16"
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.act_fn = SwiGLU(save)

    @classmethod
    def from_module(cls, mlp: nn.Module, *, save: Any) -> GatedMLP:
        """Over the layers of a module that has them under these names (shared, not copied)."""
        parts: Any = mlp
        return cls(parts.gate_proj, parts.up_proj, parts.down_proj, save=save).train(mlp.training)

    @property
    def save(self) -> str:
        """What SwiGLU's backward keeps."""
        return self.act_fn.save

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` to ``[..., K]``."""
        return self.down_proj(self.act_fn(self.gate_proj(x), self.up_proj(x)))


class FP8Linear(nn.Linear):
    """:func:`lowmem.ops.fp8_linear` over a weight ``[out_features, in_features]``: ``nn.Linear`` with products in FP8
    and its input kept in FP8; ``scaling`` is ``"tensor"`` or ``"row"``. ``state_dict`` keys are ``nn.Linear``'s."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scaling: Literal["tensor", "row"] = "tensor",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if scaling not in SCALINGS:
            bad("FP8Linear", "scaling", "'tensor' or 'row'", repr(scaling))
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.scaling = scaling

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, scaling: Literal["tensor", "row"] = "tensor") -> FP8Linear:
        """Over the parameters of a plain ``nn.Linear`` (shared, not copied)."""
        if type(linear) is not nn.Linear:
            bad("FP8Linear", "linear", "an nn.Linear, no subclass", type(linear).__name__, kind=TypeError)
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, scaling=scaling, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (nn.Linear's name)
        """``[..., in_features]`` to ``[..., out_features]``."""
        return fp8_linear(input, self.weight, self.bias, scaling=self.scaling)


class FusedLinearCrossEntropy(nn.Module):
    """:func:`lowmem.ops.linear_cross_entropy` with its options: ``forward(x, weight, target, bias=None)`` is the
    loss of the output layer ``x weight^T + bias``, whose logits are never formed."""

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        reduction: Literal["mean", "sum", "none"] = "mean",
        save: Literal["grad", "recompute"] = "grad",
        rows: int | None = None,
        dw_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_options("FusedLinearCrossEntropy", label_smoothing, z_loss, softcap, reduction, save, rows)
        self.options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "softcap": softcap,
            "reduction": reduction,
            "save": save,
            "rows": rows,
            "dw_dtype": dw_dtype,
        }

    def forward(self, x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [..., K]``, ``weight [V, K]``, ``target [...]``; the loss, or ``[...]`` losses with reduction "none"."""
        return linear_cross_entropy(x, weight, target, bias=bias, **self.options)

    def extra_repr(self) -> str:
        """The options."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
