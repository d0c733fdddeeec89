"""How a parameter that ``fully_shard`` cut over ranks (a DTensor) keeps states in groups.

A DTensor is cut along one dimension in whole slices. Its states are DTensors cut at the same places: codes have the
parameter's shape, scales one row of groups for each slice of dimension 0. For that a group must not cross a slice, so
its size there is the largest power of two, up to ``group_size``, that divides a slice's elements; below 16 the moments
stay fp32. Whole groups then move when a checkpoint is loaded on another number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def _dtensor(t: Tensor) -> Any:
    """``t`` as a DTensor, or None; imports nothing where there cannot be one."""
    return t if hasattr(t, "_local_tensor") and hasattr(t, "placements") else None


def local(t: Tensor) -> Tensor:
    """This rank's part of ``t``, the tensor itself where it is not sharded."""
    part = t._local_tensor if _dtensor(t) is not None else t  # type: ignore[attr-defined]
    return part.detach()


@dataclass(frozen=True)
class Shard:
    """A parameter's layout: its group size (0: fp32 moments), this rank's first element, its mesh (None: no
    DTensor)."""

    group_size: int
    offset: int
    mesh_key: Any
    mesh: Any = None

    def same_everywhere(self, seed: Tensor) -> Tensor:
        """``seed`` as the mesh's first rank drew it: replicas must round alike."""
        if self.mesh is None:
            return seed
        import torch.distributed as dist

        for group in self.mesh.get_all_groups():
            dist.broadcast(seed, src=dist.get_global_rank(group, 0), group=group)
        return seed


def shard_of(p: Tensor, group_size: int) -> Shard:
    """The layout of ``p`` for groups of ``group_size``."""
    d = _dtensor(p)
    if d is None:
        return Shard(group_size, 0, None)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    row = d.numel() // d.shape[0] if d.dim() and d.shape[0] else 1
    size = min(group_size, row & -row)
    sharded = [placement.dim for placement in d.placements if placement.is_shard()]
    if any(dim != 0 for dim in sharded):
        size = 0  # cut inside slices: the moments stay fp32
    _, first = compute_local_shape_and_global_offset(d.shape, d.device_mesh, d.placements)
    offset = first[0] * row if first else 0
    key = (d.device_mesh, tuple(map(str, d.placements)))
    return Shard(size if size >= 16 else 0, offset, key, d.device_mesh)


def wrap(part: Tensor, p: Tensor, shard: Shard, per: int) -> Tensor:
    """``part``, a state of this rank with one entry for every ``per`` elements (0, 1: the parameter's shape), as a
    DTensor cut like ``p``; ``part`` itself where ``p`` is not sharded."""
    d = _dtensor(p)
    if d is None:
        return part
    from torch.distributed.tensor import DTensor

    if per <= 1:
        shape = torch.Size(d.shape)
    else:
        row = d.numel() // d.shape[0]
        shape = torch.Size((d.shape[0], row // per))
        part = part.view(-1, row // per)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, d.device_mesh, d.placements, run_check=False, shape=shape, stride=stride)


def reduce_over_shards(part: Tensor, p: Tensor) -> Tensor:
    """The sum of ``part`` over the ranks that hold different shards of ``p``."""
    d: Any = _dtensor(p)
    import torch.distributed as dist

    for dim, placement in enumerate(d.placements):
        if placement.is_shard():
            dist.all_reduce(part, group=d.device_mesh.get_group(dim))
    return part
