"""Projected mode: what :class:`ProjAdamW` does with the parameters of :class:`lowmem.nn.ProjectedLinear`, and
``project_``, which puts such layers into a model.

The gradient that arrives is R. A layer that falls due at a step has G as well, gathered by its last backward passes in
:attr:`Projection.dense`: averaged over the processes here, and brought to the scale that R has in ``.grad``.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from .._errors import bad
from ..convert import _targets
from ..nn.projected import ProjectedLinear, live_layers
from ..ops import projected as ops
from .job import Job
from .policy import OP, SIDES

if TYPE_CHECKING:
    from .proj_adamw import ProjAdamW

Model = TypeVar("Model", bound=nn.Module)
_NAME = "optim.project_"
_LEAST = 16  # the side below which ProjAdamW does not project


# ---------------------------------------------------------------------------------------------------------- the model


def project_(
    model: Model, rank: int, *, target_modules: str | Collection[str] = "all-linear", side: str = "auto"
) -> Model:
    """Replace linear layers by :class:`lowmem.nn.ProjectedLinear`, in place, so that backward gives R and never the
    m x n gradient; return ``model``. The layers keep their parameters; a :class:`ProjAdamW` without ``residual`` and
    ``reparam`` trains them, of rank at most ``rank``.

    Order: ``project_``, then the optimizer, then DDP, then ``torch.compile``; with ``fully_shard``, which replaces
    parameters, ``project_``, ``fully_shard``, then the optimizer.

    Args:
        model: any ``nn.Module`` that no optimizer and no wrapper holds yet.
        rank: the most columns that a layer's basis may have: it sizes the gradient. ``energy=`` chooses below it.
        target_modules: ``"all-linear"`` (every plain ``nn.Linear`` that trains but the output head, with both sides
            at least 16), a regular expression for whole names, or a collection of names or suffixes, as in PEFT.
        side: where P stands, as in :class:`ProjAdamW`; ``"right"`` saves ``rank`` numbers a token for backward and
            ``"left"`` x.

    Raises ValueError ``lowmem.optim.project_: ...`` where an optimizer or a wrapper (DDP, FSDP, ``torch.compile``)
    holds the model already, a weight is tied to another module's or has hooks that would read its gradient, nothing
    matches, or the model is projected already. Nothing is changed unless all of it can be.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        bad(_NAME, "rank", "a whole number >= 1", repr(rank))
    if side not in SIDES:
        bad(_NAME, "side", f"one of {', '.join(map(repr, SIDES))}", repr(side))
    _refuse_wrapped(model)
    if any(isinstance(module, ProjectedLinear) for module in model.modules()):
        bad(_NAME, "model", "a model that is not projected", "one with ProjectedLinear layers")
    found: dict[str, Any] = _targets(model, target_modules)
    if target_modules == "all-linear":
        found = {n: m for n, m in found.items() if m.weight.requires_grad and min(m.weight.shape) >= _LEAST}
    if not found:
        bad(_NAME, "target_modules", "names of nn.Linear layers that train", repr(target_modules))
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), set()).add(id(module))
    for name, module in found.items():
        _refuse_layer(name, module, owners)
    _refuse_held({id(m.weight) for m in found.values()})
    layers: dict[int, ProjectedLinear] = {}  # one layer for a module that is used in several places
    for name, module in found.items():
        if id(module) not in layers:
            layer = layers[id(module)] = ProjectedLinear.from_linear(module, rank, side=side)
            layer.projection.place = len(layers)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[id(module)])
    return model


def _refuse_layer(name: str, module: nn.Module, owners: dict[int, set[int]]) -> None:
    if type(module) is not nn.Linear:
        bad(_NAME, "target_modules", "nn.Linear layers", f"{name!r}: {type(module).__name__}", kind=TypeError)
    weight = module.weight
    if not weight.requires_grad:
        bad(_NAME, "target_modules", "layers that train", f"{name!r}: a frozen weight")
    if len(owners[id(weight)]) > 1:
        hint = "its gradient is the sum of both uses, of which a projection sees one: leave it out of target_modules"
        bad(_NAME, "target_modules", "weights of one module each", f"{name!r}: a tied weight", hint=hint)
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None) or weight.grad is not None:
        hint = "the gradient is never formed; read lowrank_grad.grad, which is R, or leave the layer out"
        bad(_NAME, "model", "weights whose .grad nobody reads", f"{name!r}: hooks on it, or a .grad", hint=hint)
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        bad(_NAME, "model", "layers without hooks", f"{name!r} with hooks", hint="register them after project_")


def _refuse_wrapped(model: nn.Module) -> None:
    hint = "project_ comes before the optimizer, DDP, fully_shard and torch.compile"
    for module in model.modules():
        name = type(module).__name__
        if name in ("DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule"):
            bad(_NAME, "model", "a model that nothing wraps yet", name, hint=hint)
        if any(c.__name__ == "FSDPModule" for c in type(module).__mro__):
            bad(_NAME, "model", "a model that nothing wraps yet", "a model under fully_shard", hint=hint)
        if module._compiled_call_impl is not None:
            bad(_NAME, "model", "a model that nothing wraps yet", f"a compiled {name}", hint=hint)


def _refuse_held(weights: set[int]) -> None:
    """Refuse weights that an optimizer or a wrapper beside the model holds: it would train, or average, what no longer
    has a gradient."""
    hint = "project_ comes before the optimizer and the wrappers"
    for attempt in range(2):
        held = ""
        for thing in gc.get_objects():
            kind = type(thing)
            if issubclass(kind, torch.optim.Optimizer) and hasattr(thing, "param_groups"):
                if any(id(p) in weights for group in thing.param_groups for p in group["params"]):
                    held = f"an optimizer ({kind.__name__}) that holds its weights"
            elif kind.__name__ in ("DistributedDataParallel", "OptimizedModule") and isinstance(thing, nn.Module):
                if any(id(p) in weights for p in thing.parameters()):
                    held = f"a wrapper ({kind.__name__}) around it"
        thing = None
        if not held:
            return
        if attempt == 0:
            gc.collect()  # it may be garbage already
    bad(_NAME, "model", "a model without optimizer and wrapper", held, hint=hint)


# ------------------------------------------------------------------------------------------------------ the optimizer


def attach(optimizer: ProjAdamW, group: dict[str, Any]) -> None:
    """Note which of ``group``'s parameters are a projected layer's, and refuse options that need more than R."""
    layers = {id(layer.lowrank_grad): layer for layer in live_layers()}
    mine = [(p, layers[id(p)]) for p in group["params"] if id(p) in layers]
    try:
        for _, layer in mine:
            _check(layer, group)
    except ValueError:
        optimizer.param_groups.remove(group)
        raise
    for p, layer in mine:
        optimizer._layers[id(p)] = layer
        layer.projection.optimizer = weakref.ref(optimizer)
        layer.projection.due, layer.projection.dense = True, None


def _check(layer: ProjectedLinear, group: dict[str, Any]) -> None:
    projection = layer.projection
    side = "left" if projection.left else "right"
    if group["residual"] != "none" or group["reparam"] is not None:
        name = "residual" if group["residual"] != "none" else "reparam"
        hint = "it reads the whole gradient, which projected layers never form"
        bad(OP, name, f"{'none' if name == 'residual' else None!r} for projected layers", repr(group[name]), hint=hint)
    if not group["project"]:
        bad(OP, "project", "True for projected layers", "False", hint="optim.lowrank_groups makes the groups")
    if group["side"] not in ("auto", side):
        bad(OP, "side", f"'auto' or {side!r}, the layers' own", repr(group["side"]))
    if group["rank"] is not None and group["rank"] > layer.rank:
        bad(OP, "rank", f"at most {layer.rank}, the rank of project_", group["rank"])
    holder = projection.optimizer() if projection.optimizer is not None else None
    if holder is not None and any(layer is other for other in holder._layers.values()):
        warnings.warn(f"lowmem.{OP}: params: a projected layer moves from one optimizer to another", stacklevel=4)


def job(layer: ProjectedLinear, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Job:
    """What there is to do for a projected layer whose gradient has arrived."""
    if layer.lowrank_grad is not p:
        hint = "build the optimizer after fully_shard, which replaces parameters"
        bad(OP, "params", "the layer's present lowrank_grad", "one that was replaced", hint=hint)
    if state["step"] == 0 and "basis" not in state and _groups(layer):
        _share_seed(layer, state)
    made = _idle(layer, p, group, state)
    projection = layer.projection
    r = whole(p.grad)
    if projection.dense is not None:
        g, projection.dense = projection.dense, None
        g = _average(layer, g)
        made.dense = g.mul_(ops.scale_of(r, g, projection)).to(layer.weight.dtype)
        return made
    rank = projection.basis(r).shape[-1]
    made.r = r if rank == projection.width else (r[:rank] if projection.left else r[:, :rank]).contiguous()
    return made


def _idle(layer: ProjectedLinear, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Job:
    weight = layer.weight.detach()
    return Job(p, local(weight), group, state, layer.projection.left, rows=_rows(weight))


def renewed(layer: ProjectedLinear, done: Job) -> None:
    """Let the layer use ``done``'s new basis."""
    layer.projection.renewed(_idle(layer, done.param, done.group, done.state).basis)


def synchronise(optimizer: ProjAdamW, only: Tensor | None = None) -> None:
    """Tell each projected layer whether its next backward gathers G; drop what is gathered. A basis that a checkpoint
    brought is installed."""
    count = sum(optimizer._projects(p, group) for group in optimizer.param_groups for p in group["params"])
    for group in optimizer.param_groups:
        for p in group["params"]:
            layer = optimizer._layers.get(id(p))
            if layer is None or (only is not None and p is not only):
                continue
            layer.projection.dense = None
            state = optimizer.state.get(p)
            if not state:
                continue
            idle = _idle(layer, p, group, state)
            layer.projection.due = optimizer._due(idle, count)
            known = layer.projection.read
            if "basis" in state and (known is None or known.__self__.state is not state):  # type: ignore[attr-defined]
                layer.projection.renewed(idle.basis)


# --------------------------------------------------------------------------------------------------- several processes


def whole(t: Any) -> Any:
    """A DTensor's whole value (every process takes part), any other tensor itself."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def local(t: Any) -> Any:
    """A DTensor's part on this process, any other tensor itself."""
    return t.to_local() if hasattr(t, "full_tensor") else t


def _rows(weight: Any) -> slice | None:
    """The rows that this process holds of a weight that ``fully_shard`` cut; None for a whole weight."""
    if not hasattr(weight, "full_tensor"):
        return None
    mesh, cut = weight.device_mesh, [k for k, place in enumerate(weight.placements) if place.is_shard()]
    if len(cut) != 1 or weight.placements[cut[0]].dim != 0:
        bad(OP, "params", "weights that fully_shard cuts by rows, over one mesh dimension", str(weight.placements))
    rows = weight.shape[0]
    each = -(-rows // mesh.size(cut[0]))
    start = min(mesh.get_local_rank(cut[0]) * each, rows)
    return slice(start, min(start + each, rows))


def _groups(layer: ProjectedLinear) -> list[Any]:
    """The process groups over which this layer's gradients are averaged."""
    weight: Any = layer.weight
    if hasattr(weight, "full_tensor"):
        return [weight.device_mesh.get_group(k) for k in range(weight.device_mesh.ndim)]
    return [] if layer.projection.group is None else [layer.projection.group]


def _average(layer: ProjectedLinear, g: Tensor) -> Tensor:
    for group in _groups(layer):
        torch.distributed.all_reduce(g, group=group)
        g.div_(torch.distributed.get_world_size(group))
    return g


def _share_seed(layer: ProjectedLinear, state: dict[str, Any]) -> None:
    """Every process draws the bases of the first one's seed."""
    seed = state["seed"].to(layer.lowrank_grad.device)
    for group in _groups(layer):
        torch.distributed.broadcast(seed, torch.distributed.get_global_rank(group, 0), group=group)
    state["seed"].copy_(seed)
