"""ProjAdamW as an optimizer: rank, moments, state, resume, the parameters it does not project, and bad input."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

from lowmem.optim import FisherWindow, OnConverged, OnSimilar, ProjAdamW, lowrank_groups, register_codec
from lowmem.optim import codec as codecs

SHAPES = [(24, 40), (40, 24), (32, 32), (24, 40)]
AXES = {
    "fixed": {"rank": 4},
    "energy": {"energy": 0.8},
    "energy-power": {"energy": 0.9, "projector": "power", "rank_min": 3, "rank_max": 12},
    "power": {"rank": 4, "projector": "power"},
    "svd-keep": {"rank": 4, "projector": "svd", "moments": "keep", "side": "left"},
    "energy-keep": {"energy": 0.8, "moments": "keep"},
    "random": {"rank": 4, "projector": "random", "side": "right"},
    "frugal": {"density": 0.25, "projector": "randk", "moments": "reset", "residual": "sign"},
    "fira": {"rank": 4, "residual": "fira"},
    "fira-randk": {"rank": 4, "residual": "fira", "projector": "randk"},
    "sign": {"rank": 4, "residual": "sign", "residual_scale": 0.3},
    "apollo": {"rank": 4, "residual": "apollo", "projector": "random"},
    "natural": {"rank": 4, "precond": FisherWindow(3, 0.5)},
    "weight-norm": {"rank": 4, "reparam": "weight_norm"},
    "bf16": {"rank": 4, "state": "bf16"},
    "int8": {"rank": 4, "state": "int8", "basis": "int8", "refresh": OnSimilar(3, 0.1, 2.0, 2)},
    "converged": {"energy": 0.8, "refresh": OnConverged(0.9, 9, 3)},
    "stochastic": {"rank": 4, "rounding": "stochastic"},
    "ignore": {"rank": 4, "nonfinite": "ignore"},
}


def problem(dtype=torch.float32):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(s).to(dtype)) for s in SHAPES]
    params.append(nn.Parameter(torch.randn(7).to(dtype)))
    return params, [torch.randn(p.shape).to(dtype) for p in params]


def make(params, **options):
    return ProjAdamW(params, **{"lr": 1e-2, "weight_decay": 0.1, "refresh": 7, "seed": 3, **options})


def steps(optimizer, params, targets, count):
    for _ in range(count):
        for p, t in zip(params, targets, strict=True):
            p.grad = p.detach() - t
        optimizer.step()


def distance(params, targets):
    return sum(float(((p.detach() - t).double() ** 2).sum()) for p, t in zip(params, targets, strict=True))


# -------------------------------------------------------------------------------------- every axis: descends, resumes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_descends_and_resumes_exactly(axes, dtype):
    """20 steps equal 9 steps, a checkpoint read with weights_only=True into an optimizer of another seed, 11 steps."""
    params, targets = problem(dtype)
    before = distance(params, targets)
    optimizer = make(params, **AXES[axes])
    steps(optimizer, params, targets, 9)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": [p.detach() for p in params]}, file)
    steps(optimizer, params, targets, 11)
    assert distance(params, targets) < before
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others = [nn.Parameter(p) for p in saved["params"]]
    resumed = make(others, **{**AXES[axes], "seed": 99})
    resumed.load_state_dict(saved["optimizer"])
    steps(resumed, others, targets, 11)
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
    assert resumed.report() == optimizer.report() and len(optimizer.report()) == 4
    for p, q in zip(params, others, strict=True):
        for name, value in optimizer.state[p].items():
            assert isinstance(value, torch.Tensor), f"state {name} is no tensor"
            other = resumed.state[q][name]
            assert torch.equal(value, other) and value.dtype == other.dtype and value.device == other.device, name


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_v_is_never_negative(axes):
    params, targets = problem()
    optimizer = make(params, **{**AXES[axes], "betas": (0.9, 0.9)}, lr=0.3)
    for _ in range(6):
        steps(optimizer, params, targets, 4)
        for p in params[:4]:
            v = codecs.find_codec("state", optimizer.param_groups[0]["state"]).decode(
                codecs.get(optimizer.state[p], "exp_avg_sq"), signed=False, shape=optimizer.state[p]["exp_avg_sq"].shape
            )
            assert (v >= 0).all() and v.isfinite().all()


def test_the_same_seed_gives_the_same_bits():
    def final(seed):
        torch.manual_seed(seed)
        params, targets = [nn.Parameter(torch.ones(24, 40))], [torch.linspace(-1, 1, 960).view(24, 40) ** 3]
        optimizer = ProjAdamW(params, 1e-2, rank=4, projector="random")
        steps(optimizer, params, targets, 5)
        return params[0].detach()

    assert torch.equal(final(1), final(1)) and not torch.equal(final(1), final(2))


# --------------------------------------------------------------------------------------------------------------- rank


def decaying(shape, seed=0):
    torch.manual_seed(seed)
    k = min(shape)
    u, v = torch.linalg.qr(torch.randn(shape[0], k)).Q, torch.linalg.qr(torch.randn(shape[1], k)).Q
    return (u * 0.85 ** torch.arange(k)) @ v.T


@pytest.mark.parametrize("projector", ["svd", "rsvd", "power"])
@pytest.mark.parametrize("energy", [0.3, 0.7, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("shape", [(24, 40), (60, 33)], ids=str)
def test_the_rank_is_the_brute_force_smallest(shape, energy, projector):
    p = nn.Parameter(torch.zeros(shape))
    p.grad = decaying(shape)
    optimizer = ProjAdamW([p], 1e-2, energy=energy, projector=projector, iters=8)
    optimizer.step()
    s2 = torch.linalg.svdvals(p.grad.double()) ** 2
    smallest = next(r for r in range(1, len(s2) + 1) if s2[r:].sum() <= (1 - energy) * s2.sum())
    (row,) = optimizer.report()
    assert row["rank"] == smallest
    assert energy * (1 - 1e-5) <= row["captured"] <= 1
    assert abs(row["captured"] - float(s2[:smallest].sum() / s2.sum())) <= 1e-4


@pytest.mark.parametrize("projector", ["svd", "rsvd", "power"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=str)
def test_exact_rank_k_gives_rank_k_and_loses_nothing(shape, projector):
    """The projected gradient, sent back, is the gradient: with SGD inside, the unprojected update."""
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    torch.manual_seed(3)
    p.grad = torch.randn(shape[0], 5, dtype=torch.float64) @ torch.randn(5, shape[1], dtype=torch.float64)
    # betas of 0 and a huge eps make Adam a plain gradient step of size lr / eps
    optimizer = ProjAdamW([p], 1e6, energy=1 - 1e-9, projector=projector, betas=(0.0, 0.0), eps=1e9, scale=1.0)
    optimizer.step()
    assert optimizer.report()[0]["rank"] == 5
    torch.testing.assert_close(p.detach(), -1e-3 * p.grad, rtol=1e-6, atol=1e-9)


def test_rank_min_and_rank_max():
    p = nn.Parameter(torch.zeros(24, 40))
    p.grad = torch.randn(24, 1) @ torch.randn(1, 40)
    for options, rank in (({}, 1), ({"rank_min": 6}, 6), ({"rank_min": 30}, 24)):
        optimizer = ProjAdamW([p], 1e-2, energy=0.9, **options)
        optimizer.step()
        assert optimizer.report()[0]["rank"] == rank
    p.grad = torch.randn(24, 40)
    optimizer = ProjAdamW([p], 1e-2, energy=0.999, rank_max=7)
    optimizer.step()
    assert optimizer.report()[0]["rank"] == 7


def test_moments_follow_the_rank():
    p = nn.Parameter(torch.zeros(24, 40))
    optimizer = ProjAdamW([p], 1e-2, energy=0.9, refresh=2)
    for k in (3, 3, 9, 9, 2, 2):
        p.grad = torch.linalg.qr(torch.randn(24, k)).Q @ torch.linalg.qr(torch.randn(40, k)).Q.T
        optimizer.step()
        rank = optimizer.report()[0]["rank"]
        assert optimizer.state[p]["exp_avg"].shape == (rank, 40) and optimizer.state[p]["basis"].shape == (24, rank)
    assert [rank for _, rank, _ in optimizer.report()[0]["history"]] == [3, 9, 2]


def test_a_rank_above_the_short_side_is_lowered_with_a_warning():
    p = nn.Parameter(torch.zeros(24, 40))
    with pytest.warns(UserWarning, match=r"rank: expected at most min\(m, n\) = 24 .* got 64: lowered"):
        optimizer = ProjAdamW([p], 1e-2, rank=64)
    p.grad = torch.randn(24, 40)
    optimizer.step()
    assert optimizer.report()[0]["rank"] == 24


def test_rotation_conserves_what_both_bases_see():
    """Within the span of both bases a rotated M is the same matrix, and V's total does not grow."""
    from lowmem.optim import subspace

    torch.manual_seed(0)
    old = torch.linalg.qr(torch.randn(24, 4)).Q
    new = old @ torch.linalg.qr(torch.randn(4, 4)).Q  # another basis of the same subspace
    m, v = torch.randn(4, 9), torch.rand(4, 9)
    m2, v2 = subspace.rotate(m, v, subspace.overlap(new, old), True)
    torch.testing.assert_close(new @ m2, old @ m)
    torch.testing.assert_close(v2.sum(0), v.sum(0))
    mt, vt = subspace.rotate(m.T, v.T, subspace.overlap(new, old), False)
    assert torch.equal(mt.T, m2) or torch.allclose(mt.T, m2)
    assert torch.allclose(vt.T, v2)


# --------------------------------------------------------------------------------------------- refreshes, state bytes


def test_refreshes_are_staggered():
    params, targets = problem()
    optimizer = make(params, rank=4, refresh=8)
    steps(optimizer, params, targets, 30)
    at = [[t for t, _, _ in row["history"]] for row in optimizer.report()]
    assert at == [[0, 8, 16, 24], [0, 6, 14, 22], [0, 4, 12, 20, 28], [0, 2, 10, 18, 26]]
    params, targets = problem()
    optimizer = make(params, rank=4, refresh=8, stagger=False)
    steps(optimizer, params, targets, 30)
    assert {tuple(t for t, _, _ in row["history"]) for row in optimizer.report()} == {(0, 8, 16, 24)}


def test_equal_shapes_are_refreshed_in_one_batch(monkeypatch):
    from lowmem.optim import subspace

    sizes = []
    real = subspace.power_iteration
    monkeypatch.setattr(subspace, "power_iteration", lambda a, *r, **k: sizes.append(len(a)) or real(a, *r, **k))
    params, targets = problem()
    alone, _ = problem()
    steps(make(params, rank=4, projector="power", stagger=False), params, targets, 8)
    assert sorted(sizes) == [1, 1, 2]
    for p, q, t in zip(alone, params, targets, strict=True):  # the batch changes no matrix's result
        if p.dim() == 2 and p is not alone[3]:
            steps(make([p], rank=4, projector="power", stagger=False), [p], [t], 1)
            assert p.shape == q.shape


@pytest.mark.parametrize("state, each", [("fp32", 4), ("bf16", 2), ("int8", 1)])
@pytest.mark.parametrize("shape", [(64, 256), (256, 64)], ids=str)
def test_state_bytes(shape, state, each):
    p = nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
    optimizer = ProjAdamW([p], 1e-2, rank=16, state=state)
    p.grad = torch.randn(shape).bfloat16()
    optimizer.step()
    scales = 2 * 4 * 16 * 256 // 128 if state == "int8" else 0
    want = 2 * 16 * 256 * each + scales + 2 * 64 * 16  # M and V, the basis in bf16
    held = optimizer.report()[0]["state_bytes"]
    assert want <= held <= want + 200  # counters, seed and history
    assert codecs.find_codec("state", state).bytes(16 * 256) * 2 + 2 * 64 * 16 == want


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_codecs_round_without_bias_and_keep_zero(name, signed):
    x = torch.randn(4, 300) ** 3
    x = x if signed else x**2
    x[0, :5] = 0
    codec = codecs.find_codec("state", name)
    draws = []
    for k in range(200):
        stored = codec.encode(x, signed=signed, generator=torch.Generator().manual_seed(k))
        draws.append(codec.decode(stored, signed=signed, shape=x.shape))
    mean = torch.stack(draws).double().mean(0)
    assert (mean[0, :5] == 0).all()
    if signed or name == "bf16":  # the mean of 200 draws of at most one step: five of its standard deviations
        step = 2.0**-7 * x.abs() if name == "bf16" else stored[".scale"].max() / 127
        assert ((mean - x).abs() <= 5 * 0.5 * step / 200**0.5 + 1e-12).all()
    if not signed:
        assert (torch.stack(draws)[:, x > 0] > 0).all()


def test_a_slow_average_moves_in_16_and_8_bits():
    """With rounding to nearest V would stay where it is: 0.001 of it is less than half a step of bf16."""
    for state in ("bf16", "int8"):
        p = nn.Parameter(torch.zeros(16, 256))
        optimizer = ProjAdamW([p], 0.0, rank=16, projector="randk", state=state, refresh=1000)
        torch.manual_seed(0)
        p.grad = torch.randn(16, 256).abs() + 0.5
        optimizer.step()
        codec = codecs.find_codec("state", state)

        def v(p=p, optimizer=optimizer, codec=codec):
            return codec.decode(codecs.get(optimizer.state[p], "exp_avg_sq"), signed=False, shape=p.shape)

        first = v().clone()
        p.grad.zero_()
        for _ in range(300):
            optimizer.step()
        ratio = float(v().sum() / first.sum())
        assert abs(ratio - 0.999**300) < 0.05, state


def test_a_codec_of_another_family_slots_in():
    class Half(codecs.BFloat16):
        def encode(self, x, *, signed, generator):
            return {"": x.half(), ".note": torch.ones(1)}

        def decode(self, stored, *, signed, shape):
            assert stored[".note"].item() == 1
            return stored[""].float()

    if "half-for-test" not in codecs._CODECS:
        register_codec("half-for-test", Half())
    params, targets = problem()
    optimizer = make(params, rank=4, state="half-for-test")
    steps(optimizer, params, targets, 9)
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.float16
    with pytest.raises(ValueError, match="name: expected a name that is free"):
        register_codec("fp32", Half())


# ----------------------------------------------------------------------------------------- what torch's optimizers do


def test_what_is_not_projected_gets_torchs_adamw():
    shapes = [(7,), (3, 4, 5), (4, 300), (24, 40)]
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(s)) for s in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    groups = [{"params": ours[:3]}, {"params": ours[3:], "project": False, "lr": 3e-3}]
    a = ProjAdamW(groups, 1e-2, rank=4, weight_decay=0.1)
    b = torch.optim.AdamW([{"params": theirs[:3]}, {"params": theirs[3:], "lr": 3e-3}], lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)
    assert a.report() == []


def test_lowrank_groups_takes_linear_weights_and_leaves_the_rest():
    model = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 48), nn.LayerNorm(48), nn.Linear(48, 50))
    groups = lowrank_groups(model, energy=0.9, rank_min=2)
    optimizer = ProjAdamW(groups, 1e-2)
    loss = model(torch.arange(50)).square().mean()
    loss.backward()
    optimizer.step()
    assert [row["name"] for row in optimizer.report()] == ["1.weight", "3.weight"]
    assert optimizer.param_groups[0]["energy"] == 0.9 and optimizer.param_groups[1]["project"] is False
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="target_modules: expected linear layers whose weight trains"):
        lowrank_groups(model)


def test_schedulers_clipping_accumulation_and_closures():
    torch.manual_seed(0)
    model = nn.Linear(40, 24)
    x, y = torch.randn(64, 40), torch.randn(64, 24)
    optimizer = ProjAdamW(model.parameters(), 1e-2, rank=4, seed=1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=4)
    twin = copy.deepcopy(model)
    other = ProjAdamW(twin.parameters(), 1e-2, rank=4, seed=1)
    schedule2 = torch.optim.lr_scheduler.LinearLR(other, 0.5, total_iters=4)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        return loss

    for _ in range(6):
        assert optimizer.step(closure).requires_grad
        schedule.step()
        other.zero_grad()
        for half in (slice(0, 32), slice(32, 64)):  # accumulation: two halves
            ((twin(x[half]) - y[half]).square().mean() / 2).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        other.step()
        schedule2.step()
    torch.testing.assert_close(model.weight, twin.weight, rtol=1e-3, atol=1e-4)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2)


def test_lr_may_be_a_tensor_and_groups_may_be_added():
    p, q = nn.Parameter(torch.randn(24, 40)), nn.Parameter(torch.randn(30, 20))
    optimizer = ProjAdamW([p], torch.tensor(1e-2), rank=4)
    optimizer.add_param_group({"params": [q], "energy": 0.5, "refresh": OnConverged(0.3, 50)})
    assert optimizer.param_groups[1]["rank"] is None
    for t in (p, q):
        t.grad = torch.randn_like(t)
    optimizer.step()
    assert [row["shape"] for row in optimizer.report()] == [(24, 40), (30, 20)]


def test_missing_gradients_leave_a_parameter_and_its_state_alone():
    params, targets = problem()
    optimizer = make(params, rank=4)
    steps(optimizer, params, targets, 3)
    before = [p.detach().clone() for p in params]
    state = copy.deepcopy(optimizer.state[params[1]])
    for p, t in zip(params, targets, strict=True):
        p.grad = p.detach() - t
    params[1].grad = None
    params[4].grad = None
    optimizer.step()
    moved = [not torch.equal(p, b) for p, b in zip(params, before, strict=True)]
    assert moved == [True, False, True, True, False]
    assert all(torch.equal(state[k], optimizer.state[params[1]][k]) for k in state)


# ---------------------------------------------------------------------------------------------------------- bad input


def snapshot(optimizer):
    return {(i, k): v.clone() for i, s in enumerate(optimizer.state.values()) for k, v in s.items()}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 2, 4])
@pytest.mark.parametrize("at", [0, 3, 7])
def test_a_gradient_that_is_not_finite_skips_the_step(bad, which, at):
    """Also in a step that would refresh (0 and 7), and in a parameter that is not projected (4)."""
    params, targets = problem()
    twins, _ = problem()
    options = {"rank": 4, "state": "bf16", "stagger": False}
    optimizer, other = make(params, **options), make(twins, **options)
    steps(optimizer, params, targets, at)
    steps(other, twins, targets, at)
    weights, state = [p.detach().clone() for p in params], snapshot(optimizer)
    for p, t in zip(params, targets, strict=True):
        p.grad = p.detach() - t
    params[which].grad.view(-1)[-1] = bad
    assert optimizer.step() is None and optimizer.skipped == 1
    assert all(torch.equal(p, w) for p, w in zip(params, weights, strict=True))
    after = snapshot(optimizer)
    if at:  # the first step makes counters and nothing else
        assert after.keys() == state.keys()
    assert all(torch.equal(after[k], v) for k, v in state.items())
    steps(optimizer, params, targets, 9)
    steps(other, twins, targets, 9)
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
    resumed = make(problem()[0], **options)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.skipped == 1


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_zero_gradients(axes):
    """Nothing is divided by zero, W only decays, and the first nonzero gradient gets a basis of its own."""
    params, targets = problem()
    optimizer = make(params, **{**AXES[axes], "weight_decay": 0.0})
    before = [p.detach().clone() for p in params]
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert optimizer.skipped == 0
    for p, b in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), b, rtol=1e-6, atol=1e-6)
    start = distance(params, targets)
    steps(optimizer, params, targets, 12)
    assert distance(params, targets) < start
    if "randk" not in str(AXES[axes]) and "random" not in str(AXES[axes]):
        assert all(row["history"][3][0] == 3 for row in optimizer.report())


def test_a_changed_shape_is_refused_before_anything_is_written():
    params, targets = problem()
    optimizer = make(params, rank=4)
    steps(optimizer, params, targets, 2)
    params[1].data = torch.zeros(50, 24)
    before = params[0].detach().clone()
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"the shape that the state was made for, \(40, 24\), got \(50, 24\)"):
        optimizer.step()
    assert torch.equal(params[0], before)


@pytest.mark.parametrize(
    "other, name",
    [
        ({"rank": 8}, "rank"),
        ({"energy": 0.9}, "rank"),
        ({"rank": 4, "projector": "power"}, "projector"),
        ({"rank": 4, "refresh": OnConverged()}, "refresh"),
        ({"rank": 4, "state": "int8"}, "state"),
        ({"rank": 4, "side": "left"}, "side"),
    ],
)
def test_a_checkpoint_of_another_policy_is_refused(other, name):
    params, targets = problem()
    optimizer = make(params, rank=4)
    steps(optimizer, params, targets, 2)
    target = make(problem()[0], **other)
    with pytest.raises(ValueError, match=rf"lowmem\.ProjAdamW\.load_state_dict: {name}: expected .* got "):
        target.load_state_dict(optimizer.state_dict())
    assert not target.state


def test_sparse_gradients_are_refused():
    p, q = nn.Parameter(torch.randn(24, 40)), nn.Parameter(torch.randn(24, 40))
    optimizer = ProjAdamW([p, q], 1e-2, rank=4)
    p.grad, q.grad = torch.ones(24, 40), torch.ones(24, 40).to_sparse()
    before = p.detach().clone()
    with pytest.raises(TypeError, match=r"lowmem\.ProjAdamW: grad: expected a dense gradient, got a sparse one"):
        optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "rank: expected a whole number >= 1, got 0"),
        ({"rank": 4, "energy": 0.9}, "rank: expected one of rank, energy and density"),
        ({"energy": 1.0}, r"energy: expected a fraction in \(0, 1\), got 1.0"),
        ({"density": 1.5}, "density"),
        ({"density": 0.0, "projector": "randk"}, "density: expected above 0 without a residual"),
        ({"rank": 4, "side": "top"}, "side: expected one of 'auto', 'left', 'right', got 'top'"),
        ({"rank": 4, "projector": "qr"}, "projector: expected one of"),
        ({"rank": 4, "moments": "drop"}, "moments: expected one of"),
        ({"rank": 4, "residual": "full"}, "residual: expected one of"),
        ({"rank": 4, "state": "fp7"}, "state: expected one of 'fp32', 'bf16', 'int8'"),
        ({"rank": 4, "basis": "fp7"}, "basis: expected one of"),
        ({"rank": 4, "refresh": 0}, "refresh: expected a whole number >= 1"),
        ({"rank": 4, "refresh": "often"}, "refresh: expected a whole number >= 1"),
        ({"rank": 4, "refresh": OnConverged(tol=-1.0)}, r"refresh\.tol: expected a number >= 0"),
        ({"rank": 4, "refresh": OnSimilar(gap=0)}, r"refresh\.gap: expected a whole number >= 1"),
        ({"rank": 4, "precond": 3}, "precond: expected None or FisherWindow"),
        ({"rank": 4, "precond": FisherWindow(0)}, r"precond\.s: expected a whole number >= 1"),
        ({"energy": 0.5, "precond": FisherWindow()}, "precond: expected None with energy="),
        ({"energy": 0.5, "projector": "random"}, "projector: expected 'rsvd', 'power' or 'svd' with energy="),
        ({"rank": 4, "residual": "apollo", "projector": "randk"}, "projector: expected a dense one"),
        ({"rank": 4, "residual": "fira", "reparam": "weight_norm"}, "reparam: expected None with a residual"),
        ({"rank": 4, "projector": "randk", "basis": "int8"}, "basis: expected None with projector='randk'"),
        ({"rank": 4, "limiter": 0.5}, "limiter: expected a number > 1"),
        ({"rank": 4, "betas": (0.9, 1.0)}, "betas"),
        ({"rank": 4, "eps": -1.0}, "eps: expected a number >= 0"),
        ({"rank": 4, "rounding": "up"}, "rounding: expected 'nearest' or 'stochastic'"),
        ({"rank": 4, "lr": float("nan")}, "lr: expected a number >= 0"),
        ({"rank": 4, "rank_min": 0}, "rank_min"),
        ({"rank": 4, "rank_min": 5, "rank_max": 3}, "rank_max: expected a whole number >= 5"),
    ],
    ids=str,
)
def test_options_that_cannot_be_served(options, message):
    with pytest.raises(ValueError, match=r"lowmem\.ProjAdamW: " + message):
        ProjAdamW([nn.Parameter(torch.zeros(24, 40))], **{"lr": 1e-2, **options})


def test_no_warning_in_ordinary_use():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params, targets = problem()
        steps(make(params, energy=0.5), params, targets, 9)


def test_the_growth_limiter_bounds_growth_and_forgets_a_zero():
    """The rest of the gradient grows by at most 1.01 a step; after a step of zeros it may have any size."""
    p = nn.Parameter(torch.zeros(24, 40))
    optimizer = ProjAdamW([p], 1.0, rank=4, residual="fira", scale=0.0, refresh=1000)
    torch.manual_seed(0)
    moved = []
    for size in (1.0, 5.0, 5.0, 0.0, 3.0, 300.0):
        before = p.detach().clone()
        p.grad = size * torch.randn(24, 40)
        optimizer.step()
        moved.append(float((p.detach() - before).norm()))
    assert moved[3] == 0
    assert moved[1] <= 1.0101 * moved[0] and moved[2] <= 1.0101 * moved[1] and moved[5] <= 1.0101 * moved[4]
    assert moved[4] > 0.1 * moved[0]


def test_gradscaler():
    """An overflow is skipped by the scaler, a scaled step equals the plain one."""
    torch.manual_seed(0)
    ours, plain = (nn.Parameter(torch.ones(24, 40)) for _ in range(2))
    a, b = (ProjAdamW([p], 1e-2, rank=4, seed=1) for p in (ours, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(5):
        g = torch.randn(24, 40)
        scaler.scale((ours * g).sum()).backward()
        if step == 2:
            ours.grad[0, 0] = float("inf")
        else:
            plain.grad = g
            b.step()
        scaler.step(a)
        scaler.update()
        a.zero_grad()
    torch.testing.assert_close(ours, plain)
    assert a.skipped == 0 and int(a.state[ours]["step"]) == 4
