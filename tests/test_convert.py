"""lowmem.convert and lowmem.report on whole models."""

import copy

import pytest
import torch
from torch import nn

import lowmem
from lowmem.nn import FusedLoRALinear, lora_layers

transformers = pytest.importorskip("transformers", reason="whole models come from it (extra: hf)")


def llama(dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    options = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
    } | kwargs
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**options)).to(dtype)


def test_convert_shares_weights_freezes_the_rest_and_changes_no_output():
    model = llama().eval()
    ids = torch.arange(20).view(2, 10)
    weights = {name: p.data_ptr() for name, p in model.named_parameters()}
    before = model(ids).logits
    assert lowmem.convert(model, r=4, alpha=8) is model
    torch.testing.assert_close(model(ids).logits, before)
    names = [name for name, _ in lora_layers(model)]
    assert len(names) == 14 and "lm_head" not in names
    assert all(p.data_ptr() == weights[name] for name, p in model.named_parameters() if "lora_" not in name)
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_training_equals_peft():
    peft = pytest.importorskip("peft")
    base = llama(torch.float64)
    ours = lowmem.convert(copy.deepcopy(base), r=3, alpha=6)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear"))
    with torch.no_grad():
        for name, layer in lora_layers(ours):
            twin = theirs.base_model.model.get_submodule(name)
            layer.lora_A["default"].copy_(twin.lora_A["default"].weight)
    ids = torch.randint(0, 64, (2, 12))
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        steps = []
        for _ in range(4):
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append(loss.item())
        losses.append(steps)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9) and losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_transformers_gradient_checkpointing_gives_the_same_gradients(reentrant):
    ids = torch.randint(0, 64, (2, 12))
    grads = []
    for checkpointing in (False, True):
        model = lowmem.convert(llama(), r=4, dropout=0.2).train()
        for _, layer in lora_layers(model):
            torch.manual_seed(7)
            nn.init.normal_(layer.lora_B["default"])
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(11)
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


def test_llama_compiles_in_one_graph():
    torch._dynamo.reset()
    model = lowmem.convert(llama(), r=4, dropout=0.1).train()
    ids = torch.randint(0, 64, (2, 12))

    def loss_of(m, ids):
        return m(input_ids=ids, labels=ids, use_cache=False).loss

    torch.manual_seed(0)
    eager = loss_of(model, ids)
    torch.manual_seed(0)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")(model, ids)
    torch.testing.assert_close(compiled, eager)
    compiled.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("target", "count"),
    [
        ("all-linear", 14),
        (["q_proj", "v_proj"], 4),
        (["layers.1.mlp.gate_proj"], 1),
        (r".*\.1\..*_proj", 7),
        (["lm_head"], 1),
    ],
)
def test_target_modules(target, count):
    assert len(list(lora_layers(lowmem.convert(llama(), r=2, target_modules=target)))) == count


def test_a_module_used_twice_becomes_one_layer():
    shared = nn.Linear(8, 8)
    model = lowmem.convert(nn.Sequential(shared, nn.ReLU(), shared), r=2)
    assert model[0] is model[2] and isinstance(model[0], FusedLoRALinear)


def test_layers_whose_forward_would_be_bypassed_are_left_and_reported():
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    lowmem.convert(model, r=2)
    assert [name for name, _ in lora_layers(model)] == ["1"]
    text = str(lowmem.report(model))
    assert "NonDynamicallyQuantizableLinear is a subclass" in text
    with pytest.raises(
        TypeError,
        match="target_modules: expected names of nn.Linear, nn.Embedding or nn.Conv2d layers, got '0.out_proj'",
    ):
        lowmem.convert(nn.Sequential(nn.MultiheadAttention(8, 2)), r=2, target_modules=["out_proj"])


def test_report_counts_and_reasons():
    model = lowmem.convert(llama(torch.bfloat16), r=4, dropout=0.1, target_modules=["q_proj"])
    report = lowmem.report(model)
    assert report.converted == 2 and report.trainable == 2 * 4 * (32 + 32)
    assert report.total == sum(p.numel() for p in model.parameters())
    rows = {row[0]: row for row in report.rows}
    assert rows["model.layers.0.self_attn.q_proj"][3] == "64+12"  # 32 bf16; 4 bf16 and one word of bits
    assert rows["model.layers.0.self_attn.k_proj"][4] == "not a target"
    assert rows["lm_head"][4] == "the output head"
    next(lora_layers(model))[1].merge()
    assert "is merged: one GEMM" in str(lowmem.report(model))


def test_backends_lists_every_operator_on_both_devices():
    rows = lowmem.backends().rows
    assert {row[0] for row in rows} >= {
        "lora_shrink",
        "lora_expand",
        "lora_dy",
        "lora_dx",
        "lora_da",
        "lora_masked_expand_",
    }
    assert all(row[2] for row in rows) and {row[1] for row in rows} == {"cpu", "cuda"}


def test_errors_change_nothing():
    model = llama()
    for kwargs, message in [
        ({"r": 0}, "r: expected an integer >= 1"),
        ({"r": 2, "dropout": -1.0}, "dropout: expected a probability"),
        (
            {"r": 2, "target_modules": ["nope"]},
            r"target_modules: expected names of nn.Linear layers \(there are: down_proj",
        ),
        ({"r": 2, "target_modules": ["q_proj", "input_layernorm"]}, "LlamaRMSNorm is not an nn.Linear, nn.Embed"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            lowmem.convert(model, **kwargs)
        assert not list(lora_layers(model)) and all(p.requires_grad for p in model.parameters())


def test_a_converted_model_is_refused():
    model = lowmem.convert(llama(), r=2)
    with pytest.raises(ValueError, match="lowmem.convert: model: expected a model that is not converted, got 14 of"):
        lowmem.convert(model, r=2)
