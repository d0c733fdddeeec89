"""Projected mode: R from a backward without G, equal to the plain optimizer, and what surrounds it."""

import contextlib
import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowmem import optim
from lowmem.nn import ProjectedLinear
from lowmem.ops.projected import _PROJECTIONS, Projection
from lowmem.testing import assert_close_to_reference, reference_pair, saved_bytes

TOKENS = 24


class Block(nn.Module):
    """Projected on either side, square, biased, below the least side, and a norm."""

    def __init__(self, recompute=None):
        super().__init__()
        self.wide, self.square, self.narrow = nn.Linear(24, 40), nn.Linear(40, 40, bias=False), nn.Linear(40, 20)
        self.norm, self.head = nn.LayerNorm(20), nn.Linear(20, 3)
        self.recompute = recompute

    def forward(self, x):
        if self.recompute is not None and torch.is_grad_enabled():
            return self.head(self.norm(checkpoint(self.body, x, use_reentrant=self.recompute)))
        return self.head(self.norm(self.body(x)))

    def body(self, x):
        return self.narrow(torch.tanh(self.square(torch.tanh(self.wide(x)))))


def batches(count, dtype=torch.float64, rows=TOKENS, seed=7):
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rows, 24, generator=g).to(dtype), torch.randn(rows, 3, generator=g).to(dtype))
        for _ in range(count)
    ]


def loss_of(model, batch):
    x, y = batch
    return ((model(x) - y).float() ** 2).mean() if x.dtype != torch.float64 else ((model(x) - y) ** 2).mean()


def model_of(dtype=torch.float64, recompute=None):
    torch.manual_seed(0)
    return Block(recompute).to(dtype)


OPTIONS = {"rank": 6, "refresh": 4, "weight_decay": 0.1, "seed": 3, "scale": 1.0}


def make(model, lr=1e-2, **options):
    return optim.ProjAdamW(optim.lowrank_groups(model), lr, **{**OPTIONS, **options})


def pair(dtype=torch.float64, rank=6, side="auto", recompute=None, **options):
    """The same model trained plainly and in projected mode."""
    if options.get("energy") or options.get("density"):
        options = {"rank": None, **options}
    plain, projected = model_of(dtype, recompute), model_of(dtype, recompute)
    a = make(plain, side=side, **options)
    optim.project_(projected, rank, side=side)
    return (plain, a), (projected, make(projected, **options))


def train(model, optimizer, data, clip=None, accumulate=1):
    for k, batch in enumerate(data):
        (loss_of(model, batch) / accumulate).backward()
        if (k + 1) % accumulate == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()


def weights(model):
    return {n: p.detach() for n, p in model.named_parameters() if not n.endswith("lowrank_grad")}


def same(a, b, bound=1e-9):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        assert float((a[name] - b[name]).abs().max()) <= bound, name


POLICIES = {
    "rsvd": {},
    "power": {"projector": "power"},
    "svd-keep": {"projector": "svd", "moments": "keep"},
    "all-at-once": {"stagger": False},
    "energy": {"energy": 0.8},
    "energy-converged": {"energy": 0.9, "refresh": optim.OnConverged(0.9, 5, 2)},
    "random": {"projector": "random"},
    "randk": {"projector": "randk"},
    "natural": {"precond": optim.FisherWindow(2, 1.0)},
}


@pytest.mark.parametrize("policy, side", [(p, s) for p in POLICIES for s in ("left", "right")], ids=str)
def test_equals_the_plain_optimizer(policy, side):
    """Over 11 steps with two or more refreshes a layer, in float64, where rounding cannot hide an error."""
    (plain, a), (projected, b) = pair(side=side, **POLICIES[policy], rank_max=6 if "energy" in policy else None)
    data = batches(11)
    train(plain, a, data)
    train(projected, b, data)
    same(plain, projected)
    ours, theirs = b.report(), a.report()
    assert len(ours) == 3 and all(len(row["history"]) >= 3 for row in ours)
    for one, other in zip(ours, theirs, strict=True):
        assert one["name"] == other["name"].replace("weight", "lowrank_grad")
        assert [h[:2] for h in one["history"]] == [h[:2] for h in other["history"]]
        assert one["side"] == other["side"] == side and one["state_bytes"] == other["state_bytes"]


@pytest.mark.parametrize("how", ["clip", "accumulate", "reentrant", "checkpoint", "int8", "stochastic", "set to zero"])
def test_equals_the_plain_optimizer_with(how):
    recompute = {"reentrant": True, "checkpoint": False}.get(how)
    options = {"int8": {"state": "int8", "basis": "int8"}, "stochastic": {"rounding": "stochastic"}}.get(how, {})
    (plain, a), (projected, b) = pair(recompute=recompute, **options)
    data = batches(12)
    x = [(x.requires_grad_(recompute is True), y) for x, y in data]
    if how == "set to zero":
        zero = b.zero_grad
        b.zero_grad = lambda: zero(set_to_none=False)
    count = 2 if how == "accumulate" else 1
    if how == "clip":
        # the norm is |R|'s: a bound on it clips other steps than one on |G|. Scale both by hand.
        for optimizer, model in ((a, plain), (b, projected)):
            optimizer.register_step_pre_hook(
                lambda *_, model=model: [p.grad.mul_(0.37) for p in model.parameters() if p.grad is not None] and None
            )
    train(plain, a, x, accumulate=count)
    train(projected, b, x, accumulate=count)
    same(plain, projected, 1e-3 if how == "int8" else 1e-9)  # codes are drawn: one may fall on the other side


def test_bf16_is_as_exact_as_the_usual_route():
    """R in bf16 against the error rule: the reference is P^T (dY^T X) with G formed."""
    torch.manual_seed(1)
    for side in ("left", "right"):
        layer = ProjectedLinear(48, 40, bias=False, rank=8, side=side, dtype=torch.bfloat16)
        held = optim.ProjAdamW([layer.lowrank_grad], 1e-3, rank=8)
        x, dy = torch.randn(64, 48).bfloat16(), torch.randn(64, 40).bfloat16()
        p = torch.linalg.qr(torch.randn(40 if side == "left" else 48, 8)).Q.bfloat16()
        layer.projection.renewed(lambda p=p: p)
        layer.projection.due = False
        layer(x).backward(dy)

        def dense(x, dy, p, side=side):
            g = dy.T @ x
            return p.T @ g if side == "left" else g @ p

        exact, low = reference_pair(dense, x, dy, p)
        thin = (dy.double() @ p.double()) if side == "left" else (x.double() @ p.double())
        # X P (dY P) is rounded on its way: in R's units, that is
        middle = thin.abs().max() * (x if side == "left" else dy).double().abs().sum(0).max()
        assert_close_to_reference(layer.lowrank_grad.grad, exact, low, rounded=[middle], what=side)
        assert held.skipped == 0


def test_trains_bf16_and_scaled_gradients():
    data = batches(12, torch.float32)
    losses = {}
    for name in ("plain", "bf16", "scaled"):
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        model = model_of(dtype)
        if name != "plain":
            optim.project_(model, 6)
        optimizer = make(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=name == "scaled")
        for k, (x, y) in enumerate(data):
            loss = loss_of(model, (x.to(dtype), y.to(dtype)))
            scaler.scale(loss * (float("inf") if k == 5 and name == "scaled" else 1)).backward()
            scaler.unscale_(optimizer)
            if k != 5:  # the scaler skips what overflowed; the others leave it out as well
                scaler.step(optimizer)
            elif name == "scaled":
                scaler.step(optimizer)
            scaler.update()
            model.zero_grad()  # not the optimizer's: what a dropped backward gathered must not count
        losses[name] = weights(model)
    for name in losses["plain"]:
        want = losses["plain"][name]
        assert float((losses["scaled"][name] - want).abs().max()) < 1e-5, name
        assert float((losses["bf16"][name].float() - want).norm() / want.norm()) < 0.05, name


def test_a_dropped_backward_leaves_nothing_behind():
    """Steps given up after backward, cleared by the model and not by the optimizer, while layers gather G."""
    (plain, a), (projected, b) = pair()
    data = batches(8)
    train(plain, a, data)
    for batch, junk in zip(data, batches(8, seed=8), strict=True):
        loss_of(projected, junk).backward()
        projected.zero_grad()
        train(projected, b, [batch])
    same(plain, projected)


def test_gradient_is_zero_beyond_the_rank():
    """Clipping's norm must be |R|: nothing may stand in the columns and rows that the basis does not have."""
    model = optim.project_(model_of(), 20)
    optimizer = make(model, rank=None, energy=0.5, refresh=2)
    train(model, optimizer, batches(2))
    for batch in batches(3, seed=8):  # with and without a refresh
        loss_of(model, batch).backward()
        for layer in (model.wide, model.square, model.narrow):
            rank = optimizer.state[layer.lowrank_grad]["basis"].shape[1]
            assert 0 < rank < 20
            grad = layer.lowrank_grad.grad.T if layer.projection.left else layer.lowrank_grad.grad
            assert grad[:, :rank].any() and not grad[:, rank:].any()
        optimizer.step()
        optimizer.zero_grad()


def test_resumes_exactly_and_state_dict_is_a_linear_layers():
    data = batches(11, torch.float32)
    one = model_of(torch.float32)
    keys = list(one.state_dict())
    optim.project_(one, 6)
    assert list(one.state_dict()) == keys
    a = make(one)
    train(one, a, data[:6])
    file = io.BytesIO()
    torch.save({"model": one.state_dict(), "optimizer": a.state_dict()}, file)
    train(one, a, data[6:])
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    two = optim.project_(Block(), 6)
    two.load_state_dict(saved["model"])
    b = make(two, seed=11)
    b.load_state_dict(saved["optimizer"])
    train(two, b, data[6:])
    same(one, two, 0.0)
    Block().load_state_dict(two.state_dict())  # a plain model takes it
    three = copy.deepcopy(two)
    assert three.wide.projection is not two.wide.projection and three.wide.projection.optimizer is None
    with pytest.raises(RuntimeError, match="expected in the groups of a lowmem.optim.ProjAdamW"):
        loss_of(three, data[0]).backward()


def test_compiles_once_over_refreshes():
    """fullgraph, one graph for steps with and without a refresh, equal to eager."""
    data = batches(9, torch.float32)
    eager, compiled = model_of(torch.float32), model_of(torch.float32)
    graphs = []

    def backend(graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    for model in (eager, compiled):
        optim.project_(model, 6)
    a, b = make(eager), make(compiled)
    compiled.compile(fullgraph=True, backend=backend)
    train(eager, a, data)
    train(compiled, b, data)
    same(eager, compiled, 1e-6)
    assert len(graphs) == 1


# -------------------------------------------------------------------------------------------------------------- bytes


def test_bytes_by_formula():
    """Gradient width*m, saved activation r a token on the right side and x on the left, state as plain."""
    m, n, r, tokens = 64, 96, 5, 128
    x = torch.randn(tokens, n)
    for side in ("right", "left"):
        layer = ProjectedLinear(n, m, rank=8, side=side)
        optimizer = optim.ProjAdamW([layer.lowrank_grad], 1e-3, rank=r, refresh=100)
        layer(x).sum().backward()
        assert layer.weight.grad is None and layer.projection.dense.shape == (m, n)
        optimizer.step()
        assert layer.projection.dense is None
        optimizer.zero_grad()
        stamp = 2 * 8
        want = stamp + 4 * tokens * (r if side == "right" else n)
        assert saved_bytes(lambda layer=layer: layer(x)) == want
        layer(x).sum().backward()
        long = m if side == "right" else n
        assert layer.projection.dense is None and layer.lowrank_grad.grad.nbytes == 4 * 8 * long
        state = optimizer.state[layer.lowrank_grad]
        assert sum(state[k].nbytes for k in ("exp_avg", "exp_avg_sq")) == 8 * r * long
        assert state["basis"].nbytes == 4 * r * (n if side == "right" else m)


def test_no_tensor_of_the_gradients_size_between_refreshes():
    m, n = 192, 256
    layer = ProjectedLinear(n, m, bias=False, rank=4, side="right")
    optimizer = optim.ProjAdamW([layer.lowrank_grad], 1e-3, rank=4, refresh=100)
    x = torch.randn(8, n)

    def step():
        layer(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    most = max(e.nbytes() for e in events if e.name() == "[memory]")
    assert 0 < most < 4 * m * n // 2


# ---------------------------------------------------------------------------------------------------------- layerwise


@pytest.mark.parametrize("mode", ["plain", "projected"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_layerwise_equals_step(mode, accumulate):
    data = batches(12)
    one, two = model_of(), model_of()
    if mode == "projected":
        for model in (one, two):
            optim.project_(model, 6)
    a, b = make(one), make(two)
    train(one, a, data, accumulate=accumulate)
    layerwise = optim.layerwise_(two, b)
    for k, batch in enumerate(data):
        last = (k + 1) % accumulate == 0
        with contextlib.nullcontext() if last else layerwise.accumulate():
            (loss_of(two, batch) / accumulate).backward()
        assert all((p.grad is None) == last for p in two.parameters() if p.requires_grad)
        if last:
            assert all(p.projection.dense is None for p in two.modules() if isinstance(p, ProjectedLinear))
            b.step()  # finds nothing
    same(one, two, 0.0)
    layerwise.remove()
    loss_of(two, data[0]).backward()
    assert any(p.grad is not None for p in two.parameters())


def test_layerwise_refuses():
    model = model_of()
    with pytest.raises(TypeError, match=r"lowmem.optim.layerwise_: optimizer: expected a lowmem.optim.ProjAdamW"):
        optim.layerwise_(model, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(ValueError, match="none of them"):
        optim.layerwise_(model, make(model_of()))


# ---------------------------------------------------------------------------------------------------------- bad input


def test_nonfinite_gradients_skip_the_step():
    model = optim.project_(model_of(torch.float32), 6)
    optimizer = make(model)
    data = batches(4, torch.float32)
    train(model, optimizer, data[:1])
    train(model, optimizer, data[1:2])
    for bad in (float("nan"), float("inf")):
        before = copy.deepcopy((weights(model), optimizer.state_dict()["state"]))
        x, y = data[2]
        loss_of(model, (x * bad, y)).backward()
        optimizer.step()
        optimizer.zero_grad()
        after = (weights(model), optimizer.state_dict()["state"])
        assert all(torch.equal(a, before[0][n]) for n, a in after[0].items())
        assert all(torch.equal(v, before[1][k][n]) for k, s in after[1].items() for n, v in s.items())
    assert optimizer.skipped == 2
    train(model, optimizer, data[3:])
    assert all(torch.isfinite(w).all() for w in weights(model).values())


def test_zero_and_missing_gradients():
    model = optim.project_(model_of(torch.float32), 6)
    optimizer = make(model, weight_decay=0.0)
    before = copy.deepcopy(weights(model))
    (loss_of(model, batches(1, torch.float32)[0]) * 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()  # no gradient at all
    assert all(torch.equal(w, before[n]) for n, w in weights(model).items())
    assert all(m.projection.due for m in model.modules() if isinstance(m, ProjectedLinear)), "there was nothing to find"


def refuses(match, call, kind=ValueError):
    with pytest.raises(kind, match=match):
        call()


def test_project_refuses_a_wrong_order_by_name():
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters())
    refuses("an optimizer .AdamW. that holds its weights .project_ comes before", lambda: optim.project_(model, 4))
    del optimizer
    refuses("got OptimizedModule", lambda: optim.project_(torch.compile(model), 4))
    wrapper = torch.compile(model)
    refuses("a wrapper .OptimizedModule. around it", lambda: optim.project_(model, 4))
    del wrapper
    model = model_of()
    model.compile()
    refuses("a compiled Block", lambda: optim.project_(model, 4))
    model = optim.project_(model_of(), 4)
    refuses("expected a model that is not projected", lambda: optim.project_(model, 4))


def test_project_refuses_what_it_cannot_serve():
    for rank in (0, -1, 2.0, True):
        refuses("rank: expected a whole number >= 1", lambda rank=rank: optim.project_(model_of(), rank))
    refuses("side: expected one of", lambda: optim.project_(model_of(), 4, side="up"))
    refuses("names of nn.Linear layers that train", lambda: optim.project_(model_of(), 4, target_modules=["nothing"]))
    tied = model_of()
    tied.other = nn.Embedding(40, 40, dtype=torch.float64)
    tied.other.weight = tied.square.weight
    refuses("'square': a tied weight", lambda: optim.project_(tied, 4))
    assert type(tied.wide) is nn.Linear, "nothing is changed"
    read = model_of()
    read.wide.weight.register_hook(lambda g: g)
    refuses("'wide': hooks on it, or a .grad", lambda: optim.project_(read, 4))
    late = model_of()
    late.wide.weight.register_post_accumulate_grad_hook(lambda p: None)
    refuses("lowrank_grad.grad, which is R", lambda: optim.project_(late, 4))
    frozen = model_of()
    frozen.wide.weight.requires_grad_(False)
    assert type(optim.project_(frozen, 4).wide) is nn.Linear
    named = model_of()
    named.wide.weight.requires_grad_(False)
    refuses("a frozen weight", lambda: optim.project_(named, 4, target_modules=["wide"]))
    refuses("no subclass", lambda: ProjectedLinear.from_linear(nn.Bilinear(2, 2, 2), 4), TypeError)


def test_optimizer_refuses_what_needs_the_whole_gradient():
    model = optim.project_(model_of(), 6)
    groups = optim.lowrank_groups(model)
    refuses("residual: expected 'none' for projected layers", lambda: optim.Fira(groups, rank=4))
    refuses("reparam: expected None for projected layers", lambda: optim.GradNormLoRP(groups, rank=4))
    refuses("rank: expected at most 6, the rank of project_, got 7", lambda: optim.ProjAdamW(groups, rank=7))
    other = [{**groups[0], "project": False}]
    refuses("project: expected True for projected layers", lambda: optim.ProjAdamW(other, rank=4))
    refuses("side: expected 'auto' or", lambda: optim.ProjAdamW([model.wide.lowrank_grad], rank=4, side="left"))
    assert model.wide.projection.optimizer is None, "a refused optimizer holds nothing"


def test_readers_of_grad_are_told_where_it_is():
    model = optim.project_(model_of(), 6)
    optimizer = make(model)
    data = batches(2)
    model.wide.weight.requires_grad_(True)
    refuses("read lowrank_grad.grad, which is R", lambda: loss_of(model, data[0]).backward())
    model.wide.weight.requires_grad_(False)
    loss = loss_of(model, data[0])
    train(model, optimizer, data[1:])
    refuses("modified by an inplace|got a replaced basis", loss.backward, RuntimeError)
    with torch.no_grad():
        before = model(data[0][0])
    assert before.grad_fn is None and len(_PROJECTIONS) >= 3 and isinstance(model.wide.projection, Projection)


def test_a_rank_above_the_sides_is_lowered():
    model = optim.project_(model_of(), 1000)
    assert model.narrow.projection.width == 20 and model.wide.projection.width == 24
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = make(model, rank=1000)
    train(model, optimizer, batches(2))
    assert [row["rank"] for row in optimizer.report()] == [24, 40, 20]


def test_closures_and_changed_shapes():
    model = optim.project_(model_of(), 6)
    optimizer = make(model)
    batch = batches(1)[0]

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(8)]
    assert losses[-1] < losses[0]
    loss_of(model, batch).backward()
    model.wide.weight.data = torch.zeros(41, 24, dtype=torch.float64)
    refuses("the shape that the state was made for, .40, 24., got .41, 24.", optimizer.step)
