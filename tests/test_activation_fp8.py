"""fp8_linear: products in FP8 through torch._scaled_mm, within the bounds of the rounded operands."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowmem
from lowmem.nn import FP8Linear
from lowmem.ops import activation_fp8 as family
from lowmem.ops import fp8_linear
from lowmem.testing import LAYOUTS, saved_bytes

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def off(t, dtype, dim):
    """The most by which an element of ``t`` may be off, and |t|."""
    _, scale = family.to_fp8(t, dtype, dim)
    relative, least = (1 / 16, 2.0**-10) if dtype == family.E4M3 else (1 / 8, 2.0**-17)
    a = t.double().abs()
    return torch.maximum(a * relative, scale.double() * least) + a * 2.0**-20, a


def product_bound(x, y):
    """|(a + da)(b + db) - ab| at most."""
    (da, a), (db, b) = x, y
    return da @ b + a @ db + da @ db


@pytest.mark.parametrize("scaling", family.SCALINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (5, 33, 7), (32, 64, 48)])
def test_forward_and_gradients_within_the_bound(device, scaling, dtype, m, k, n):
    x = torch.randn(m, k, device=device).to(dtype).requires_grad_()
    weight = torch.randn(n, k, device=device).to(dtype).requires_grad_()
    bias = torch.randn(n, device=device, dtype=dtype).requires_grad_()
    dy = torch.randn(m, n, device=device).to(dtype)
    y = fp8_linear(x, weight, bias, scaling=scaling)
    got = y, *torch.autograd.grad(y, (x, weight, bias), dy)
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    exact = F.linear(*wide)
    exact = exact, *torch.autograd.grad(exact, wide, dy.double())
    row, column = (None, None) if scaling == "tensor" else (1, 0)
    xs, ws = off(x.detach(), family.E4M3, row), off(weight.detach(), family.E4M3, row)
    dys = off(dy, family.E5M2, row)
    bounds = [product_bound(xs, [t.T for t in ws]), product_bound(dys, off(weight.detach(), family.E4M3, column))]
    for_dw = dys if scaling == "tensor" else (torch.zeros_like(dys[1]), dys[1])
    bounds += [product_bound([t.T for t in for_dw], xs), torch.zeros(n, device=device)]
    for a, e, bound in zip(got, exact, bounds, strict=True):
        assert a.dtype == dtype
        rounding = torch.finfo(dtype).eps * (e.abs() + bound) * 2 + 1e-6 * m
        assert bool(((a.double() - e).abs() <= bound + rounding).all())


@pytest.mark.parametrize("scaling", family.SCALINGS)
def test_scaled_mm_equals_its_reference(device, scaling):
    dim = None if scaling == "tensor" else 1
    for out in (torch.float32, torch.bfloat16):
        for m, k, n in ((16, 32, 48), (3, 33, 5)):
            a, sa = family.to_fp8(torch.randn(m, k, device=device), family.E5M2, dim)
            b, sb = family.to_fp8(torch.randn(n, k, device=device), family.E4M3, dim)
            sb = sb.t() if dim else sb
            want = family.scaled_mm_reference(a, b.t(), sa, sb, out)
            got = family.scaled_mm(a, b.t(), sa, sb, out)
            torch.testing.assert_close(got, want, rtol=2 * torch.finfo(out).eps, atol=1e-5)


def test_saved_bytes_by_formula(device):
    for scaling, scales in (("tensor", 4), ("row", 4 * 6)):
        layer = FP8Linear(40, 24, scaling=scaling, device=device, dtype=torch.bfloat16)
        x = torch.randn(2, 3, 40, device=device, dtype=torch.bfloat16).requires_grad_()
        assert saved_bytes(lambda layer=layer, x=x: layer(x)) == 6 * 40 + scales
        layer.weight.requires_grad_(False)
        assert saved_bytes(lambda layer=layer, x=x: layer(x)) == 0


@pytest.mark.parametrize("scaling", family.SCALINGS)
def test_module_compiles_and_checkpoints(device, scaling):
    linear = nn.Linear(32, 48).to(device)
    layer = FP8Linear.from_linear(linear, scaling=scaling)
    assert layer.weight is linear.weight and set(layer.state_dict()) == set(linear.state_dict())
    x = torch.randn(4, 16, 32, device=device).requires_grad_()
    inputs = (x, layer.weight, layer.bias)
    want = torch.autograd.grad(layer(x).square().sum(), inputs)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), inputs), want)
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(y.square().sum(), inputs), want))
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


def test_layouts_empty_and_zero(device):
    weight = torch.randn(8, 40, device=device)
    x = torch.randn(7, 40, device=device)
    for scaling in family.SCALINGS:
        want = fp8_linear(x, weight, scaling=scaling)
        for name in LAYOUTS:
            if name != "expanded":
                got = fp8_linear(LAYOUTS[name](x), LAYOUTS[name](weight), scaling=scaling)
                torch.testing.assert_close(got, want)
        x0, w0 = (torch.randn(n, 40, device=device).requires_grad_() for n in (0, 8))
        y = fp8_linear(x0, w0, scaling=scaling)
        dx, dw = torch.autograd.grad(y.sum(), (x0, w0))
        assert y.shape == (0, 8) and dx.shape == x0.shape and not dw.any()
        assert not fp8_linear(torch.zeros_like(x), weight, scaling=scaling).any()


def test_not_finite_values_show(device):
    weight = torch.randn(8, 40, device=device)
    for value in (torch.nan, torch.inf):
        x = torch.randn(7, 40, device=device)
        x[2, 3] = value
        assert bool(fp8_linear(x, weight).isnan().all())
        rows = fp8_linear(x, weight, scaling="row")
        assert bool(rows[2].isnan().all()) and bool(rows[:2].isfinite().all()) and bool(rows[3:].isfinite().all())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: fp8_linear(x, x, scaling="block"), "scaling: expected 'tensor' or 'row'"),
        (lambda x: fp8_linear(x.double(), x.double()), "x: expected float32"),
        (lambda x: fp8_linear(x, x.bfloat16()), "weight: expected torch.float32"),
        (lambda x: fp8_linear(x, x[:, :2]), r"weight: expected shape \[N, 4\]"),
        (lambda x: fp8_linear(x, x, torch.ones(4)), r"bias: expected shape \[3\]"),
        (lambda x: fp8_linear(torch.tensor(1.0), x), r"x: expected shape \[..., K\] with K >= 1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises((ValueError, TypeError), match=rf"lowmem\.fp8_linear: {message}"):
        call(torch.ones(3, 4))
    with pytest.raises(TypeError, match="FP8Linear: linear: expected an nn.Linear"):
        FP8Linear.from_linear(lowmem.nn.RMSNorm(3))
