"""optim.AdamW8 and Fp8AdamW as a torch user meets them: against AdamW, state, resuming, skipping, clipping, groups,
flags, bad input. The operators below are in test_lowbit_optim_ops.py, sharding in test_adamw8_sharded.py."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from lowmem.ops.codecs import CODECS
from lowmem.optim import AdamW8, Fp8AdamW, state_bytes
from lowmem.testing import huge_view

pytestmark = pytest.mark.usefixtures("poisoned")


def parameters(dtype=torch.float32, device="cpu", sizes=((64, 256), (4096,), (50,), (3, 1999))):
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter((torch.randn(*s, generator=g) * 0.1).to(dtype).to(device)) for s in sizes]


def set_grads(params, seed, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=g) * 0.01 * scale).to(p.dtype).to(p.device)


def everything(params, optimizer):
    kept = [p.detach().clone() for p in params]
    return kept + [t.clone() for p in params for _, t in sorted(optimizer.state.get(p, {}).items())]


def equal(a, b):
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------------------------------- updates


@pytest.mark.parametrize("m, v", [("de8", "log8"), ("e4m3+exp", "e4m3+exp"), ("log8", "log8"), ("de8+exp", "de8")])
def test_close_to_torchs_adamw(device, m, v):
    ours, theirs = parameters(device=device), parameters(device=device)
    a = AdamW8(ours, lr=1e-2, m=m, v=v)
    b = torch.optim.AdamW(theirs, lr=1e-2)
    for t in range(20):
        set_grads(ours, t), set_grads(theirs, t)
        a.step(), b.step()
    for p, q, start in zip(ours, theirs, parameters(device=device), strict=True):
        moved = (q - start).norm()
        assert (p - q).norm() < (0.05 if p.numel() >= 4096 else 1e-4) * moved


def test_first_step_is_exact_for_any_codec():
    # m and v are used before they are rounded, and both start from 0
    for codec in CODECS:
        ours, theirs = parameters(), parameters()
        set_grads(ours, 1), set_grads(theirs, 1)
        AdamW8(ours, lr=1e-2, m=codec, v=codec).step()
        torch.optim.AdamW(theirs, lr=1e-2).step()
        for p, q in zip(ours, theirs, strict=True):
            assert (p - q).abs().max() <= 2.0**-22 * q.abs().max()


def test_plain_bf16_stalls_and_stochastic_rounding_does_not():
    # updates of 1e-4 at weights of 1, whose bf16 neighbours are 4e-3 and 8e-3 away
    start = torch.ones(64, 128)
    exact = nn.Parameter(start.clone())
    plain, dithered, split = (nn.Parameter(start.bfloat16()) for _ in range(3))
    options = {"lr": 1e-4, "weight_decay": 0.0}
    pairs = [(exact, torch.optim.AdamW([exact], **options)), (plain, torch.optim.AdamW([plain], **options))]
    pairs += [(dithered, AdamW8([dithered], **options)), (split, AdamW8([split], weights="bf16+rem16", **options))]
    for _ in range(300):
        for p, optimizer in pairs:
            p.grad = torch.full_like(p, 0.1)
            optimizer.step()
    moved = (exact - 1).mean().item()
    assert abs(moved + 0.03) < 1e-4 and torch.equal(plain.float(), start)
    # 8192 weights, each a sum of 300 draws: the mean is far tighter than one weight
    assert abs((dithered.float() - 1).mean().item() - moved) < 5e-4
    assert (split.float() - exact).abs().max() < 2.0**-8


def test_remainder_is_fp32_training():
    narrow = parameters(torch.bfloat16)
    wide = [nn.Parameter(p.detach().float()) for p in narrow]
    a, b = AdamW8(narrow, weights="bf16+rem16"), AdamW8(wide)
    for t in range(5):
        set_grads(narrow, t)
        for p, q in zip(narrow, wide, strict=True):
            q.grad = p.grad.float()
        a.step(), b.step()
    from lowmem.ops.lowbit_optim import join_reference

    for p, q in zip(narrow, wide, strict=True):
        assert torch.equal(join_reference(p.detach(), a.state[p]["remainder"]), q)
        assert equal(
            [a.state[p]["exp_avg"], a.state[p]["exp_avg_sq"]], [b.state[q]["exp_avg"], b.state[q]["exp_avg_sq"]]
        )


def test_groups_maximize_and_tensor_lr():
    p = parameters()
    set_grads(p, 3)
    twin = [nn.Parameter(q.detach().clone()) for q in p]
    for q, r in zip(p, twin, strict=True):
        r.grad = -q.grad
    rate = torch.tensor(1e-2)
    groups = [{"params": p[:2], "lr": rate, "m": "log8"}, {"params": p[2:], "weight_decay": 0.5, "betas": (0.8, 0.9)}]
    others = [
        {"params": twin[:2], "lr": 1e-2, "m": "log8"},
        {"params": twin[2:], "weight_decay": 0.5, "betas": (0.8, 0.9)},
    ]
    a, b = AdamW8(groups, lr=1e-3), AdamW8(others, lr=1e-3, maximize=True)
    a.step(), b.step()
    assert all(torch.equal(x, y) for x, y in zip(p, twin, strict=True))
    schedule = torch.optim.lr_scheduler.LambdaLR(a, lambda i: 1 / (1 + i))
    a.step()
    schedule.step()
    assert rate == 5e-3 and a.param_groups[1]["lr"] == 5e-4


def test_closure_and_parameters_without_gradients():
    p = parameters()
    optimizer = AdamW8(p)
    p[0].grad = torch.ones_like(p[0])

    def closure():
        assert torch.is_grad_enabled()
        return torch.tensor(3.0)

    before = p[1].detach().clone()
    assert optimizer.step(closure) == 3 and torch.equal(p[1], before) and list(optimizer.state) == [p[0]]
    optimizer.zero_grad()
    optimizer.step()  # nothing to do
    assert optimizer.state[p[0]]["step"] == 1


def test_awkward_parameters(device):
    empty = nn.Parameter(torch.empty(0, 5, device=device))
    turned = nn.Parameter(torch.randn(80, 70, device=device).t())
    conv = nn.Parameter(torch.randn(8, 64, 3, 3, device=device).to(memory_format=torch.channels_last))
    tail, scalar = nn.Parameter(torch.randn(4097, device=device)), nn.Parameter(torch.tensor(1.0, device=device))
    params = [empty, turned, conv, tail, scalar]
    twins = [nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in params]
    a, b = AdamW8(params), AdamW8(twins)
    for t in range(3):
        set_grads(params, t), set_grads(twins, t)
        a.step(), b.step()
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


def test_parameters_beyond_32_bits():
    far = nn.Parameter(huge_view(2, 3000, torch.float32))
    far.data.copy_(torch.randn(2, 3000))
    near = nn.Parameter(far.detach().clone())
    far.grad = near.grad = torch.randn(2, 3000)
    AdamW8([far]).step(), AdamW8([near]).step()
    assert torch.equal(far, near)


def test_mixed_dtypes_in_one_call():
    def make():
        a = parameters(torch.bfloat16, sizes=((64, 100), (50,))) + parameters(sizes=((64, 100), (50,)))
        return a

    together, apart = make(), make()
    torch.manual_seed(5)
    one = AdamW8(together)
    for t in range(3):
        set_grads(together, t)
        one.step()
    torch.manual_seed(5)
    two = [AdamW8(apart[:2]), AdamW8(apart[2:])]
    for t in range(3):
        set_grads(apart, t)
        two[0].step(), two[1].step()
    assert all(torch.equal(p, q) for p, q in zip(together, apart, strict=True))


@pytest.mark.gpu
def test_mixed_devices_in_one_call():
    both = parameters() + parameters(device="cuda")
    alone = parameters()
    a, b = AdamW8(both), AdamW8(alone)
    set_grads(both[:4], 1), set_grads(both[4:], 1), set_grads(alone, 1)
    a.step(), b.step()
    for p, q, r in zip(both[:4], both[4:], alone, strict=True):
        assert torch.equal(p, r) and torch.equal(q.cpu(), r)


# --------------------------------------------------------------------------------------------------- skip, clip, scale


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_skips_the_step(device, value):
    p = parameters(torch.bfloat16, device) + parameters(device=device)
    optimizer = AdamW8(p, weights="bf16+rem16")
    for t in range(2):
        set_grads(p, t)
        optimizer.step()
    before = everything(p, optimizer)
    set_grads(p, 2)
    p[3].grad[2, 1998] = value
    optimizer.step()
    assert optimizer.last_skipped and equal(before, everything(p, optimizer))
    set_grads(p, 2)
    optimizer.step()
    assert not optimizer.last_skipped and optimizer.state[p[0]]["step"] == 3


def test_without_the_check_it_is_torchs_behaviour():
    p = parameters()
    set_grads(p, 0)
    p[1].grad[5] = math.nan
    optimizer = AdamW8(p, skip_nonfinite=False)
    optimizer.step()
    assert optimizer.last_skipped is None and p[1][5].isnan() and p[0].isfinite().all()


def test_clipping_is_torchs(device):
    ours, theirs = parameters(device=device), parameters(device=device)
    a, b = AdamW8(ours, max_grad_norm=0.5), AdamW8(theirs)
    for t in range(3):
        set_grads(ours, t), set_grads(theirs, t)
        a.step()
        norm = nn.utils.clip_grad_norm_(theirs, 0.5)
        b.step()
        assert abs(a.last_norm / norm - 1) < 1e-5
    for p, q in zip(ours, theirs, strict=True):
        assert (p - q).abs().max() < 1e-6


def test_grad_scaler():
    for inner in ({}, {"max_grad_norm": 0.3}):
        ours, theirs = parameters(), parameters()
        a, b = AdamW8(ours, **inner), AdamW8(theirs, **inner)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for t in range(4):
            set_grads(ours, t, scale=1024.0), set_grads(theirs, t)
            if t == 2:  # an overflow: skipped, and the scale is halved
                ours[0].grad[0, 0] = math.inf
                before = everything(ours, a)
            scaler.scale(torch.tensor(1.0))
            scaler.step(a)
            scaler.update()
            if t == 2:
                assert equal(before, everything(ours, a)) and scaler.get_scale() == 512.0
                scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            else:
                b.step()
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))  # the scale is a power of two
        assert not hasattr(a, "found_inf")


# ------------------------------------------------------------------------------------------------------------ the state


@pytest.mark.parametrize("m, v", [("de8", "log8"), ("e4m3+exp", "e4m3+exp"), ("int4", "e5m2")])
@pytest.mark.parametrize("weights", ["bf16+sr", "bf16+rem16"])
def test_resuming_is_exact(device, m, v, weights):
    p = parameters(torch.bfloat16, device) + parameters(device=device)
    optimizer = AdamW8(p, m=m, v=v, weights=weights, lr=1e-2)
    for t in range(3):
        set_grads(p, t)
        optimizer.step()
    file = io.BytesIO()
    torch.save({"p": [q.detach() for q in p], "o": optimizer.state_dict()}, file)
    for t in range(3, 6):
        set_grads(p, t)
        optimizer.step()
    torch.manual_seed(999)  # the random numbers of the rounding are in the state
    kept = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    again = [nn.Parameter(q) for q in kept["p"]]
    other = AdamW8(again, m=m, v=v, weights=weights)
    draws = torch.get_rng_state()
    other.load_state_dict(kept["o"])
    assert torch.equal(draws, torch.get_rng_state()) and other.param_groups[0]["lr"] == 1e-2
    for t in range(3, 6):
        set_grads(again, t)
        other.step()
    assert equal(everything(p, optimizer), everything(again, other))
    for q in copy.deepcopy(other).state.values():
        assert all(isinstance(t, torch.Tensor) for t in q.values())


def test_an_interrupted_save_or_a_foreign_state_changes_nothing(tmp_path):
    p = parameters()
    optimizer = AdamW8(p)
    set_grads(p, 0)
    optimizer.step()
    before = everything(p, optimizer)
    path = tmp_path / "state.pt"
    torch.save(optimizer.state_dict(), path)
    whole = path.read_bytes()
    for share in (0.1, 0.5, 0.95):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises((RuntimeError, EOFError, OSError)):
            optimizer.load_state_dict(torch.load(path, weights_only=True))
        assert equal(before, everything(p, optimizer))
    good = optimizer.state_dict()

    def spoilt(change):
        state = copy.deepcopy(good)
        change(state)
        return state

    bad = {
        "the keys": lambda s: s["state"][0].pop("exp_avg_scale"),
        "exp_avg of parameter 1: expected torch.uint8": lambda s: s["state"][1].update(exp_avg=torch.zeros(4096)),
        "exp_avg_sq_span of parameter 0: expected": lambda s: s["state"][0].update(
            exp_avg_sq_span=s["state"][0]["exp_avg_sq_span"][1:]
        ),
        "m: expected 'de8', got 'log8'": lambda s: s["param_groups"][0].update(m="log8"),
        "group_size: expected 128, got 64": lambda s: s["param_groups"][0].update(group_size=64),
        "as many groups": lambda s: s["param_groups"][0]["params"].pop(),
        "the keys 'state' and 'param_groups'": lambda s: s.pop("state"),
    }
    for message, change in bad.items():
        with pytest.raises(ValueError, match="lowmem.AdamW8.load_state_dict: ") as caught:
            optimizer.load_state_dict(spoilt(change))
        assert message in str(caught.value)
        assert equal(before, everything(p, optimizer))
    optimizer.load_state_dict(good)
    assert equal(before, everything(p, optimizer))


def test_state_bytes():
    n, g = 4096 * 1024, 4096 * 1024 // 128
    cases = [({}, torch.float32, 2 * n + 9 * g), ({"m": "e4m3+exp", "v": "log8"}, torch.float32, 2 * n + 10 * g)]
    cases += [
        ({"weights": "bf16+rem16"}, torch.bfloat16, 4 * n + 9 * g),
        ({"m": "int4", "v": "int4"}, torch.float32, n + 8 * g),
    ]
    for options, dtype, expected in cases:
        p = nn.Parameter(torch.zeros(4096, 1024, dtype=dtype))
        p.grad = torch.zeros_like(p)
        optimizer = AdamW8([p], **options)
        optimizer.step()
        total = state_bytes(optimizer)
        assert total == expected + 4 + 8  # step and seed
        limit = 2.08 if dtype == torch.float32 else 4.08
        assert total / n <= limit
        other = Fp8AdamW([p])
        other.step()
        assert state_bytes(other) / n <= 2.08
    small = nn.Parameter(torch.zeros(4095))
    small.grad = torch.zeros_like(small)
    optimizer = AdamW8([small])
    optimizer.step()
    assert state_bytes(optimizer) == 8 * 4095 + 12


def test_two_runs_have_the_same_bits():
    results = []
    for _ in range(2):
        torch.manual_seed(7)
        p = parameters(torch.bfloat16)
        optimizer = AdamW8(p)
        for t in range(4):
            set_grads(p, t)
            optimizer.step()
        results.append(everything(p, optimizer))
    assert equal(*results)


@pytest.mark.parametrize("name, codec", [("log8", "log8"), ("fp8", "e4m3+exp")])
def test_formats_as_states_of_the_projected_optimizer(name, codec):
    from lowmem.ops.codecs import decode_reference, encode_reference
    from lowmem.optim import ProjAdamW
    from lowmem.optim.codec import find_codec

    weights = {}
    for state in ("fp32", name):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(96, 250) * 0.1)
        start = p.detach().clone()
        optimizer = ProjAdamW([p], lr=1e-2, rank=16, state=state, betas=(0.9, 0.95))
        for t in range(5):
            set_grads([p], t)
            optimizer.step()
        weights[state] = p.detach() - start
    assert (weights[name] - weights["fp32"]).norm() < 0.05 * weights["fp32"].norm()
    assert optimizer.state[p]["exp_avg"].dtype == torch.uint8
    x = torch.rand(16, 250)
    for signed in (True, False):
        kept = find_codec("state", name).encode(x, signed=signed, generator=None)
        want = encode_reference(x, codec, 128, signed)
        assert all(torch.equal(a, b) for a, b in zip(want, kept.values(), strict=True))
        assert sum(t.nbytes for t in kept.values()) == find_codec("state", name).bytes(x.numel())
        back = find_codec("state", name).decode(kept, signed=signed, shape=x.shape)
        assert torch.equal(back, decode_reference(*want, x.numel(), codec, 128, signed).view(x.shape))


# ------------------------------------------------------------------------------------------------------------ bad input


BAD = {
    "amsgrad: expected False": {"amsgrad": True},
    "differentiable: expected False": {"differentiable": True},
    "foreach, fused: expected at most one": {"foreach": True, "fused": True},
    "lr: expected a finite number >= 0, got -1": {"lr": -1},
    "lr: expected a number or a tensor of one element": {"lr": torch.ones(2)},
    "betas: expected two numbers in [0, 1), got 1.0": {"betas": (0.9, 1.0)},
    "eps: expected a finite number": {"eps": math.nan},
    "weight_decay: expected a finite number >= 0": {"weight_decay": -0.1},
    "m: expected one of e4m3": {"m": "fp8"},
    "v: expected one of e4m3": {"v": "float"},
    "group_size: expected one of 16": {"group_size": 100},
    "weights: expected one of auto": {"weights": "bf16"},
    "max_grad_norm: expected a number > 0": {"max_grad_norm": 0.0},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_options(message):
    with pytest.raises(ValueError) as caught:
        AdamW8(parameters(), **BAD[message])
    assert f"lowmem.AdamW8: {message}" in str(caught.value)


def test_bad_parameters_and_gradients():
    for dtype in (torch.float64, torch.float16):
        with pytest.raises(TypeError, match="lowmem.AdamW8: params: expected float32 or bfloat16 parameters"):
            AdamW8(parameters(dtype))
    with pytest.raises(TypeError, match="weights='fp32'"):
        Fp8AdamW(parameters(torch.bfloat16), weights="fp32")
    table = nn.Embedding(100, 64, sparse=True)
    optimizer = AdamW8(table.parameters())
    table(torch.tensor([3])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(TypeError, match="lowmem.AdamW8.step: params: expected dense gradients"):
        optimizer.step()
    assert torch.equal(before, table.weight) and not optimizer.state[table.weight]
    with pytest.raises(ValueError, match="lowmem.AdamW8: m: expected"):
        optimizer.add_param_group({"params": parameters(), "m": "x"})
    assert len(optimizer.param_groups) == 1
    AdamW8(parameters(), foreach=True), AdamW8(parameters(), fused=True, capturable=True)


@pytest.mark.gpu
def test_capturable():
    p, twin = parameters(device="cuda"), parameters(device="cuda")
    rate = torch.tensor(1e-2, device="cuda")
    a, b = AdamW8(p, lr=rate, max_grad_norm=1.0, capturable=True), AdamW8(twin, lr=1e-2, max_grad_norm=1.0)
    set_grads(p, 0), set_grads(twin, 0)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        a.step(), b.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        a.step()
    for _ in range(3):
        for q, r in zip(p, twin, strict=True):
            r.grad = torch.randn_like(r)
            q.grad.copy_(r.grad)
        graph.replay()
        b.step()
    assert all(torch.equal(x, y) for x, y in zip(p, twin, strict=True))
