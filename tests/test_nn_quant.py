"""QuantLinear, and packed bases under LoRA: what a training loop, a checkpoint and a compiler ask of them."""

import copy
import io
import pickle

import pytest
import torch
from quant_cases import SPECS, packed, weight
from torch import nn

import lowmem
from lowmem import memory
from lowmem.nn import FusedLoRAGroup, FusedLoRALinear, MultiLoRALinear, QuantLinear
from lowmem.ops import lora_linear, multi_lora_linear
from lowmem.quant import QuantSpec, dequantize, quantize
from lowmem.testing import assert_close_to_reference, saved_bytes

LAYERS = {
    "nf4-nested": QuantSpec("nf4", 64, double_quant=True),
    "nf3": QuantSpec("nf3"),
    "int4-zero": QuantSpec("int4", 32, zero_point=True),
    "int3-row": QuantSpec("int3", -1),
    "int8": QuantSpec("int8"),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def layer_of(name, device="cpu", n=48, k=128, bias=True, dtype=torch.float32):
    linear = nn.Linear(k, n, bias=bias).to(dtype)
    with torch.no_grad():
        linear.weight.copy_(weight(n, k))
    return QuantLinear.from_linear(linear, LAYERS[name]).to(device)


def with_dense(layer):
    """The same layer with its dequantized weight, as plain torch."""
    dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    dense = dense.to(layer.weight.device, layer.dense_dtype)
    with torch.no_grad():
        dense.weight.copy_(dequantize(layer.base))
        if layer.bias is not None:
            dense.bias.copy_(layer.bias)
    return dense


@every_layer
def test_computes_what_the_dequantized_layer_computes(name, device):
    for bias in (True, False):
        layer = layer_of(name, device, bias=bias, dtype=torch.float64)
        dense = with_dense(layer)
        x = torch.randn(2, 5, 128, dtype=torch.float64, device=device, requires_grad=True)
        grads = []
        for one in (layer, dense):
            one.zero_grad()
            y = one(x)
            (dx,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
            y.square().sum().backward()
            grads.append((y, dx, one.bias.grad if bias else None))
            x.grad = None
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want)
        assert layer.weight.grad is None and isinstance(layer, nn.Linear)


@every_layer
def test_state_dict(name, device):
    layer = layer_of(name, device)
    spec = LAYERS[name]
    want = {"weight", "weight_scale", "bias"}
    want |= {"weight_zero"} if spec.zero_point else set()
    want |= {"weight_scale_code", "weight_scale_absmax", "weight_scale_offset"} if spec.double_quant else set()
    state = layer.state_dict()
    assert set(state) == want and state["weight"].dtype == torch.uint8
    other = layer_of(name, device)
    with torch.no_grad():
        for t in other.parameters():
            t.zero_()
    other.load_state_dict(state)
    x = torch.randn(3, 128, device=device)
    assert torch.equal(other(x), layer(x))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), layer(x)) and twin.qspec == spec
        assert not any(p.requires_grad for n, p in twin.named_parameters() if n != "bias")
        assert twin.weight.data_ptr() != layer.weight.data_ptr()


def test_loading_refuses_other_bytes():
    int4, nf4 = QuantSpec("int4", 64, scale_dtype=torch.float32), QuantSpec("nf4", 64)
    linear = nn.Linear(128, 48, bias=False)
    a, b = QuantLinear.from_linear(linear, int4), QuantLinear.from_linear(linear, nf4)
    assert a.weight.shape == b.weight.shape and a.weight_scale.shape == b.weight_scale.shape
    with pytest.raises(RuntimeError, match=r"lowmem\.QuantLinear: weight: expected QuantSpec.*int4.*got nf4"):
        a.load_state_dict(b.state_dict())
    int8 = QuantLinear.from_linear(linear, "int8")
    before = int8.weight.clone()
    with pytest.raises(RuntimeError, match=r"expected packed bytes \(uint8\), got torch.float32"):
        int8.load_state_dict({**int8.state_dict(), "weight": linear.weight})  # the same shape
    assert torch.equal(int8.weight, before)
    with pytest.raises(RuntimeError, match=r"expected weight_scale in torch.bfloat16, got torch.float32"):
        int8.load_state_dict({**dict(int8.state_dict()), "weight_scale": int8.weight_scale.float()})
    lora = FusedLoRALinear(128, 48, r=2, alpha=2)
    with pytest.raises(RuntimeError, match=r"expected a floating dtype, got packed nf4"):
        lora.load_state_dict(FusedLoRALinear.from_linear(b, r=2, alpha=2).state_dict(), strict=False)


@every_layer
def test_casts_leave_the_bytes_alone(name):
    layer = layer_of(name)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    for cast in (layer.half, layer.bfloat16, lambda: layer.to(torch.float64), layer.float):
        assert cast() is layer
        for key, value in layer.state_dict().items():
            if key != "bias":
                assert torch.equal(value, before[key]) and value.dtype == before[key].dtype, key
    layer.bfloat16()
    assert layer.bias.dtype == torch.bfloat16
    assert layer(torch.randn(2, 128, dtype=torch.bfloat16)).dtype == torch.bfloat16
    moved = layer.to("meta")
    assert moved.weight.device.type == "meta" and moved.weight_scale.device.type == "meta"


@every_layer
def test_train_eval_train_keeps_gradients(name, device):
    layer = layer_of(name, device)
    x = torch.randn(3, 128, device=device, requires_grad=True)
    want = torch.autograd.grad(layer(x).sum(), x)[0]
    for _ in range(2):
        layer.eval()
        with torch.no_grad():
            layer(x)
        with torch.inference_mode():
            layer(x.detach())
        assert torch.equal(torch.autograd.grad(layer(x).sum(), x)[0], want)
        layer.train()
        assert torch.equal(torch.autograd.grad(layer(x).sum(), x)[0], want)


@every_layer
def test_no_dense_copy(name):
    layer = layer_of(name, n=1100, k=1408, dtype=torch.bfloat16)
    x = torch.randn(20, 1408, dtype=torch.bfloat16, requires_grad=True)
    memory.release_workspace()
    frozen = [p for p in layer.parameters() if not p.requires_grad]
    assert saved_bytes(lambda: layer(x), exclude=frozen) == 0
    layer(x).sum().backward()
    dense = 1100 * 1408 * 2
    state = memory.workspace()
    assert state.lent == 0 and state.held < dense
    assert sum(p.nbytes for p in frozen) == layer.base.nbytes < dense


@every_layer
def test_compile(name, device):
    layer = layer_of(name, device)
    x = torch.randn(3, 128, device=device, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    assert torch.equal(y, layer(x))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(layer(x).sum(), x)[0])


def test_from_qtensor_shares():
    q = packed(SPECS["int4-g32-zero"], 6, 64)
    layer = QuantLinear.from_qtensor(q)
    assert layer.weight.data_ptr() == q.packed.data_ptr() and layer.weight_zero.data_ptr() == q.zero.data_ptr()
    assert layer.base.packed is layer.weight and layer.bias is None
    assert repr(layer) == ("QuantLinear(in_features=64, out_features=6, bias=False, int4, group=32, zero_point)")


def test_bad_input():
    q = packed(SPECS["nf4"], 6, 64)
    with pytest.raises(TypeError, match=r"lowmem\.QuantLinear: q: expected a QTensor, got Tensor"):
        QuantLinear(torch.zeros(6, 64))
    with pytest.raises(ValueError, match=r"lowmem\.QuantLinear: q: expected a weight \[N, K\]"):
        QuantLinear(packed(SPECS["nf4"], 2, 6, 64))
    with pytest.raises(ValueError, match=r"lowmem\.QuantLinear: bias: expected a floating tensor \[6\]"):
        QuantLinear(q, torch.zeros(7))
    with pytest.raises(ValueError, match=r"lowmem\.QuantLinear: packed: expected"):
        QuantLinear(packed(SPECS["nf4"], 6, 64).map(lambda t: t.reshape(-1)[:-1]))
    with pytest.raises(TypeError, match=r"lowmem\.QuantLinear: linear: expected an nn\.Linear"):
        QuantLinear.from_linear(QuantLinear(q), "nf4")
    with pytest.raises(TypeError, match=r"lowmem\.FusedLoRALinear: linear: expected a dense weight"):
        FusedLoRALinear.from_svd(QuantLinear(q), r=2)


# --------------------------------------------------------------------------------------------------- under adapters


@pytest.mark.parametrize("p", [0.0, 0.25])
@every_layer
def test_lora_over_a_packed_base(name, p, device):
    q = quantize(weight(33, 128), LAYERS[name]).to(device)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        dense = dequantize(q, dtype)
        g = torch.Generator().manual_seed(2)

        def make(*shape, g=g, dtype=dtype):
            return torch.randn(*shape, generator=g).to(device=device, dtype=dtype).requires_grad_()

        x, a, b, gate, bias = make(7, 128), make(4, 128), make(33, 4), make(4), make(33)
        seed = torch.tensor([5], device=device)
        dy = torch.randn(7, 33, generator=g).to(device=device, dtype=dtype)

        def run(base, dtype=dtype, leaves=(x, a, b, gate, bias), seed=seed, dy=dy):
            x, a, b, gate, bias = (t.detach().to(dtype).requires_grad_() for t in leaves)
            y = lora_linear(x, base, a, b, 1.5, bias=bias, gate=gate, p=p, seed=seed)
            y.backward(dy.to(dtype))
            return y.detach(), x.grad, a.grad, b.grad, gate.grad, bias.grad

        got, lowprec, exact = run(q), run(dense), run(dense.double(), torch.float64)
        for what, one, low, wide in zip("y dx da db dgate dbias".split(), got, lowprec, exact, strict=True):
            terms = wide.abs() + 30 * wide.abs().mean()
            assert_close_to_reference(one, wide, low, terms=terms, what=f"{what} {dtype}")


def test_no_clone_and_no_dense_weight_under_lora():
    layer = FusedLoRALinear.from_linear(layer_of("nf4-nested", n=1100, k=1408, dtype=torch.bfloat16), r=8, alpha=8)
    x = torch.randn(20, 1408, dtype=torch.bfloat16, requires_grad=True)
    own = [*layer.parameters()]
    # x and S, as over a dense base
    assert saved_bytes(lambda: layer(x), exclude=[*own, x]) == 20 * 8 * 2
    memory.release_workspace()
    layer(x).sum().backward()
    assert memory.workspace().lent == 0 and memory.workspace().held < 1100 * 1408 * 2
    assert all(layer.lora_A[n].grad is not None for n in layer.lora_A)
    assert layer.lora_A["default"].dtype == torch.float32 and layer.weight.dtype == torch.uint8


@every_layer
def test_lora_module(name, device):
    packed_layer = layer_of(name, device)
    layer = FusedLoRALinear.from_linear(packed_layer, r=4, alpha=8, dropout=0.1)
    assert layer.weight is packed_layer.weight and layer.bias is packed_layer.bias
    nn.init.normal_(layer.lora_B["default"], std=0.1)
    x = torch.randn(5, 128, device=device, requires_grad=True)
    other = FusedLoRALinear.from_linear(layer_of(name, device), r=4, alpha=8, dropout=0.1)
    other.load_state_dict(layer.state_dict())
    layer.eval(), other.eval()
    assert torch.equal(other(x), layer(x))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(layer))).double().float()
    assert torch.equal(twin(x), layer(x))
    with layer.disabled():
        assert torch.equal(layer(x), packed_layer(x))
    layer.train()
    torch.manual_seed(3)
    want = layer(x)
    torch.manual_seed(3)
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(got, want)
    got.sum().backward()
    assert layer.lora_A["default"].grad is not None and layer.weight.grad is None


@every_layer
def test_merging_into_a_packed_base(name, device):
    layer = FusedLoRALinear.from_linear(layer_of(name, device), r=4, alpha=8)
    nn.init.normal_(layer.lora_B["default"], std=0.02)
    x = torch.randn(5, 128, device=device)
    want = (dequantize(layer.base) + 2 * layer.lora_B["default"] @ layer.lora_A["default"]).detach()
    unmerged = layer(x)
    linear = layer.merged_linear()
    assert type(linear) is nn.Linear
    torch.testing.assert_close(linear.weight, want)
    torch.testing.assert_close(linear(x), unmerged, atol=1e-5, rtol=1e-5)
    data = layer.weight.data_ptr()
    error = layer.merge()
    got = dequantize(layer.base)
    assert error == pytest.approx(float((got - want).norm() / want.norm()), rel=1e-4)
    assert 0 < error < {"nf4-nested": 0.12, "nf3": 0.25, "int4-zero": 0.12, "int3-row": 0.4, "int8": 0.02}[name]
    assert layer.weight.data_ptr() == data  # in place: whoever shares the bytes sees the merge, as over a dense base
    torch.testing.assert_close(layer(x), x @ got.T + layer.bias, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.merged_linear().weight, got)
    with pytest.raises(ValueError, match=r"lowmem\.FusedLoRALinear: unmerge: expected a dense base, got"):
        layer.unmerge()


def test_merging_what_is_not_finite_leaves_the_bytes():
    layer = FusedLoRALinear.from_linear(layer_of("nf4-nested"), r=4, alpha=8)
    before = layer.weight.clone()
    with torch.no_grad():
        layer.lora_B["default"].fill_(float("nan"))
    with pytest.raises(ValueError, match="expected finite adapter weights"):
        layer.merge()
    assert torch.equal(layer.weight, before) and layer.merged is None


def test_dora_over_a_packed_base():
    layer = layer_of("int8")
    dora = FusedLoRALinear.from_linear(layer, r=4, alpha=8, use_dora=True)
    dense = FusedLoRALinear.from_linear(with_dense(layer), r=4, alpha=8, use_dora=True)
    nn.init.normal_(dora.lora_B["default"], std=0.1)
    dense.lora_A["default"].data.copy_(dora.lora_A["default"])
    dense.lora_B["default"].data.copy_(dora.lora_B["default"])
    x = torch.randn(5, 128, requires_grad=True)
    torch.testing.assert_close(dora(x), dense(x), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(
        torch.autograd.grad(dora(x).sum(), x)[0], torch.autograd.grad(dense(x).sum(), x)[0], atol=2e-5, rtol=1e-4
    )


def test_groups_and_many_adapters_over_packed_bases(device):
    layers = [FusedLoRALinear.from_linear(layer_of(name, device), r=4, alpha=8) for name in LAYERS]
    for layer in layers:
        nn.init.normal_(layer.lora_B["default"], std=0.1)
    x = torch.randn(5, 128, device=device, requires_grad=True)
    apart = [layer(x) for layer in layers]
    together = FusedLoRAGroup(layers)(x)
    for one, two in zip(apart, together, strict=True):
        assert torch.equal(one, two)
    (dx,) = torch.autograd.grad(sum(y.sum() for y in together), x)
    (want,) = torch.autograd.grad(sum(y.sum() for y in apart), x)
    torch.testing.assert_close(dx, want)

    base = layer_of("nf4-nested", device)
    options = {"r": 3, "alpha": 3.0}
    many = MultiLoRALinear(base, {"a": options, "b": options})
    for name in ("a", "b"):
        nn.init.normal_(many.lora_B[name], std=0.1)
    ids = torch.tensor([0, 1, 1, -1, 0], device=device)
    y = many(x, adapter_ids=ids)
    for row, which in enumerate(("a", "b", "b", None, "a")):
        want_row = base(x[row])
        if which is not None:
            want_row = want_row + x[row] @ many.lora_A[which].T @ many.lora_B[which].T
        torch.testing.assert_close(y[row], want_row, atol=1e-5, rtol=1e-5)
    y.sum().backward()
    assert many.lora_A["a"].grad is not None
    with pytest.raises(ValueError, match=r"lowmem\.multi_lora_linear: A: expected at least one adapter"):
        multi_lora_linear(x, base.base, [], [], [], torch.zeros(1, dtype=torch.int64, device=device))


def test_convert_puts_adapters_over_quantized_layers():
    model = nn.Sequential(layer_of("nf4-nested"), nn.ReLU(), nn.Linear(48, 8))
    lowmem.convert(model, r=2)
    assert isinstance(model[0], FusedLoRALinear) and isinstance(model[2], FusedLoRALinear)
    assert model[0].qspec == LAYERS["nf4-nested"] and model[2].qspec is None
    model(torch.randn(2, 128)).sum().backward()
    assert model[0].lora_B["default"].grad is not None
