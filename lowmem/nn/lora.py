"""LoRA modules: :class:`FusedLoRALinear`, a drop-in ``nn.Linear`` with named low-rank adapters."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._errors import bad
from ..ops.lora import Adapted, accumulate_dtype, lora_group, lora_linear
from ..ops.lora_multi import multi_lora_linear
from .dora import merged_row_norms, row_norms_squared

MERGE_ROWS = 1024  # rows of W that merge() holds in fp32 at a time


PARTS = ("A", "B", "gate", "magnitude")  # what an adapter may be made of: the attributes lora_<part>


def _check_adapter(name: str, r: int, alpha: float, dropout: float) -> None:
    op = "FusedLoRALinear"
    if not isinstance(name, str) or not name or "." in name:
        bad(op, "name", "a non-empty string without dots", repr(name))
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        bad(op, "r", "an integer >= 1", repr(r))
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        bad(op, "alpha", "a finite number", repr(alpha))
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0.0 <= dropout <= 1.0:
        bad(op, "dropout", "a probability in [0, 1]", repr(dropout))


class FusedLoRALinear(nn.Linear):
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
        base: ``[N, K]``, used as the weight without a copy; None makes a new weight, initialised as ``nn.Linear`` does.
        use_rslora: scale by ``alpha / sqrt(r)``.
        adapter_dtype: dtype of A and B; None means fp32 over a 16-bit weight and the weight's dtype otherwise.
        mask: ``"bits"`` keeps one bit an element for backward, ``"seed"`` draws the mask again there.
        use_dora, gate, train: see :meth:`add_adapter`.
        name: the first adapter's name.
        device, dtype: of a new weight.

    ``state_dict`` keys: ``weight``, ``bias``, ``lora_A.<name>`` ``[r, K]``, ``lora_B.<name>`` ``[N, r]`` and, where
    there are any, ``lora_gate.<name>`` ``[r]`` and ``lora_magnitude.<name>`` ``[N]``. A is initialised as in
    ``nn.Linear``, B with zeros, a gate with ones, a magnitude with the norms of W's rows.

    Raises ValueError or TypeError ``lowmem.FusedLoRALinear: <argument>: expected ..., got ...``.
    """

    _version = 1
    merged_factor: Tensor | None
    _row_norms_squared: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        bias: bool = False,
        base: Tensor | None = None,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        mask: Literal["bits", "seed"] = "bits",
        use_dora: bool = False,
        gate: bool = False,
        train: Collection[str] = PARTS,
        name: str = "default",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        op = "FusedLoRALinear"
        _check_adapter(name, r, alpha, dropout)
        for argument, value in (("in_features", in_features), ("out_features", out_features)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                bad(op, argument, "an integer >= 1", repr(value))
        if mask not in ("bits", "seed"):
            bad(op, "mask", "'bits' or 'seed'", repr(mask))
        if adapter_dtype is not None and not adapter_dtype.is_floating_point:
            bad(op, "adapter_dtype", "a floating dtype", adapter_dtype, kind=TypeError)
        if base is None:
            super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        else:
            if tuple(base.shape) != (out_features, in_features) or not base.is_floating_point():
                got = f"{tuple(base.shape)} in {base.dtype}"
                bad(op, "base", f"a floating tensor of shape [{out_features}, {in_features}]", got)
            nn.Module.__init__(self)
            self.in_features, self.out_features = in_features, out_features
            self.weight = base if isinstance(base, nn.Parameter) else nn.Parameter(base, requires_grad=False)
            zeros = torch.zeros(out_features, device=base.device, dtype=base.dtype) if bias else None
            self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros))
        self._init_adapters(mask)
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

    def _init_adapters(self, mask: str) -> None:
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.lora_gate = nn.ParameterDict()
        self.lora_magnitude = nn.ParameterDict()
        self.r: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.train_parts: dict[str, tuple[str, ...]] = {}
        self.mask = mask
        self.active_adapter = ""
        self.merged: str | None = None
        self.register_buffer("merged_factor", None)  # DoRA's m / norm [N] while merged: what unmerge() divides by
        self.register_buffer("_row_norms_squared", None, persistent=False)  # of W [N], where an adapter is DoRA
        self._disabled = 0
        self.group: Any = None  # the FusedLoRAGroup that may answer for this layer (lora_group.py)
        self.routing: Any = None  # which rows belong to which adapter (lora_multi.py)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> FusedLoRALinear:
        """A layer over ``linear``'s own weight and bias parameters (shared, not copied; both are frozen). ``options``:
        r, alpha and whatever else the constructor takes but sizes, base and bias."""
        op = "FusedLoRALinear"
        if isinstance(linear, FusedLoRALinear):
            bad(op, "linear", "a plain nn.Linear", "a FusedLoRALinear", hint="add_adapter gives it another adapter")
        if type(linear) is not nn.Linear:
            got = type(linear).__name__
            bad(op, "linear", "an nn.Linear (no subclass: its own forward would be lost)", got, kind=TypeError)
        layer = cls(linear.in_features, linear.out_features, base=linear.weight, **options)
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
        rank = min(linear.weight.shape)
        if isinstance(r, bool) or not isinstance(r, int) or not 1 <= r <= rank:
            bad("FusedLoRALinear", "r", f"an integer in [1, {rank}]", repr(r))
        dtype = accumulate_dtype(linear.weight.dtype)
        layer = cls.from_linear(linear, r=r, alpha=r, gate=True, train=train, name=name, adapter_dtype=dtype)
        u, sigma, vt = torch.linalg.svd(layer.weight.to(dtype), full_matrices=False)
        layer.lora_A[name].copy_(vt[:r])
        layer.lora_B[name].copy_(u[:, :r])
        layer.lora_gate[name].copy_(sigma[:r])
        layer._add_to_weight(-1.0)
        return layer

    # ------------------------------------------------------------------------------------------------------ adapters

    def add_adapter(
        self,
        name: str,
        *,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        use_dora: bool = False,
        gate: bool = False,
        train: Collection[str] = PARTS,
    ) -> None:
        """Add adapter ``name`` (B zero, so the output does not change). It is frozen until :meth:`set_adapter` makes it
        the active one.

        Args:
            name: any string without dots that is not taken.
            r, alpha, dropout, use_rslora, adapter_dtype: as for the class.
            use_dora: ``y = m / |W + scale B A| * (x W^T + scale * drop(x) A^T B^T) + bias`` with a trained magnitude
                ``m`` ``[N]`` (DoRA, arXiv 2402.09353, section 4.3: the norm of each row is taken as a constant). Saves
                ``N`` more numbers a row; the norm needs no dense copy of the weight. PEFT drops x in the base term too.
            gate: a trained factor for each rank (SoRA, arXiv 2311.11696); see :func:`lowmem.optim.prox_l1_`.
            train: which parts train once active, of ``A``, ``B``, ``gate``, ``magnitude``. ``("B",)`` is LoRA-FA (arXiv
                2308.03303), which saves ``S`` alone and no ``x``.
        """
        op = "FusedLoRALinear"
        _check_adapter(name, r, alpha, dropout)
        if name in self.lora_A:
            bad(op, "name", f"a name other than {', '.join(self.lora_A)}", repr(name))
        if isinstance(train, str) or not set(train) <= set(PARTS):
            bad(op, "train", f"a collection of {', '.join(PARTS)}", repr(train))
        device, dtype = self.weight.device, adapter_dtype or accumulate_dtype(self.weight.dtype)
        parts = {"A": torch.empty(r, self.in_features, device=device, dtype=dtype)}
        nn.init.kaiming_uniform_(parts["A"], a=math.sqrt(5))
        parts["B"] = torch.zeros(self.out_features, r, device=device, dtype=dtype)
        if gate:
            parts["gate"] = torch.ones(r, device=device, dtype=dtype)
        if use_dora:
            self._row_norms_squared = row_norms_squared(self.weight)
            parts["magnitude"] = self._row_norms_squared.sqrt().to(dtype)
        for part, value in parts.items():
            getattr(self, f"lora_{part}")[name] = nn.Parameter(value, requires_grad=False)
        self.r[name], self.alpha[name] = r, float(alpha)
        self.dropout[name], self.use_rslora[name] = float(dropout), bool(use_rslora)
        self.train_parts[name] = tuple(part for part in PARTS if part in train)

    def set_adapter(self, name: str, *, trainable: bool = True) -> None:
        """Make ``name`` the active adapter and freeze the others, as PEFT does; ``trainable=False`` freezes it too."""
        if name not in self.lora_A:
            bad("FusedLoRALinear", "name", f"one of {', '.join(self.lora_A)}", repr(name))
        if self.merged is not None and self.merged != name:
            bad("FusedLoRALinear", "name", f"{self.merged!r}, which is merged", repr(name), hint="unmerge() first")
        self.active_adapter = name
        self.train_only((name,) if trainable else ())

    def train_only(self, names: Collection[str]) -> None:
        """Let the ``train`` parts of adapters ``names`` train, and freeze all others; the active adapter stays."""
        for part in PARTS:
            for other, parameter in getattr(self, f"lora_{part}").items():
                parameter.requires_grad_(other in names and part in self.train_parts[other])

    def scaling(self, name: str | None = None) -> float:
        """``alpha / r`` of adapter ``name`` (default: the active one), or ``alpha / sqrt(r)`` for rsLoRA."""
        name = name or self.active_adapter
        r = self.r[name]
        return self.alpha[name] / (math.sqrt(r) if self.use_rslora[name] else r)

    def disabled(self) -> Any:
        """Context in which the layer computes its base alone (for a reference model's pass), merged or not."""
        return disabled(self)

    # --------------------------------------------------------------------------------------------------------- merge

    def merge(self) -> None:
        """``W += scale * B A`` with the active adapter (gate and magnitude included), computed in fp32 and rounded
        once; forward then costs one GEMM. Refused, with W untouched, where the adapter holds NaN or infinity."""
        if self.merged is not None:
            bad("FusedLoRALinear", "merge", "a layer that is not merged", f"{self.merged!r} merged")
        name = self.active_adapter
        factor = self._row_factor(name)
        self._add_to_weight(1.0, after=factor)
        self.merged_factor = None if factor is None else factor.detach()
        self.merged = name

    def unmerge(self) -> None:
        """Take the merged adapter out of W again: exact in fp64 and fp32 but for one rounding, in 16 bits to within one
        rounding of the merged weight."""
        if self.merged is None:
            bad("FusedLoRALinear", "unmerge", "a merged layer", "a layer that is not merged")
        factor = self.merged_factor
        self._add_to_weight(-1.0, before=None if factor is None else 1.0 / factor)
        self.merged = self.merged_factor = self._row_norms_squared = None

    def _delta(self, name: str) -> tuple[Tensor, Tensor]:
        """``A`` and ``scale * B * gate`` in the accumulation dtype: their product is what merging adds."""
        dtype = accumulate_dtype(self.weight.dtype)
        b = self.lora_B[name].to(dtype) * self.scaling(name)
        return self.lora_A[name].to(dtype), b * self.lora_gate[name].to(dtype) if name in self.lora_gate else b

    def _row_factor(self, name: str) -> Tensor | None:
        """DoRA's ``m / |W + scale B A|``, ``[N]``, differentiable in ``m`` alone; None for other adapters."""
        if name not in self.lora_magnitude:
            return None
        with torch.no_grad():
            a, b = self._delta(name)
            squared = self._row_norms_squared
            if squared is None or squared.dtype != a.dtype:  # W was written, or module.to(dtype) was called
                self._row_norms_squared = squared = row_norms_squared(self.weight)
            norms = merged_row_norms(self.weight, squared, a, b)
        return self.lora_magnitude[name] / norms

    @torch.no_grad()
    def _add_to_weight(self, sign: float, *, before: Tensor | None = None, after: Tensor | None = None) -> None:
        a, b = self._delta(self.active_adapter)
        if not all(bool(torch.isfinite(t).all()) for t in (a, b, before, after) if t is not None):
            got = "NaN or infinity"
            bad("FusedLoRALinear", self.active_adapter, "finite adapter weights", got, hint="the weight is untouched")
        for start in range(0, self.out_features, MERGE_ROWS):
            block = slice(start, start + MERGE_ROWS)
            rows = self.weight[block].to(a.dtype)
            if before is not None:
                rows = rows * before[block, None]
            rows = torch.addmm(rows, b[block], a, alpha=sign)
            self.weight[block] = rows if after is None else rows * after[block, None]

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
            self.weight,
            self.lora_A[name],
            self.lora_B[name],
            self.scaling(name),
            None if name in self.lora_magnitude else self.bias,  # DoRA's bias comes after the magnitude
            self.lora_gate[name] if name in self.lora_gate else None,
            p,
            torch.randint(0, 2**62, (1,), device=device) if p > 0 else None,
        )

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (nn.Linear's name)
        """``[..., in_features]`` to ``[..., out_features]``; see :func:`lowmem.ops.lora_linear`."""
        if self._disabled and self.merged is not None:
            return self._base_of_merged(input)
        if self._disabled or self.merged is not None:
            return F.linear(input, self.weight, self.bias)
        if self.routing is not None:
            return self.routed_forward(input, self.routing)
        factor = self._row_factor(self.active_adapter)
        if self.group is not None and factor is None:
            y = self.group.take(self, input)
            if y is not None:
                return y
        (y,) = lora_group(input, (self.adapted(input.device),), save_mask=self.mask == "bits")
        if factor is None:
            return y
        factor = factor.to(y.dtype)
        return y * factor if self.bias is None else torch.addcmul(self.bias.to(y.dtype), y, factor)

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
            self.weight,
            [self.lora_A[name] for name in names],
            [self.lora_B[name] for name in names],
            [self.scaling(name) for name in names],
            routing.offsets,
            order=routing.order,
            bias=self.bias,
            ps=ps,
            seeds=torch.randint(0, 2**62, (len(names),), device=input.device) if any(ps) else None,
            save_mask=self.mask == "bits",
        )

    def _base_of_merged(self, input: Tensor) -> Tensor:  # noqa: A002
        # the merged weight is factor * (W + B A): take its adapter off again, on the output
        a, b = (t.to(input.dtype) for t in self._delta(self.active_adapter))
        factor = self.merged_factor
        if factor is None:
            return lora_linear(input, self.weight, a, b, -1.0, bias=self.bias)
        y = lora_linear(input, self.weight, a, b * factor[:, None].to(b.dtype), -1.0) / factor.to(input.dtype)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """``nn.Linear``'s line and the adapters'."""
        adapters = ", ".join(
            f"{name}(r={self.r[name]}, alpha={self.alpha[name]:g}, dropout={self.dropout[name]:g})"
            for name in self.lora_A
        )
        return f"{super().extra_repr()}, active={self.active_adapter}, adapters=[{adapters}]"

    # ---------------------------------------------------------------------------------------------------- state dict

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None and self.merged is not None:
            metadata[prefix[:-1]]["merged"] = self.merged

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
        if local_metadata.get("version", self._version) > self._version:
            error_msgs.append(
                f"lowmem.FusedLoRALinear: {prefix[:-1] or 'state_dict'}: expected version <= {self._version}, got "
                f"{local_metadata['version']} (written by a newer lowmem)"
            )
            return
        factor = state_dict.get(prefix + "merged_factor")  # a buffer only while DoRA is merged
        self.merged_factor = None if factor is None else torch.empty_like(factor, device=self.weight.device)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prefix + "weight" in state_dict:
            self.merged = local_metadata.get("merged")
            self._row_norms_squared = None


def lora_layers(module: nn.Module) -> Iterator[tuple[str, FusedLoRALinear]]:
    """``(name, layer)`` of every :class:`FusedLoRALinear` in ``module``, itself included."""
    for name, child in module.named_modules():
        if isinstance(child, FusedLoRALinear):
            yield name, child


def set_adapter(module: nn.Module, name: str, *, trainable: bool = True) -> None:
    """:meth:`FusedLoRALinear.set_adapter` on every layer of ``module``; no layer changes unless all have ``name``."""
    layers = list(lora_layers(module))
    if not layers or any(name not in layer.lora_A for _, layer in layers):
        known = sorted(set.intersection(*(set(layer.lora_A) for _, layer in layers))) if layers else []
        bad("set_adapter", "name", f"an adapter that every layer has ({', '.join(known) or 'none'})", repr(name))
    for _, layer in layers:
        layer.set_adapter(name, trainable=trainable)


@contextmanager
def disabled(module: nn.Module) -> Iterator[nn.Module]:
    """Context in which every :class:`FusedLoRALinear` in ``module`` computes its base alone, merged or not."""
    layers = [layer for _, layer in lora_layers(module)]
    with ExitStack() as undo:
        for layer in layers:
            layer._disabled += 1
            undo.callback(_enable, layer)
        yield module


def _enable(layer: FusedLoRALinear) -> None:
    layer._disabled -= 1
