"""``layerwise_``: each parameter is updated as soon as backward has its gradient, which is freed at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import bad

_OP = "optim.layerwise_"


class Layerwise:
    """What :func:`layerwise_` returns."""

    def __init__(self, optimizer: Any, params: Sequence[Tensor]) -> None:
        self._optimizer = optimizer
        self._waiting = False
        self._hooks = [p.register_post_accumulate_grad_hook(self._update) for p in params]

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Inside, backward adds to the gradients and updates nothing: for every micro-batch but a step's last. The
        gradients of the parameters exist in the meantime, R of projected layers among them."""
        before, self._waiting = self._waiting, True
        try:
            yield
        finally:
            self._waiting = before

    def remove(self) -> None:
        """Back to ``optimizer.step()`` for all parameters at once."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _update(self, p: Tensor) -> None:
        if self._waiting:
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if torch.distributed.get_world_size() > 1:
                hint = "a gradient is averaged over them only later"
                bad(_OP, "model", "training in one process", "several", hint=hint, kind=RuntimeError)
        self._optimizer.step_parameter(p)
        p.grad = None


def layerwise_(model: nn.Module, optimizer: torch.optim.Optimizer) -> Layerwise:
    """Update each parameter of ``model`` in a hook, once backward has accumulated its gradient, and free the gradient:
    at most a few layers' gradients exist at a time (LOMO, arXiv 2306.09782; GaLore's per-layer mode). The numbers are
    ``optimizer.step()``'s own. ::

        layerwise = lowmem.optim.layerwise_(model, optimizer)
        for k, batch in enumerate(batches):
            with contextlib.nullcontext() if k % 4 == 3 else layerwise.accumulate():
                model(batch).backward()

    ``optimizer.step()`` then finds no gradients and does nothing, so learning-rate schedulers and loops that call it
    stay as they are. There is no norm over all gradients to clip by, no GradScaler, one process; a gradient that is not
    finite skips its own parameter.

    Args:
        model: its parameters that ``optimizer`` holds get the hook.
        optimizer: a :class:`ProjAdamW`, or another with ``step_parameter(p)``.

    Raises TypeError for an optimizer without ``step_parameter``, ValueError where it holds none of the parameters;
    RuntimeError in backward with several processes.
    """
    if not callable(getattr(optimizer, "step_parameter", None)):
        bad(_OP, "optimizer", "a lowmem.optim.ProjAdamW", type(optimizer).__name__, kind=TypeError)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    params = [p for p in model.parameters() if p.requires_grad and id(p) in held]
    if not params:
        bad(_OP, "optimizer", "the model's parameters in its groups", "none of them")
    return Layerwise(optimizer, params)
