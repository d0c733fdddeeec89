"""The operators of the lowrank family: every backend against the references in float64."""

import pytest
import torch

from lowmem import _dispatch
from lowmem.ops import lowrank
from lowmem.testing import (
    DTYPES,
    LAYOUTS,
    assert_close_to_reference,
    huge_view,
    reference_pair,
    terms_of,
    to64,
)

OPS = torch.ops.lowmem
ADAM = (0.9, 0.99, 0.271, 0.0297, 1e-6)  # beta1, beta2, bias corrections, eps
SHAPES = [(1, 1, 1), (2, 7, 1), (33, 100, 7), (65, 33, 16), (100, 257, 33)]
SEED = torch.tensor([(5 << 40) + 77])
pytestmark = pytest.mark.usefixtures("poisoned")


def inputs(m, n, r, left, dtype, device="cpu", seed=0):
    """``(w, g, p, n, r, f)``, the basis orthonormal as far as its dtype goes."""
    torch.manual_seed(seed)
    short, long = (m, n) if left else (n, m)
    r = min(r, short)
    p = torch.linalg.qr(torch.randn(short, r, dtype=torch.float64)).Q
    thin = (r, long) if left else (long, r)
    made = (torch.randn(m, n), torch.randn(m, n), p, torch.randn(thin), torch.randn(thin))
    f = torch.rand(long, dtype=lowrank.working(torch.empty(0, dtype=dtype)))
    return (*(t.to(device, dtype) for t in made), f.to(device))


def mutated(fn, w, *args):
    """What ``fn`` leaves in a copy of ``w``."""
    w = w.clone()
    fn(w, *args)
    return w


def check_update(name, w, *args, **rule):
    reference = getattr(lowrank, name.removeprefix("lowrank_").rstrip("_") + "_reference")
    exact, low = reference_pair(lambda *a: mutated(reference, *a), w, *args)
    terms = terms_of(lambda w, *a: mutated(reference, w, *a), w, *(-a if k == 0 else a for k, a in enumerate(args)))
    got = mutated(getattr(OPS, name), w, *args)
    assert_close_to_reference(got, exact, low, terms=terms, **rule)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_project(device, dtype, left):
    for m, n, r in SHAPES:
        _, g, p, _, _, _ = inputs(m, n, r, left, dtype, device)
        exact, low = reference_pair(lowrank.project_reference, g, p, left)
        terms = terms_of(lowrank.project_reference, g, p, left)
        assert_close_to_reference(OPS.lowrank_project(g, p, left), exact, low, terms=terms)


def adam_case(dtype, shape, device, seed=0):
    torch.manual_seed(seed)
    kind = lowrank.working(torch.empty(0, dtype=dtype))
    m, v = torch.randn(shape, dtype=kind, device=device), torch.rand(shape, dtype=kind, device=device)
    return m, v, torch.randn(shape, device=device).to(dtype)


def adam_all(fn, m, v, *args):
    m, v = m.clone(), v.clone()
    n = fn(m, v, *args)
    return m, v, n


def check_adam(fn, reference, args, rounded=None):
    exact = adam_all(reference, *to64(args))
    low = adam_all(reference, *args)
    got = adam_all(fn, *args)
    for k, what in enumerate(("exp_avg", "exp_avg_sq", "n")):
        # N: three roundings more than its own, of M, of V and of the root
        terms = 4 * exact[k].abs()
        assert_close_to_reference(got[k], exact[k], low[k], terms=terms, what=what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 100), (65, 33), (0, 4)], ids=str)
def test_adam(device, dtype, shape):
    m, v, r = adam_case(dtype, shape, device)
    check_adam(OPS.lowrank_adam_, lowrank.adam_reference, (m, v, r, *ADAM))
    if shape[0] > 1:
        check_adam(OPS.lowrank_adam_, lowrank.adam_reference, (m.T.contiguous(), v.T.contiguous(), r.T, *ADAM))


def test_adam_at_zero_and_beyond():
    """V = 0 and R = 0 divide by eps alone; with eps = 0 the result is NaN as the formula says, not a crash."""
    z = torch.zeros(3, 40)
    n = OPS.lowrank_adam_(z.clone(), z.clone(), z, *ADAM)
    assert torch.equal(n, z)
    m = torch.full((3, 40), -0.5)
    n = OPS.lowrank_adam_(m, torch.zeros(3, 40), z, *ADAM)
    torch.testing.assert_close(n, torch.full_like(n, -0.45 / 0.271 / 1e-6))


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_project_adam(device, dtype, left):
    for m, n, r in SHAPES:
        _, g, p, thin, _, _ = inputs(m, n, r, left, dtype, device)
        a, b, _ = adam_case(dtype, thin.shape, device)
        got = adam_all(OPS.lowrank_project_adam_, a, b, g, p, left, *ADAM)
        # R is rounded to g's dtype between the two
        want = adam_all(OPS.lowrank_adam_, a, b, OPS.lowrank_project(g, p, left), *ADAM)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True)) or device == "cuda"
        check_adam(OPS.lowrank_project_adam_, lowrank.project_adam_reference, (a, b, g, p, left, *ADAM))


@pytest.mark.parametrize("decay", [1.0, 0.98])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_updates(device, dtype, left, decay):
    for m, n, r in SHAPES:
        w, g, p, thin, _, f = inputs(m, n, r, left, dtype, device)
        # 16-bit weights: P.N is rounded once more, to their dtype
        product = 0.3 * lowrank._back(*to64(p, thin), left)
        check_update("lowrank_update_", w, p, thin, left, 0.3, decay, None, rounded=[product])
        check_update("lowrank_update_scaled_", w, g, p, thin, f, left, 0.3, decay, None, rounded=[product])
        none, empty = p[:, :0], thin[:0] if left else thin[:, :0]
        check_update("lowrank_update_scaled_", w, g, none, empty, f, left, 0.0, decay, None)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update_sign(device, dtype, left):
    """The sign of what rounding can turn is left out: G - P.R near zero."""
    for m, n, r in SHAPES:
        w, g, p, thin, rr, _ = inputs(m, n, r, left, dtype, device)
        rest = g.double() - lowrank._back(p.double(), rr.double(), left)
        sure = rest.abs() > 1e-4 * rest.abs().max()
        args = (g, p, thin, rr, left, 0.3, 0.7, 0.98, None)
        exact = mutated(lowrank.update_sign_reference, *to64((w, *args)))
        low = mutated(lowrank.update_sign_reference, w, *args)
        got = mutated(OPS.lowrank_update_sign_, w, *args)
        terms = w.double().abs() + 0.3 * lowrank._back(p.double().abs(), thin.double().abs(), left) + 0.7
        keep = [torch.where(sure, t, torch.zeros_like(t)) for t in (got, exact, low)]
        assert_close_to_reference(*keep, terms=terms, rounded=[exact])
        # the rest of a projected gradient is zero up to rounding, and its sign is -1, 0 or 1 there
        assert ((got.double() - exact).abs() <= 1.5 + 1e-2 * exact.abs()).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("left", [True, False])
def test_layouts(device, left, layout):
    m, n = 33, 100
    w, g, p, thin, rr, f = inputs(m, n, 7, left, torch.float32, device)
    g, p, thin, rr = (LAYOUTS[layout](t) for t in (g, p, thin, rr))
    torch.testing.assert_close(
        OPS.lowrank_project(g, p, left), OPS.lowrank_project(g.contiguous(), p.contiguous(), left)
    )
    # a weight cannot be expanded: its elements would share memory
    of_w = LAYOUTS["transposed" if layout == "expanded" else layout]
    for dtype in (torch.float32, torch.bfloat16):
        for name, args in (
            ("lowrank_update_", (p, thin, left, 0.3, 0.9, None)),
            ("lowrank_update_scaled_", (g, p, thin, f, left, 0.3, 0.9, None)),
            ("lowrank_update_sign_", (g, p, thin, rr, left, 0.3, 0.2, 0.9, None)),
        ):
            args = tuple(a.to(dtype) if isinstance(a, torch.Tensor) and a is not f else a for a in args)
            plain, strided = w.to(dtype), of_w(w.to(dtype).clone())
            getattr(OPS, name)(plain, *(a.contiguous() if isinstance(a, torch.Tensor) else a for a in args))
            getattr(OPS, name)(strided, *args)
            torch.testing.assert_close(
                strided, plain, **({} if dtype == torch.float32 else {"rtol": 2.0**-6, "atol": 1e-2})
            )


# ------------------------------------------------------------------------------------------------ stochastic rounding


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 33), (9, 100), (4, 257)], ids=str)
def test_stochastic_rounding_is_the_references_bit_for_bit(device, shape):
    """Also row by row: the random bits belong to the element of the weight."""
    torch.manual_seed(0)
    seed = SEED.to(device)
    w, x = torch.randn(shape, device=device).bfloat16(), torch.randn(shape, device=device)
    for other in (x, x.bfloat16()):
        want = mutated(lowrank.axpy_reference, w, other, 0.5, 1.0, seed, 3)  # both factors exact: no rounding differs
        got = mutated(OPS.lowrank_axpy_, w, other, 0.5, 1.0, seed, 3)
        assert torch.equal(got, want)
        rows = torch.cat(
            [mutated(OPS.lowrank_axpy_, w[i : i + 1], other[i : i + 1], 0.5, 1.0, seed, 3 + i) for i in range(shape[0])]
        )
        assert torch.equal(rows, want)


def test_stochastic_rounding_keeps_what_is_not_finite():
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 3.3895e38, 0.0, -0.0] + [1.0] * 40])
    w = torch.zeros(x.shape, dtype=torch.bfloat16)
    got = mutated(OPS.lowrank_axpy_, w, x, 1.0, 1.0, SEED, 0)
    assert got[0, 0].isnan() and got[0, 1] == float("inf") and got[0, 2] == -float("inf")
    assert (got[0, 4:6] == 0).all() and (got[0, 6:] == 1).all()
    assert torch.equal(got.isnan(), mutated(lowrank.axpy_reference, w, x, 1.0, 1.0, SEED, 0).isnan())


def test_stochastic_rounding_is_unbiased_where_rounding_to_nearest_stands_still():
    w = torch.ones(64, 512, dtype=torch.bfloat16)
    p, n = torch.full((64, 1), 1.0), torch.full((1, 512), 1.0)
    near, random = w.clone(), w.clone()
    for step in range(50):  # a twentieth of a bf16 step below 1 each
        OPS.lowrank_update_(near, p, n, True, 2.0**-8 / 20, 1.0, None)
        OPS.lowrank_update_(random, p, n, True, 2.0**-8 / 20, 1.0, SEED + step)
    assert torch.equal(near, w)
    assert abs(float(random.double().mean()) - (1 - 50 * 2.0**-8 / 20)) < 2e-4


@pytest.mark.parametrize("left", [True, False])
def test_the_blocks_of_an_update_round_as_the_whole(device, left):
    """Small whole numbers, so that no product or sum is rounded: only the random bits decide, row by row."""
    torch.manual_seed(0)
    w = torch.randn(33, 100, device=device).bfloat16()
    p = torch.randint(-3, 4, (33 if left else 100, 4), device=device).bfloat16()
    n = torch.randint(-3, 4, (4, 100) if left else (33, 4), device=device).bfloat16()
    args = (p, n, left, 2.0**-12, 1.0, SEED.to(device))
    assert torch.equal(mutated(OPS.lowrank_update_, w, *args), mutated(lowrank.update_reference, w, *args))


@pytest.mark.parametrize("left", [True, False])
def test_updates_round_stochastically(device, left):
    w, g, p, thin, rr, f = inputs(33, 100, 7, left, torch.bfloat16, device)
    seed = SEED.to(device)
    for name, args in (
        ("lowrank_update_", (p, thin, left, 0.01, 0.999)),
        ("lowrank_update_scaled_", (g, p, thin, f * 0.01, left, 0.01, 0.999)),
        ("lowrank_update_sign_", (g, p, thin, rr, left, 0.01, 0.01, 0.999)),
    ):
        reference = getattr(lowrank, name.removeprefix("lowrank_").rstrip("_") + "_reference")
        exact = mutated(reference, *to64((w, *args)), None)
        draws = torch.stack([mutated(getattr(OPS, name), w, *args, seed + k).double() for k in range(64)])
        ulp = 2.0**-7 * exact.abs().clamp_min(1e-3)
        assert (draws.mean(0) - exact).abs().le(5 * 0.5 * ulp / 8 + 0.02 * 0.04).float().mean() > 0.995
        assert not torch.equal(draws[0], draws[1])


# ------------------------------------------------------------------------------------------------- the family's rules


def test_offsets_beyond_32_bits(device):
    w = huge_view(3, 40, torch.bfloat16, device)
    w[2] = torch.arange(40)
    want = w.clone()
    x = torch.randn(3, 40, device=device)
    OPS.lowrank_axpy_(w, x, 0.5, 1.0, None, 0)
    lowrank.axpy_reference(want, x, 0.5, 1.0, None, 0)
    assert torch.equal(w, want)
    g = huge_view(3, 40, torch.float32, device)
    g[2] = torch.arange(40)
    p = torch.randn(3, 2, device=device)
    torch.testing.assert_close(OPS.lowrank_project(g, p, True), p.T @ g.contiguous())


def largest_allocation(fn):
    """Bytes of the largest single allocation that torch makes on the CPU during ``fn()``."""
    fn()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        fn()
    events = profile.profiler.kineto_results.events()
    return max((e.nbytes() for e in events if e.name() == "[memory]"), default=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("residual", ["none", "fira", "sign", "apollo", "randk"])
def test_no_step_allocates_a_matrix(dtype, left, residual):
    """Counted over a whole ProjAdamW step between refreshes: at most a quarter of the weight."""
    from lowmem.optim import ProjAdamW

    m, n = (768, 1536) if left else (1536, 768)
    w = torch.nn.Parameter(torch.randn(m, n).to(dtype))
    w.grad = torch.randn(m, n).to(dtype)
    projector = "randk" if residual == "randk" else "random"
    optimizer = ProjAdamW(
        [w], 1e-3, rank=16, refresh=1000, projector=projector, residual="sign" if residual == "randk" else residual,
        weight_decay=0.1, rounding="stochastic",
    )  # fmt: skip
    optimizer.step()
    most = largest_allocation(optimizer.step)
    assert most <= m * n * w.element_size() // 4 + 4096


@pytest.mark.parametrize("left", [True, False])
def test_registration(device, left):
    w, g, p, thin, rr, f = inputs(9, 12, 3, left, torch.float32, device)
    m, v = torch.rand_like(thin), torch.rand_like(thin)
    seed = SEED.to(device)
    cases = {
        "lowrank_project": (g, p, left),
        "lowrank_adam_": (m, v, rr, *ADAM),
        "lowrank_project_adam_": (m, v, g, p, left, *ADAM),
        "lowrank_axpy_": (w, g, 0.5, 0.9, seed, 0),
        "lowrank_update_": (w, p, thin, left, 0.5, 0.9, seed),
        "lowrank_update_scaled_": (w, g, p, thin, f, left, 0.5, 0.9, None),
        "lowrank_update_sign_": (w, g, p, thin, rr, left, 0.5, 0.1, 0.9, None),
    }
    assert set(cases) == {name for name in _dispatch.OPERATORS if name.startswith("lowrank_")}
    for name, args in cases.items():
        torch.library.opcheck(getattr(OPS, name).default, args)


def test_no_derivative():
    g = torch.randn(4, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="no derivative of its own"):
        OPS.lowrank_project(g, torch.randn(4, 2), True)


@pytest.mark.skipif(not _dispatch.CPU.loaded, reason="lowmem/_C is not loaded")
def test_the_compiled_operators_check_their_arguments():
    w, m = torch.zeros(4, 6), torch.zeros(4, 6)
    with pytest.raises(RuntimeError, match=r"lowmem\.lowrank_axpy_: x: expected shape \[4, 6\], got shape \(4, 5\)"):
        OPS.lowrank_axpy_(w, torch.zeros(4, 5), 1.0, 1.0, None, 0)
    with pytest.raises(RuntimeError, match=r"x: expected torch\.\w+ or torch\.float32, got torch\.Half"):
        OPS.lowrank_axpy_(w, w.half(), 1.0, 1.0, None, 0)
    with pytest.raises(RuntimeError, match=r"seed: expected one element"):
        OPS.lowrank_axpy_(w.bfloat16(), w, 1.0, 1.0, torch.zeros(2, dtype=torch.int64), 0)
    with pytest.raises(RuntimeError, match=r"lowmem\.lowrank_adam_: exp_avg_sq: expected as many elements as r"):
        OPS.lowrank_adam_(m, torch.zeros(4, 5), w, *ADAM)
    with pytest.raises(RuntimeError, match=r"exp_avg: expected torch\.Float, got torch\.Double"):
        OPS.lowrank_adam_(m.double(), m, w, *ADAM)
    with pytest.raises(RuntimeError, match=r"exp_avg: expected a contiguous tensor"):
        OPS.lowrank_adam_(torch.zeros(6, 4).T, m, w, *ADAM)
    assert not w.any() and not m.any()


@pytest.mark.skipif(not _dispatch.CPU.loaded, reason="lowmem/_C is not loaded")
@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
def test_every_instruction_set(runs_under, isa):
    code = """
import torch
from lowmem.ops import lowrank
torch.manual_seed(0)
seed = torch.tensor([12345678901234])
for cols in (1, 15, 16, 17, 33, 64, 100):
    w, x = torch.randn(5, cols).bfloat16(), torch.randn(5, cols)
    for s in (None, seed):
        for other in (x, x.bfloat16()):
            a, b = w.clone(), w.clone()
            torch.ops.lowmem.lowrank_axpy_(a, other, -0.5, 1.0, s, 2)
            lowrank.axpy_reference(b, other, -0.5, 1.0, s, 2)
            assert torch.equal(a, b), cols
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        r = x.to(dtype)
        kind = lowrank.working(r)
        m, v = torch.randn(5, cols, dtype=kind), torch.rand(5, cols, dtype=kind)
        m2, v2 = m.clone(), v.clone()
        n = torch.ops.lowmem.lowrank_adam_(m, v, r, .9, .99, .3, .2, 1e-6)
        n2 = lowrank.adam_reference(m2, v2, r, .9, .99, .3, .2, 1e-6)
        torch.testing.assert_close(m, m2); torch.testing.assert_close(v, v2); torch.testing.assert_close(n, n2)
print("same")
"""
    try:
        assert "same" in runs_under("cpu", code, LOWMEM_CPU_ISA=isa)
    except AssertionError as error:
        if "that this processor has" in str(error):
            pytest.skip(f"this processor has no {isa}")
        raise
