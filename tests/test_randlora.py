"""RandLoRA: equal to PEFT's layer given the same bases, bases at no memory, bytes, merging, bad input."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowmem.nn import RandLoRALinear
from lowmem.ops.philox import inv_keep, keep_mask
from lowmem.ops.randlora import randlora_linear, random_bases
from lowmem.testing import assert_close_to_reference, saved_bytes, terms_of

F64 = torch.float64
SIZES = [(12, 20), (20, 12), (12, 12), (13, 7)]  # wide, tall, square, sides that r does not divide
pytestmark = pytest.mark.usefixtures("poisoned")


def layer(k=12, n=20, dtype=F64, r=4, bias=True, device="cpu", **options):
    base = nn.Linear(k, n, bias=bias, dtype=dtype, device=device)
    made = RandLoRALinear(base, **({"r": r, "alpha": 2 * r} | options))
    with torch.no_grad():
        made.randlora_lambda.normal_()
        made.randlora_gamma.normal_()
    return made


def run(module, x, leaves):
    x = x.detach().requires_grad_()
    y = module(x)
    upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    return [y.detach(), *torch.autograd.grad(y, [x, *leaves], upstream)]


def learned(module):
    return [module.randlora_lambda, module.randlora_gamma]


def peft_model(k, n, r, dropout=0.0):
    """PEFT's layer, and another of other sizes on the same bases."""
    peft = pytest.importorskip("peft")
    with pytest.warns(UserWarning, match="not save basis"):
        config = peft.RandLoraConfig(
            r=r, randlora_alpha=2 * r, randlora_dropout=dropout, target_modules=["0", "1"], save_projection=False
        )
    return peft.get_peft_model(nn.Sequential(nn.Linear(k, n), nn.Linear(n, 25)), config).to(F64).base_model.model


@pytest.mark.parametrize(("k", "n"), SIZES)
@pytest.mark.parametrize("bases", ["PEFT's", "seeded"])
def test_equals_peft_given_the_same_bases(k, n, bases):
    theirs = peft_model(k, n, 3)[0]
    shared = theirs.randlora_A["default"], theirs.randlora_B["default"]
    fused = layer(k, n, r=3, seed=11, bases=shared if bases == "PEFT's" else None)
    with torch.no_grad():
        theirs.base_layer.load_state_dict({"weight": fused.weight, "bias": fused.bias})
        theirs.randlora_lambda["default"].copy_(fused.randlora_lambda)
        theirs.randlora_gamma["default"].copy_(fused.randlora_gamma)
        if bases == "seeded":
            narrow, wide = random_bases(k, n, 3, fused.basis_seed, F64)
            shared[0][:, 0, : min(k, n)] = narrow
            count = fused.randlora_lambda.shape[1]
            shared[1][: max(k, n), :count] = wide.t().view(max(k, n), count, 3)
    x = torch.randn(2, 5, k, dtype=F64)
    other = run(theirs, x, [theirs.randlora_lambda["default"], theirs.randlora_gamma["default"]])
    for one, two in zip(run(fused, x, learned(fused)), other, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fused.delta_weight(), theirs.get_delta_weight("default"))


def test_starts_as_the_linear_and_as_peft_does():
    linear = nn.Linear(12, 20)
    fused = RandLoRALinear(linear, r=5, alpha=100)
    x = torch.randn(3, 12)
    torch.testing.assert_close(fused(x), linear(x), rtol=0, atol=0)
    theirs = peft_model(12, 20, 5)[0]
    assert torch.equal(fused.randlora_lambda.double(), theirs.randlora_lambda["default"])
    torch.testing.assert_close(fused.randlora_gamma.double(), theirs.randlora_gamma["default"], rtol=1e-6, atol=0)
    assert fused.weight is linear.weight and not fused.weight.requires_grad and not fused.bias.requires_grad
    assert fused.scaling == 20


@pytest.mark.parametrize("r", [1, 2, 3, 32])
@pytest.mark.parametrize(("k", "n"), [(64, 96), (96, 64), (64, 64)])
def test_the_update_has_full_rank(k, n, r):
    assert torch.linalg.matrix_rank(layer(k, n, r=r).delta_weight()) == min(k, n)


@pytest.mark.parametrize(("k", "n"), SIZES)
@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
def test_every_gradient_against_plain_torch(k, n, p):
    fused = layer(k, n)
    lam, gam = learned(fused)
    basis, seed = fused.basis_seed, torch.tensor([3])
    w = fused.weight.detach().requires_grad_()
    narrow, wide = random_bases(k, n, 4, basis, F64)

    def plain(x):
        delta = torch.zeros(n, k, dtype=F64)
        for i in range(4):
            for j in range(lam.shape[1]):
                row = lam[i, j] * narrow[i].double() * gam[j]
                other = wide[i * lam.shape[1] + j]
                delta = delta + (torch.outer(other, row) if k <= n else torch.outer(row, other))
        dropped = torch.where(keep_mask(len(x), k, p, seed), x, 0) * inv_keep(p)
        return F.linear(x, w, fused.bias) + 0.3 * dropped @ delta.t()

    def ours(x):
        return randlora_linear(x, w, lam, gam, 0.3, basis_seed=basis, bias=fused.bias, p=p, seed=seed)

    x = torch.randn(6, k, dtype=F64)
    for one, two in zip(run(ours, x, [w, lam, gam]), run(plain, x, [w, lam, gam]), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("k", "n"), [(5, 7), (7, 5)])
def test_gradcheck(k, n):
    fused = layer(k, n, r=2)
    x, leaves = torch.randn(4, k, dtype=F64, requires_grad=True), learned(fused)
    seed = torch.tensor([8])

    def fn(x, lam, gam):
        return randlora_linear(x, fused.weight, lam, gam, 0.7, basis_seed=fused.basis_seed, p=0.25, seed=seed)

    assert torch.autograd.gradcheck(fn, (x, *leaves))


def test_seeded_bases_are_bits_of_the_map_and_the_same_in_every_dtype():
    seed = torch.tensor([21])
    narrow, wide = random_bases(40, 24, 3, seed, torch.bfloat16)
    assert narrow.shape == (3, 24) and wide.shape == (24, 40)
    number = sum(2**bit * keep_mask(3, 24, 0.5, seed, bit).int() for bit in range(8))
    torch.testing.assert_close(narrow, (2.0 * number - 255) / 21845**0.5)
    assert 0.8 < narrow.std() < 1.2 and abs(narrow.mean()) < 0.3
    for i in range(3):
        signs = keep_mask(8, 40, 0.5, seed, 8 + i).to(torch.bfloat16) * 2 - 1
        assert torch.equal(wide[8 * i : 8 * i + 8], signs)
    for dtype in (torch.float16, torch.float32, F64):
        again = random_bases(40, 24, 3, seed, dtype)
        assert torch.equal(narrow, again[0]) and torch.equal(wide.to(dtype), again[1])
    other = random_bases(40, 24, 3, torch.tensor([22]), F64)[1]
    assert abs((other * wide).mean()) < 0.15 and abs(other.mean()) < 0.15


@pytest.mark.parametrize(("k", "n"), [(48, 64), (64, 48)])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_bf16_by_the_error_rule(k, n, adapter, device):
    fused = layer(k, n, dtype=torch.bfloat16, r=8, alpha=1.0, adapter_dtype=adapter, device=device)
    x = torch.randn(33, k, device=device).bfloat16().requires_grad_()
    dy = torch.randn(33, n, device=device).bfloat16()
    lam, gam = learned(fused)
    y = fused(x)
    ours = [y.detach(), *torch.autograd.grad(y, [x, lam, gam], dy)]
    narrow, wide = random_bases(k, n, 8, fused.basis_seed, torch.bfloat16)
    parts = [t.detach() for t in (x, fused.weight, fused.bias, lam, gam, narrow, wide, dy)]
    scale = fused.scaling

    def reference(x, w, bias, lam, gam, narrow, wide, dy):
        u = (lam[:, :, None] * narrow[:, None, :].to(lam.dtype) * gam).flatten(0, 1).to(x.dtype)
        a, b = (u, wide.t()) if k <= n else (wide, u.t())
        s, ds = x @ a.t() * scale, dy @ b * scale
        du = (ds.t() @ x if k <= n else s.t() @ dy).view(*lam.shape, -1).to(lam.dtype)
        dlam = (du * narrow[:, None, :].to(lam.dtype) * gam).sum(2)
        dgam = (du * narrow[:, None, :].to(lam.dtype) * lam[:, :, None]).sum(0)
        return F.linear(x, w, bias) + s @ b.t(), dy @ w + ds @ a, dlam, dgam

    exact = reference(*(t.double() for t in parts))
    for got, wide_, low, sums in zip(ours, exact, reference(*parts), terms_of(reference, *parts), strict=True):
        assert_close_to_reference(got, wide_, low, terms=sums, rounded=[sums], rounded_to=torch.bfloat16)


@pytest.mark.parametrize(("k", "n"), [(256, 384), (384, 256)])
def test_bases_take_no_memory_and_backward_keeps_x_alone(k, n):
    fused = layer(k, n, dtype=torch.bfloat16, r=32, bias=False, dropout=0.1)
    count, low = 256 // 32, 256
    own = [*fused.named_parameters(), *fused.named_buffers()]
    bytes_of = {name: t.nbytes for name, t in own if name != "weight"}
    assert bytes_of == {
        "randlora_lambda": 32 * count * 4,
        "randlora_gamma": count * low * 4,
        "basis_seed": 8,
    }
    assert list(fused.state_dict()) == ["weight", *bytes_of]
    x = torch.randn(40, k, dtype=torch.bfloat16, requires_grad=True)
    assert saved_bytes(lambda: fused(x)) == 40 * k * 2 + 8 + 8  # x, the bases' seed, the mask's
    assert saved_bytes(lambda: fused(x), exclude=(x, fused)) == 8


def test_peft_keeps_both_bases_of_every_layer_for_backward():
    theirs = peft_model(256, 384, 32)[0].float()
    fused = layer(256, 384, r=32, dtype=torch.float32)
    x = torch.randn(64, 256, requires_grad=True)
    shared = [theirs.randlora_A["default"], theirs.randlora_B["default"]]
    there = saved_bytes(lambda: theirs(x), exclude=(x, *shared))
    assert there >= 256 * 256 * 4, "its scaled basis at least"
    assert saved_bytes(lambda: fused(x), exclude=(x, fused)) == 0


def test_several_layers_share_bases_and_none_is_in_the_state():
    model = peft_model(12, 20, 3)
    shared = model[0].randlora_A["default"], model[0].randlora_B["default"]
    first, second = (RandLoRALinear(nn.Linear(*s, dtype=F64), r=3, alpha=3, bases=shared) for s in [(12, 20), (20, 25)])
    assert first.bases[1] is second.bases[1]
    assert "basis_seed" not in first.state_dict() and len(list(first.buffers())) == 0
    second(first(torch.randn(4, 12, dtype=F64))).sum().backward()
    assert second.randlora_lambda.grad.any()


@pytest.mark.parametrize(("k", "n"), SIZES)
def test_merge_unmerge_disabled_and_state(k, n):
    fused = layer(k, n, dropout=0.3).eval()
    x = torch.randn(6, k, dtype=F64)
    active, plain, weight = fused(x).detach(), F.linear(x, fused.weight, fused.bias), fused.weight.detach().clone()
    with fused.disabled(), fused.disabled():
        assert torch.equal(fused(x), plain)
    fused.merge()
    torch.testing.assert_close(fused(x), active)
    with fused.disabled():
        torch.testing.assert_close(fused(x), plain)
    twin = layer(k, n, seed=5).eval()
    twin.load_state_dict(copy.deepcopy(fused.state_dict()))
    for one in (fused, twin):
        assert one.merged
        one.unmerge()
        torch.testing.assert_close(one.weight.data, weight)
        torch.testing.assert_close(one(x), active)
    with pytest.raises(ValueError, match="unmerge: expected a merged layer"):
        fused.unmerge()
    with torch.no_grad():
        fused.randlora_lambda[0, 0] = torch.nan
    with pytest.raises(ValueError, match="randlora_lambda: expected finite adapter weights"):
        fused.merge()
    torch.testing.assert_close(fused.weight.data, weight)


def test_compile_fullgraph_checkpoint_and_autocast():
    torch._dynamo.reset()
    fused = layer(dropout=0.4)
    x = torch.randn(6, 12, dtype=F64)
    torch.manual_seed(1)
    eager = run(fused, x, learned(fused))
    for way in (
        torch.compile(fused, fullgraph=True, backend="aot_eager"),
        lambda x: checkpoint(fused, x, use_reentrant=False),
    ):
        torch.manual_seed(1)
        for one, two in zip(run(way, x, learned(fused)), eager, strict=True):
            torch.testing.assert_close(one, two)
    half = layer(dtype=torch.float32).eval()
    with torch.autocast("cpu", torch.bfloat16):
        y = half(x.float())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), half(x.float()), rtol=0.1, atol=0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5).int()}, "x: expected a floating tensor"),
        ({"base": torch.zeros(7, 4)}, r"base: expected \[N, 5\] in torch.float32, got shape \(7, 4\)"),
        ({"lam": torch.zeros(2, 2)}, r"lam: expected a floating tensor \[r, ceil\(5 / r\)\], got shape \(2, 2\)"),
        ({"lam": torch.zeros(0, 3)}, r"lam: expected .*got shape \(0, 3\)"),
        ({"gam": torch.zeros(3, 7)}, r"gam: expected a floating tensor \[3, 5\], got shape \(3, 7\)"),
        ({"basis_seed": None}, "basis_seed: expected either basis_seed or bases, got neither"),
        ({"basis_seed": torch.zeros(1)}, "basis_seed: expected an int64 tensor of one element, got torch.float32"),
        ({"bases": (torch.zeros(2, 1, 5), torch.zeros(7, 3, 2))}, "either basis_seed or bases, got both"),
        ({"bases": (torch.zeros(2, 5), torch.zeros(7, 3, 2)), "basis_seed": None}, r"bases\[0\]: expected a floating"),
        ({"bases": (torch.zeros(2, 1, 5), torch.zeros(6, 3, 2)), "basis_seed": None}, r"bases\[1\]: expected \[>= 7"),
        ({"p": 0.5}, "seed: expected an int64 tensor of one element, got None"),
        ({"p": -1.0}, r"p: expected a probability in \[0, 1\]"),
        ({"bias": torch.zeros(5)}, r"bias: expected \[7\] in torch.float32"),
        ({"lam": torch.zeros(2, 3, device="meta")}, r"lam: expected device cpu \(x's\), got device meta"),
    ],
)
def test_bad_arguments(change, message):
    given = {"x": torch.zeros(2, 5), "base": torch.zeros(7, 5), "lam": torch.zeros(2, 3), "gam": torch.zeros(3, 5)}
    given |= {"scale": 1.0, "basis_seed": torch.tensor([1])} | change
    with pytest.raises(ValueError, match="^lowmem.randlora_linear: .*" + message):
        randlora_linear(**given)


def test_refusals():
    for options, message in [
        ({"r": 13}, r"r: expected at most min\(K, N\) = 12, got 13"),
        ({"r": 0}, "r: expected an integer >= 1, got 0"),
        ({"seed": -1}, r"seed: expected an integer in \[0, 2\*\*63\), got -1"),
    ]:
        with pytest.raises(ValueError, match="^lowmem.RandLoRALinear: " + message):
            layer(**({"alpha": 4} | options))
    with pytest.raises(TypeError, match="base: expected an nn.Linear .*, got RandLoRALinear"):
        RandLoRALinear(layer(), r=2, alpha=2)
