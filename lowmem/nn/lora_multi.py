"""Batches whose rows belong to different adapters: :func:`routed` for whole models, :class:`MultiLoRALinear` for one
layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._errors import bad
from .lora import FusedLoRALinear
from .lora_layer import lora_layers
from .quant import QuantLinear


class Routing(NamedTuple):
    """Which rows belong to which adapter: ``names[j]`` owns rows ``order[offsets[j]:offsets[j + 1]]``."""

    names: tuple[str, ...]
    order: Tensor | None
    offsets: Tensor
    rows: int


def route(
    names: Sequence[str], *, adapter_ids: Tensor | None = None, cu_seqlens: Tensor | None = None, rows: int
) -> Routing:
    """A :class:`Routing` for ``rows`` rows over adapters ``names``, made on the ids' device without a host sync.

    Args:
        names: adapter j's name is ``names[j]``.
        adapter_ids: integers in ``[-1, len(names))``, -1 for the base alone: one a row, or one for each of ``n`` equal
            runs of rows where it holds ``n`` numbers and ``n`` divides ``rows`` (one a sample), or with ``cu_seqlens``
            one a segment.
        cu_seqlens: integers, ascending: rows ``cu_seqlens[i]:cu_seqlens[i + 1]`` are segment i; its adapter is
            ``adapter_ids[i]``, or i. Rows outside see the base alone.
        rows: how many rows a layer's input has, all leading dimensions together.

    Values are checked where they are on the CPU; on a GPU by an assertion on the device.
    """
    op, count = "route", len(names)
    if count < 1:
        bad(op, "names", "at least one adapter", "none")
    given = [t for t in (adapter_ids, cu_seqlens) if t is not None]
    if not given:
        bad(op, "adapter_ids", "adapter_ids, cu_seqlens or both", "neither")
    for name, t in (("adapter_ids", adapter_ids), ("cu_seqlens", cu_seqlens)):
        if t is not None and (t.dtype not in (torch.int32, torch.int64) or t.device != given[0].device):
            bad(op, name, f"int32 or int64 on {given[0].device}", f"{t.dtype} on {t.device}", kind=TypeError)
    if adapter_ids is not None:
        inside = ((adapter_ids >= -1) & (adapter_ids < count)).all()
        _require(inside, "adapter_ids", f"numbers in [-1, {count})", adapter_ids)
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
            bad(op, "cu_seqlens", "one dimension, at least two numbers", f"shape {tuple(cu_seqlens.shape)}")
        cu = cu_seqlens.long()
        _require(
            (cu[1:] >= cu[:-1]).all() & (cu[0] >= 0) & (cu[-1] <= rows), "cu_seqlens", f"ascending in [0, {rows}]", cu
        )
        segments = cu.numel() - 1
        if adapter_ids is None:
            if segments != count:
                bad(op, "cu_seqlens", f"{count + 1} numbers, one segment an adapter, or adapter_ids too", cu.numel())
            return Routing(tuple(names), None, cu, rows)
        if tuple(adapter_ids.shape) != (segments,):
            bad(op, "adapter_ids", f"[{segments}], one a segment", f"shape {tuple(adapter_ids.shape)}")
        at = torch.searchsorted(cu, torch.arange(rows, device=cu.device), right=True) - 1
        padded = torch.cat([adapter_ids.long(), adapter_ids.new_full((1,), -1, dtype=torch.int64)])
        ids = padded[torch.where(at < 0, segments, at)]  # rows before the first and after the last segment: -1
    else:
        assert adapter_ids is not None
        ids = adapter_ids.reshape(-1).long()
        if ids.numel() != rows:
            if ids.numel() == 0 or rows % ids.numel():
                bad(op, "adapter_ids", f"{rows} numbers, or a divisor of it (one a sample)", ids.numel())
            ids = ids.repeat_interleave(rows // ids.numel(), output_size=rows)
    order = torch.argsort(ids, stable=True)
    offsets = torch.searchsorted(ids[order], torch.arange(count + 1, device=ids.device))
    return Routing(tuple(names), order, offsets, rows)


def _require(ok: Tensor, argument: str, expected: str, got: Tensor) -> None:
    if ok.device.type == "cpu" and not torch.compiler.is_compiling():
        if not bool(ok):
            bad(
                "route", argument, expected, got.tolist() if got.numel() < 20 else f"{int(got.min())}..{int(got.max())}"
            )
    else:
        torch._assert_async(ok, f"lowmem.route: {argument}: expected {expected}")


def train_adapters(module: nn.Module, names: Sequence[str] | None = None) -> None:
    """Let adapters ``names`` (default: all) of every layer train, and freeze the others: what a batch of many needs."""
    for _, layer in lora_layers(module):
        layer.train_only(list(layer.lora_A) if names is None else names)


@contextmanager
def routed(
    module: nn.Module,
    names: Sequence[str],
    *,
    adapter_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    rows: int,
) -> Iterator[nn.Module]:
    """Context in which every :class:`FusedLoRALinear` in ``module`` applies to each row of its input that row's
    adapter.

    Arguments as in :func:`route`; ``rows`` is batch times sequence. Inside, the active adapter counts for nothing. A
    layer called with another number of rows raises. Backward may run outside; recomputation (activation checkpointing)
    must run inside.
    """
    layers = []
    for where, layer in lora_layers(module):
        if not isinstance(layer, FusedLoRALinear):
            bad("routed", "module", "adapters on linear layers alone", f"{type(layer).__name__} at {where!r}")
        layers.append(layer)
    for name in names:
        if not layers or any(name not in layer.lora_A for layer in layers):
            bad("routed", "names", "adapters that every layer has", repr(name))
    routing = route(names, adapter_ids=adapter_ids, cu_seqlens=cu_seqlens, rows=rows)
    before = [layer.routing for layer in layers]
    for layer in layers:
        layer.routing = routing
    try:
        yield module
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.routing = old


class MultiLoRALinear(FusedLoRALinear):
    """A linear layer with several adapters that train together, each on its own rows of the batch.

    Args:
        base: an ``nn.Linear`` or a :class:`lowmem.nn.QuantLinear`; its parameters are shared and frozen.
        adapters: name to the options of :meth:`FusedLoRALinear.add_adapter` (``r``, ``alpha``, ...), any number of
            them. Adapter ids count them in this order.
    """

    def __init__(self, base: nn.Linear, adapters: Mapping[str, Mapping[str, Any]]) -> None:
        if not adapters:
            bad("MultiLoRALinear", "adapters", "at least one adapter", "none")
        if type(base) not in (nn.Linear, QuantLinear):
            bad("MultiLoRALinear", "base", "an nn.Linear or a QuantLinear", type(base).__name__, kind=TypeError)
        first, *others = adapters
        weight = base.base if isinstance(base, QuantLinear) else base.weight
        super().__init__(base.in_features, base.out_features, base=weight, name=first, **adapters[first])
        if base.bias is not None:
            self.bias = base.bias
            self.bias.requires_grad_(False)
        for name in others:
            self.add_adapter(name, **adapters[name])
        self.train_only(list(adapters))

    def forward(self, input: Tensor, adapter_ids: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """``[..., K]`` to ``[..., N]``; ``adapter_ids`` and ``cu_seqlens`` as in :func:`route`. With neither, the rows
        that :func:`routed` set, or else the active adapter for all rows."""
        if (adapter_ids is None and cu_seqlens is None) or self._disabled:
            return super().forward(input)
        for name, given in (("adapter_ids", adapter_ids), ("cu_seqlens", cu_seqlens)):
            if given is not None and given.device != input.device:
                bad("MultiLoRALinear", name, f"device {input.device} (input's)", f"device {given.device}")
        rows = input.numel() // max(input.shape[-1], 1)
        return self.routed_forward(
            input, route(list(self.lora_A), adapter_ids=adapter_ids, cu_seqlens=cu_seqlens, rows=rows)
        )
