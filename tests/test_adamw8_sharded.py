"""AdamW8 over parameters that fully_shard cut over two processes (gloo, CPU)."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lowmem.optim import AdamW8

SIZES = [(96, 128), (50, 192), (33, 256), (64,), (70, 100)]
"""Row lengths that groups of 128, 64, 128 and 16 divide ([33, 256]: rows that two ranks cannot halve), a small one, and
one (100) that nothing from 16 on divides: fp32 moments."""


def build(dtype):
    torch.manual_seed(3)
    model = nn.Module()
    for i, size in enumerate(SIZES):
        setattr(model, f"p{i}", nn.Parameter((torch.randn(*size) * 0.1).to(dtype)))
    return model


def full(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def gradient(i, step, size, dtype):
    g = torch.Generator().manual_seed(100 * step + i)
    return (torch.randn(*size, generator=g) * 0.01).to(dtype)


def steps_of(model, optimizer, count, dtype, spoil=-1, first=0):
    from torch.distributed.tensor import DTensor, distribute_tensor

    for step in range(first, first + count):
        for i, p in enumerate(model.parameters()):
            g = gradient(i, step, SIZES[i], dtype)
            if step == spoil and i == 2:
                g[-1, 3] = torch.nan  # in the last rank's rows alone
            p.grad = distribute_tensor(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g
        optimizer.step()


def worker(rank, world, dtype, folder):
    sys.path.insert(0, str(Path(__file__).parent))
    from two_processes import leave, meet

    torch.set_num_threads(1)
    meet(rank, world, folder)
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.fsdp import fully_shard

    model = build(dtype)
    fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (world,)))
    torch.manual_seed(50 + rank)  # ranks that draw differently must still agree on the seeds
    optimizer = AdamW8(model.parameters(), lr=1e-2, max_grad_norm=0.05)
    steps_of(model, optimizer, 2, dtype)
    before = [p.to_local().clone() for p in model.parameters()]
    steps_of(model, optimizer, 1, dtype, spoil=2, first=2)
    assert optimizer.last_skipped and all(
        torch.equal(a, p.to_local()) for a, p in zip(before, model.parameters(), strict=True)
    )
    whole = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    whole = copy.deepcopy(whole)  # what is not sharded is in it by reference
    steps_of(model, optimizer, 1, dtype, first=3)
    after = [full(p.detach()).clone() for p in model.parameters()]
    # back to the state before the last step, through a full checkpoint
    for p, old in zip(model.parameters(), before, strict=True):
        p._local_tensor.detach().copy_(old)
    set_optimizer_state_dict(model, optimizer, whole, options=StateDictOptions(full_state_dict=True))
    steps_of(model, optimizer, 1, dtype, first=3)
    again = [full(p.detach()).clone() for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(after, again, strict=True))
    kinds = [optimizer.state[p]["exp_avg"].dtype for p in model.parameters()]
    states = [{k: full(v) for k, v in optimizer.state[p].items()} for p in model.parameters()]
    if rank == 0:
        torch.save((after, kinds, states), f"{folder}/results.pt")
    leave()


def test_two_ranks_equal_one(tmp_path):
    dtype = torch.bfloat16  # with stochastic rounding, whose random numbers must follow the element
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    torch.multiprocessing.spawn(worker, (2, dtype, str(tmp_path)), nprocs=2, join=True)
    after, kinds, states = torch.load(tmp_path / "results.pt", weights_only=True)
    u8, f32 = torch.uint8, torch.float32
    assert kinds == [u8, u8, u8, f32, f32]
    for size, state, group in zip(SIZES[:3], states[:3], (128, 64, 128), strict=True):
        assert state["exp_avg"].shape == size and state["exp_avg_scale"].shape == (size[0], size[1] // group)
        assert state["step"] == 3
    # one process, the same groups, the same seeds: the same bits
    model = build(dtype)
    groups = [
        {"params": [p], "group_size": g} for p, g in zip(model.parameters(), (128, 64, 128, 128, 128), strict=True)
    ]
    single = AdamW8(groups, lr=1e-2, max_grad_norm=0.05)
    for p, state in zip(model.parameters(), states, strict=True):
        p.grad = torch.zeros_like(p)
        if state["exp_avg"].dtype == f32 and p.numel() >= 4096:  # nothing divides its rows: fp32 moments when sharded
            single.state[p] = {k: torch.zeros_like(state[k]) for k in ("step", "seed", "exp_avg", "exp_avg_sq")}
        else:
            single.state[p] = single._new_state(
                p, single.param_groups[0] if p.shape != SIZES[1] else single.param_groups[1]
            )
        single.state[p]["seed"] = state["seed"]
    steps_of(model, single, 4, dtype, spoil=2)
    for p, q, state in zip(model.parameters(), after, states, strict=True):
        assert torch.equal(p, q), p.shape
        for name, value in single.state[p].items():
            assert torch.equal(value.view(-1), state[name].view(-1)), name
