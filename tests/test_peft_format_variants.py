"""DoRA and gates in PEFT's folder format, both directions."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowmem
from lowmem.nn import lora_layers

peft = pytest.importorskip("peft", reason="the format's owner (extra: hf)")
transformers = pytest.importorskip("transformers", reason="whole models come from it (extra: hf)")
IDS = torch.arange(20).view(2, 10)


def llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    ).eval()


def converted(**options):
    model = lowmem.convert(llama(), r=3, alpha=6, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            nn.init.normal_(layer.lora_B["default"])
            for p in (*layer.lora_gate.values(), *layer.lora_magnitude.values()):
                p.mul_(torch.rand_like(p) + 0.5)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("options", [{"use_dora": True}, {"gate": True}, {"use_dora": True, "gate": True}])
def test_peft_reloads_with_equal_logits(tmp_path, options):
    model = converted(**options)
    lowmem.save_adapter(model, tmp_path)
    torch.testing.assert_close(
        logits(peft.PeftModel.from_pretrained(llama(), tmp_path)), logits(model), rtol=1e-5, atol=1e-5
    )


def test_lowmem_loads_dora_from_peft(tmp_path):
    theirs = peft.get_peft_model(
        llama(), peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", use_dora=True)
    )
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.normal_()
            elif "magnitude" in name:
                p.mul_(1.5)
    theirs.eval().save_pretrained(tmp_path)
    same = lowmem.convert(llama(), r=3, use_dora=True)
    lowmem.load_adapter(same, tmp_path)
    other = lowmem.convert(llama(), r=2)
    lowmem.load_adapter(other, tmp_path, name="dora")
    for ours in (same, other):
        torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


def test_another_kind_under_the_same_name_is_refused_and_nothing_changes(tmp_path):
    lowmem.save_adapter(converted(use_dora=True), tmp_path)
    for model, got in ((converted(), "no magnitude"), (converted(gate=True), "a gate")):
        before = logits(model)
        with pytest.raises(
            ValueError, match=f"lowmem.load_adapter: name: expected an adapter of the file's kind.*{got}"
        ):
            lowmem.load_adapter(model, tmp_path)
        assert torch.equal(logits(model), before)


def test_a_magnitude_missing_extra_or_misshapen_is_refused(tmp_path):
    file = tmp_path / "adapter_model.safetensors"
    lowmem.save_adapter(converted(use_dora=True), tmp_path)
    whole = load_file(file)
    key = next(k for k in whole if k.endswith("lora_magnitude_vector"))
    save_file({k: v for k, v in whole.items() if k != key}, file)
    with pytest.raises(ValueError, match=f"of every layer, got no {key}"):
        lowmem.load_adapter(converted(use_dora=True), tmp_path)
    save_file(whole | {key: torch.zeros(3)}, file)
    with pytest.raises(ValueError, match=f"{key} of shape .*got shape .3."):
        lowmem.load_adapter(converted(use_dora=True), tmp_path)
    lowmem.save_adapter(converted(), tmp_path)
    save_file(load_file(file) | {key: whole[key]}, file)
    with pytest.raises(ValueError, match=f"also {key}"):
        lowmem.load_adapter(converted(), tmp_path)


def test_dora_on_some_layers_is_not_saved(tmp_path):
    model = converted()
    layer = next(lora_layers(model))[1]
    del layer.lora_A["default"], layer.lora_B["default"]
    layer.add_adapter("default", r=3, alpha=6, use_dora=True)
    with pytest.raises(ValueError, match="lowmem.save_adapter: name: expected DoRA on all"):
        lowmem.save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
