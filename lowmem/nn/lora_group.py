"""Layers over one input (q/k/v, gate/up) computed together: :class:`FusedLoRAGroup`."""

from __future__ import annotations

import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import bad
from ..ops.lora import lora_group
from .lora import FusedLoRALinear


class FusedLoRAGroup:
    """Several :class:`FusedLoRALinear` that read the same tensor, run as one :func:`lowmem.ops.lora_group`.

    Call it with ``x`` for the outputs of all layers, or :meth:`attach` it to the module that calls the layers one by
    one: while that module's forward runs, the first layer called computes for all, and each of the others, when it is
    called with the same tensor, hands its output over. "The same" is decided by identity, version, grad mode, autocast
    and training mode; anything else, and anything under ``torch.compile``, takes the layer's own path, whose numbers
    are the same. A layer with hooks of its own, or whose forward was replaced, is not computed before it is called.

    Random numbers are drawn in the layers' order at the first call: equal to separate calls that follow one another.

    The group holds no parameters and is no module; it is copied and pickled with its layers.
    """

    def __init__(self, layers: Sequence[FusedLoRALinear]) -> None:
        op = "FusedLoRAGroup"
        if len(layers) < 2:
            bad(op, "layers", "at least two FusedLoRALinear", len(layers))
        for layer in layers:
            if not isinstance(layer, FusedLoRALinear):
                bad(op, "layers", "FusedLoRALinear", type(layer).__name__, kind=TypeError)
            if layer.in_features != layers[0].in_features:
                got = f"{layers[0].in_features} and {layer.in_features}"
                bad(op, "layers", "one in_features, since they read one tensor", got)
            if layer.group is not None:
                bad(op, "layers", "layers that are in no group", "one that is in a group")
        if len({id(layer) for layer in layers}) < len(layers):
            bad(op, "layers", "different layers", "one layer twice")
        self.layers = list(layers)
        self._open = 0
        self._x: Tensor | None = None
        self._state: tuple[Any, ...] = ()
        self._outputs: dict[int, Tensor] = {}

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of all layers for ``x`` ``[..., in_features]``."""
        with self.opened():
            return tuple(layer(x) for layer in self.layers)

    def attach(self, parent: nn.Module) -> FusedLoRAGroup:
        """Open the group while ``parent.forward`` runs, and close it afterwards, also after an exception."""
        for layer in self.layers:
            layer.group = self
        parent.register_forward_pre_hook(self._enter)
        parent.register_forward_hook(self._exit, always_call=True)
        return self

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Context in which the layers' calls are answered together."""
        outside = [layer.group for layer in self.layers]
        for layer in self.layers:
            layer.group = self
        self._enter()
        try:
            yield
        finally:
            self._exit()
            for layer, group in zip(self.layers, outside, strict=True):
                layer.group = group

    def _enter(self, *unused: Any) -> None:
        self._clear()
        self._open += 1

    def _exit(self, *unused: Any) -> None:
        if self._outputs and sys.exc_info()[0] is None:
            warnings.warn(
                f"lowmem.FusedLoRAGroup: {len(self._outputs)} of {len(self.layers)} layers were computed and not asked "
                f"for: they do not read one tensor. lowmem.convert(..., example_inputs=...) finds those that do",
                stacklevel=2,
            )
        self._clear()
        self._open = max(self._open - 1, 0)

    def _clear(self) -> None:
        self._x, self._state, self._outputs = None, (), {}

    def take(self, layer: FusedLoRALinear, x: Tensor) -> Tensor | None:
        """``layer``'s output for ``x`` where the group may compute it, else None."""
        if torch.compiler.is_compiling() or not self._open or not _joins(layer, layer):
            return None
        state = _state(x)
        if self._x is x and self._state == state and id(layer) in self._outputs:
            return self._outputs.pop(id(layer))
        ready = [one for one in self.layers if _joins(one, layer)]
        if self._outputs or len(ready) < 2:  # what is computed and not yet asked for is not computed again
            return None
        layers = [one.adapted(x.device) for one in ready]
        outputs = lora_group(x, layers, save_mask=layer.mask == "bits", save=layer.save, pick=layer.pick(x))
        self._x, self._state = x, state
        self._outputs = {id(one): y for one, y in zip(ready, outputs, strict=True)}
        return self._outputs.pop(id(layer))

    def __getstate__(self) -> dict[str, Any]:
        """Pickled and copied closed and empty."""
        return {"layers": self.layers, "_open": 0, "_x": None, "_state": (), "_outputs": {}}


SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_CROSS = re.compile("cross|enc(oder)?_?(dec(oder)?_?)?att", re.IGNORECASE)  # k and v read another tensor than q there


Layers = list[tuple[nn.Module, list[Any]]]


def groups(model: nn.Module, kind: type[nn.Linear], example_inputs: Any = None) -> Layers:
    """``(parent, layers)`` for the layers of class ``kind`` that read one tensor: by their usual names, or as one call
    with ``example_inputs`` shows."""
    return groups_by_name(model, kind) if example_inputs is None else groups_by_call(model, example_inputs, kind)


def groups_by_name(model: nn.Module, kind: type[nn.Linear] = FusedLoRALinear) -> Layers:
    """``(parent, layers)`` for the usual names of layers over one input, except in cross attention."""
    found = []
    for name, parent in model.named_modules():
        if _CROSS.search(name.rpartition(".")[2]) or getattr(parent, "is_cross_attention", False):
            continue
        children = dict(parent.named_children())
        for names in SIBLINGS:
            layers = [children[n] for n in names if isinstance(children.get(n), kind)]
            found.append((parent, [one for one in layers if one.in_features == layers[0].in_features]))
    return _groups(found)


def groups_by_call(model: nn.Module, example_inputs: Any, kind: type[nn.Linear] = FusedLoRALinear) -> Layers:
    """``(parent, layers)`` for layers of one parent that were called once each with the same tensor in one call of
    ``model`` with ``example_inputs`` (a dict of keywords, a tuple, or one argument), in eval mode without gradients."""
    calls: list[tuple[Any, Tensor, int]] = []  # the tensors are held: an id must not be used twice

    def record(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        calls.append((layer, inputs[0], inputs[0]._version))

    layers = {child for child in model.modules() if isinstance(child, kind)}
    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng():
            if isinstance(example_inputs, dict):
                model(**example_inputs)
            else:
                model(*example_inputs) if isinstance(example_inputs, tuple) else model(example_inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    times = Counter(id(layer) for layer, _, _ in calls)
    found: Layers = []
    for parent in model.modules():
        own = {id(child) for child in parent.children()}
        same: dict[tuple[int, int], list[Any]] = {}
        for layer, x, version in calls:
            if id(layer) in own and times[id(layer)] == 1:
                same.setdefault((id(x), version), []).append(layer)
        found += [(parent, members) for members in same.values()]
    return _groups(found)


def _groups(found: Layers) -> Layers:
    # a layer in two places belongs to no group, and one layer is none
    times = Counter(id(layer) for _, layers in found for layer in layers)
    kept = [(parent, [one for one in layers if times[id(one)] == 1]) for parent, layers in found]
    return [(parent, layers) for parent, layers in kept if len(layers) > 1]


def _state(x: Tensor) -> tuple[Any, ...]:
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind)
    version = None if x.is_inference() else x._version
    return (
        version,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        autocast and torch.get_autocast_dtype(kind),
    )


def _joins(one: FusedLoRALinear, caller: FusedLoRALinear) -> bool:
    """Whether ``one`` may be computed now, when ``caller`` is called."""
    return (
        one.training == caller.training
        and one.mask == caller.mask
        and one.save == caller.save
        and one.sample_budget == caller.sample_budget
        and one.computes_plain_lora()
        and one.weight.dtype == caller.weight.dtype
        and not (one._forward_pre_hooks or one._backward_pre_hooks or one._backward_hooks)
        and "forward" not in one.__dict__
    )
