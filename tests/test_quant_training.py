"""Training quantized weights: PEQA's scales and zeros, LR-QAT's lattice; gradients against float64 autograd of the
dense formulas, what is saved, merging."""

import pytest
import torch
from quant_cases import weight
from torch import nn

from lowmem import memory
from lowmem.nn import LRQATLinear, QuantLinear
from lowmem.ops import lattice_linear, qmatmul, qscale_grad, quant_lattice, quant_scale
from lowmem.ops import quant as quant_ops
from lowmem.quant import QuantSpec, dequantize, quantize
from lowmem.testing import assert_close_to_reference, reference_pair, saved_bytes, saved_for_backward, terms_of

pytestmark = pytest.mark.usefixtures("poisoned")

SPECS = {
    "int4-row": QuantSpec("int4", -1, scale_dtype=torch.float32),
    "int3-g32": QuantSpec("int3", 32),
    "int2-g16-zero": QuantSpec("int2", 16, zero_point=True),
    "int8-row-zero": QuantSpec("int8", -1, zero_point=True, scale_dtype=torch.float16),
    "nf4-g32": QuantSpec("nf4", 32),
    "nf3-nested": QuantSpec("nf3", 32, double_quant=True),
}
every_spec = pytest.mark.parametrize("name", SPECS)


def dense_of(q, scale, zero):
    """``W`` in float64 as a function of scales and zeros."""
    spec = q.spec
    codes = quant_ops.codes_reference(q.packed, spec, q.cols, 0, q.rows).view(*q.shape[:-1], scale.shape[-1], -1)
    values = quant_ops.code_table(spec.format).double()[codes.long()] if spec.is_table else codes.double()
    if not spec.is_table:
        values = values - (2 ** (spec.bits - 1) if zero is None else zero[..., None])
    return (values * scale[..., None]).view(q.shape)


def scales_of(q):
    """Scales in float64, and zeros, of the shape ``[..., N, groups]``."""
    groups = q.spec.scale_count(1, q.cols)
    index = torch.arange(q.rows * groups)
    s = quant_ops.scales_reference(q.scale, q.scale_code, q.scale_absmax, q.scale_offset, q.spec, index)
    shape = (*q.shape[:-1], groups)
    return s.double().view(shape), None if q.zero is None else q.zero.double().view(shape)


@every_spec
@pytest.mark.parametrize("shape", [(12, 96), (300, 64), (3, 20, 64)])
def test_scale_gradients(name, shape, device):
    q = quantize(weight(*shape), SPECS[name])
    lead = shape[:-2] + (7,)
    dy, x = torch.randn(*lead, shape[-2]).double(), torch.randn(*lead, shape[-1]).double()
    scale, zero = scales_of(q)
    scale.requires_grad_()
    inputs = [scale] if zero is None else [scale, zero.requires_grad_()]
    expected = torch.autograd.grad(x @ dense_of(q, scale, zero).mT, inputs, dy)
    found = qscale_grad(dy.to(device), x.to(device), q.to(device))
    assert (found[1] is None) == (zero is None)
    for one, exact in zip(found, expected, strict=False):
        assert one.shape == exact.shape and one.dtype == torch.float64
        assert torch.allclose(one.cpu(), exact, rtol=1e-11, atol=1e-11 * float(exact.abs().max()))


@every_spec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scale_gradients_in_training_dtypes(name, dtype, device):
    q = quantize(weight(40, 96), SPECS[name]).to(device)
    dy, x = torch.randn(33, 40, device=device).to(dtype), torch.randn(33, 96, device=device).to(dtype)
    dy.div_(8)
    weight_args = (*q.tensors(), q.spec.code, 40, 96, 0)

    def formula(dy, x):
        ds, dz = quant_ops.scale_grad_reference(dy, x, *weight_args)
        return ds, dz if q.zero is not None else ds

    exact, lowprec = reference_pair(formula, dy, x)
    terms = terms_of(formula, dy, x)
    for found, good, low, size in zip(qscale_grad(dy, x, q), exact, lowprec, terms, strict=True):
        if found is not None:
            assert_close_to_reference(found, good, low.to(found.dtype), terms=size, what=name)


def layer_of(name, n=24, k=96, bias=True, **options):
    linear = nn.Linear(k, n, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(weight(n, k))
    return QuantLinear.from_linear(linear, SPECS[name], train_scale=True, **options)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n", [24, 130])
@pytest.mark.parametrize("name", ["int4-row", "int3-g32", "int2-g16-zero", "int8-row-zero", "nf4-g32"])
def test_layer_against_the_dense_formula(name, n, bias, device):
    zeros = "zero" in name
    layer = layer_of(name, n=n, bias=bias, train_zero=zeros).to(device)
    q = layer.base
    x = torch.randn(2, 5, 96, dtype=torch.float64, device=device, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    scale = q.scale.detach().double().cpu().requires_grad_()
    zero = q.zero.detach().double().cpu().requires_grad_() if zeros else None
    again = x.detach().cpu().requires_grad_()
    dense = again @ dense_of(q.to("cpu"), scale, zero).T + (layer.bias.detach().double().cpu() if bias else 0)
    dense.backward(dy.cpu())
    pairs = [(y, dense), (x.grad, again.grad), (layer.weight_scale.grad, scale.grad)]
    pairs += [(layer.weight_zero.grad, zero.grad)] if zeros else []
    for found, exact in pairs:
        limit = 3e-7  # an element of W is rounded to fp32, and so are the gradients of fp32 parameters
        assert found.shape == exact.shape
        assert torch.allclose(found.cpu().double(), exact, rtol=limit, atol=limit * float(exact.detach().abs().max()))
    assert layer.weight.grad is None and (
        not bias or torch.allclose(layer.bias.grad.cpu(), dy.cpu().sum((0, 1)).float())
    )


def test_what_is_saved_and_no_dw():
    m, n, k = 64, 48, 256
    x = torch.randn(m, k, requires_grad=True)
    for name, bias, size in (("int4-row", False, m * n), ("int4-row", True, m * k), ("int3-g32", False, m * k)):
        layer = layer_of(name, n=n, k=k, bias=bias)
        kept = saved_for_backward(lambda layer=layer: layer(x), exclude=(layer,))
        assert sum(s.bytes for s in kept) == 4 * size, (name, bias)
    frozen = QuantLinear.from_linear(nn.Linear(k, n), "int4")
    assert saved_bytes(lambda: frozen(x), exclude=(frozen, x)) == 0
    # scratch holds panels alone: 256 of 1024 rows of dW, and of the codes' values
    layer = layer_of("int3-g32", n=1024, k=64)
    memory.release_workspace()
    memory.WORKSPACE._peak = 0
    qscale_grad(torch.randn(4, 1024), torch.randn(4, 64), layer.base)
    assert memory.workspace().peak == 2 * 4 * quant_scale.PANEL * 64 < 4 * 1024 * 64


def test_a_scale_that_reaches_zero():
    layer = layer_of("int4-row", n=16, bias=False)
    with torch.no_grad():
        layer.weight_scale[3] = 0
        layer.weight_scale[4] = 1e-35
    x = torch.randn(6, 96)
    layer(x).sum().backward()
    grad = layer.weight_scale.grad
    assert grad.isfinite().all() and grad[3] == 0 and grad[4] == 0 and (grad[:3] != 0).all()
    zeros = quantize(torch.zeros(8, 96), SPECS["int4-row"])
    layer = QuantLinear.from_qtensor(zeros, train_scale=True)
    layer(x).sum().backward()
    assert torch.equal(layer.weight_scale.grad, torch.zeros(8, 1))


@pytest.mark.parametrize("name", ["int4-row", "int2-g16-zero"])
def test_rows_in_parts(name, monkeypatch):
    q = quantize(weight(20, 96), SPECS[name])
    dy, x = torch.randn(11, 20).double(), torch.randn(11, 96).double()
    y, scale = torch.randn(11, 20).double(), torch.rand(20, 1).double() + 1
    whole = qscale_grad(dy, x, q)
    monkeypatch.setattr(quant_scale, "ROWS", 4)
    monkeypatch.setattr(quant_scale, "PANEL", 7)
    again = qscale_grad(dy, x, q)
    for one, two in zip(whole, again, strict=True):
        assert (one is None and two is None) or torch.allclose(one, two, rtol=1e-12, atol=1e-12)
    in_parts = quant_scale.row_scale_grad(dy, y, scale)
    assert torch.allclose(in_parts, ((dy * y).sum(0) / scale[:, 0])[:, None], rtol=1e-12)


def test_one_expert_and_all():
    from dataclasses import replace

    q = quantize(weight(3, 20, 64), QuantSpec("int4", 32, scale_dtype=torch.float32))
    s = q.scale.clone().requires_grad_()
    q = replace(q, scale=s)
    x = torch.randn(3, 7, 64)
    (all_,) = torch.autograd.grad(qmatmul(x, q).sum(), s)
    (one,) = torch.autograd.grad(qmatmul(x[1], q, expert=1).sum(), s)
    assert torch.allclose(one[1], all_[1], rtol=1e-5) and not one[0].any() and not one[2].any()


def test_peqa_trains_scales_alone_and_swaps_tasks():
    torch.manual_seed(0)
    target = nn.Linear(96, 24)
    layer = QuantLinear.from_linear(target, SPECS["int3-g32"], train_scale=True)
    layer.bias.requires_grad_(False)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["weight_scale"]
    before, codes = layer.weight_scale.detach().clone(), layer.weight.clone()
    optimizer = torch.optim.AdamW([layer.weight_scale], lr=1e-3)
    x = torch.randn(256, 6) @ torch.randn(6, 96) + 0.1 * torch.randn(256, 96)
    losses = []
    for _ in range(100):
        loss = (layer(x) - target(x)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0] and torch.equal(layer.weight, codes)
    state = layer.state_dict()
    again = QuantLinear.from_linear(target, SPECS["int3-g32"], train_scale=True)
    again.load_state_dict(state)
    assert torch.equal(again(x), layer(x)) and not torch.equal(before, again.weight_scale)
    assert layer.half().weight_scale.dtype == torch.float32  # a cast of the model does not touch what trains


def test_scales_that_cannot_train():
    linear = nn.Linear(96, 24)
    for spec, options, message in (
        (SPECS["nf3-nested"], {"train_scale": True}, "train_scale: expected a spec with double_quant=False"),
        (QuantSpec("nf4", 64), {"train_scale": True}, "train_scale: expected groups within rows of K = 96"),
        (SPECS["int3-g32"], {"train_zero": True}, "train_zero: expected a spec with zero_point=True"),
    ):
        with pytest.raises(ValueError, match=rf"lowmem\.QuantLinear: {message}"):
            QuantLinear.from_linear(linear, spec, **options)


@pytest.mark.parametrize("name", ["int4-row", "int3-g32"])
def test_scales_train_under_compile(name):
    layer = layer_of(name, bias=False)
    x = torch.randn(8, 96)
    layer(x).square().sum().backward()
    eager, layer.weight_scale.grad = layer.weight_scale.grad, None
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    assert torch.allclose(layer.weight_scale.grad, eager, rtol=1e-6)


# -------------------------------------------------------------------------------------------------------------- LR-QAT


def lattice_by_hand(x, phi, a, b, scale, c, bits):
    """The dense formula in float64 with a straight-through estimator."""
    half = 2 ** (bits - 1)
    z = phi.double() * (1 if phi.is_floating_point() else 2.0 ** (bits - 8)) + c * (b @ a)
    rounded = z + (z.round() - z).detach()
    on = ((rounded.detach() >= -half) & (rounded.detach() <= half - 1)).double()
    clipped = rounded * on + (rounded.clamp(-half, half - 1) * (1 - on)).detach()
    w = (clipped.view(*scale.shape, -1) * scale[..., None]).view(phi.shape)
    return x @ w.T


def lattice_case(bits, groups, phi, n=20, k=96, r=5, dtype=torch.float64):
    g = torch.Generator().manual_seed(bits)
    half = 2 ** (bits - 1)
    z = torch.randn(n, k, generator=g).double() * half * 0.6  # some beyond the lattice
    z = z.clamp(-half, half - 2.0 ** (bits - 8))
    stored = (z * 2 ** (8 - bits)).round().clamp(-128, 127).to(torch.int8) if phi == "int8" else z.bfloat16()
    a, b = torch.randn(r, k, generator=g).to(dtype), (torch.randn(n, r, generator=g) * 0.3).to(dtype)
    scale = (torch.rand(n, groups, generator=g) * 0.05 + 0.01).to(dtype)
    x = torch.randn(9, k, generator=g).to(dtype)
    return x, stored, a, b, scale


@pytest.mark.parametrize("phi", ["int8", "bf16"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_lattice_gradients(bits, groups, phi, device):
    x, stored, a, b, scale = (t.to(device) for t in lattice_case(bits, groups, phi))
    bias = torch.randn(20, dtype=torch.float64, device=device)
    inputs = [t.requires_grad_() for t in (x, a, b, scale, bias)]
    y = lattice_linear(x, stored, a, b, scale, 0.7, bits, bias=bias)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, inputs, dy)
    dense = lattice_by_hand(x, stored, a, b, scale, 0.7, bits) + bias
    expected = torch.autograd.grad(dense, inputs, dy)
    assert torch.allclose(y, dense, rtol=1e-12)
    z = stored.double() * (2.0 ** (bits - 8) if phi == "int8" else 1) + 0.7 * (b @ a)
    assert bool((z.round() >= 2 ** (bits - 1)).any())  # the mask is at work
    for one, exact in zip(found, expected, strict=True):
        assert torch.allclose(one, exact, rtol=1e-10, atol=1e-11 * float(exact.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lattice_gradients_in_training_dtypes(dtype):
    x, stored, a, b, scale = lattice_case(4, 3, "int8", n=300, dtype=torch.float32)
    x, dy = x.to(dtype), torch.randn(9, 300).to(dtype)
    found = torch.ops.lowmem.quant_lattice_grad(dy, x, stored, a, b, scale, 0.7, 4)
    exact = quant_lattice.grad_reference(dy.double(), x.double(), stored, a, b, scale, 0.7, 4)
    lowprec = quant_lattice.grad_reference(dy, x, stored, a, b, scale, 0.7, 4)
    dw = dy.double().abs().T @ x.double().abs()
    s = scale.double().repeat_interleave(32, 1)
    terms = (b.double().abs().T @ (dw * s), (dw * s) @ a.double().abs().T, dw.view(300, 3, -1).sum(-1) * 8)
    for name, one, good, low, size in zip(("dA", "dB", "ds"), found, exact, lowprec, terms, strict=True):
        assert_close_to_reference(one, good, low, terms=size, what=name)


@pytest.mark.parametrize("phi", ["int8", "bf16"])
@pytest.mark.parametrize("group", [-1, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_merge_is_exact(bits, group, phi):
    linear = nn.Linear(64, 300)
    layer = LRQATLinear.from_linear(linear, bits=bits, group_size=group, r=4, phi=phi)
    with torch.no_grad():
        layer.lora_B.normal_().mul_(0.5)
        layer.weight_scale.mul_(1.1)
    merged = layer.merge()
    w = dequantize(merged.base, torch.float32)
    assert torch.equal(layer(torch.eye(64)), w.T + layer.bias) and merged.bias is layer.bias
    x = torch.randn(5, 64)
    assert torch.equal(torch.nn.functional.linear(x, w, layer.bias), layer(x))
    assert torch.allclose(merged(x), layer(x), rtol=1e-5, atol=1e-5)
    assert merged.base.packed.nbytes == 300 * 64 * bits // 8 and merged.train(False)(x).shape == (5, 300)


def test_start_and_rounding_of_phi():
    linear = nn.Linear(96, 24, bias=False)
    for bits in (2, 3, 4, 8):
        fine = LRQATLinear.from_linear(linear, bits=bits, r=4, phi="int8")
        s = fine.weight_scale.detach()
        half = 2 ** (bits - 1)
        steps = (linear.weight.detach() / s).clamp(-half, half - 2.0 ** (bits - 8))
        error = (fine.weight_phi.float() * 2.0 ** (bits - 8) - steps).abs().max()
        assert error <= 2.0 ** -(9 - bits) + 1e-6
        start = dequantize(
            quantize(linear.weight, QuantSpec(f"int{bits}", -1, scale_dtype=torch.float32), method="mse")
        )
        moved = (dequantize(fine.merge().base) - start).abs() > 1e-6  # phi's rounding moves what lies between two steps
        assert moved.float().mean() < 0.1 if bits < 8 else not moved.any()


def test_lrqat_learns_and_beats_rounding():
    torch.manual_seed(0)
    target = nn.Linear(64, 48)
    layer = LRQATLinear.from_linear(target, bits=2, group_size=32, r=8)
    # inputs of few directions: which way an element rounds matters less than what the row does to them
    x = torch.randn(512, 6) @ torch.randn(6, 64) + 0.1 * torch.randn(512, 64)

    def loss():
        return (layer(x) - target(x)).square().mean()

    first = loss().item()
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad and p is not layer.bias], lr=3e-3)
    for _ in range(150):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss().item() < 0.5 * first
    merged = layer.merge()
    assert (merged(x) - target(x)).square().mean().item() == pytest.approx(loss().item(), rel=1e-4)


def test_lrqat_saves_x_alone():
    layer = LRQATLinear(256, 128, bits=4, r=8)
    x = torch.randn(64, 256, requires_grad=True)
    assert saved_bytes(lambda: layer(x), exclude=(layer, x)) == 0
    sizes = {n: p.nbytes for n, p in layer.named_parameters()}
    assert sizes["weight_phi"] == 128 * 256
    trained = sum(p.nbytes for n, p in layer.named_parameters() if p.requires_grad and n != "bias")
    assert trained == 4 * (8 * (128 + 256) + 128)


def test_lrqat_under_compile_and_autocast():
    layer = LRQATLinear(64, 32, bits=3, group_size=32, r=4)
    with torch.no_grad():
        layer.lora_B.normal_()
    x = torch.randn(6, 64)
    layer(x).square().sum().backward()
    eager = {n: p.grad.clone() for n, p in layer.named_parameters() if p.requires_grad}
    layer.zero_grad()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    for name, p in layer.named_parameters():
        if p.requires_grad:
            assert torch.allclose(p.grad, eager[name], rtol=1e-5, atol=1e-6), name
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_opcheck():
    x, stored, a, b, scale = lattice_case(4, 3, "int8", dtype=torch.float32)
    dy = torch.randn(9, 20)
    ops = torch.ops.lowmem
    torch.library.opcheck(ops.quant_lattice_codes, (stored, a, b, 0.5, 4, 3, 9))
    for transposed in (False, True):
        args = (dy if transposed else x, stored, a, b, scale, 0.5, 4, None, transposed)
        torch.library.opcheck(ops.quant_lattice_matmul, args)
    torch.library.opcheck(ops.quant_lattice_grad, (dy, x, stored, a, b, scale, 0.5, 4))
    q = quantize(weight(20, 96), SPECS["int2-g16-zero"])
    torch.library.opcheck(ops.quant_scale_grad, (dy, x, *q.tensors(), q.spec.code, 20, 96, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "bits: expected 2, 3, 4 or 8"),
        ({"r": 0}, "r: expected an integer >= 1"),
        ({"phi": "fp8"}, "phi: expected 'int8' or 'bf16'"),
        ({"alpha": float("nan")}, "alpha: expected a finite number"),
    ],
)
def test_bad_lrqat(change, message):
    with pytest.raises(ValueError, match=rf"lowmem\.LRQATLinear: {message}"):
        LRQATLinear(64, 32, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 64)}, "x: expected shape"),
        ({"x": torch.ones(2, 96, dtype=torch.int32)}, "x: expected a floating dtype"),
        ({"phi": torch.ones(20, 96, dtype=torch.int32)}, "phi: expected"),
        ({"A": torch.ones(5, 64)}, "A: expected"),
        ({"B": torch.ones(20, 4)}, "B: expected"),
        ({"scale": torch.ones(20, 7)}, "scale: expected"),
        ({"bits": 5}, "bits: expected"),
        ({"bias": torch.ones(3)}, "bias: expected"),
    ],
)
def test_bad_lattice(change, message):
    x, stored, a, b, scale = lattice_case(4, 3, "int8", dtype=torch.float32)
    arguments = {"x": x, "phi": stored, "A": a, "B": b, "scale": scale, "c": 0.5, "bits": 4, **change}
    with pytest.raises((ValueError, TypeError), match=rf"lowmem\.lattice_linear: {message}"):
        lattice_linear(**arguments)
