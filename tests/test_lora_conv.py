"""LoRA on 2-D convolutions: against PEFT's layer and plain torch, the seed's mask, bytes, merging, bad input."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowmem
from lowmem.nn import FusedLoRAConv2d, disabled
from lowmem.ops import lora_conv2d
from lowmem.ops.philox import inv_keep, keep_mask
from lowmem.testing import assert_close_to_reference, saved_bytes, terms_of

F64 = torch.float64
pytestmark = pytest.mark.usefixtures("poisoned")

GEOMETRIES = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "1x1": {"kernel_size": 1},
    "strided": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1)},
    "same": {"kernel_size": (4, 3), "padding": "same"},
    "valid": {"kernel_size": 2, "padding": "valid"},
}
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def layer(c=4, n=6, dtype=F64, r=3, geometry="3x3", device="cpu", **options):
    base = nn.Conv2d(c, n, **GEOMETRIES[geometry], dtype=dtype, device=device)
    made = FusedLoRAConv2d(base, **({"r": r, "alpha": 2 * r} | options))
    for b in made.lora_B.values():
        nn.init.normal_(b)
    return made


def run(module, x, leaves):
    x = x.detach().requires_grad_()  # keeps the memory format
    y = module(x)
    upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, [x, *leaves], upstream)]


def adapters(fused):
    return [fused.lora_A["default"], fused.lora_B["default"]]


@pytest.mark.parametrize("shape", [(2, 4, 7, 6), (1, 4, 5, 5), (0, 4, 5, 5), (4, 5, 5)])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_equals_peft_layer(shape, geometry):
    peft = pytest.importorskip("peft")
    fused = layer(geometry=geometry)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"])
    base = nn.Conv2d(4, 6, **GEOMETRIES[geometry], dtype=F64)
    twin = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False).base_model.model[0]
    with torch.no_grad():
        twin.base_layer.load_state_dict({"weight": fused.weight, "bias": fused.bias})
        twin.lora_A["default"].weight.copy_(fused.lora_A["default"])
        twin.lora_B["default"].weight.copy_(fused.lora_B["default"])
    x = torch.randn(shape, dtype=F64)
    theirs = run(twin, x, [twin.lora_A["default"].weight, twin.lora_B["default"].weight])
    for memory in FORMATS.values() if len(shape) == 4 else [torch.contiguous_format]:
        for ours, other in zip(run(fused, x.contiguous(memory_format=memory), adapters(fused)), theirs, strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-11, atol=1e-11)


def composed(x, w, bias, a, b, scale, p, seed, options):
    keep = keep_mask(x.shape[0] * x.shape[1], x.shape[2] * x.shape[3], p, seed).view(x.shape)
    dropped = torch.where(keep, x, 0) * inv_keep(p)
    return F.conv2d(x, w, bias, **options) + scale * F.conv2d(F.conv2d(dropped, a, **options), b)


@pytest.mark.parametrize("memory", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2, "dilation": (1, 2)}], ids=["padded", "dilated"])
def test_every_gradient_against_plain_torch(memory, p, options):
    seed = torch.tensor([77])
    sizes = [(2, 3, 8, 7), (5, 3, 3, 3), (5,), (2, 3, 3, 3), (5, 2, 1, 1)]
    x, w, bias, a, b = (torch.randn(s, dtype=F64, requires_grad=True) for s in sizes)
    given = x.detach().contiguous(memory_format=memory)
    ours = run(lambda x: lora_conv2d(x, w, a, b, 1.3, bias=bias, p=p, seed=seed, **options), given, [w, bias, a, b])
    theirs = run(lambda x: composed(x, w, bias, a, b, 1.3, p, seed, options), given, [w, bias, a, b])
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("memory", FORMATS.values(), ids=FORMATS)
def test_gradcheck(memory):
    x, w, a, b = (torch.randn(s, dtype=F64) for s in [(2, 3, 4, 4), (4, 3, 2, 2), (2, 3, 2, 2), (4, 2, 1, 1)])
    leaves = [t.requires_grad_() for t in (x.contiguous(memory_format=memory), a, b)]
    seed = torch.tensor([5])
    assert torch.autograd.gradcheck(lambda x, a, b: lora_conv2d(x, w, a, b, 0.7, p=0.25, seed=seed), leaves)


@pytest.mark.parametrize("memory", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_bf16_by_the_error_rule(memory, adapter, device):
    fused = layer(8, 16, dtype=torch.bfloat16, adapter_dtype=adapter, device=device, r=4)
    x = torch.randn(3, 8, 6, 6, device=device).bfloat16().contiguous(memory_format=memory).requires_grad_()
    y = fused(x)
    dy = torch.randn(y.shape, device=device).bfloat16()
    ours = [y.detach(), *torch.autograd.grad(y, [x, *adapters(fused)], dy)]
    parts = [t.detach() for t in (x, fused.weight, fused.bias, *adapters(fused), dy)]

    def reference(x, w, bias, a, b, dy):
        a, b, out = a.to(x.dtype), b.to(x.dtype), (a.dtype, b.dtype)
        s = 2.0 * F.conv2d(x, a, padding=1)
        ds = 2.0 * torch.einsum("nr,bnhw->brhw", b[:, :, 0, 0], dy)
        dx = nn.grad.conv2d_input(x.shape, w, dy, padding=1) + nn.grad.conv2d_input(x.shape, a, ds, padding=1)
        da = nn.grad.conv2d_weight(x, a.shape, ds, padding=1).to(out[0])
        db = torch.einsum("bnhw,brhw->nr", dy, s)[..., None, None].to(out[1])
        return F.conv2d(x, w, bias, padding=1) + F.conv2d(s, b), dx, da, db

    exact = reference(*(t.double() for t in parts))
    terms = terms_of(reference, *parts)
    x64, w64, bias64, _, _, dy64 = (t.double() for t in parts)
    base = F.conv2d(x64, w64, bias64, padding=1), nn.grad.conv2d_input(x.shape, w64, dy64, padding=1)
    rounded = [[base[0]], [base[1]], [], []]
    for got, wide, low, sums, middle in zip(ours, exact, reference(*parts), terms, rounded, strict=True):
        assert_close_to_reference(got, wide, low, terms=sums, rounded=middle, rounded_to=torch.bfloat16)


def test_what_is_saved():
    x = torch.randn(2, 8, 6, 6).bfloat16().requires_grad_()
    fused = layer(8, 16, dtype=torch.bfloat16, dropout=0.1, r=4)
    pixels = 2 * 6 * 6
    assert saved_bytes(lambda: fused(x)) == 2 * 8 * pixels + 2 * 4 * pixels + 8  # x, S, the seed
    only_b = layer(8, 16, dtype=torch.bfloat16, r=4, train=("B",))
    assert saved_bytes(lambda: only_b(x)) == 2 * 4 * pixels
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_dropout=0.1, target_modules=["0"])
    twin = peft.get_peft_model(nn.Sequential(nn.Conv2d(8, 16, 3, padding=1).bfloat16()), config)
    twin = twin.to(torch.bfloat16).train()
    assert saved_bytes(lambda: fused(x)) < 0.65 * saved_bytes(lambda: twin(x))


def test_dropout_only_while_training_and_under_the_generators_seed():
    fused = layer(dropout=0.5)
    x = torch.randn(2, 4, 5, 5, dtype=F64)
    torch.manual_seed(3)
    first = fused(x)
    assert not torch.equal(fused(x), first)
    torch.manual_seed(3)
    assert torch.equal(fused(x), first)
    fused.eval()
    assert torch.equal(fused(x), fused(x))


@pytest.mark.parametrize("memory", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("geometry", ["3x3", "1x1", "strided"])
def test_merge_unmerge_disabled_and_state(geometry, memory):
    fused = layer(geometry=geometry).to(memory_format=memory).eval()
    x = torch.randn(2, 4, 7, 6, dtype=F64)
    active, weight = fused(x).detach(), fused.weight.detach().clone()
    plain = F.conv2d(x, weight, fused.bias, fused.stride, fused.padding)
    with fused.disabled():
        torch.testing.assert_close(fused(x), plain)
    fused.merge()
    torch.testing.assert_close(fused(x), active)
    with disabled(nn.ModuleList([fused])):
        torch.testing.assert_close(fused(x), plain)
    twin = layer(geometry=geometry).eval()
    twin.load_state_dict(copy.deepcopy(fused.state_dict()))
    assert list(twin.state_dict()) == ["weight", "bias", "lora_A.default", "lora_B.default"]
    for one in (fused, twin):
        one.unmerge()
        torch.testing.assert_close(one.weight.data, weight)
        torch.testing.assert_close(one(x), active)


@pytest.mark.parametrize("memory", FORMATS.values(), ids=FORMATS)
def test_compile_fullgraph(memory):
    torch._dynamo.reset()
    fused = layer()
    x = torch.randn(2, 4, 7, 6, dtype=F64).contiguous(memory_format=memory)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(run(compiled, x, adapters(fused)), run(fused, x, adapters(fused)), strict=True):
        torch.testing.assert_close(ours, eager)


def test_autocast_is_the_convolutions():
    fused = layer(dtype=torch.float32)
    x = torch.randn(2, 4, 7, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = fused(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), fused(x), rtol=0.05, atol=0.05)


def test_convert_names_it_and_trains(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4))
    lowmem.convert(model, r=2, target_modules=["0", "3"])
    assert isinstance(model[0], FusedLoRAConv2d)
    x, target = torch.randn(16, 3, 4, 4), torch.randint(0, 4, (16,))
    optimizer = torch.optim.AdamW(lowmem.optim.lora_plus_groups(model, 1e-2))
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert "2 of 2 layers converted" in str(lowmem.report(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4)}, r"x: expected a floating tensor \[batch, C, H, W\] or .*, got shape \(3, 4\)"),
        ({"base": torch.zeros(4, 1, 2, 2)}, r"base: expected \[N, 3, kh, kw\] in torch.float32, .*groups"),
        ({"A": torch.zeros(2, 3, 1, 1)}, r"A: expected a floating tensor \[r, 3, 2, 2\]"),
        ({"B": torch.zeros(4, 3, 1, 1)}, r"B: expected a floating tensor \[4, 2, 1, 1\]"),
        ({"bias": torch.zeros(3)}, r"bias: expected \[4\] in torch.float32"),
        ({"p": 1.5}, r"p: expected a probability in \[0, 1\], got 1.5"),
        ({"p": 0.5}, "seed: expected int64 of one element on cpu, since p > 0, got None"),
        ({"padding": "same", "stride": 2}, "padding: expected numbers, 'valid', or 'same' with stride 1"),
        ({"A": torch.zeros(2, 3, 2, 2, device="meta")}, r"A: expected device cpu \(x's\), got device meta"),
    ],
)
def test_bad_arguments(change, message):
    sizes = {"x": (2, 3, 4, 4), "base": (4, 3, 2, 2), "A": (2, 3, 2, 2), "B": (4, 2, 1, 1)}
    given = {name: torch.zeros(size) for name, size in sizes.items()} | {"scale": 1.0} | change
    with pytest.raises(ValueError, match="^lowmem.lora_conv2d: " + message):
        lora_conv2d(**given)


def test_refusals():
    for base, message in [
        (nn.Conv1d(4, 4, 1), "expected an nn.Conv2d .*, got Conv1d"),
        (nn.Conv2d(4, 4, 1, groups=2), "expected groups=1, got groups=2"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "expected padding_mode='zeros', got 'reflect'"),
    ]:
        with pytest.raises((ValueError, TypeError), match="^lowmem.FusedLoRAConv2d: base: " + message):
            FusedLoRAConv2d(base, r=2, alpha=2)
    with pytest.raises(TypeError, match="a convolution with groups=2"):
        lowmem.convert(nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)), r=2, target_modules=["0"])
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="convert: use_dora, gate: expected False, since '0' is no nn.Linear"):
        lowmem.convert(model, r=2, target_modules=["0", "1"], use_dora=True)
    assert all(p.requires_grad for p in model.parameters()) and type(model[1]) is nn.Linear
