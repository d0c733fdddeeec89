"""LoRA modules: :class:`FusedLoRALinear`, a drop-in ``nn.Linear`` with named low-rank adapters."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._dtypes import accumulate_dtype
from .._errors import bad
from ..ops.activation_saved import INPUT_SAVES
from ..ops.lora import Adapted, lora_group, lora_linear
from ..ops.lora_multi import multi_lora_linear
from ..ops.quant import qmatmul
from ..ops.sampled import Pick
from ..quant import QTensor, dequantize
from ..sampling import budget_rows, pick
from .dora import scaled
from .lora_layer import PARTS, LoRALayer, check_adapter
from .quant import QuantLinear


class FusedLoRALinear(LoRALayer, nn.Linear):
    """``y = x W^T + bias + scale * drop_p(x) A^T B^T`` with ``W`` and ``bias`` frozen (LoRA, arXiv 2106.09685).

    ``scale = alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora`` (arXiv 2312.03732). Several adapters may live on
    one layer under different names; one is active at a time.

    Saved for backward, per input row: ``in_features * itemsize`` for ``x`` (one storage shared by all layers over the
    same ``x``), ``r * itemsize`` for S and, with dropout, ``in_features / 8`` for the mask's bits, or 0 with
    ``mask="seed"``.

    Args:
        in_features, out_features: K and N.
        r: rank, any integer >= 1.
        alpha: numerator of the scale.
        dropout: drop probability of the adapter's input while training, in 1/65536ths.
        bias: give the layer a bias, ``[N]``.
        base: ``[N, K]``, used as the weight without a copy, or a :class:`lowmem.quant.QTensor` of that shape (QLoRA,
            arXiv 2305.14314); None makes a new weight, initialised as ``nn.Linear`` does.
        use_rslora: scale by ``alpha / sqrt(r)``.
        adapter_dtype: dtype of A and B; None means fp32 over a 16-bit weight (or one quantized from 16 bits) and the
            weight's dtype otherwise.
        mask: ``"bits"`` keeps one bit an element for backward, ``"seed"`` draws the mask again there.
        save: how the input is kept for dA (:func:`lowmem.ops.lora_linear`); rows routed to many adapters keep it as it
            came.
        sample_budget: share of the input's rows, in (0, 1], that dA is estimated from without bias while training
            (:func:`lowmem.sampling.pick`); they are kept instead of the input, and ``save`` stays "bf16". None: all.
        use_dora, gate, train: see :meth:`add_adapter`.
        name: the first adapter's name.
        device, dtype: of a new weight.

    ``state_dict`` keys: ``weight`` (and :class:`lowmem.nn.QuantLinear`'s for a packed one), ``bias``,
    ``lora_A.<name>`` ``[r, K]``, ``lora_B.<name>`` ``[N, r]`` and, where there are any, ``lora_gate.<name>`` ``[r]``
    and ``lora_magnitude.<name>`` ``[N]``. A is initialised as in ``nn.Linear``, B with zeros, a gate with ones, a
    magnitude with the norms of W's rows.

    Raises ValueError or TypeError ``lowmem.FusedLoRALinear: <argument>: expected ..., got ...``.
    """

    op = "FusedLoRALinear"
    save = "bf16"
    sample_budget: float | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        bias: bool = False,
        base: Tensor | QTensor | None = None,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        mask: Literal["bits", "seed"] = "bits",
        save: Literal["bf16", "fp8", "recompute"] = "bf16",
        sample_budget: float | None = None,
        use_dora: bool = False,
        gate: bool = False,
        train: Collection[str] = PARTS,
        name: str = "default",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        op = "FusedLoRALinear"
        check_adapter(op, name, r, alpha, dropout)
        for argument, value in (("in_features", in_features), ("out_features", out_features)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                bad(op, argument, "an integer >= 1", repr(value))
        if mask not in ("bits", "seed"):
            bad(op, "mask", "'bits' or 'seed'", repr(mask))
        if save not in INPUT_SAVES:
            bad(op, "save", "'bf16', 'fp8' or 'recompute'", repr(save))
        if sample_budget is not None:
            budget_rows(1, sample_budget)
            if save != "bf16":
                bad(op, "save", "'bf16' with a sample_budget", repr(save))
        if adapter_dtype is not None and not adapter_dtype.is_floating_point:
            bad(op, "adapter_dtype", "a floating dtype", adapter_dtype, kind=TypeError)
        if base is None:
            nn.Linear.__init__(self, in_features, out_features, bias=bias, device=device, dtype=dtype)
        else:
            if tuple(base.shape) != (out_features, in_features) or not base.dtype.is_floating_point:
                got = f"{tuple(base.shape)} in {base.dtype}"
                bad(op, "base", f"a floating tensor of shape [{out_features}, {in_features}], or a QTensor", got)
            nn.Module.__init__(self)
            self.in_features, self.out_features = in_features, out_features
            if isinstance(base, QTensor):
                self.set_qtensor(base)
            else:
                self.weight = base if isinstance(base, nn.Parameter) else nn.Parameter(base, requires_grad=False)
            zeros = torch.zeros(out_features, device=base.device, dtype=base.dtype) if bias else None
            self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros))
        self._init_adapters(mask)
        self.save, self.sample_budget = save, sample_budget
        self.add_adapter(
            name,
            r=r,
            alpha=alpha,
            dropout=dropout,
            use_rslora=use_rslora,
            adapter_dtype=adapter_dtype,
            use_dora=use_dora,
            gate=gate,
            train=train,
        )
        self.set_adapter(name)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> FusedLoRALinear:
        """A layer over the weight (dense or packed) and bias parameters of an ``nn.Linear`` or a
        :class:`lowmem.nn.QuantLinear` (shared, not copied; all are frozen). ``options``: r, alpha and whatever else the
        constructor takes but sizes, base and bias."""
        op = "FusedLoRALinear"
        if isinstance(linear, FusedLoRALinear):
            bad(op, "linear", "a plain nn.Linear", "a FusedLoRALinear", hint="add_adapter gives it another adapter")
        if type(linear) not in (nn.Linear, QuantLinear):
            got = type(linear).__name__
            want = "an nn.Linear or a QuantLinear (no subclass: its own forward would be lost)"
            bad(op, "linear", want, got, kind=TypeError)
        base = linear.base if isinstance(linear, QuantLinear) else linear.weight
        layer = cls(linear.in_features, linear.out_features, base=base, **options)
        if linear.bias is not None:
            layer.bias = linear.bias
            layer.bias.requires_grad_(False)
        return layer.train(linear.training)

    @classmethod
    @torch.no_grad()
    def from_svd(
        cls, linear: nn.Linear, *, r: int, train: Collection[str] = ("gate",), name: str = "default"
    ) -> FusedLoRALinear:
        """SVFit (arXiv 2409.05926): ``W = U_r diag(sigma) V_r^T + W_e`` by the SVD in fp32 (fp64 for fp64), with
        ``A = V_r^T``, ``B = U_r``, ``gate = sigma``, scale 1, and ``W_e`` written over ``linear``'s weight.

        With only the gate training, backward keeps ``r`` numbers a row and no ``x``. At the start the layer computes
        what ``linear`` did, to within the rounding of ``W_e``. r is at most ``min(N, K)``.
        """
        if isinstance(linear, QuantLinear):
            bad("FusedLoRALinear", "linear", "a dense weight, which from_svd writes", f"{linear.qspec}", kind=TypeError)
        rank = min(linear.weight.shape)
        if isinstance(r, bool) or not isinstance(r, int) or not 1 <= r <= rank:
            bad("FusedLoRALinear", "r", f"an integer in [1, {rank}]", repr(r))
        dtype = accumulate_dtype(linear.weight.dtype)
        layer = cls.from_linear(linear, r=r, alpha=r, gate=True, train=train, name=name, adapter_dtype=dtype)
        u, sigma, vt = torch.linalg.svd(layer.weight.to(dtype), full_matrices=False)
        layer.lora_A[name].copy_(vt[:r])
        layer.lora_B[name].copy_(u[:, :r])
        layer.lora_gate[name].copy_(sigma[:r])
        layer._add_to(layer.weight, -1.0)
        return layer

    def adapter_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """``[r, K]`` and ``[N, r]``."""
        return (r, self.in_features), (self.out_features, r)

    @torch.no_grad()
    def merged_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A plain ``nn.Linear`` with ``W + scale * B A`` (gate and magnitude included) in ``dtype`` (default: the
        weight's, or the one that a packed base was quantized from); this layer stays as it is."""
        base, wide = self.base, accumulate_dtype(self.dense_dtype)
        dense = dequantize(base, wide) if isinstance(base, QTensor) else base.to(wide, copy=True)
        if self.merged is None:
            self._add_to(dense, 1.0, after=self._row_factor(self.active_adapter))
        linear = nn.Linear(1, 1, bias=False, device=dense.device)
        linear.in_features, linear.out_features = self.in_features, self.out_features
        linear.weight = nn.Parameter(dense.to(dtype or self.dense_dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(linear.weight.dtype, copy=True), requires_grad=False)
        return linear.train(self.training)

    # ------------------------------------------------------------------------------------------------------- forward

    def computes_plain_lora(self) -> bool:
        """Whether forward is one :func:`lowmem.ops.lora_linear`: neither disabled, merged, routed nor DoRA."""
        special = self._disabled or self.merged is not None or self.routing is not None
        return not special and self.active_adapter not in self.lora_magnitude

    def adapted(self, device: torch.device) -> Adapted:
        """The operator's arguments for a call now; draws the dropout seed on ``device`` where one is needed."""
        name = self.active_adapter
        p = self.dropout[name] if self.training else 0.0
        return Adapted(
            self.base,
            self.lora_A[name],
            self.lora_B[name],
            self.scaling(name),
            None if name in self.lora_magnitude else self.bias,  # DoRA's bias comes after the magnitude
            self.lora_gate[name] if name in self.lora_gate else None,
            p,
            torch.randint(0, 2**62, (1,), device=device) if p > 0 else None,
        )

    def pick(self, x: Tensor) -> Pick | None:
        """The rows of ``x`` that dA is estimated from in a call now; None: all of them."""
        budget, n = self.sample_budget, x.numel() // max(x.shape[-1], 1)
        needed = self.lora_A[self.active_adapter].requires_grad or self.weight.requires_grad
        if budget is None or not (self.training and torch.is_grad_enabled() and needed) or n == 0:
            return None
        if budget_rows(n, budget) == n:
            return None
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return pick(x, budget, seed=torch.randint(0, 2**62, (1,), device=x.device))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (nn.Linear's name)
        """``[..., in_features]`` to ``[..., out_features]``; see :func:`lowmem.ops.lora_linear`."""
        if self._disabled and self.merged is not None:
            return self._base_of_merged(input)
        if self._disabled or self.merged is not None:
            base = self.base
            if isinstance(base, QTensor):
                return qmatmul(input, base, bias=self.bias)
            return F.linear(input, base, self.bias)
        if self.routing is not None:
            return self.routed_forward(input, self.routing)
        factor = self._row_factor(self.active_adapter)
        if self.group is not None and factor is None:
            y = self.group.take(self, input)
            if y is not None:
                return y
        layers = (self.adapted(input.device),)
        (y,) = lora_group(input, layers, save_mask=self.mask == "bits", save=self.save, pick=self.pick(input))
        if factor is None:
            return y
        return scaled(y, factor, self.bias)

    def routed_forward(self, input: Tensor, routing: Any) -> Tensor:  # noqa: A002
        """Each row through its own adapter (:func:`lowmem.nn.route`); see :func:`lowmem.ops.multi_lora_linear`."""
        names = routing.names
        rows = input.numel() // max(input.shape[-1], 1)
        if rows != routing.rows:
            bad("FusedLoRALinear", "input", f"{routing.rows} rows, as routed", rows)
        special = [name for name in names if name in self.lora_magnitude or name in self.lora_gate]
        if special or self.merged is not None:
            got = f"{self.merged!r} merged" if self.merged else f"{special[0]!r} with a gate or a magnitude"
            bad("FusedLoRALinear", "routing", "plain adapters on a layer that is not merged", got)
        ps = [self.dropout[name] if self.training else 0.0 for name in names]
        return multi_lora_linear(
            input,
            self.base,
            [self.lora_A[name] for name in names],
            [self.lora_B[name] for name in names],
            [self.scaling(name) for name in names],
            routing.offsets,
            order=routing.order,
            bias=self.bias,
            ps=ps,
            seeds=torch.randint(0, 2**62, (len(names),), device=input.device) if any(ps) else None,
            save_mask=self.mask == "bits",
            checked=True,
        )

    def _base_of_merged(self, input: Tensor) -> Tensor:  # noqa: A002
        # the merged weight is factor * (W + B A): take its adapter off again, on the output
        a, b = (t.to(input.dtype) for t in self._delta(self.active_adapter))
        factor = self.merged_factor
        if factor is None:
            return lora_linear(input, self.base, a, b, -1.0, bias=self.bias)
        y = lora_linear(input, self.base, a, b * factor[:, None].to(b.dtype), -1.0) / factor.to(input.dtype)
        return y if self.bias is None else y + self.bias
