"""What every adapted module has, whatever it computes: named adapters, merging, ``disabled``, its state dict."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._dtypes import accumulate_dtype
from .._errors import bad
from ..quant import QTensor, dequantize, quantize
from ..quant.qtensor import TENSORS
from .dora import merged_row_norms, row_norms_squared
from .quant import PackedWeight

MERGE_ROWS = 1024  # rows of W that merge() holds in fp32 at a time
PARTS = ("A", "B", "gate", "magnitude")  # what an adapter may be made of: the attributes lora_<part>


def check_adapter(op: str, name: str, r: int, alpha: float, dropout: float) -> None:
    """Complain of an adapter's settings that make no sense, in ``lowmem.<op>``'s name."""
    if not isinstance(name, str) or not name or "." in name:
        bad(op, "name", "a non-empty string without dots", repr(name))
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        bad(op, "r", "an integer >= 1", repr(r))
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        bad(op, "alpha", "a finite number", repr(alpha))
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0.0 <= dropout <= 1.0:
        bad(op, "dropout", "a probability in [0, 1]", repr(dropout))


class LoRALayer(PackedWeight):
    """A frozen module with low-rank adapters under different names, one of them active: the part of
    :class:`FusedLoRALinear`, :class:`FusedLoRAEmbedding` and :class:`FusedLoRAConv2d` that does not depend on what the
    module computes.

    A subclass says what shapes A and B have (:meth:`adapter_shapes`), how they start (:meth:`_reset`), and what merging
    adds to which matrix (:meth:`_matrix`, :meth:`_delta`).
    """

    _version = 1
    op = "LoRALayer"  # in whose name errors are raised
    only_plain = ""  # why this kind of layer has no DoRA and no gate; '' where it has
    weight: Any
    merged_factor: Tensor | None
    _row_norms_squared: Tensor | None

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
        self.tied_to = ""  # modules that share W and are not this one, as convert found them
        self.group: Any = None  # the FusedLoRAGroup that may answer for this layer (lora_group.py)
        self.routing: Any = None  # which rows belong to which adapter (lora_multi.py)

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
        """Add adapter ``name`` (B, or an embedding's A, is zero: the output does not change). It is frozen until
        :meth:`set_adapter` makes it the active one.

        Args:
            name: any string without dots that is not taken.
            r, alpha, dropout, use_rslora, adapter_dtype: as for the class.
            use_dora: ``y = m / |W + scale B A| * (x W^T + scale * drop(x) A^T B^T) + bias`` with a trained magnitude
                ``m`` ``[N]`` (DoRA, arXiv 2402.09353, section 4.3: the norm of each row is taken as a constant). Saves
                ``N`` more numbers a row; the norm needs no dense copy of the weight. PEFT drops x in the base term too.
                Linear layers alone.
            gate: a trained factor for each rank (SoRA, arXiv 2311.11696); see :func:`lowmem.optim.prox_l1_`. Linear
                layers alone.
            train: which parts train once active, of ``A``, ``B``, ``gate``, ``magnitude``. ``("B",)`` is LoRA-FA (arXiv
                2308.03303), which saves ``S`` alone and no ``x``.
        """
        op = self.op
        check_adapter(op, name, r, alpha, dropout)
        if name in self.lora_A:
            bad(op, "name", f"a name other than {', '.join(self.lora_A)}", repr(name))
        if isinstance(train, str) or not set(train) <= set(PARTS):
            bad(op, "train", f"a collection of {', '.join(PARTS)}", repr(train))
        for argument, given in (("use_dora", use_dora), ("gate", gate)):
            if given and self.only_plain:
                bad(op, argument, f"False ({self.only_plain})", given)
        device, dtype = self.weight.device, adapter_dtype or accumulate_dtype(self.dense_dtype)
        parts = self._new_parts(r, device, dtype)
        if gate:
            parts["gate"] = torch.ones(r, device=device, dtype=dtype)
        if use_dora:
            self._row_norms_squared = row_norms_squared(self.base)
            parts["magnitude"] = self._row_norms_squared.sqrt().to(dtype)
        for part, value in parts.items():
            getattr(self, f"lora_{part}")[name] = nn.Parameter(value, requires_grad=False)
        self.r[name], self.alpha[name] = r, float(alpha)
        self.dropout[name], self.use_rslora[name] = float(dropout), bool(use_rslora)
        self.train_parts[name] = tuple(part for part in PARTS if part in train)

    def adapter_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B at rank ``r``: those of PEFT's files."""
        raise TypeError(f"lowmem.{self.op}: a subclass of LoRALayer has to say what shapes its adapters have")

    def _new_parts(self, r: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """A as torch starts a layer's weight, B zero."""
        shape_a, shape_b = self.adapter_shapes(r)
        a = torch.empty(shape_a, device=device, dtype=dtype)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        return {"A": a, "B": torch.zeros(shape_b, device=device, dtype=dtype)}

    def set_adapter(self, name: str, *, trainable: bool = True) -> None:
        """Make ``name`` the active adapter and freeze the others, as PEFT does; ``trainable=False`` freezes it too."""
        if name not in self.lora_A:
            bad(self.op, "name", f"one of {', '.join(self.lora_A)}", repr(name))
        if self.merged is not None and self.merged != name:
            bad(self.op, "name", f"{self.merged!r}, which is merged", repr(name), hint="unmerge() first")
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

    def merge(self) -> float | None:
        """``W += scale * B A`` with the active adapter (gate and magnitude included), computed in fp32 and rounded
        once; forward then costs one GEMM. Refused, with W untouched, where the adapter holds NaN or infinity.

        A packed base is dequantized, summed and quantized again in its own format (absmax), which takes ``N * K`` fp32
        numbers meanwhile and cannot be undone. Returns the relative error of that,
        ``|deq(Q') - (W + delta)| / |W + delta|`` in the Frobenius norm; None for a dense base.
        :meth:`FusedLoRALinear.merged_linear` merges into a dense layer instead."""
        if self.merged is not None:
            bad(self.op, "merge", "a layer that is not merged", f"{self.merged!r} merged")
        if self.tied_to:
            hint = "the other would change with it: untie them first"
            bad(self.op, "merge", "a weight that no other module reads", f"one tied to {self.tied_to}", hint=hint)
        name = self.active_adapter
        factor = self._row_factor(name)
        base, error = self.base, None
        if isinstance(base, QTensor):
            dense = dequantize(base, accumulate_dtype(base.dtype))
            self._add_to(dense, 1.0, after=factor)
            error = self._requantize(base, dense)
        else:
            self._add_to(base, 1.0, after=factor)
        self.merged_factor = None if factor is None else factor.detach()
        self.merged = name
        return error

    @torch.no_grad()
    def _requantize(self, base: QTensor, dense: Tensor) -> float:
        """Write ``dense`` into ``base``'s own tensors, as merging writes a dense weight; the relative error of it."""
        q = quantize(dense, base.spec)
        for part in TENSORS:
            if (value := getattr(q, part)) is not None:
                getattr(base, part).copy_(value)
        size = float(torch.linalg.vector_norm(dense))
        dense.sub_(dequantize(base, dense.dtype))
        return float(torch.linalg.vector_norm(dense)) / size if size > 0 else 0.0

    def unmerge(self) -> None:
        """Take the merged adapter out of W again: exact in fp64 and fp32 but for one rounding, in 16 bits to within one
        rounding of the merged weight."""
        if self.merged is None:
            bad(self.op, "unmerge", "a merged layer", "a layer that is not merged")
        if self.qspec is not None:
            hint = "keep the packed base's state_dict before merge(), or use merged_linear()"
            bad(self.op, "unmerge", "a dense base", f"{self.qspec.format}, quantized again", hint=hint)
        factor = self.merged_factor
        self._add_to(self.weight, -1.0, before=None if factor is None else 1.0 / factor)
        self.merged = self.merged_factor = self._row_norms_squared = None

    def _delta(self, name: str) -> tuple[Tensor, Tensor]:
        """``a`` ``[r, columns]`` and ``b`` ``[rows, r]`` in the accumulation dtype: merging adds ``b a`` to the weight,
        seen as a matrix of its rows. Here ``A`` and ``scale * B * gate``."""
        dtype = accumulate_dtype(self.dense_dtype)
        b = self.lora_B[name].flatten(1).to(dtype) * self.scaling(name)
        a = self.lora_A[name].flatten(1).to(dtype)
        return a, b * self.lora_gate[name].to(dtype) if name in self.lora_gate else b

    def _row_factor(self, name: str) -> Tensor | None:
        """DoRA's ``m / |W + scale B A|``, ``[N]``, differentiable in ``m`` alone; None for other adapters."""
        if name not in self.lora_magnitude:
            return None
        with torch.no_grad():
            dtype = accumulate_dtype(self.weight.dtype)
            squared = self._row_norms_squared
            if squared is None or squared.dtype != dtype:  # W was written, or module.to(dtype) was called
                self._row_norms_squared = squared = row_norms_squared(self.base)
            a, b = self.lora_A[name], self.lora_B[name]
            c = torch.full((a.shape[0],), self.scaling(name), device=a.device, dtype=dtype)
            if name in self.lora_gate:
                c *= self.lora_gate[name]
            norms = merged_row_norms(self.base, squared, a, b, c)
        return self.lora_magnitude[name] / norms

    @torch.no_grad()
    def _add_to(
        self, weight: Tensor, sign: float, *, before: Tensor | None = None, after: Tensor | None = None
    ) -> None:
        a, b = self._delta(self.active_adapter)
        if not all(bool(torch.isfinite(t).all()) for t in (a, b, before, after) if t is not None):
            got = "NaN or infinity"
            bad(self.op, self.active_adapter, "finite adapter weights", got, hint="the weight is untouched")
        for start in range(0, weight.shape[0], MERGE_ROWS):
            block = slice(start, start + MERGE_ROWS)
            rows = weight[block].to(a.dtype).flatten(1)
            if before is not None:
                rows = rows * before[block, None]
            rows = torch.addmm(rows, b[block], a, alpha=sign)
            rows = rows if after is None else rows * after[block, None]
            weight[block] = rows.view(-1, *weight.shape[1:])

    def extra_repr(self) -> str:
        """torch's own line and the adapters'."""
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
                f"lowmem.{self.op}: {prefix[:-1] or 'state_dict'}: expected version <= {self._version}, got "
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


def lora_layers(module: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """``(name, layer)`` of every :class:`LoRALayer` in ``module``, itself included."""
    for name, child in module.named_modules():
        if isinstance(child, LoRALayer):
            yield name, child


def set_adapter(module: nn.Module, name: str, *, trainable: bool = True) -> None:
    """:meth:`LoRALayer.set_adapter` on every layer of ``module``; no layer changes unless all have ``name``."""
    layers = list(lora_layers(module))
    if not layers or any(name not in layer.lora_A for _, layer in layers):
        known = sorted(set.intersection(*(set(layer.lora_A) for _, layer in layers))) if layers else []
        bad("set_adapter", "name", f"an adapter that every layer has ({', '.join(known) or 'none'})", repr(name))
    for _, layer in layers:
        layer.set_adapter(name, trainable=trainable)


@contextmanager
def disabled(module: nn.Module) -> Iterator[nn.Module]:
    """Context in which every :class:`LoRALayer` in ``module`` computes its base alone, merged or not."""
    layers = [layer for _, layer in lora_layers(module)]
    with ExitStack() as undo:
        for layer in layers:
            layer._disabled += 1
            undo.callback(_enable, layer)
        yield module


def _enable(layer: LoRALayer) -> None:
    layer._disabled -= 1
