"""Whole models: lowmem.convert(quant=...), and quantized models in a file."""

import os

import pytest
import torch
from torch import nn

import lowmem
from lowmem.nn import FusedLoRALinear, QuantLinear
from lowmem.quant import QuantSpec, dequantize, quantize


class Block(nn.Module):
    def __init__(self, k=64):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(k, k, bias=i == 0) for i in range(3))
        self.down = nn.Linear(k, 48)
        self.norm = nn.LayerNorm(k)

    def forward(self, x):
        x = self.norm(x)
        return self.down(self.q_proj(x) * torch.sigmoid(self.k_proj(x)) + self.v_proj(x))


def model(seed=0, depth=1):
    torch.manual_seed(seed)
    return nn.Sequential(*(Block() for _ in range(depth)), nn.Linear(48, 8))


X = torch.linspace(-2, 2, 5 * 64).view(5, 64).sin()


def test_quantize_alone():
    m = model()
    dense = {n: p.detach().clone() for n, p in m.named_parameters()}
    assert lowmem.convert(m, quant="nf4") is m
    layers = {n: x for n, x in m.named_modules() if isinstance(x, QuantLinear)}
    assert set(layers) == {"0.q_proj", "0.k_proj", "0.v_proj", "0.down", "1"}
    for name, layer in layers.items():
        assert torch.equal(dequantize(layer.base), dequantize(quantize(dense[f"{name}.weight"], "nf4")))
        assert not layer.weight.requires_grad
    report = lowmem.report(m)
    assert report.converted == 0 and "none, nf4 at 4.500 bits" in str(report)
    assert m[0].norm.weight.requires_grad and torch.equal(m[0].q_proj.bias, dense["0.q_proj.bias"])
    m(X).sum().backward()
    assert m[0].norm.weight.grad is not None


def test_quantize_under_adapters():
    spec = QuantSpec("int4", 32, zero_point=True)
    m = lowmem.convert(model(), r=4, quant=spec, target_modules=["q_proj", "k_proj", "v_proj", "down"])
    layers = [x for x in m.modules() if isinstance(x, FusedLoRALinear)]
    assert len(layers) == 4 and all(x.qspec == spec for x in layers) and type(m[1]) is nn.Linear
    assert m[0].q_proj.group is not None  # q, k and v are computed together
    m(X).sum().backward()
    assert {n for n, p in m.named_parameters() if p.grad is not None} == {
        n for n, p in m.named_parameters() if p.requires_grad
    }
    assert "4 of 5 layers" in str(lowmem.report(m)) and "over int4 at 4.750 bits" in str(lowmem.report(m))
    assert sum(p.requires_grad for p in m.parameters()) == 8


def test_formats_by_name():
    m = lowmem.convert(model(), r=2, quant={"0.q_proj": "nf3", "0.down.weight": QuantSpec("int8")})
    assert m[0].q_proj.qspec.format == "nf3" and m[0].down.qspec.format == "int8" and m[0].k_proj.qspec is None
    m(X).sum().backward()


def test_a_module_in_two_places():
    m = model()
    m[0].k_proj = m[0].q_proj
    lowmem.convert(m, quant="nf4", target_modules=["q_proj", "k_proj"])
    assert isinstance(m[0].q_proj, QuantLinear) and m[0].k_proj is m[0].q_proj


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, {}, "r: expected a rank, or quant"),
        (None, {"quant": "nf5"}, "format: expected one of"),
        (None, {"quant": QuantSpec("int4", 128)}, "quant: expected a group size that divides K = 64"),
        (None, {"quant": {"0.nowhere": "nf4"}}, "quant: expected names of dense linear layers"),
        (None, {"quant": "nf4", "r": 2, "adapter_dtype": torch.int8}, "adapter_dtype: expected a floating dtype"),
        (None, {"quant": "nf4", "r": 0}, "r: expected an integer >= 1"),
        ("nan", {"quant": "nf4"}, "quant: expected finite weights, got NaN or infinity in '1'"),
        ("tied", {"quant": "nf4"}, "quant: expected weights that no other module reads"),
    ],
)
def test_refused_with_nothing_changed(change, options, message):
    m = model()
    if change == "nan":
        m[1].weight.data[0, 0] = float("nan")
    if change == "tied":
        m[0].k_proj.weight = m[0].q_proj.weight
    before = {n: id(x) for n, x in m.named_modules()}
    with pytest.raises((ValueError, TypeError), match=message):
        lowmem.convert(m, **options)
    assert {n: id(x) for n, x in m.named_modules()} == before


SPECS = {
    "0.q_proj": QuantSpec("nf4", double_quant=True),
    "0.k_proj": QuantSpec("int3", -1),
    "0.v_proj": QuantSpec("int2", 16, zero_point=True, scale_dtype=torch.float16),
    "0.down": QuantSpec("nf3", 32, double_quant=True, scale_bits=4, scale_group=16),
}


def test_save_and_load(tmp_path):
    m = lowmem.convert(model(), quant=SPECS)
    path = tmp_path / "model.safetensors"
    size = lowmem.save_quantized(m, path)
    assert size == path.stat().st_size and os.listdir(tmp_path) == [path.name]
    packed = sum(spec.storage_bytes(m.get_submodule(n).out_features, 64) for n, spec in SPECS.items())
    others = sum(p.nbytes for n, p in m.state_dict().items() if n.split(".weight")[0] not in SPECS or "bias" in n)
    header = int.from_bytes(path.read_bytes()[:8], "little") + 8
    assert size - header == packed + others  # the bytes on the disk are the formula's
    with torch.no_grad():
        want = m(X)
        for seed in (1, 2):
            fresh = model(seed)
            if seed == 2:
                lowmem.convert(fresh, quant=SPECS)
            assert lowmem.load_quantized(fresh, path) is fresh
            assert torch.equal(fresh(X), want)
    from lowmem.integrations import read_checkpoint

    assert dict(read_checkpoint(tmp_path)).keys() >= {"0.q_proj.weight", "1.weight"}
    from safetensors.torch import load_file

    assert torch.equal(load_file(path)["0.q_proj.weight"], m[0].q_proj.weight)


def test_adapters_are_saved_too(tmp_path):
    def made(seed):
        return lowmem.convert(model(seed), r=3, quant="nf4", target_modules=["q_proj", "down"])

    m = made(0)
    nn.init.normal_(m[0].down.lora_B["default"])
    lowmem.save_quantized(m, tmp_path / "m.safetensors")
    with torch.no_grad():
        assert torch.equal(lowmem.load_quantized(made(1), tmp_path / "m.safetensors")(X), m(X))


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    m = lowmem.convert(model(), quant="nf4")
    lowmem.save_quantized(m, path)
    before = path.read_bytes()
    from lowmem.integrations import quant_model

    def broken(*args):
        raise OSError("disk full")

    monkeypatch.setattr(quant_model, "write_tensors", broken)
    with pytest.raises(OSError, match="disk full"):
        lowmem.save_quantized(m, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_damaged_and_foreign_files(tmp_path):
    path = tmp_path / "m.safetensors"
    m = lowmem.convert(model(), quant=SPECS)
    lowmem.save_quantized(m, path)
    data = path.read_bytes()
    with pytest.raises(FileNotFoundError, match=r"lowmem\.load_quantized: path: expected a file"):
        lowmem.load_quantized(model(), tmp_path / "nothing")
    other = nn.Sequential(Block(), nn.Linear(48, 9))
    for wrong, message in (
        (other, r"1\.bias: expected shape \(9,\)"),
        (nn.Sequential(Block()), "expected tensors for the model.s|expected weights of the model"),
        (nn.Sequential(nn.Linear(64, 64), nn.Linear(48, 8)), "expected weights of the model's layers, got"),
        (lowmem.convert(model(), quant=QuantSpec("int8", -1)), "expected QuantSpec.*the model's"),
    ):
        before = {k: v.clone() for k, v in wrong.state_dict().items()}
        with pytest.raises((ValueError, TypeError), match=message):
            lowmem.load_quantized(wrong, path)
        assert all(torch.equal(v, before[k]) for k, v in wrong.state_dict().items())
    fresh = model(3)
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    g = torch.Generator().manual_seed(0)
    header = int.from_bytes(data[:8], "little") + 8
    for case in range(120):
        broken = bytearray(data)
        at = int(torch.randint(0, header, (1,), generator=g))
        if case % 3 == 0:
            broken = broken[: at if case % 2 else len(data) - 1 - at % 64]
        else:
            broken[at] ^= 1 << int(torch.randint(0, 8, (1,), generator=g))
        path.write_bytes(bytes(broken))
        try:
            lowmem.load_quantized(fresh, path)
        except (ValueError, TypeError, OSError):
            assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items()), case
        else:  # what changed was no part of what is read
            fresh = model(3)
