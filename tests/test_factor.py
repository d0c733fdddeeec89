"""lowmem.factor: randomized SVD, power iteration, orthonormal bases and the smallest rank."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem.factor import orthonormal, power_iteration, rsvd, smallest_rank

SEED = torch.tensor([11])


def spectrum(m, n, values, dtype=torch.float32, seed=0):
    """A matrix with these singular values."""
    torch.manual_seed(seed)
    k = len(values)
    u = torch.linalg.qr(torch.randn(m, k, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64)).Q
    return (u * torch.as_tensor(values, dtype=torch.float64) @ v.T).to(dtype)


def off(q):
    return float((q.mT @ q - torch.eye(q.shape[-1], dtype=q.dtype)).abs().max())


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (33, 33), (1, 5), (2, 40, 90), (3, 90, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rsvd_is_near_the_best(shape, dtype):
    g = torch.stack([spectrum(*shape[-2:], 0.8 ** torch.arange(min(shape[-2:])), dtype, k) for k in range(3)])
    g = g[: shape[0]] if len(shape) == 3 else g[0]
    r = min(8, min(shape[-2:]))
    u, s, vh = rsvd(g, r, seed=SEED)
    exact = torch.linalg.svdvals(g.double())
    best = (exact[..., r:] ** 2).sum(-1)
    wide = g.double()
    lost = ((wide - (u * s[..., None, :]).double() @ vh.double()) ** 2).sum((-2, -1))
    eps = torch.finfo(dtype).eps if dtype == torch.float64 else torch.finfo(torch.float32).eps
    assert (lost <= 1.02 * best + (64 * eps) ** 2 * (exact**2).sum(-1) + (dtype == torch.bfloat16) * 1e-4).all()
    assert off(u) <= 64 * eps and off(vh.mT) <= 64 * eps
    assert (s[..., :-1] >= s[..., 1:]).all()
    assert u.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_rsvd_repeats_its_bits_and_depends_on_the_seed():
    g = torch.randn(30, 50)
    state = torch.get_rng_state()
    first, again, other = (rsvd(g, 5, seed=s)[0] for s in (SEED, SEED.clone(), SEED + 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)  # torch's own generator is left alone


def test_a_matrix_of_exact_rank():
    g = spectrum(40, 60, [5.0, 3.0, 2.0])
    u, s, vh = rsvd(g, 10, seed=SEED)
    assert smallest_rank(s, float((g.double() ** 2).sum()), 1e-6) == 3
    assert ((u * s) @ vh - g).abs().max() <= 1e-5 and off(u) <= 1e-5 and s[3:].max() <= 1e-5


def test_zero_and_repeated_columns_still_give_an_orthonormal_basis():
    y = torch.randn(20, 4)
    for bad in (torch.zeros(20, 4), torch.cat((y, y), 1), torch.cat((y, y * 1e-20), 1), y[:, :1]):
        for method in ("auto", "cholesky", "qr"):
            assert off(orthonormal(bad, method)) <= 1e-5


@given(st.integers(1, 40), st.integers(1, 12), st.floats(0, 6), st.integers(0, 2**20))
def test_orthonormal(rows, columns, decades, seed):
    """Orthonormal, and the same span, for columns of any conditioning."""
    columns = min(rows, columns)
    values = torch.logspace(0, -decades, columns, dtype=torch.float64)
    y = spectrum(rows, columns, values, torch.float64, seed)
    q = orthonormal(y)
    assert off(q) <= 1e-12
    assert (y - q @ (q.T @ y)).abs().max() <= 1e-12
    low = orthonormal(y.float())
    assert off(low) <= 1e-5


def test_each_method_of_orthonormal_is_used(monkeypatch):
    """Cholesky-QR2 for what it can do, QR for what it cannot."""
    calls = []
    real = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda *a, **k: calls.append(1) or real(*a, **k))
    orthonormal(torch.randn(50, 8))
    assert not calls
    orthonormal(torch.ones(50, 8))
    assert calls == [1]


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (2, 40, 90)], ids=str)
def test_power_iteration_from_a_stale_basis(shape):
    """A step from the basis of a nearby gradient captures more than the stale basis, and converges to the best."""
    g = torch.stack([spectrum(*shape[-2:], 0.85 ** torch.arange(min(shape[-2:])), seed=k) for k in range(2)])
    g = g if len(shape) == 3 else g[0]
    short = shape[-2] if shape[-2] <= shape[-1] else shape[-1]
    a = g if shape[-2] == short else g.mT
    near = a + 0.05 * torch.randn_like(a)
    old = torch.linalg.svd(near)[0][..., :6]

    def captured(p):
        return ((p.mT @ a) ** 2).sum((-2, -1))

    best = (torch.linalg.svdvals(g)[..., :6] ** 2).sum(-1)
    one, none = power_iteration(g, old)
    assert none is None and (captured(one) > captured(old)).all() and off(one) <= 1e-5
    many, s = power_iteration(g, old, iters=30, rotate=True)
    assert (captured(many) >= 0.9999 * best).all()
    torch.testing.assert_close(s, torch.linalg.svdvals(g)[..., :6], rtol=1e-3, atol=1e-4)


def test_oversampling_captures_more_and_repeats():
    g = spectrum(64, 200, 0.97 ** torch.arange(64))
    old = torch.linalg.qr(torch.randn(64, 8)).Q
    best = float((torch.linalg.svdvals(g)[:8] ** 2).sum())

    def share(**options):
        p, _ = power_iteration(g, old, iters=2, **options)
        assert p.shape == (64, 8) and off(p) <= 1e-5
        return float(((p.T @ g) ** 2).sum()) / best

    assert share(oversample=24, seed=SEED) > share(oversample=8, seed=SEED) > share()
    assert abs(share(oversample=24, seed=SEED, products=torch.bfloat16) - share(oversample=24, seed=SEED)) < 1e-3
    whole, s = power_iteration(g, old, oversample=100, seed=SEED)  # 56 more columns are all there are
    torch.testing.assert_close(s, torch.linalg.svdvals(g)[:8], rtol=1e-4, atol=1e-5)
    assert torch.equal(whole, power_iteration(g, old, oversample=100, seed=SEED)[0])
    both, _ = power_iteration(torch.stack((g, g)), torch.stack((old, old)), oversample=8, seed=SEED)
    assert both.shape == (2, 64, 8) and not torch.equal(both[0], both[1])


def test_power_iteration_of_captured_like_gradients_in_bf16():
    g = spectrum(64, 200, 0.9 ** torch.arange(64), torch.bfloat16)
    p, _ = power_iteration(g, torch.linalg.qr(torch.randn(64, 16)).Q, iters=4)
    best = (torch.linalg.svdvals(g.double())[:16] ** 2).sum()
    assert ((p.double().T @ g.double()) ** 2).sum() >= 0.995 * best and p.dtype == torch.float32


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=12), st.floats(0.01, 0.99))
def test_smallest_rank_is_the_brute_force_smallest(values, lost):
    s = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    total = float((s**2).sum())
    got = smallest_rank(s, total, lost)
    if total == 0:
        assert got == 0
        return
    fits = [r for r in range(1, len(s) + 1) if total - float((s[:r] ** 2).sum()) <= lost * total + 1e-13 * total]
    assert got == fits[0]


def test_bad_input():
    g = torch.randn(4, 6)
    with pytest.raises(ValueError, match=r"lowmem\.factor\.rsvd: r: expected at most min\(m, n\) = 4, got 5"):
        rsvd(g, 5, seed=SEED)
    with pytest.raises(ValueError, match="r: expected a whole number >= 1"):
        rsvd(g, 0, seed=SEED)
    with pytest.raises(TypeError, match="seed: expected an int64 tensor of one element, got int"):
        rsvd(g, 2, seed=3)
    with pytest.raises(TypeError, match="g: expected a floating tensor"):
        rsvd(torch.ones(3, 3, dtype=torch.int32), 1, seed=SEED)
    with pytest.raises(ValueError, match="with elements"):
        rsvd(torch.zeros(3, 0), 1, seed=SEED)
    with pytest.raises(ValueError, match="iters"):
        rsvd(g, 2, seed=SEED, iters=-1)
    with pytest.raises(ValueError, match="oversample"):
        rsvd(g, 2, seed=SEED, oversample=1.5)
    with pytest.raises(ValueError, match=r"p: expected a basis \[..., 4 or 6, k\]"):
        power_iteration(g, torch.randn(5, 2))
    with pytest.raises(ValueError, match="at most 4 columns"):
        power_iteration(g, torch.randn(6, 5))
    with pytest.raises(ValueError, match="iters"):
        power_iteration(g, torch.randn(6, 2), iters=0)
    with pytest.raises(ValueError, match="oversample"):
        power_iteration(g, torch.randn(6, 2), oversample=-1)
    with pytest.raises(ValueError, match="seed: expected an int64 tensor of one element, for oversample > 0"):
        power_iteration(g, torch.randn(6, 2), oversample=2)
    with pytest.raises(ValueError, match="at most as many columns as rows"):
        orthonormal(g)
    with pytest.raises(ValueError, match="method"):
        orthonormal(g.T, "svd")
