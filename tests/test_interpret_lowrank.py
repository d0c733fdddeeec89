"""The Triton kernels of the lowrank family against the references, in the interpreter or on a GPU.

`TRITON_INTERPRET=1 pytest -m interpret` executes them on the CPU, in fp32 and fp16 (the interpreter gets bf16 products
wrong), with small tiles. `pytest -m gpu` runs the same checks compiled, bf16 included, with the tiles users get.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from lowmem.ops import lowrank as family
from lowmem.testing import LAYOUTS, assert_close_to_reference, reference_pair, terms_of, to64

pytestmark = pytest.mark.usefixtures("poisoned")

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
WHERE = [pytest.param("cpu", marks=pytest.mark.interpret), pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(INTERPRETING, reason="the interpreter's bf16 tl.dot is wrong"))]  # fmt: skip  # noqa: E501
ADAM = (0.9, 0.99, 0.271, 0.0297, 1e-6)
SHAPES = [(33, 70, 7), (70, 33, 20), (1, 40, 1)]


@pytest.fixture(params=WHERE)
def kernels(request):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if (request.param == "cpu") is not INTERPRETING:
        pytest.skip("the interpreter is a process of its own, TRITON_INTERPRET=1")
    from lowmem.triton_kernels import lowrank as kernels

    kernels.where = request.param
    return kernels


def inputs(kernels, m, n, r, left, dtype):
    torch.manual_seed(0)
    short, long = (m, n) if left else (n, m)
    r = min(r, short)
    p = torch.linalg.qr(torch.randn(short, r, dtype=torch.float64)).Q
    thin = (r, long) if left else (long, r)
    made = (torch.randn(m, n), torch.randn(m, n), p, torch.randn(thin), torch.randn(thin))
    return (*(t.to(kernels.where, dtype) for t in made), torch.rand(long, device=kernels.where))


def mutated(fn, w, *args, **kwargs):
    w = w.clone()
    fn(w, *args, **kwargs)
    return w


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_project(kernels, dtype, left):
    for m, n, r in SHAPES:
        _, g, p, *_ = inputs(kernels, m, n, r, left, dtype)
        exact, low = reference_pair(family.project_reference, g, p, left)
        terms = terms_of(family.project_reference, g, p, left)
        assert_close_to_reference(kernels.project(g, p, left), exact, low, terms=terms)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("left", [True, False])
def test_project_of_any_layout(kernels, left, layout):
    _, g, p, *_ = inputs(kernels, 33, 40, 7, left, torch.float32)
    g, p = LAYOUTS[layout](g), LAYOUTS[layout](p)
    exact, low = reference_pair(family.project_reference, g, p, left)
    terms = terms_of(family.project_reference, g, p, left)
    assert_close_to_reference(kernels.project(g, p, left), exact, low, terms=terms)


@pytest.mark.parametrize("left", [True, False])
def test_a_split_sum_has_the_same_bits_every_time(kernels, left, monkeypatch):
    """K in several parts, added in order by the last program of a tile; the locks are zero again."""
    monkeypatch.setattr(kernels.gpu, "programs", lambda device: 64)
    m, n = (600, 40) if left else (40, 600)
    torch.manual_seed(0)
    g, p = torch.randn(m, n, device=kernels.where), torch.randn(600, 5, device=kernels.where)
    assert kernels.splits(2, 600, 64, 16)[0] > 2
    first = kernels.project(g, p, left)
    assert torch.equal(first, kernels.project(g, p, left))
    exact, low = reference_pair(family.project_reference, g, p, left)
    assert_close_to_reference(first, exact, low, terms=terms_of(family.project_reference, g, p, left))


def adam_close(got, exact, low):
    for k, what in enumerate(("exp_avg", "exp_avg_sq", "n")):
        assert_close_to_reference(got[k], exact[k], low[k], terms=4 * exact[k].abs(), what=what)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_project_adam(kernels, dtype, left):
    for m, n, r in SHAPES:
        _, g, p, thin, *_ = inputs(kernels, m, n, r, left, dtype)
        moments = torch.randn(thin.shape, device=kernels.where), torch.rand(thin.shape, device=kernels.where)

        def run(fn, *args):
            a, b = args[0].clone(), args[1].clone()
            return a, b, fn(a, b, *args[2:])

        args = (*moments, g, p, left, *ADAM)
        # R is rounded to g's dtype between projection and Adam: the exact result starts from that R
        if dtype == torch.float32:
            exact = run(family.project_adam_reference, *to64(args))
        else:
            exact = run(family.adam_reference, *to64((*moments, kernels.project(g, p, left))), *ADAM)
        adam_close(run(kernels.project_adam, *args), exact, run(family.project_adam_reference, *args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (33, 70)], ids=str)
def test_adam(kernels, dtype, shape):
    torch.manual_seed(0)
    m, v = torch.randn(shape, device=kernels.where), torch.rand(shape, device=kernels.where)
    r = torch.randn(shape, device=kernels.where).to(dtype)
    results = []
    for fn, args in ((kernels.adam, (m, v, r)), (family.adam_reference, to64(m, v, r)), (family.adam_reference, (m, v, r))):  # fmt: skip  # noqa: E501
        a, b = args[0].clone(), args[1].clone()
        results.append((a, b, fn(a, b, args[2], *ADAM)))
    adam_close(*results)


@pytest.mark.parametrize("decay", [1.0, 0.98])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_updates(kernels, dtype, left, decay):
    for m, n, r in SHAPES:
        w, g, p, thin, rr, f = inputs(kernels, m, n, r, left, dtype)
        none, empty = p[:, :0], thin[:0] if left else thin[:, :0]
        cases = [
            (family.update_reference, (p, thin, left, 0.3, decay, None), {}),
            (family.update_scaled_reference, (p, thin, left, 0.3, decay, None), {"g": g, "f": f}),
            (family.update_scaled_reference, (none, empty, left, 0.0, decay, None), {"g": g, "f": f}),
        ]
        for reference, (p_, n_, left_, alpha, decay_, seed), extra in cases:
            full = ((g, p_, n_, f) if extra else (p_, n_)) + (left_, alpha, decay_, seed)
            exact, low = reference_pair(lambda *a, fn=reference: mutated(fn, *a), w, *full)
            got = mutated(kernels.update, w, p_, n_, left_, alpha, decay_, seed, **extra)
            terms = (
                w.double().abs() + 0.3 * family._back(*(t.double().abs() for t in (p_, n_)), left) + g.double().abs()
            )
            assert_close_to_reference(got, exact, low, terms=terms)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update_sign(kernels, dtype, left):
    for m, n, r in SHAPES:
        w, g, p, thin, rr, _ = inputs(kernels, m, n, r, left, dtype)
        rest = g.double() - family._back(p.double(), rr.double(), left)
        sure = rest.abs() > 1e-2 * rest.abs().max()  # elsewhere rounding may turn the sign
        args = (g, p, thin, rr, left, 0.3, 0.7, 0.98, None)
        exact, low = reference_pair(lambda *a: mutated(family.update_sign_reference, *a), w, *args)
        got = mutated(kernels.update, w, p, thin, left, 0.3, 0.98, None, g=g, r=rr, beta=0.7)
        terms = w.double().abs() + 0.3 * family._back(p.double().abs(), thin.double().abs(), left) + 0.7
        keep = [torch.where(sure, t, torch.zeros_like(t)) for t in (got, exact, low)]
        assert_close_to_reference(*keep, terms=terms)
        z = torch.zeros_like(g)  # a rest of exactly zero moves nothing
        thin0 = torch.zeros_like(thin)
        still = mutated(kernels.update, w, p, thin0, left, 0.3, 1.0, None, g=z, r=thin0, beta=0.7)
        assert torch.equal(still, w)


@pytest.mark.parametrize("left", [True, False])
def test_stochastic_rounding_is_the_references_bit_for_bit(kernels, left):
    """bf16 weights, factors in fp32 and an update that fp32 holds exactly: only the random bits decide."""
    for m, n in ((33, 70), (5, 40)):
        torch.manual_seed(0)
        short, long = (m, n) if left else (n, m)
        seed = torch.tensor([(9 << 40) + 3], device=kernels.where)
        w = torch.randn(m, n, device=kernels.where).bfloat16()
        p = torch.randint(-3, 4, (short, 4), device=kernels.where).float()
        thin = torch.randint(-3, 4, (4, long) if left else (long, 4), device=kernels.where).float()
        got = mutated(kernels.update, w, p, thin, left, 2.0**-14, 1.0, seed)
        want = mutated(family.update_reference, w, p, thin, left, 2.0**-14, 1.0, seed)
        assert torch.equal(got, want)
        near = mutated(kernels.update, w, p, thin, left, 2.0**-14, 1.0, seed + 1)
        assert not torch.equal(got, near)


def test_weights_with_a_row_stride_and_what_is_not_finite(kernels):
    wide = torch.randn(20, 64, device=kernels.where)
    w = wide[:, :40]
    p, thin = torch.randn(20, 3, device=kernels.where), torch.randn(3, 40, device=kernels.where)
    beside = wide[:, 40:].clone()
    want = mutated(family.update_reference, w, p, thin, True, 0.3, 0.9, None)
    kernels.update(w, p, thin, True, 0.3, 0.9, None)
    torch.testing.assert_close(w, want)
    assert torch.equal(wide[:, 40:], beside)
    w = torch.ones(4, 24, device=kernels.where).bfloat16()
    g = torch.zeros(4, 24, device=kernels.where)
    g[0, 0], g[1, 1], g[2, 2] = float("nan"), float("inf"), -float("inf")
    f = torch.ones(24, device=kernels.where)
    none, empty = torch.zeros(4, 0, device=kernels.where), torch.zeros(0, 24, device=kernels.where)
    kernels.update(w, none, empty, True, 0.0, 1.0, torch.tensor([1], device=kernels.where), g=g, f=f)
    assert w[0, 0].isnan() and w[1, 1] == -float("inf") and w[2, 2] == float("inf")
    assert int((w != 1).sum()) == 3
