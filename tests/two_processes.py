"""Processes of a torch.distributed group (gloo) in tests: how they meet and how they leave."""

from __future__ import annotations

import os

import torch.distributed as dist


def meet(rank: int, world: int, folder: str) -> None:
    """Join the group; a file in ``folder`` stands for an address, so that no port has to be free."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)


def leave() -> None:
    """End this process, whose work is checked and written, together with the others. Not through torch's shutdown:
    where one is gone before another has closed its connections, gloo's threads now and then abort that one."""
    dist.barrier()
    os._exit(0)
