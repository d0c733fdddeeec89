"""Adapters on embeddings and convolutions in PEFT's folder format, both directions."""

import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowmem
from lowmem.nn import lora_layers

peft = pytest.importorskip("peft", reason="the format's owner (extra: hf)")
transformers = pytest.importorskip("transformers", reason="whole models come from it (extra: hf)")
IDS = torch.arange(24).view(2, 12) % 20
TARGETS = ["table", "picture", "out"]


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 6, padding_idx=0)
        self.picture = nn.Conv2d(6, 8, (1, 3), padding=(0, 1))
        self.out = nn.Linear(8, 5)

    def forward(self, ids):
        return self.out(self.picture(self.table(ids).movedim(-1, 1).unsqueeze(2))[:, :, 0].movedim(1, -1))


def llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    ).eval()


def randomized(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.3)  # of order one behind three layers, so that fp32 agrees to its last digits
    return model.eval()


def converted(**options):
    return randomized(lowmem.convert(Small(), r=3, alpha=6, target_modules=TARGETS, **options))


def test_peft_reloads_with_equal_outputs(tmp_path):
    model = converted()
    lowmem.save_adapter(model, tmp_path)
    assert sorted(load_file(tmp_path / "adapter_model.safetensors")) == [
        "base_model.model.out.lora_A.weight",
        "base_model.model.out.lora_B.weight",
        "base_model.model.picture.lora_A.weight",
        "base_model.model.picture.lora_B.weight",
        "base_model.model.table.lora_embedding_A",
        "base_model.model.table.lora_embedding_B",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT only warns of missing and unmatched keys
        theirs = peft.PeftModel.from_pretrained(Small(), tmp_path).eval()
    torch.testing.assert_close(theirs(IDS), model(IDS))


def test_lowmem_loads_what_peft_saved(tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, rank_pattern={"table": 2})
    theirs = randomized(peft.get_peft_model(Small(), config))
    theirs.save_pretrained(tmp_path)
    ours = lowmem.convert(Small(), r=1, target_modules=TARGETS).eval()
    lowmem.load_adapter(ours, tmp_path, name="theirs")
    torch.testing.assert_close(ours(IDS), theirs(IDS))
    assert {name: layer.r["theirs"] for name, layer in lora_layers(ours)} == {"table": 2, "picture": 3, "out": 3}
    lowmem.save_adapter(ours, tmp_path / "again", name="theirs")
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)


def test_a_whole_embedding_beside_its_adapter_must_be_the_models_own(tmp_path):
    # PEFT writes base_layer.weight where embed_tokens is targeted
    config = peft.LoraConfig(r=3, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    theirs = randomized(peft.get_peft_model(llama(), config))
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert key in whole
    ids = torch.arange(20).view(2, 10)

    def loaded():
        ours = lowmem.convert(llama(), r=3, target_modules=["embed_tokens", "q_proj"]).eval()
        lowmem.load_adapter(ours, tmp_path)
        return ours(input_ids=ids).logits

    torch.testing.assert_close(loaded(), theirs(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    for other, got in ((whole[key] + 1, "another one"), (whole[key][:-1], r"shape \[31, 16\]")):
        save_file(whole | {key: other.contiguous()}, file)
        with pytest.raises(ValueError, match=f"path: expected the model's own embedding as {key}, got {got}"):
            loaded()
    save_file({k: v for k, v in whole.items() if k != key}, file)
    torch.testing.assert_close(loaded(), theirs(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table.lora_embedding_A": None}, "expected lora_embedding_A and lora_embedding_B of every layer, got no"),
        ({"table.lora_embedding_A": (20, 3)}, r"table.lora_embedding_A of shape \[3, 20\] .*got shape \[20, 3\]"),
        ({"picture.lora_A.weight": (3, 6)}, r"picture.lora_A.weight of shape \[3, 6, 1, 3\] .*got shape \[3, 6\]"),
        ({"picture.lora_embedding_A": (3, 6)}, "alone, got also base_model.model.picture.lora_embedding_A"),
    ],
)
def test_damaged_files_change_nothing(tmp_path, change, message):
    lowmem.save_adapter(converted(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for key, shape in change.items():
        tensors.pop(f"base_model.model.{key}", None)
        if shape is not None:
            tensors[f"base_model.model.{key}"] = torch.zeros(shape)
    save_file(tensors, file)
    model = lowmem.convert(Small(), r=3, alpha=6, target_modules=TARGETS)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="^lowmem.load_adapter: path: .*" + message):
        lowmem.load_adapter(model, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_unconverted_embedding_and_dora_are_refused(tmp_path):
    lowmem.save_adapter(converted(), tmp_path)
    model = lowmem.convert(Small(), r=3, target_modules=["out"])
    with pytest.raises(ValueError, match="model: expected FusedLoRALinear .*, got nn.Conv2d at picture, table"):
        lowmem.load_adapter(model, tmp_path)
    config = peft.LoraConfig(r=3, target_modules=TARGETS, use_dora=True)
    randomized(peft.get_peft_model(Small(), config)).save_pretrained(tmp_path / "dora")
    model = lowmem.convert(Small(), r=3, target_modules=TARGETS)
    with pytest.raises(ValueError, match="path: expected no DoRA on (table|picture) .*plain adapters"):
        lowmem.load_adapter(model, tmp_path / "dora", name="dora")
    assert all("dora" not in layer.lora_A for _, layer in lora_layers(model))
