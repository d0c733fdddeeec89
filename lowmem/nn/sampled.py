""":class:`SampledLinear`, whose weight gradient comes from some of the rows, and what such layers share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import bad
from ..ops.sampled import MODES, Pick, sampled_linear
from ..sampling import GradNormCache, budget_rows, pick
from ..sampling.rows import Mode
from .lora_group import _state


class SampledLinear(nn.Linear):
    """``y = x W^T + bias``, exact, whose backward estimates ``dW`` from ``k = ceil(budget n)`` of the ``n`` rows of
    ``x``, without bias (but for ``mode="topk"``); ``dx`` and the bias's gradient are exact (WTA-CRS, arXiv 2305.15265).

    Saved for backward: ``k (iK + 12)`` bytes with ``i`` bytes an element, instead of ``i n K``; layers in one
    :class:`SampledGroup` share them. In evaluation, without gradients, with a frozen weight, and where ``budget`` keeps
    every row, it is ``nn.Linear`` to the bit.

    Rows are chosen by ``|x_i|``, times what :attr:`cache` knows of their gradients' norms where there is one and
    :func:`sampled_keys` says which keys the rows have. Rows that :func:`sampled_rows`'s mask leaves out are never used.

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``.
        budget: share of the rows that is kept, in (0, 1].
        mode: how they are chosen, see :func:`lowmem.sampling.choose`.
        cache: keys of a :class:`lowmem.sampling.GradNormCache` to keep; 0 for none. Not under ``torch.compile``.

    ``state_dict`` keys: those of ``nn.Linear``, and ``cache.norms``, ``cache.staleness``, ``cache.steps`` with a cache.

    Raises ValueError or TypeError ``lowmem.SampledLinear: <argument>: expected ..., got ...``.
    """

    cache: GradNormCache | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        budget: float = 0.3,
        mode: Mode = "systematic",
        cache: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._sample(budget, mode, cache)

    def _sample(self, budget: float, mode: Mode, cache: int) -> None:
        budget_rows(1, budget)
        if mode not in MODES:
            bad("SampledLinear", "mode", f"one of {', '.join(MODES)}", repr(mode))
        self.budget, self.mode = float(budget), mode
        self.cache = GradNormCache(cache, device=self.weight.device) if cache else None
        self.group: SampledGroup | None = None
        self.rows: Rows | None = None  # what sampled_rows says of the rows that are coming

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, budget: float = 0.3, mode: Mode = "systematic", cache: int = 0
    ) -> SampledLinear:
        """A layer over ``linear``'s own weight and bias parameters, which stay as trainable as they are."""
        if type(linear) is not nn.Linear:
            got = type(linear).__name__
            bad(
                "SampledLinear",
                "linear",
                "an nn.Linear (no subclass: its own forward would be lost)",
                got,
                kind=TypeError,
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.train(linear.training)
        layer._sample(budget, mode, cache)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        n = input.numel() // max(input.shape[-1], 1)
        samples = self.training and torch.is_grad_enabled() and self.weight.requires_grad
        if not samples or n == 0 or budget_rows(n, self.budget) == n:
            return super().forward(input)
        x: Tensor = input
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            low = torch.get_autocast_dtype(kind)
            x, weight, bias = x.to(low), weight.to(low), None if bias is None else bias.to(low)
        if self.cache is not None and torch.compiler.is_compiling():
            bad("SampledLinear", "cache", "none under torch.compile (backward writes it)", "one", hint="cache=0")
        chosen = self.group.take(self, input, x) if self.group is not None else None
        return sampled_linear(x, weight, bias, chosen or self.pick([self], x), tell=self._tell())

    @staticmethod
    def pick(layers: Sequence[SampledLinear], x: Tensor) -> Pick:
        """The rows of ``x`` for ``layers``, which read it together: by ``|x_i| sqrt(sum_l w_il^2)`` over the caches."""
        first = layers[0]
        seed = torch.randint(0, 2**62, (1,), device=x.device)
        rows, weight = first.rows, None
        known = [one.cache for one in layers if one.cache is not None]
        if rows is not None and rows.keys is not None and known:
            weight = torch.stack([cache.weight(rows.keys) for cache in known]).square().sum(0).sqrt()
        mask = None if rows is None else rows.mask
        return pick(x, first.budget, mode=first.mode, seed=seed, weight=weight, mask=mask)

    def _tell(self) -> Any:
        if self.cache is None or self.rows is None or self.rows.keys is None:
            return None
        cache, keys = self.cache, self.rows.keys
        return lambda norms: cache.update(keys, norms)

    def extra_repr(self) -> str:
        """``nn.Linear``'s line, the budget and the mode."""
        return f"{super().extra_repr()}, budget={self.budget:g}, mode={self.mode}"


class SampledGroup:
    """Layers that read the same tensor (q/k/v, gate/up) and share one set of its rows: one choice, saved once.

    :meth:`attach` it to the module that calls the layers: while that module's forward runs, the first layer that is
    called with a tensor chooses, and each other one that is called with the same tensor (the same object, unchanged, in
    the same grad and autocast mode) takes that choice. Anything else, and everything under ``torch.compile``, chooses
    for itself. The group holds no parameters and is no module.
    """

    def __init__(self, layers: Sequence[SampledLinear]) -> None:
        op = "SampledGroup"
        if len(layers) < 2 or len({id(layer) for layer in layers}) < len(layers):
            bad(op, "layers", "at least two different SampledLinear", len(layers))
        for layer in layers:
            if not isinstance(layer, SampledLinear):
                bad(op, "layers", "SampledLinear", type(layer).__name__, kind=TypeError)
            if _kind(layer) != _kind(layers[0]):
                bad(op, "layers", "one in_features, budget and mode", f"{layers[0]} and {layer}")
        self.layers = list(layers)
        self._open = 0
        self._held: tuple[Tensor, tuple[Any, ...], Pick] | None = None

    def attach(self, parent: nn.Module) -> SampledGroup:
        """Open the group while ``parent.forward`` runs, and close it afterwards, also after an exception."""
        for layer in self.layers:
            layer.group = self
        parent.register_forward_pre_hook(self._enter)
        parent.register_forward_hook(self._exit, always_call=True)
        return self

    def _enter(self, *unused: Any) -> None:
        self._held = None
        self._open += 1

    def _exit(self, *unused: Any) -> None:
        self._held = None
        self._open = max(self._open - 1, 0)

    def take(self, layer: SampledLinear, given: Tensor, x: Tensor) -> Pick | None:
        """The rows for ``layer``'s call with ``given`` (``x`` in the dtype that it computes in), or None: its own."""
        if torch.compiler.is_compiling() or not self._open:
            return None
        state = (*_state(given), x.dtype, layer.training)
        if self._held is None or self._held[0] is not given or self._held[1] != state:
            self._held = (given, state, SampledLinear.pick([layer, *(o for o in self.layers if o is not layer)], x))
        return self._held[2]

    def __getstate__(self) -> dict[str, Any]:
        """Pickled and copied closed and empty."""
        return {"layers": self.layers, "_open": 0, "_held": None}


def _kind(layer: SampledLinear) -> tuple[Any, ...]:
    return layer.in_features, layer.budget, layer.mode


class Rows:
    """What is known of the rows that are coming: their keys and which of them count."""

    def __init__(self, keys: Tensor | None, mask: Tensor | None) -> None:
        self.keys, self.mask = keys, mask


@contextmanager
def sampled_rows(
    module: nn.Module, *, keys: Tensor | None = None, mask: Tensor | None = None, tokens: int = 1
) -> Iterator[nn.Module]:
    """Context that tells every :class:`SampledLinear` in ``module`` about the rows of the batch.

    Args:
        keys: int64 ``[n]``, or ``[n / tokens]`` with each key standing for ``tokens`` rows in turn: what the layers'
            :class:`lowmem.sampling.GradNormCache` keeps norms by (a sample's number, a position). A key out of its
            range is one that was never seen.
        mask: bool, ``[n]`` or the inputs' leading shape: rows that are False (padding) are never used.

    Backward, and recomputation under activation checkpointing, must run inside too. Raises ValueError or TypeError
    ``lowmem.sampled_rows: <argument>: expected ..., got ...``.
    """
    op = "sampled_rows"
    if keys is not None and (keys.dim() != 1 or keys.dtype != torch.int64):
        bad(op, "keys", "int64 [n]", f"shape {tuple(keys.shape)} in {keys.dtype}", kind=TypeError)
    if mask is not None and mask.dtype != torch.bool:
        bad(op, "mask", "bool", mask.dtype, kind=TypeError)
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        bad(op, "tokens", "an integer >= 1", repr(tokens))
    layers = [one for one in module.modules() if isinstance(one, SampledLinear)]
    if not layers:
        bad(op, "module", "a module with SampledLinear layers", type(module).__name__)
    rows = Rows(None if keys is None else keys.repeat_interleave(tokens), mask)
    before = [layer.rows for layer in layers]
    for layer in layers:
        layer.rows = rows
    try:
        yield module
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.rows = old
