"""The CUDA kernel of the lowbit_optim family, executed: the reference's bits in every tensor, for every order of
threads and blocks."""

import pytest
import torch
from test_lowbit_optim_ops import LISTS, check_pairs, copies, options, tensors

from lowmem.ops.codecs import CODECS

pytestmark = pytest.mark.emulate
ORDERS = (0, 1, 77)
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture
def step(rig):
    def run(*args, place="start", orders=ORDERS):
        lists, (offsets, lr, scale, found, *betas, decay, m, v, group, maximize) = args[:LISTS], args[LISTS:]
        packed = [[t.contiguous().view(-1).view(BITS[t.element_size()]).numpy() for t in one] for one in lists]
        beta1, beta2, eps = betas
        number = [None if t is None else t.item() for t in (scale, found)]
        kinds = CODECS.index(m) + 1, CODECS.index(v) + 1
        more = (offsets, lr.item(), *number, beta1, beta2, eps, decay, *kinds, group, maximize, place)
        results = []
        for order in orders:
            rig.module.configure(order, 2)
            results.append(rig.module.lowbit_adamw(packed, *more))
        for other in results[1:]:
            assert all(a.tobytes() == b.tobytes() for x, y in zip(results[0], other, strict=True) for a, b in
                       zip(x, y, strict=True))  # fmt: skip
        for one, after in zip(lists, results[0], strict=True):
            for t, new in zip(one, after, strict=True):
                t.copy_(torch.from_numpy(new.copy()).view(t.dtype).view(t.shape))

    return run


@pytest.mark.parametrize("m, v", [("de8", "log8"), ("log8", "log8"), ("e4m3+exp", "e4m3+exp")])
def test_pairs_that_are_compiled_in(step, m, v):
    check_pairs([(m, v)], step=step)


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec(step, codec):
    check_pairs([(codec, codec)] if codec not in ("log8", "e4m3+exp") else [(codec, "de8")], step=step)


@pytest.mark.parametrize("group", [16, 64, 512])
def test_group_sizes(step, group):
    check_pairs([("de8", "log8"), ("int4", "e4m3+exp")], step=step, group=group)


@pytest.mark.parametrize("kind", ["fp32", "sr", "rem"])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 4095, 4096, 4097, 8200])
def test_sizes_flush_against_pages_that_nobody_may_touch(step, n, kind):
    for small in (False, True):
        args = tensors("de8", "log8", kinds=[(n, kind, small), (33, kind, small)])
        want, got = copies(args), copies(args)
        from lowmem.ops.lowbit_optim import adamw_reference

        adamw_reference(*want, *options("de8", "log8"))
        step(*got, *options("de8", "log8"), place="end", orders=(0,))
        for one, other in zip(want[:LISTS], got[:LISTS], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_many_tensors_in_one_launch(step):
    kinds = [(1 + 37 * i % 300, ("fp32", "sr", "rem")[i % 3], i % 2 == 0) for i in range(60)]
    args = tensors("de8", "log8", kinds=kinds)
    want, got = copies(args), copies(args)
    from lowmem.ops.lowbit_optim import adamw_reference

    adamw_reference(*want, *options("de8", "log8"))
    step(*got, *options("de8", "log8"), orders=(0,))
    for one, other in zip(want[:LISTS], got[:LISTS], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
