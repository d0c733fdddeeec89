"""Every preset of ProjAdamW against a short reference of its paper, and GaLore against the released package."""

import importlib.util
import sys
import types
from pathlib import Path

import lowrank_references as ref
import pytest
import torch

from lowmem import optim
from lowmem.optim import subspace

SHAPES = [(24, 40), (40, 24), (32, 32)]


def gradients(shape, steps, seed=0):
    """Gradients that change slowly and have a decaying spectrum, independent of the weight."""
    torch.manual_seed(seed)
    k = min(shape)
    u, v = torch.randn(shape[0], k).double(), torch.randn(k, shape[1]).double()
    decay = 0.7 ** torch.arange(k).double()
    made = []
    for _ in range(steps):
        u = u + 0.1 * torch.randn(u.shape)
        made.append((u * decay) @ v * 0.3)
    return made


def run(preset, w, grads, *, lr=1e-2, **options):
    p = torch.nn.Parameter(w.clone())
    optimizer = preset([p], lr, **options)
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    return p.detach(), optimizer


def start(shape):
    torch.manual_seed(7)
    return torch.randn(shape).double()


def assert_same(got, want, w):
    # float64 against float64; divisions by small sqrt(V) and the order of sums are what is left
    assert (got - want).abs().max() <= 1e-9 * (want - w).abs().max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_galore(shape):
    w, grads = start(shape), gradients(shape, 20)
    got, optimizer = run(optim.GaLore, w, grads, rank=6, refresh=7)
    assert_same(got, ref.galore(w, grads, lr=1e-2, rank=6, gap=7, scale=0.25), w)
    assert [at for at, _, _ in optimizer.report()[0]["history"]] == [0, 7, 14]


def released_galore():
    """galore_torch's AdamW without its package, whose import wants bitsandbytes: ``pip install --no-deps galore-torch``
    is enough."""
    spec = importlib.util.find_spec("galore_torch")
    if spec is None:
        pytest.skip("galore_torch is not installed")
    folder = Path(next(iter(spec.submodule_search_locations)))
    package = types.ModuleType("galore_torch")
    package.__path__ = [str(folder)]
    sys.modules["galore_torch"] = package
    try:
        return importlib.import_module("galore_torch.adamw").AdamW
    finally:
        for name in [n for n in sys.modules if n.startswith("galore_torch")]:
            del sys.modules[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_galore_equals_the_released_package(shape, dtype):
    """20 steps with two refreshes, each step compared."""
    released = released_galore()
    w = start(shape).to(dtype)
    theirs, ours = torch.nn.Parameter(w.clone()), torch.nn.Parameter(w.clone())
    group = {"params": [theirs], "rank": 6, "update_proj_gap": 7, "scale": 0.25, "proj_type": "std"}
    a = released([group], lr=1e-2, no_deprecation_warning=True)
    b = optim.GaLore([ours], 1e-2, rank=6, refresh=7)
    for g in gradients(shape, 20):
        theirs.grad, ours.grad = g.to(dtype), g.to(dtype)
        a.step()
        b.step()
        if dtype == torch.float32:
            torch.testing.assert_close(ours.detach(), theirs.detach())
        else:  # theirs rounds moments and update to bf16 at every operation; both round W
            assert (ours - theirs).abs().max() <= 0.02 * (w - theirs).abs().max() + 2 * 2**-8 * w.abs().max()


@pytest.mark.parametrize("scale", [0.25, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fira(shape, scale):
    w, grads = start(shape), gradients(shape, 20)
    got, _ = run(optim.Fira, w, grads, rank=6, refresh=7, scale=scale)
    assert_same(got, ref.galore(w, grads, lr=1e-2, rank=6, gap=7, scale=scale, fira=True), w)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_natural_galore(shape):
    w, grads = start(shape), gradients(shape, 9)
    got, _ = run(optim.NaturalGaLore, w, grads, rank=3, refresh=50)
    assert_same(got, ref.galore(w, grads, lr=1e-2, rank=3, gap=50, scale=0.25, window=4), w)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradnormlorp(shape):
    w, grads = start(shape), gradients(shape, 20)
    got, _ = run(optim.GradNormLoRP, w, grads, rank=6, refresh=7)
    assert_same(got, ref.weight_norm(w, grads, lr=1e-2, rank=6, gap=7, scale=0.25), w)


def drawn(monkeypatch, name):
    """What the optimizer draws for a basis, in order."""
    seen = []
    real = getattr(subspace, name)

    def note(*args, **kwargs):
        seen.append(real(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(subspace, name, note)
    return seen


@pytest.mark.parametrize("preset, tensor", [(optim.Apollo, False), (optim.ApolloMini, True)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_apollo(shape, preset, tensor, monkeypatch):
    w, grads = start(shape), gradients(shape, 20)
    bases = drawn(monkeypatch, "random_basis")
    options = {} if tensor else {"rank": 5}
    got, _ = run(preset, w, grads, refresh=7, **options)
    scale = 128**0.5 if tensor else 1.0
    want = ref.apollo(w, grads, [b.double() for b in bases], lr=1e-2, gap=7, scale=scale, tensor=tensor)
    assert len(bases) == 3 and bases[0].shape[1] == (1 if tensor else 5)
    assert_same(got, want, w)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_frugal(shape, monkeypatch):
    w, grads = start(shape), gradients(shape, 20)
    chosen = drawn(monkeypatch, "random_coordinates")
    got, _ = run(optim.FRUGAL, w, grads, refresh=7)
    assert_same(got, ref.frugal(w, grads, chosen, lr=1e-2, gap=7), w)
    assert len(chosen) == 3 and all(len(c.unique()) == min(shape) // 4 for c in chosen)


def test_frugal_at_both_ends_of_its_density():
    """Density 1 is AdamW, density 0 is sign descent."""
    w, grads = start((24, 40)), gradients((24, 40), 12)
    got, _ = run(optim.FRUGAL, w, grads, density=1.0, weight_decay=0.1, refresh=50)
    p = torch.nn.Parameter(w.clone())
    adamw = torch.optim.AdamW([p], lr=1e-2, weight_decay=0.1)
    for g in grads:
        p.grad = g.clone()
        adamw.step()
    assert_same(got, p.detach(), w)
    got, _ = run(optim.FRUGAL, w, grads, density=0.0, refresh=50)
    assert_same(got, w - 1e-2 * sum(g.sign() for g in grads), w)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adarankgrad(shape):
    """The rank, the renewal on convergence and the rotated moments; gradients fade at first, so that they converge."""
    w = start(shape)
    grads = [g * 0.85 ** min(t, 12) for t, g in enumerate(gradients(shape, 50))]
    rule = optim.OnConverged(tol=0.6, max_gap=12, min_gap=3)
    got, optimizer = run(optim.AdaRankGrad, w, grads, energy=0.9, projector="svd", refresh=rule, stagger=False)
    want, log = ref.adarankgrad(w, grads, lr=1e-2, energy=0.9, tol=0.6, gap=12, least=3)
    assert [(at, rank) for at, rank, _ in optimizer.report()[0]["history"]] == log
    gaps = [b - a for (a, _), (b, _) in zip(log, log[1:], strict=False)]
    assert min(gaps) < 12 and max(gaps) == 12  # both reasons occur
    assert_same(got, want, w)


def test_qgalore():
    """GaLore but for the rounding of basis and moments, and a gap that doubles while the leading vector is stable."""
    shape = (64, 256)
    w, grads = start(shape), gradients(shape, 60)
    rule = optim.OnSimilar(gap=3, threshold=0.4, growth=2.0, window=2)
    torch.manual_seed(0)
    got, optimizer = run(optim.QGaLore, w, grads, rank=16, refresh=rule)
    steps = [at for at, _, _ in optimizer.report()[0]["history"]]
    # the first comparison is at the second renewal, the window is full at the third
    assert steps == [0, 3, 6, 12, 24, 48]
    want, _ = run(optim.GaLore, w, grads, rank=16, refresh=rule)
    assert (got - want).norm() <= 0.1 * (want - w).norm()
    (row,) = optimizer.report()
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    moments = 2 * (16 * 256 + 16 * 256 // 128 * 4) + 16 * 64 + 16 * 64 // 128 * 4
    assert state["exp_avg"].dtype == torch.int8 and state["basis"].dtype == torch.int8
    assert moments <= row["state_bytes"] <= moments + 512
