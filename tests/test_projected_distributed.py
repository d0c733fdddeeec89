"""Projected mode on two processes (gloo): DDP with and without no_sync, and FSDP2, against one process and G."""

import contextlib
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
WORLD, STEPS = 2, 7


def run(rank, folder):
    """One process: every case, its weights into ``folder``."""
    sys.path.insert(0, str(Path(__file__).parent))
    import test_projected as one
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    from two_processes import leave, meet

    from lowmem import optim

    torch.set_num_threads(1)
    meet(rank, WORLD, folder)
    half = one.TOKENS // WORLD
    data = [
        tuple(t[rank * half : (rank + 1) * half] for t in batch) for batch in one.batches(2 * STEPS, rows=one.TOKENS)
    ]

    def steps(model, optimizer, waiting):
        for k, batch in enumerate(data):
            with waiting() if k % 2 == 0 else contextlib.nullcontext():
                (one.loss_of(model, batch) / 2).backward()
            if k % 2 == 1:
                optimizer.step()
                optimizer.zero_grad()

    for name in ("ddp", "fsdp"):
        model = optim.project_(one.model_of(), 6)
        torch.manual_seed(rank)  # bases are the first process's all the same
        if name == "ddp":
            optimizer = one.make(model, seed=3 + rank)
            wrapped = DistributedDataParallel(model)
            steps(wrapped, optimizer, wrapped.no_sync)
        else:
            for layer in (model.wide, model.square, model.narrow):
                fully_shard(layer)
            fully_shard(model)
            optimizer = one.make(model, seed=3 + rank)

            @contextlib.contextmanager
            def waiting(model=model):
                model.set_requires_gradient_sync(False)
                yield
                model.set_requires_gradient_sync(True)

            steps(model, optimizer, waiting)
        full = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in one.weights(model).items()}
        torch.save({n: p.clone() for n, p in full.items()}, f"{folder}/{name}{rank}.pt")
    leave()


def test_two_processes_equal_one(tmp_path):
    """DDP and FSDP2 with accumulation over two micro-batches, with refreshes, in float64, against the plain optimizer
    in one process. Seeds differ from process to process."""
    import test_projected as one

    torch.multiprocessing.spawn(run, (str(tmp_path),), nprocs=WORLD)
    model = one.model_of()
    one.train(model, one.make(model), one.batches(2 * STEPS), accumulate=2)
    want = one.weights(model)
    for name in ("ddp", "fsdp"):
        got = [torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for rank in range(WORLD)]
        for n in want:
            assert torch.equal(got[0][n], got[1][n]), (name, n)
            assert float((got[0][n] - want[n]).abs().max()) < 1e-9, (name, n)


def test_layerwise_refuses_several_processes(monkeypatch):
    import test_projected as one

    from lowmem import optim

    model = one.model_of()
    optim.layerwise_(model, one.make(model))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="expected training in one process, got several"):
        one.loss_of(model, one.batches(1)[0]).backward()
