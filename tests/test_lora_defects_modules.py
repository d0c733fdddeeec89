"""Known defects of other LoRA implementations that concern whole layers and their variants, each as a test that this
package passes; those of one operator are in test_lora_defects.py."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lowmem
from lowmem.nn import FusedLoRALinear, lora_layers, routed, train_adapters
from lowmem.testing import saved_bytes

peft = pytest.importorskip("peft", reason="the peer whose layers we replace (extra: hf)")


def layer(k=48, n=40, dtype=torch.float32, **options):
    made = FusedLoRALinear(k, n, **({"r": 4, "alpha": 8, "bias": True, "dtype": dtype} | options))
    for b in made.lora_B.values():
        nn.init.normal_(b)
    return made


def peft_layer(fused, **options):
    linear = nn.Linear(fused.in_features, fused.out_features, dtype=fused.weight.dtype)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], **options)
    twin = peft.get_peft_model(nn.Sequential(linear), config, autocast_adapter_dtype=False).base_model.model[0]
    with torch.no_grad():
        twin.base_layer.load_state_dict({"weight": fused.weight, "bias": fused.bias})
        twin.lora_A["default"].weight.copy_(fused.lora_A["default"])
        twin.lora_B["default"].weight.copy_(fused.lora_B["default"])
    return twin


def test_lorafusion_ignores_merged_and_disabled_adapters():
    fused = layer()
    x = torch.randn(5, 48)
    plain = F.linear(x, fused.weight, fused.bias).detach()
    active = fused(x).detach()
    assert not torch.allclose(active, plain)
    with fused.disabled():
        assert torch.equal(fused(x), plain)
    fused.merge()  # there the adapter would now be added a second time
    torch.testing.assert_close(fused(x), active, rtol=1e-4, atol=1e-4)
    with fused.disabled():
        torch.testing.assert_close(fused(x), plain, rtol=1e-4, atol=1e-4)


def test_peft_rewrites_a_merged_weight_to_disable_its_adapter():
    # its forward unmerges in place and stays unmerged: a reference model's pass changes the policy's weights
    fused = layer(dtype=torch.bfloat16)
    twin = peft_layer(fused)
    x = torch.randn(5, 48).bfloat16()
    for one in (fused, twin):
        one.merge()
    ours, theirs = fused.weight.clone(), twin.base_layer.weight.clone()
    with fused.disabled():
        fused(x)
    assert torch.equal(fused.weight, ours) and fused.merged
    twin.enable_adapters(False)
    twin(x)
    twin.enable_adapters(True)
    assert not torch.equal(twin.base_layer.weight, theirs), "PEFT has changed: this test says nothing any more"


class Shapes(TorchDispatchMode):
    """Records the shape of every tensor that an operator makes (views are left out)."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.made += [tuple(t.shape) for t in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(t)]
        return out


def test_peft_dora_makes_the_merged_weight_in_every_step():
    # peft#1692, DoRA's memory and time: a dense [N, K] product for the norms of its rows
    fused = layer(48, 40, use_dora=True)
    twin = peft_layer(fused, use_dora=True)
    with torch.no_grad():
        twin.lora_magnitude_vector["default"].weight.copy_(fused.lora_magnitude["default"])
    fused(torch.randn(1, 48))  # the norms of W's own rows are made once
    found = {}
    for name, module in (("ours", fused), ("theirs", twin)):
        x = torch.randn(7, 48, requires_grad=True)
        with Shapes() as seen:
            module(x).sum().backward()
        found[name] = seen.made
    assert (40, 48) in found["theirs"], "PEFT has changed: this test says nothing any more"
    assert (40, 48) not in found["ours"] and (48, 40) not in found["ours"]


def test_peft_dora_keeps_more_for_backward():
    fused = layer(256, 192, dtype=torch.bfloat16, use_dora=True, dropout=0.1)
    twin = peft_layer(fused, use_dora=True, lora_dropout=0.1)
    x = torch.randn(128, 256).bfloat16().requires_grad_()
    frozen = (x, twin.base_layer.weight, twin.base_layer.bias)
    there = saved_bytes(lambda: twin(x), exclude=frozen)
    here = saved_bytes(lambda: fused(x), exclude=(x, fused.weight, fused.bias))
    # S, the mask's bits, the output before the magnitude, and per column the factor and the norm
    assert here == 128 * 4 * 2 + 128 * 256 // 8 + 128 * 192 * 2 + 192 * (2 + 4)
    assert here < 0.6 * there


def test_peft_sums_an_embeddings_gradient_in_the_models_dtype():
    base = nn.Embedding(4, 2, dtype=torch.bfloat16)
    config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=["0"])
    twin = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config, autocast_adapter_dtype=False)
    twin = twin.base_model.model[0].to(torch.bfloat16)
    fused = lowmem.nn.FusedLoRAEmbedding(base, r=1, alpha=1, adapter_dtype=torch.bfloat16)
    with torch.no_grad():
        fused.lora_B["default"].fill_(0.5)
        twin.lora_embedding_B["default"].fill_(0.5)
    ids = torch.ones(4096, dtype=torch.int64)
    twin(ids).sum().backward()
    fused(ids).sum().backward()
    assert fused.lora_A["default"].grad[0].tolist() == [0, 4096, 0, 0]
    assert twin.lora_embedding_A["default"].grad[0, 1] < 512, "PEFT has changed: this test says nothing any more"


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 10), nn.Linear(10, 6)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def test_ranks_that_differ_by_layer_and_by_adapter(tmp_path):
    model = lowmem.convert(Two(), r=3, alpha=6, name="a")
    for r, (_, one) in zip((1, 5), lora_layers(model), strict=True):
        one.add_adapter("b", r=r, alpha=2.0 * r)
        for b in one.lora_B.values():
            nn.init.normal_(b, std=0.3)
    train_adapters(model)
    x, ids = torch.randn(6, 12), torch.tensor([0, 1, 1, -1, 0, 1])
    with routed(model, ["a", "b"], adapter_ids=ids, rows=6):
        together = model(x)
    together.square().sum().backward()
    mixed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for j, name in enumerate(("a", "b")):
        lowmem.nn.set_adapter(model, name)
        alone = model(x[ids == j])
        torch.testing.assert_close(together[ids == j], alone)
        alone.square().sum().backward()
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(mixed[name], p.grad)
    lowmem.save_adapter(model, tmp_path, name="b")
    again = lowmem.convert(Two(), r=2)
    lowmem.load_adapter(again, tmp_path, name="b")
    assert [one.r["b"] for _, one in lora_layers(again)] == [1, 5]
    torch.testing.assert_close(again(x), model(x))
    torch.testing.assert_close(peft.PeftModel.from_pretrained(Two(), tmp_path)(x), model(x))


def test_every_adapter_of_a_batch_empty_but_one_and_all_empty():
    model = lowmem.convert(Two(), r=3, name="a")
    for _, one in lora_layers(model):
        one.add_adapter("b", r=2, alpha=2)
    train_adapters(model)
    x = torch.randn(4, 12)
    for ids in (torch.full((4,), 1), torch.full((4,), -1)):
        model.zero_grad()
        with routed(model, ["a", "b"], adapter_ids=ids, rows=4):
            model(x).sum().backward()
        for name, p in model.named_parameters():
            if "lora_A.a" in name or "lora_B.a" in name:
                assert p.grad is not None and not p.grad.any()
    empty = torch.zeros(0, 12)
    with routed(model, ["a", "b"], cu_seqlens=torch.tensor([0, 0, 0]), rows=0):
        assert model(empty).shape == (0, 6)
