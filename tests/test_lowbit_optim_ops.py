"""The operators below AdamW8: the step against AdamW in float64, the backends against the reference bit for bit,
stochastic rounding, the norm, bad input."""

import itertools
import math

import pytest
import torch

from lowmem.ops.codecs import CODECS, encode_reference
from lowmem.ops.lowbit_optim import (
    adamw_reference,
    dither_reference,
    grad_norm_reference,
    join_reference,
    split_reference,
    unbias,
)
from lowmem.testing import huge_view

pytestmark = pytest.mark.usefixtures("poisoned")
LISTS = 11  # of tensors, before the offsets
KINDS = [  # numel, weights, small
    (5000, "fp32", False),
    (1000, "fp32", True),
    (4111, "sr", False),
    (300, "sr", True),
    (2049, "rem", False),
    (70, "rem", True),
    (0, "fp32", False),
    (1, "sr", False),
]


def state(x, codec, signed, small, group):
    if small:
        return [x.clone(), torch.empty(0), torch.empty(0, dtype=torch.uint8)]
    return list(encode_reference(x, codec, group, signed))


def tensors(m, v, group=128, device="cpu", kinds=KINDS):
    """The lists of lowbit_adamw_ for tensors of every kind."""
    gen = torch.Generator().manual_seed(5)
    lists = [[] for _ in range(LISTS)]
    offsets = []
    for n, kind, small in kinds:
        p, g = torch.randn(n, generator=gen), torch.randn(n, generator=gen) * 0.1
        rest = torch.empty(0, dtype=torch.int16)
        if kind != "fp32":
            p, g = p.bfloat16(), g.bfloat16()
        if kind == "rem":
            rest = torch.randint(-(2**15), 2**15, (n,), generator=gen).short()
        first = state(torch.randn(n, generator=gen) * 0.1, m, True, small, group)
        second = state(torch.randn(n, generator=gen) ** 2 * 0.01, v, False, small, group)
        seed = torch.randint(0, 2**62, (1,), generator=gen)
        entry = [p, g, rest, *first, *second, torch.tensor(float(n % 7 + 1)), seed]
        for one, value in zip(lists, entry, strict=True):
            one.append(value.to(device))
        offsets.append(13 if n == 300 else 8 * n + 2**35 - 16)
    return [*lists, offsets]


def copies(args):
    return [[t.clone() for t in one] for one in args[:LISTS]] + [args[LISTS]]


def options(m, v, group=128, *, scale=None, found=None, maximize=False, decay=0.1, device="cpu"):
    def number(x):
        return None if x is None else torch.tensor(x, device=device)

    return (number(1e-3), number(scale), number(found), 0.9, 0.999, 1e-8, decay, m, v, group, maximize)


def check_pairs(pairs, device="cpu", step=None, group=128):
    """The backend of ``device`` leaves the reference's bits in every tensor."""
    step = step or torch.ops.lowmem.lowbit_adamw_
    for m, v in pairs:
        args = tensors(m, v, group)
        for more in ({}, {"maximize": True, "scale": 0.37, "found": 0.0, "decay": 0.0}, {"found": 1.0}):
            want, got = copies(args), [[t.to(device) for t in one] for one in copies(args)[:LISTS]] + [args[LISTS]]
            adamw_reference(*want, *options(m, v, group, **more))
            step(*got, *options(m, v, group, **more, device=device))
            for which, (one, other) in enumerate(zip(want[:LISTS], got[:LISTS], strict=True)):
                for i, (a, b) in enumerate(zip(one, other, strict=True)):
                    assert torch.equal(a, b.cpu()), (m, v, more, which, KINDS[i])
            if more.get("found"):
                assert all(torch.equal(a, b) for one, two in zip(args, want, strict=True) for a, b in
                           zip(one, two, strict=True) if isinstance(a, torch.Tensor))  # fmt: skip


@pytest.mark.parametrize("m", CODECS)
def test_backend_has_the_bits_of_the_reference(device, m):
    check_pairs([(m, v) for v in ("log8", "e4m3+exp", "int8")], device)


@pytest.mark.parametrize("v", CODECS)
def test_backend_has_the_bits_of_the_reference_for_every_second_moment(device, v):
    check_pairs([("de8", v)], device)


@pytest.mark.parametrize("group", [16, 64, 512])
def test_other_group_sizes(device, group):
    check_pairs([("de8", "log8"), ("int4", "e4m3+exp")], device, group=group)


def test_threads_do_not_change_the_bits():
    kinds = [(100_003, "sr", False), (70_001, "fp32", False), (3, "rem", True), (33_000, "rem", False)]
    args, results = tensors("de8", "log8", kinds=kinds), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        now = copies(args)
        torch.ops.lowmem.lowbit_adamw_(*now, *options("de8", "log8"))
        results.append([t for one in now[:LISTS] for t in one] + [torch.ops.lowmem.lowbit_grad_norm(now[1])])
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_fp32_moments_are_torchs_adamw():
    # the update alone: no codes on the way, against torch.optim.AdamW in float64
    n, lists = 3000, tensors("de8", "log8", kinds=[(3000, "fp32", True)])
    lists[3][0].zero_()
    lists[6][0].zero_()
    twin = torch.nn.Parameter(lists[0][0].double())
    theirs = torch.optim.AdamW([twin], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    narrow = torch.nn.Parameter(lists[0][0].clone())
    theirs32 = torch.optim.AdamW([narrow], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for t in range(1, 6):
        lists[1][0] = torch.randn(n) * 10.0 ** (t - 3)
        lists[9][0].fill_(t)
        twin.grad, narrow.grad = lists[1][0].double(), lists[1][0].clone()
        theirs.step()
        theirs32.step()
        torch.ops.lowmem.lowbit_adamw_(*lists, *options("de8", "log8"))
    torch_error = (narrow.double() - twin).abs().max()
    assert (lists[0][0].double() - twin).abs().max() <= 2 * torch_error + 2.0**-23 * twin.abs().max()


def test_powers_of_the_bias_correction():
    for t in (1, 2, 3, 10, 1000, 123_457, 2**24 - 1):
        one, two = unbias(0.9, 0.999, torch.tensor(float(t)))
        assert abs(one.item() * -math.expm1(t * math.log(0.9)) - 1) < 1e-6
        assert abs(two.item() ** 2 * -math.expm1(t * math.log(0.999)) - 1) < 1e-6


# ------------------------------------------------------------------------------------------------------------- weights


def test_remainder_is_an_exact_master():
    bits = torch.randint(-(2**31), 2**31 - 1, (20000,)).int()
    master = bits.view(torch.float32)
    master = master[master.isfinite()]
    p, rest = split_reference(master)
    assert torch.equal(join_reference(p, rest).view(torch.int32), master.view(torch.int32))
    near = (master.abs() < 1e38) & (rest != -(2**15))
    assert torch.equal(p[near], master[near].bfloat16())  # rounded to nearest; ties away from zero


def test_stochastic_rounding_is_unbiased_and_stays_between_neighbours():
    x = torch.randn(4000)
    low = (x.view(torch.int32) & -65536).view(torch.float32)
    high = (low.view(torch.int32) + 65536).view(torch.float32)
    total, draws = torch.zeros(4000, dtype=torch.float64), 400
    for t in range(draws):
        got = dither_reference(x, torch.tensor([99]), 0, torch.tensor(float(t))).float()
        assert ((got == low) | (got == high)).all()
        total += got
    ulp = (high - low).abs().double()
    share = ((x - low).double() / (high - low).double()).clamp(0, 1)
    sigma = (share * (1 - share) / draws).sqrt() * ulp
    assert ((total / draws - x).abs() <= 5 * sigma + 1e-12).all()
    exact = x.bfloat16().float()
    assert torch.equal(dither_reference(exact, torch.tensor([99]), 0, torch.tensor(1.0)).float(), exact)
    top = torch.tensor([3.4028e38, -3.4028e38])
    for t in range(50):
        assert dither_reference(top, torch.tensor([5]), 0, torch.tensor(float(t))).isfinite().all()


@pytest.mark.parametrize("cut", [8, 13, 128, 1000])
def test_random_numbers_follow_the_element_not_the_shard(cut):
    x, seed, t = torch.randn(2000), torch.tensor([2**61 + 5]), torch.tensor(7.0)
    whole = dither_reference(x, seed, 2**35 - 40, t)
    parts = [dither_reference(x[:cut], seed, 2**35 - 40, t), dither_reference(x[cut:], seed, 2**35 - 40 + cut, t)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, dither_reference(x, seed + 2**32, 2**35 - 40, t))
    assert not torch.equal(whole, dither_reference(x, seed, 2**35 - 40, t + 1))


# ---------------------------------------------------------------------------------------------------------------- norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_flag(device, dtype):
    for scale in (1.0, 1e-25, 1e25):
        grads = [(torch.randn(n) * scale).to(dtype).to(device) for n in (1, 1023, 5000, 0, 33)]
        want, got = grad_norm_reference(grads), torch.ops.lowmem.lowbit_grad_norm(grads)
        # 1024 fp32 products in 32 running sums: far below one unit each
        assert abs(got[0] - want[0]) <= 1e-6 * want[0] and got[1] == 0
        for value in (math.nan, math.inf, -math.inf):
            for i, k in ((0, 0), (1, 1022), (2, 1500), (4, 32)):
                bad = [g.clone() for g in grads]
                bad[i][k] = value
                assert torch.ops.lowmem.lowbit_grad_norm(bad)[1] == 1, (i, k, value)


@pytest.mark.slow
def test_a_nan_beyond_element_2_to_the_31():
    flat = huge_view(2, 64, torch.bfloat16).as_strided((2**31 + 64,), (1,))
    assert torch.ops.lowmem.lowbit_grad_norm([flat])[1] == 0
    flat[-1] = math.nan
    assert torch.ops.lowmem.lowbit_grad_norm([flat])[1] == 1


# ----------------------------------------------------------------------------------------------------------- interface


def test_registration(device):
    kinds = [(200, "fp32", False), (130, "sr", False), (40, "rem", True)]
    args = tensors("de8", "log8", device=device, kinds=kinds)
    torch.library.opcheck(
        torch.ops.lowmem.lowbit_adamw_.default, (*args, *options("de8", "log8", scale=0.5, found=0.0, device=device))
    )
    torch.library.opcheck(torch.ops.lowmem.lowbit_grad_norm.default, (args[1],))


NAMES = (
    "params grads remainders m_codes m_scales m_spans v_codes v_scales v_spans steps seeds offsets lr grad_scale "
    "found_inf beta1 beta2 eps weight_decay m v group_size maximize"
).split()
BAD = {
    "m: expected one of e4m3": lambda a: a.update(m="fp9"),
    "group_size: expected 16, 32": lambda a: a.update(group_size=96),
    "beta2: expected a number in [0, 1), got 1": lambda a: a.update(beta2=1.0),
    "eps: expected a finite number >= 0, got -1": lambda a: a.update(eps=-1.0),
    "weight_decay: expected a finite number >= 0, got inf": lambda a: a.update(weight_decay=math.inf),
    "lr: expected 1 elements, got 2": lambda a: a.update(lr=torch.ones(2)),
    "found_inf: expected torch.Float, got torch.Double": lambda a: a.update(found_inf=torch.ones(1).double()),
    "grads: expected 8 entries, as params has, got 7": lambda a: a["grads"].pop(),
    "grads: expected 5000 elements, got 4999": lambda a: a["grads"].__setitem__(0, a["grads"][0][1:]),
    "grads: expected float32 or bfloat16, got torch.Half": lambda a: a["grads"].__setitem__(7, a["grads"][7].half()),
    "params: expected float32 or bfloat16, got torch.Double": lambda a: a["params"].__setitem__(
        7, a["params"][7].double()
    ),
    "params: expected contiguous tensors, got strides": lambda a: a["params"].__setitem__(6, torch.ones(6)[::2]),
    "remainders: expected 2049 elements, got 2048": lambda a: a["remainders"].__setitem__(4, a["remainders"][4][1:]),
    "m_codes: expected 2049 elements, got 2048": lambda a: a["m_codes"].__setitem__(4, a["m_codes"][4][1:]),
    "m_scales: expected 17 elements, got 16": lambda a: a["m_scales"].__setitem__(4, a["m_scales"][4][1:]),
    "v_spans: expected 17 elements, got 16": lambda a: a["v_spans"].__setitem__(4, a["v_spans"][4][1:]),
    "v_codes: expected torch.Byte, got torch.Int": lambda a: a["v_codes"].__setitem__(4, a["v_codes"][4].int()),
    "steps: expected torch.Float, got torch.Long": lambda a: a["steps"].__setitem__(4, a["steps"][4].long()),
    "seeds: expected torch.Long, got torch.Int": lambda a: a["seeds"].__setitem__(4, a["seeds"][4].int()),
    "offsets: expected numbers >= 0, got -8": lambda a: a["offsets"].__setitem__(7, -8),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_before_anything_is_written(device, message, request):
    from lowmem import _dispatch

    if not (_dispatch.CPU if device == "cpu" else _dispatch.CUDA).loaded:
        pytest.skip("the reference does not check: the public optimizer does")
    given = dict(
        zip(NAMES, (*tensors("de8", "log8", device=device), *options("de8", "log8", device=device)), strict=True)
    )
    given["lr"] = given["lr"].clone()
    kept = [t for name in NAMES[:LISTS] for t in given[name]]
    before = [t.clone() for t in kept]
    BAD[message](given)
    with pytest.raises(RuntimeError) as caught:
        torch.ops.lowmem.lowbit_adamw_(*given.values())
    assert f"lowmem.lowbit_adamw_: {message}" in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True))


def test_the_checks_notice_a_broken_step():
    def forgets_the_last(*args):  # the last element of every parameter keeps its value
        before = [p.clone() for p in args[0]]
        adamw_reference(*args)
        for p, old in zip(args[0], before, strict=True):
            p[-1:] = old[-1:]

    def least_by_position(*args):  # COAT's: the least of a group is found with zeros in it
        adamw_reference(*args)
        args[8][0][0] = 1

    for broken in (forgets_the_last, least_by_position):
        with pytest.raises(AssertionError):
            check_pairs([("de8", "log8")], step=broken)
    assert len(list(itertools.product(CODECS, CODECS))) == 64
