"""The sampled family: choices whose expectations are enumerated, gradients against masked products, the layer."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import lowmem
from lowmem import ops, sampling
from lowmem.nn import FusedLoRALinear, QuantLinear, SampledGroup, SampledLinear, sampled_rows
from lowmem.ops import sampled
from lowmem.testing import assert_close_to_reference, reference_pair, saved_bytes, terms_of

UNBIASED = ("systematic", "wta", "crs")


def seed(value=0):
    return torch.tensor([value])


# ---------------------------------------------------------------------------------- expectations, by enumeration


def expectation(p, k, mode, monkeypatch):
    """``E[sum_j scale_j e_(rows_j)]`` over the uniforms, exactly: a choice is constant between the breakpoints of a
    uniform, so one point of each piece, weighted by its length, is the whole integral."""
    n = p.numel()
    s, _ = torch.sort(sampled.relative(p), descending=True, stable=True)
    cuts = {0.0, 1.0}
    for t in range(k):
        tail = s[t:].cumsum(0)
        if tail[-1] > 0:
            cuts |= {float((c / tail[-1] * (k - t)) % 1.0) for c in tail} | {float(c / tail[-1]) for c in tail}
    cuts = sorted(cuts)
    pieces = [((a + b) / 2, b - a) for a, b in zip(cuts, cuts[1:], strict=False) if b - a > 1e-12]
    total = torch.zeros(n, dtype=torch.float64)
    for choice in itertools.product(pieces, repeat=1 if mode == "systematic" else k):
        points = torch.tensor([u for u, _ in choice], dtype=torch.float64)
        monkeypatch.setattr(sampled, "uniforms", lambda seed, count, points=points: points[:count])
        rows, scale = sampled.choose_reference(p, k, mode, seed())
        mass = math.prod(length for _, length in choice)
        total.index_add_(0, rows, scale.double() * mass)
    return total


@pytest.mark.parametrize("mode", UNBIASED)
@pytest.mark.parametrize(
    "p, k",
    [
        ([3.0, 1.0, 1.0, 0.5], 2),
        ([100.0, 1.0, 0.1, 0.01], 2),
        ([1.0, 1.0, 1.0, 1.0, 1.0], 3),
        ([5.0, 4.0, 0.0, 1.0, 0.0], 2),
        ([0.0, 2.0, 0.0, 1.0], 3),  # fewer rows that count than places
        ([1e-30, 3e-30, 2e-30], 2),
        ([1.0, 2.0, 3.0], 1),
    ],
)
def test_the_expectation_is_the_sum(mode, p, k, monkeypatch):
    p = torch.tensor(p, dtype=torch.float64)
    got = expectation(p, k, mode, monkeypatch)
    # fp32 weights: one rounding each
    torch.testing.assert_close(got, (p > 0).double(), rtol=2e-6, atol=1e-7)


def test_topk_takes_the_largest():
    rows, scale = sampling.choose(torch.tensor([1.0, 5.0, 0.0, 3.0]), 3, mode="topk", seed=seed())
    assert rows.tolist() == [0, 1, 3] and scale.tolist() == [1.0, 1.0, 1.0]


@given(st.integers(1, 40), st.data())
def test_inclusion_probabilities(n, data):
    k = data.draw(st.integers(1, n))
    heavy = data.draw(st.floats(0.0, 6.0))
    p = torch.randn(n, generator=torch.Generator().manual_seed(n * 100 + k), dtype=torch.float64).exp() ** heavy
    pi = sampling.inclusion_probabilities(p, k)
    assert abs(float(pi.sum()) - k) < 1e-9 * k
    assert bool(((pi > 0) & (pi <= 1)).all())
    below = pi < 1
    if int(below.sum()) > 1:  # in proportion to p where not capped
        ratio = pi[below] / p[below]
        assert float(ratio.max() / ratio.min()) < 1 + 1e-9
        assert k == n or float(p[below].max()) <= float(p[~below].min() if (~below).any() else math.inf) * (1 + 1e-12)
    # brute force: the number of capped rows is the least that leaves no probability above 1
    s = p.sort(descending=True).values
    t = next(t for t in range(k) if (k - t) * float(s[t]) <= float(s[t:].sum()) * (1 + 1e-15))
    assert int((pi > 1 - 1e-12).sum()) >= t


@given(st.integers(1, 60), st.data())
def test_systematic_choices_are_different_rows(n, data):
    k = data.draw(st.integers(1, n))
    g = torch.Generator().manual_seed(n * 61 + k)
    p = torch.randn(n, generator=g).abs() ** data.draw(st.sampled_from([0, 1, 4]))
    rows, scale = sampling.choose(p, k, seed=seed(n + k))
    assert rows.unique().numel() == k and bool((rows.diff() > 0).all()) if k > 1 else True
    pi = sampling.inclusion_probabilities(p, k)[rows]
    torch.testing.assert_close(scale.double(), 1 / pi, rtol=1e-6, atol=0)


def variance(mode, x, dy, k):
    """The exact variance of the estimate of dY^T X, summed over its entries: enumerated over a fine grid of seeds."""
    full = dy.T @ x
    p = sampling.row_norms(x) * sampling.row_norms(dy)
    total = 0.0
    for i in range(300):
        rows, scale = sampling.choose(p, k, mode=mode, seed=seed(i))
        total += float((sampled.dw_reference(dy, x[rows], rows, scale) - full).square().sum())
    return total / 300 / float(full.square().sum())


@pytest.mark.parametrize("tail", [0.0, 1.5])
def test_systematic_varies_least(tail):
    # 300 independent draws a mode: the standard error of each mean is under a tenth of it, and the gaps are larger
    g = torch.Generator().manual_seed(5)
    size = torch.randn(512, 1, generator=g, dtype=torch.float64).mul(tail).exp()
    x = torch.randn(512, 16, generator=g, dtype=torch.float64) * size
    dy = torch.randn(512, 8, generator=g, dtype=torch.float64) * size
    found = {mode: variance(mode, x, dy, 154) for mode in UNBIASED}
    assert found["systematic"] < found["wta"] * 0.9 and found["wta"] <= found["crs"] * 1.1
    if tail:
        assert found["wta"] < found["crs"] * 0.5


# --------------------------------------------------------------------------------------------- awkward importances


@pytest.mark.parametrize("mode", sampled.MODES)
@pytest.mark.parametrize("p", [[0.0] * 5, [1.0] * 5, [0, 0, 7.0, 0, 0], [1e-300, 2e-300, 3e-300, 1e-300, 0.0]])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_degenerate_importances(mode, p, k):
    rows, scale = sampling.choose(torch.tensor(p, dtype=torch.float64), k, mode=mode, seed=seed(3))
    assert rows.shape == scale.shape == (k,) and bool(scale.isfinite().all())
    assert bool(((rows >= 0) & (rows < 5)).all())
    zero = torch.tensor(p, dtype=torch.float64)[rows] == 0
    assert bool((scale[zero] == 0).all())
    if k == 5 and mode in ("systematic", "topk"):
        assert rows.tolist() == [0, 1, 2, 3, 4] and bool((scale[~zero] == 1).all())


@pytest.mark.parametrize("mode", UNBIASED)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_chosen(mode, bad):
    p = torch.rand(50)
    p[17] = bad
    rows, scale = sampling.choose(p, 5, mode=mode, seed=seed(1))
    assert 17 in rows.tolist() and bool(scale.isfinite().all())


@pytest.mark.parametrize("mode", sampled.MODES)
@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_the_scale_of_the_importances_does_not_matter(mode, factor):
    p = torch.rand(100, dtype=torch.float64)
    for one, two in zip(
        sampling.choose(p, 30, mode=mode, seed=seed(2)), sampling.choose(p * factor, 30, mode=mode, seed=seed(2)),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, two, rtol=1e-6, atol=0)


def test_norms_of_any_size():
    x = torch.tensor([[3e30, 4e30], [3e-30, 4e-30], [0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]])
    got = sampling.row_norms(x)
    torch.testing.assert_close(got[:3], torch.tensor([5e30, 5e-30, 0.0], dtype=torch.float64), rtol=1e-6, atol=0)
    assert got[3].isnan() and got[4].isinf()


# ---------------------------------------------------------------------------------------------------------- parts of dW


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_equal_the_masked_product(dtype):
    dy, x = torch.randn(37, 11).to(dtype), torch.randn(37, 7).to(dtype)
    rows, scale = torch.tensor([0, 3, 3, 36]), torch.tensor([1.0, 0.5, 2.0, 3.0])
    weight = torch.zeros(37, dtype=torch.float64).index_add_(0, rows, scale.double())

    def masked(dy, x):
        return (dy * weight.to(dy.dtype)[:, None]).T @ x

    got = ops.sampled_dw(dy, x, rows=rows, row_scale=scale)
    exact, low = reference_pair(masked, dy, x)
    rounded = [(dy.double().abs() * weight[:, None]).T @ x.double().abs()]
    assert_close_to_reference(got, exact, low, terms=terms_of(masked, dy, x), rounded=rounded, rounded_to=dtype)
    assert torch.equal(ops.sampled_dw(dy, x), dy.T @ x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_columns_and_entries_are_the_full_products(dtype):
    dy, x = torch.randn(33, 12).to(dtype), torch.randn(33, 9).to(dtype)
    full = lambda dy, x: dy.T @ x  # noqa: E731
    exact, low = reference_pair(full, dy, x)
    terms = terms_of(full, dy, x)
    cols = torch.tensor([8, 0, 3])
    assert_close_to_reference(ops.sampled_dw(dy, x, cols=cols), exact[:, cols], low[:, cols], terms=terms)
    i, j = torch.tensor([0, 11, 5, 5]), torch.tensor([0, 8, 2, 2])
    assert_close_to_reference(ops.sampled_dw(dy, x, coo=(i, j)), exact[i, j], low[i, j], terms=terms)
    empty = torch.zeros(0, dtype=torch.int64)
    assert ops.sampled_dw(dy, x, coo=(empty, empty)).shape == (0,)
    assert ops.sampled_dw(dy, x, rows=empty).eq(0).all()


def test_entries_make_no_full_product(monkeypatch):
    monkeypatch.setattr(sampled, "_CHUNK", 64)
    dy, x = torch.randn(16, 50), torch.randn(16, 40)
    i, j = torch.randint(50, (23,)), torch.randint(40, (23,))
    torch.testing.assert_close(ops.sampled_dw(dy, x, coo=(i, j)), (dy.T @ x)[i, j])


# --------------------------------------------------------------------------------------------------------- operators


def test_opcheck():
    x, dy = torch.randn(9, 5), torch.randn(9, 4)
    rows, scale = torch.tensor([1, 4, 8]), torch.tensor([1.0, 2.0, 0.0])
    q = torch.ops.lowmem
    for op, args in (
        (q.sampled_norms, (x,)),
        (q.sampled_choose, (torch.rand(9), 3, "systematic", seed())),
        (q.sampled_choose, (torch.rand(9), 3, "wta", seed())),
        (q.sampled_gather, (x, rows, scale)),
        (q.sampled_gather, (x, rows, None)),
        (q.sampled_dw, (dy, x[rows], rows, scale)),
        (q.sampled_dw_coo, (dy, x, rows % 4, rows % 5)),
    ):
        torch.library.opcheck(op.default, args)


def test_no_derivative_by_accident():
    x = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="sampled_norms"):
        torch.ops.lowmem.sampled_norms(x).sum().backward()


# -------------------------------------------------------------------------------------------------------------- layer


def layer_and_input(**options):
    layer = SampledLinear(24, 10, dtype=torch.float64, **options)
    return layer, torch.randn(4, 16, 24, dtype=torch.float64, requires_grad=True)


def test_forward_dx_and_bias_are_exact():
    layer, x = layer_and_input(budget=0.25)
    dense = torch.nn.Linear(24, 10, dtype=torch.float64)
    dense.load_state_dict(layer.state_dict())
    x2 = x.detach().clone().requires_grad_()
    y, y2 = layer(x), dense(x2)
    assert torch.equal(y, y2)
    up = torch.randn_like(y)
    y.backward(up)
    y2.backward(up)
    torch.testing.assert_close(x.grad, x2.grad)
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
    assert not torch.allclose(layer.weight.grad, dense.weight.grad)


@pytest.mark.parametrize("mode", UNBIASED)
def test_the_gradient_is_unbiased(mode):
    # the mean of 600 draws is within 5 standard errors, measured from the draws, of the exact gradient in norm:
    # sqrt(sum of variances / 600) is one, and Chebyshev bounds a false alarm by 1 / 25 a seed, which is fixed
    layer, x = layer_and_input(budget=0.3, mode=mode, bias=False)
    up = torch.randn(4, 16, 10, dtype=torch.float64)
    exact = up.reshape(-1, 10).T @ x.detach().reshape(-1, 24)
    draws = []
    for _ in range(600):
        (g,) = torch.autograd.grad(layer(x), layer.weight, up)
        draws.append(g)
    draws = torch.stack(draws)
    error = (draws.mean(0) - exact).norm()
    assert error < 5 * (draws.var(0).sum() / 600).sqrt()


def test_when_it_is_a_plain_linear():
    layer, x = layer_and_input(budget=0.3)
    assert saved_bytes(lambda: layer(x), exclude=x) > 0
    layer.eval()
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert saved_bytes(lambda: layer(x), exclude=x) == 0  # nn.Linear saves x itself
    layer.train()
    layer.weight.requires_grad_(False)
    assert saved_bytes(lambda: layer(x), exclude=x) == 0
    layer.weight.requires_grad_(True)
    layer.budget = 1.0
    (g,) = torch.autograd.grad(layer(x).sum(), layer.weight)
    (e,) = torch.autograd.grad(F.linear(x, layer.weight, layer.bias).sum(), layer.weight)
    assert torch.equal(g, e)
    assert layer(x[:0]).shape == (0, 16, 10)


class Attention(torch.nn.Module):
    def __init__(self, group=True, k=1024, **options):
        super().__init__()
        self.q, self.k, self.v = (SampledLinear(k, k // 2, bias=False, **options) for _ in range(3))
        if group:
            SampledGroup([self.q, self.k, self.v]).attach(self)

    def forward(self, x):
        return self.q(x) + self.k(x) + self.v(x)


def test_bytes_saved():
    n, k = 500, 1024
    x = torch.randn(n, k, requires_grad=True)
    layer = SampledLinear(k, 64, budget=0.3)
    assert saved_bytes(lambda: layer(x), exclude=x) == 150 * (4 * k + 12)
    shared = saved_bytes(lambda: Attention(k=k, budget=0.3)(x), exclude=x)
    assert shared == 150 * (4 * k + 12) and shared <= 0.31 * 4 * n * k  # q, k and v together
    assert saved_bytes(lambda: Attention(group=False, k=k, budget=0.3)(x), exclude=x) == 3 * shared


def test_a_group_shares_only_what_is_the_same():
    block = Attention(k=32, budget=0.3).double()
    x = torch.randn(40, 32, dtype=torch.float64, requires_grad=True)
    block(x).sum().backward()
    up = torch.ones(40, 16, dtype=torch.float64)
    grads = [one.weight.grad for one in (block.q, block.k, block.v)]
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])  # one choice, one upstream gradient
    assert not torch.allclose(grads[0], up.T @ x.detach())
    assert block.q.group._held is None  # closed with the parent
    other = copy.deepcopy(block)
    assert other.q.group is not block.q.group and other.q.group.layers[0] is other.q
    held = block.q.group
    held._enter()
    first = held.take(block.q, x, x)
    assert held.take(block.k, x, x) is first
    x.data.add_(0)
    with torch.no_grad():
        x.mul_(1.0)  # a new version
    assert held.take(block.v, x, x) is not first
    held._exit()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_repeats_the_choice(reentrant):
    layer, x = layer_and_input(budget=0.3)
    torch.manual_seed(9)
    layer(x).square().sum().backward()
    plain, layer.weight.grad = layer.weight.grad, None
    torch.manual_seed(9)
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(layer.weight.grad, plain)


def test_compile_fullgraph():
    layer, x = layer_and_input(budget=0.3)
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.manual_seed(4)
    layer(x).square().sum().backward()
    plain, layer.weight.grad = layer.weight.grad, None
    torch.manual_seed(4)
    fast(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain)
    block = Attention(k=32, budget=0.3).double()
    y = torch.compile(block, fullgraph=True, backend="aot_eager")(torch.randn(8, 32, dtype=torch.float64))
    y.sum().backward()
    assert block.q.weight.grad is not None
    cached = SampledLinear(4, 4, cache=3)
    with pytest.raises(Exception, match="none under torch.compile"):
        torch.compile(cached, fullgraph=True, backend="aot_eager")(torch.randn(9, 4))


def test_autocast_and_16_bits():
    layer = SampledLinear(32, 8, budget=0.5)
    x = torch.randn(20, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    half = SampledLinear(32, 8, budget=0.5, dtype=torch.bfloat16)
    half(x.bfloat16()).sum().backward()
    assert half.weight.grad.dtype == torch.bfloat16


def test_padding_is_never_used():
    layer, x = layer_and_input(budget=0.4, bias=False)
    mask = torch.ones(4, 16, dtype=torch.bool)
    mask[:, 5:] = False
    with torch.no_grad():
        x[~mask] = 1e6
    with sampled_rows(layer, mask=mask):
        layer(x).backward(torch.ones(4, 16, 10, dtype=torch.float64))
    # 20 rows count and 26 are kept: the gradient is that of the rows that count, exactly
    kept = x.detach()[mask].sum(0).expand(10, 24)
    torch.testing.assert_close(layer.weight.grad, kept)


# -------------------------------------------------------------------------------------------------------------- cache


def test_an_empty_cache_weighs_all_alike_and_a_full_one_by_norms():
    cache = sampling.GradNormCache(5)
    keys = torch.tensor([0, 1, 4, 9, -1])
    assert torch.equal(cache.weight(keys), torch.ones(5))  # 9 and -1 are out of range: never seen
    cache.update(keys, torch.tensor([1.0, 3.0, 0.0, 5.0, 7.0]))
    assert cache.norms.tolist() == [1.0, 3.0, -1.0, -1.0, 0.0]
    got = cache.weight(torch.tensor([0, 1, 4, 2, 9]))
    mean = 4 / 3
    want = [0.9 / mean + 0.1, 0.9 * 3 / mean + 0.1, 0.1, 1.0, 1.0]
    torch.testing.assert_close(got, torch.tensor(want))


def test_repeated_keys_get_their_mean_square_and_bad_norms_are_left_out():
    cache = sampling.GradNormCache(3)
    cache.update(torch.tensor([0, 0, 1, 2]), torch.tensor([3e-30, 4e-30, math.nan, math.inf], dtype=torch.float64))
    torch.testing.assert_close(cache.norms[0], torch.tensor(math.sqrt(12.5) * 1e-30), rtol=1e-5, atol=0)
    assert cache.norms[1:].tolist() == [-1.0, -1.0]


def test_a_cache_that_tells_nothing_fades_out():
    keys = torch.arange(200)
    true, stale = sampling.GradNormCache(200), sampling.GradNormCache(200)
    g = torch.Generator().manual_seed(0)
    norms = torch.rand(200, generator=g).exp() ** 4
    for _ in range(12):
        true.update(keys, norms)
        stale.update(keys, torch.rand(200, generator=g).exp() ** 4)
    assert float(true.staleness) < 0.01 and float(stale.staleness) > 0.3
    # the weights' spread is (1 - m) of the norms' own
    spread = [float(cache.weight(keys).std() / (cache.norms / cache.norms.mean()).std()) for cache in (true, stale)]
    assert abs(spread[0] - 0.9) < 1e-4 and abs(spread[1] - (1 - float(stale.staleness))) < 1e-4


def test_the_layer_feeds_its_cache_and_draws_by_it():
    torch.manual_seed(0)
    layer = SampledLinear(8, 6, bias=False, budget=0.3, cache=4, dtype=torch.float64)
    x = torch.randn(4, 10, 8, dtype=torch.float64)
    up = torch.randn(4, 10, 6, dtype=torch.float64) * torch.tensor([1.0, 1.0, 1.0, 50.0]).view(4, 1, 1)
    ids = torch.tensor([3, 0, 1, 2])
    with sampled_rows(layer, keys=ids, tokens=10):
        layer(x).backward(up)
    want = up.norm(dim=-1).square().mean(1).sqrt()
    torch.testing.assert_close(layer.cache.norms[ids], want.float(), rtol=1e-5, atol=0)
    with sampled_rows(layer, keys=ids, tokens=10):
        chosen = SampledLinear.pick([layer], x)
    assert int((chosen.rows >= 30).sum()) == 10  # every row of the sample whose gradients are large
    again = SampledLinear(8, 6, bias=False, cache=4, dtype=torch.float64)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.cache.norms, layer.cache.norms)


# ---------------------------------------------------------------------------------------------------------- bad input


def part(**which):
    return ops.sampled_dw(torch.rand(3, 2), torch.rand(3, 2), **which)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: sampling.choose(torch.rand(4), 0, seed=seed()), "k: expected an integer from 1 to 4, got 0"),
        (lambda: sampling.choose(torch.rand(4), 5, seed=seed()), "k: expected an integer from 1 to 4, got 5"),
        (lambda: sampling.choose(torch.rand(0), 1, seed=seed()), "p: expected a floating vector"),
        (lambda: sampling.choose(torch.rand(4), 1, mode="best", seed=seed()), "mode: expected one of systematic"),
        (lambda: sampling.choose(torch.rand(4), 1, seed=torch.zeros(1)), "seed: expected int64"),
        (lambda: sampling.budget_rows(4, 0.0), "budget: expected a share"),
        (lambda: sampling.budget_rows(4, 1.5), "budget: expected a share"),
        (lambda: sampling.pick(torch.rand(4, 2), 0.5, seed=seed(), mask=torch.ones(3) > 0), "mask: expected shape"),
        (lambda: sampling.pick(torch.rand(4, 2), 0.5, seed=seed(), mask=torch.ones(4)), "mask: expected bool"),
        (lambda: sampling.pick(torch.rand(0, 2), 0.5, seed=seed()), "x: expected at least one row"),
        (lambda: sampling.GradNormCache(0), "size: expected an integer"),
        (lambda: sampling.GradNormCache(3).weight(torch.zeros(2)), "keys: expected int64"),
        (lambda: SampledLinear(3, 3, mode="none"), "mode: expected one of"),
        (lambda: SampledLinear(3, 3, budget=-1), "budget: expected a share"),
        (lambda: SampledGroup([SampledLinear(3, 3)]), "layers: expected at least two"),
        (lambda: SampledGroup([SampledLinear(3, 3), SampledLinear(4, 3)]), "layers: expected one in_features"),
        (lambda: SampledLinear.from_linear(SampledLinear(3, 3)), "linear: expected an nn.Linear"),
        (lambda: ops.sampled_dw(torch.rand(3, 2), torch.rand(4, 2)), "X: expected as many rows as dY"),
        (lambda: ops.sampled_dw(torch.rand(3, 2), torch.rand(3, 2).double()), "X: expected dY's dtype"),
        (lambda: part(rows=torch.tensor([3])), r"rows: expected indices in \[0, 3\)"),
        (lambda: part(cols=torch.tensor([2])), r"cols: expected indices in \[0, 2\)"),
        (lambda: part(rows=torch.tensor([0]), cols=torch.tensor([0])), "cols: expected nothing beside rows"),
        (lambda: part(row_scale=torch.ones(3)), "row_scale: expected one number"),
        (lambda: part(coo=(torch.tensor([0]), torch.tensor([0, 1]))), "coo: expected two lists"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_rows_context_checks_and_restores():
    layer = SampledLinear(3, 3)
    with pytest.raises(ValueError, match="SampledLinear layers"), sampled_rows(torch.nn.Linear(2, 2)):
        pass
    with pytest.raises(TypeError, match="mask: expected bool"), sampled_rows(layer, mask=torch.ones(2)):
        pass
    with pytest.raises(RuntimeError, match="inside"), sampled_rows(layer, keys=torch.zeros(1, dtype=torch.int64)):
        raise RuntimeError("inside")
    assert layer.rows is None


# ------------------------------------------------------------------------------------------ adapters and whole models


def lora(p=0.0, **options):
    torch.manual_seed(0)
    layer = FusedLoRALinear(24, 10, r=4, alpha=8, dropout=p, dtype=torch.float64, **options)
    torch.nn.init.normal_(layer.lora_B["default"])
    return layer


@pytest.mark.parametrize("mask", ["bits", "seed"])
def test_an_adapters_gradient_from_some_rows(mask, monkeypatch):
    layer, x = lora(0.2, sample_budget=0.3, mask=mask), torch.randn(50, 24, dtype=torch.float64)
    up = torch.randn(50, 10, dtype=torch.float64)
    # all rows, with weights 1: the exact gradient, through the same code
    every = sampled.Pick(torch.arange(50), torch.ones(50), x)
    monkeypatch.setattr(type(layer), "pick", lambda self, x: every)
    torch.manual_seed(3)
    layer(x).backward(up)
    got = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    monkeypatch.undo()
    plain = lora(0.2, mask=mask)
    torch.manual_seed(3)
    plain(x).backward(up)
    for name, p in plain.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(got[name], p.grad)
    # 400 draws: the mean of dA is within five standard errors in norm, dB is exact in each
    exact, draws = plain.lora_A["default"].grad, []
    layer.dropout["default"] = 0.0
    plain.dropout["default"] = 0.0
    plain.zero_grad()
    plain(x).backward(up)
    exact = plain.lora_A["default"].grad
    for _ in range(400):
        layer.zero_grad()
        layer(x).backward(up)
        draws.append(layer.lora_A["default"].grad.clone())
        torch.testing.assert_close(layer.lora_B["default"].grad, plain.lora_B["default"].grad)
    draws = torch.stack(draws)
    assert (draws.mean(0) - exact).norm() < 5 * (draws.var(0).sum() / 400).sqrt()
    assert float(draws.var(0).sum()) > 0


def test_an_adapters_saved_bytes():
    n, k = 500, 1024
    x = torch.randn(n, k, dtype=torch.bfloat16, requires_grad=True)
    layer = FusedLoRALinear(k, 64, r=8, alpha=8, sample_budget=0.3, dtype=torch.bfloat16)
    assert saved_bytes(lambda: layer(x), exclude=x) == 150 * (2 * k + 12) + n * 8 * 2  # the rows, and S
    assert layer.eval()(x).shape == (n, 64)
    assert saved_bytes(lambda: layer(x), exclude=x) == n * 8 * 2  # x itself, and S


def test_an_adapter_over_packed_weights_and_one_that_saves_no_rows():
    layer = FusedLoRALinear.from_linear(
        QuantLinear.from_linear(torch.nn.Linear(64, 16), "nf4"), r=4, alpha=4, sample_budget=0.5
    )
    torch.nn.init.normal_(layer.lora_B["default"])
    x = torch.randn(20, 64, requires_grad=True)
    layer(x).sum().backward()
    assert layer.lora_A["default"].grad.abs().sum() > 0 and x.grad is not None
    only_b = FusedLoRALinear(64, 16, r=4, alpha=4, sample_budget=0.5, train=("B",))
    assert only_b.pick(x) is None


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"gate": True}])
def test_an_adapter_compiles_and_recomputes(options):
    layer = lora(0.1, sample_budget=0.4, **options)
    x = torch.randn(3, 20, 24, dtype=torch.float64, requires_grad=True)

    def grads(fn):
        layer.zero_grad()
        torch.manual_seed(11)
        fn(x).square().sum().backward()
        return [p.grad for p in layer.parameters() if p.requires_grad]

    plain = grads(layer)
    for other in (
        torch.compile(layer, fullgraph=True, backend="aot_eager"),
        lambda x: checkpoint(layer, x, use_reentrant=False),
        lambda x: checkpoint(layer, x, use_reentrant=True),
    ):
        for one, two in zip(plain, grads(other), strict=True):
            torch.testing.assert_close(one, two)


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (torch.nn.Linear(64, 32) for _ in range(3))
        self.o_proj = torch.nn.Linear(32, 8)

    def forward(self, x):
        return self.o_proj(self.q_proj(x) + self.k_proj(x) * self.v_proj(x))


@pytest.mark.parametrize("r", [None, 4])
def test_convert(r):
    model = Small()
    weight = model.q_proj.weight
    before = model.state_dict()
    lowmem.convert(model, r=r, sample_budget=0.3)
    kind = SampledLinear if r is None else FusedLoRALinear
    assert type(model.o_proj) is kind and model.q_proj.weight is weight
    assert model.q_proj.group is model.k_proj.group is model.v_proj.group
    x = torch.randn(100, 64, requires_grad=True)
    # one choice for q, k and v, one for o; beside them a product's two factors, and S
    rows = 30 * (4 * 64 + 12) + 30 * (4 * 32 + 12)
    kept = saved_bytes(lambda: model(x), exclude=[x, model])
    assert kept == rows + 2 * 100 * 32 * 4 + (0 if r is None else 4 * 100 * 4 * 4)
    model(x).sum().backward()
    if r is None:
        assert weight.grad is not None and set(model.state_dict()) == set(before)
        assert "SampledLinear" in str(lowmem.report(model))
    else:
        assert weight.grad is None and model.q_proj.lora_A["default"].grad is not None
    with pytest.raises(ValueError, match="target_modules|model"):
        lowmem.convert(model, r=r, sample_budget=0.3)


def test_what_does_not_go_together():
    with pytest.raises(ValueError, match="sample_budget: expected None without r"):
        lowmem.convert(Small(), quant="nf4", sample_budget=0.3)
    with pytest.raises(ValueError, match="save: expected 'bf16' with a sample_budget"):
        FusedLoRALinear(4, 4, r=1, alpha=1, sample_budget=0.5, save="fp8")
    with pytest.raises(ValueError, match="budget: expected a share"):
        lowmem.convert(Small(), r=2, sample_budget=2.0)
    x = torch.randn(6, 4)
    chosen = sampling.pick(x, 0.5, seed=seed())
    with pytest.raises(TypeError, match=r"lora_linear: pick.x: expected x's dtype"):
        ops.lora_linear(x.double(), None, torch.randn(2, 4), torch.randn(3, 2), 1.0, pick=chosen)
    with pytest.raises(ValueError, match=r"lora_linear: pick.x: expected \[3, 5\]"):
        ops.lora_linear(torch.randn(6, 5), None, torch.randn(2, 5), torch.randn(3, 2), 1.0, pick=chosen)
