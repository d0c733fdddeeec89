"""Adapters in PEFT's folder format: both directions against PEFT itself, and what is refused before a first write."""

from __future__ import annotations

import copy
import json
import math
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lowmem import convert
from lowmem.integrations import load_adapter, peft_format, save_adapter
from lowmem.nn import FusedLoRALinear, disabled, lora_layers

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IDS = torch.arange(24).view(2, 12) * 7 % 64


def llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def randomize(model: nn.Module, seed: int = 1) -> nn.Module:
    """Adapters that matter: B is zero after conversion, and then nothing that is wrong with A or alpha would show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def converted(dtype: torch.dtype = torch.float32, **settings: object) -> nn.Module:
    return randomize(convert(llama(dtype), **{"r": 4, "alpha": 8, "dropout": 0.1, **settings}))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def peft_model(dtype: torch.dtype = torch.float32, **settings: object) -> nn.Module:
    config = peft.LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.1,
            "target_modules": "all-linear",
            "task_type": "CAUSAL_LM",
            **settings,
        }
    )
    return randomize(peft.get_peft_model(llama(dtype), config).eval())


def reload_in_peft(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT only warns of missing and unmatched keys
        return peft.PeftModel.from_pretrained(llama(dtype), folder)


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    config.update(changes)
    (folder / CONFIG).write_text(json.dumps(config))


def snapshot(model: nn.Module) -> tuple:
    layers = [
        (name, dict(m.r), dict(m.alpha), dict(m.use_rslora), dict(m.dropout), m.active_adapter)
        for name, m in lora_layers(model)
    ]
    return {k: v.clone() for k, v in model.state_dict().items()}, layers, [p.requires_grad for p in model.parameters()]


def assert_untouched(model: nn.Module, before: tuple) -> None:
    state, layers, grads = snapshot(model)
    assert layers == before[1] and grads == before[2] and state.keys() == before[0].keys()
    assert all(torch.equal(state[key], before[0][key]) for key in state)


def refuses(model: nn.Module, folder: Path, match: str, kind: type[Exception] = ValueError, **kw: object) -> None:
    """``load_adapter`` raises in the package's form and leaves the model as it was."""
    before = snapshot(model)
    with pytest.raises(kind, match=match) as error:
        load_adapter(model, folder, **kw)
    assert str(error.value).startswith("lowmem.load_adapter: ") and "expected " in str(error.value)
    assert_untouched(model, before)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_adapter(converted(), tmp_path / "adapter")
    return tmp_path / "adapter"


# -------------------------------------------------------------------------------------------------- both directions


def test_peft_reloads_with_equal_logits(tmp_path: Path) -> None:
    model = converted()
    save_adapter(model, tmp_path)
    other = reload_in_peft(tmp_path)
    assert type(other) is peft.PeftModelForCausalLM
    with disabled(model):
        assert (logits(model) - logits(other)).abs().max() > 0.1  # the adapters do something
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-5, atol=1e-5)
    assert other.peft_config["default"].lora_dropout == 0.1


def test_lowmem_loads_what_peft_saved(tmp_path: Path) -> None:
    model = peft_model()
    model.save_pretrained(tmp_path)
    ours = convert(llama(), r=4, alpha=1, dropout=0.3)
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-5, atol=1e-5)
    layer = ours.model.layers[0].self_attn.q_proj
    assert layer.alpha == {"default": 8.0} and layer.dropout == {"default": 0.3}


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_bf16_both_directions(tmp_path: Path, adapter_dtype: torch.dtype) -> None:
    ours = converted(torch.bfloat16, adapter_dtype=adapter_dtype)
    save_adapter(ours, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS).values()} == {adapter_dtype}
    other = reload_in_peft(tmp_path, torch.bfloat16)
    assert next(p for n, p in other.named_parameters() if "lora_" in n).dtype == torch.float32  # PEFT's own choice
    # ours rounds the adapters to bf16 in the product: measured by PEFT's own error with bf16 adapters
    exact = logits(copy.deepcopy(ours).float())
    error = (logits(reload_in_peft(tmp_path, torch.bfloat16).to(torch.bfloat16)).float() - exact).abs().max()
    assert (logits(ours).float() - exact).abs().max() <= 2 * error
    assert (logits(ours).float() - logits(other).float()).abs().max() <= 2 * error
    other.save_pretrained(tmp_path / "peft")
    again = convert(llama(torch.bfloat16), r=4, adapter_dtype=adapter_dtype)
    load_adapter(again, tmp_path / "peft")
    assert torch.equal(logits(again), logits(ours))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_patterns_from_peft(tmp_path: Path, use_rslora: bool) -> None:
    model = peft_model(
        use_rslora=use_rslora,
        rank_pattern={"q_proj": 7, "^model.layers.1.mlp.down_proj": 1, r"layers\.0\.mlp\.(up|gate)_proj": 3},
        alpha_pattern={"v_proj": 5.5, "1.self_attn.q_proj": 16},
    )
    model.save_pretrained(tmp_path)
    # the layers' ranks are the file's; no adapter of that name is there yet, so it is added
    ours = convert(llama(), r=2, name="first")
    load_adapter(ours, tmp_path, name="second")
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-5, atol=1e-5)
    ranks = {name: layer.r["second"] for name, layer in lora_layers(ours)}
    assert ranks["model.layers.0.self_attn.q_proj"] == 7 and ranks["model.layers.0.mlp.up_proj"] == 3
    assert ranks["model.layers.1.mlp.down_proj"] == 1 and ranks["model.layers.0.mlp.down_proj"] == 4
    for _, layer in lora_layers(ours):
        assert layer.use_rslora == {"first": False, "second": use_rslora} and layer.dropout["second"] == 0.1
        assert layer.lora_A["second"].requires_grad and not layer.lora_A["first"].requires_grad


@pytest.mark.parametrize("rslora", ["none", "all", "some"])
def test_patterns_to_peft(tmp_path: Path, rslora: str) -> None:
    model = llama()
    convert(model, r=4, alpha=8)
    for i, (name, layer) in enumerate(lora_layers(model)):
        r = 5 if name.endswith("v_proj") else 3 + i % 3 if name.endswith("down_proj") or i == 0 else 4
        alpha = 2.5 if ".1." in name and "mlp" in name else 8
        layer.add_adapter("x", r=r, alpha=alpha, use_rslora=rslora == "all" or (rslora == "some" and i % 2 == 0))
        layer.set_adapter("x")
    randomize(model)
    save_adapter(model, tmp_path, name="x")
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["r"] == 4 and config["rank_pattern"]["v_proj"] == 5
    assert config["use_rslora"] is (rslora == "all")
    torch.testing.assert_close(logits(reload_in_peft(tmp_path)), logits(model), rtol=1e-5, atol=1e-5)


O_PROJ = ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]


@pytest.mark.parametrize(
    ("targets", "written"),
    [
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (["layers.0.mlp.up_proj", "o_proj"], ["model.layers.0.mlp.up_proj", *O_PROJ]),
        ("all-linear", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
    ],
)
def test_target_modules_name_the_layers_and_no_others(tmp_path: Path, targets: object, written: list[str]) -> None:
    model = converted(target_modules=targets)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == written
    other = reload_in_peft(tmp_path)
    theirs = {
        n.removeprefix("base_model.model.") for n, m in other.named_modules() if isinstance(m, peft.tuners.lora.Linear)
    }
    assert theirs == {name for name, _ in lora_layers(model)}
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-5, atol=1e-5)


class Nested(nn.Module):
    """Names in which a whole name is another's suffix, as no list of ``target_modules`` can tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 6)
        self.inner = nn.ModuleDict({"proj": nn.Linear(6, 6)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner["proj"](self.proj(x).tanh())


def test_a_name_that_is_anothers_suffix(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain, x = Nested(), torch.randn(3, 6)
    model = randomize(convert(copy.deepcopy(plain), r=2, target_modules="proj"))
    assert [name for name, _ in lora_layers(model)] == ["proj"]
    save_adapter(model, tmp_path)
    other = peft.PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(other(x), model(x), rtol=1e-5, atol=1e-5)


def test_round_trip_is_exact(tmp_path: Path) -> None:
    model = converted(r=3, alpha=2.5, use_rslora=True)
    save_adapter(model, tmp_path / "new" / "folder", base_model_name_or_path="some/base")
    again = convert(llama(), r=3)
    load_adapter(again, tmp_path / "new" / "folder")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert torch.equal(logits(again), logits(model))
    config = json.loads((tmp_path / "new" / "folder" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "some/base" and config["lora_alpha"] == 2.5


def test_wrappers_are_seen_through(tmp_path: Path) -> None:
    model = converted()
    save_adapter(model, tmp_path / "plain")
    for i, wrapped in enumerate((torch.compile(model, backend="eager"), nn.DataParallel(model))):
        save_adapter(wrapped, tmp_path / str(i))
        for file in (CONFIG, WEIGHTS):
            assert (tmp_path / str(i) / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    load_adapter(torch.compile(converted(), backend="eager"), tmp_path / "plain")


def test_saving_a_merged_model_saves_the_adapter(tmp_path: Path, saved: Path) -> None:
    model = converted()
    for _, layer in lora_layers(model):
        layer.merge()
    save_adapter(model, tmp_path / "merged")
    assert (tmp_path / "merged" / WEIGHTS).read_bytes() == (saved / WEIGHTS).read_bytes()


def test_different_dropouts_are_warned_of(tmp_path: Path) -> None:
    model = converted(target_modules=["q_proj"])
    model.model.layers[1].self_attn.q_proj.dropout["default"] = 0.5
    with pytest.warns(UserWarning, match=r"dropouts are \[0.1, 0.5\]"):
        save_adapter(model, tmp_path)


# ------------------------------------------------------------------------------------------------- refused, untouched


def test_truncated_at_every_kind_of_place(saved: Path) -> None:
    whole = (saved / WEIGHTS).read_bytes()
    header = int.from_bytes(whole[:8], "little")
    model = converted()
    for size in (0, 3, 8, 8 + header // 2, 8 + header, len(whole) // 2, len(whole) - 1):
        (saved / WEIGHTS).write_bytes(whole[:size])
        refuses(model, saved, f"path: expected a whole safetensors file .*got {size} bytes.*truncated or corrupt")
    for broken in (whole + b"x", b"\xff" * len(whole), whole[:20] + b"\0" + whole[21:]):
        (saved / WEIGHTS).write_bytes(broken)
        refuses(model, saved, "expected a whole safetensors file")


def rewrite(folder: Path, change: object) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def test_half_a_layer_missing(saved: Path) -> None:
    rewrite(saved, lambda t: t.pop(f"{Q}.lora_B.weight"))
    refuses(converted(), saved, "lora_A and lora_B of every layer, got no .*layers.0.self_attn.q_proj.lora_B.weight")
    refuses(converted(), saved, "lora_A and lora_B of every layer", strict=False)


def test_a_layer_missing(saved: Path) -> None:
    rewrite(saved, lambda t: [t.pop(f"{Q}.lora_{s}.weight") for s in "AB"])
    refuses(converted(), saved, "weights for 14 layers, got none for model.layers.0.self_attn.q_proj .*strict=False")
    model, donor = randomize(converted(), seed=2), converted()
    kept = model.model.layers[0].self_attn.q_proj.lora_A["default"].clone()
    with pytest.warns(UserWarning, match="no weights for model.layers.0.self_attn.q_proj: left as they are"):
        load_adapter(model, saved, strict=False)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.lora_A["default"], kept)
    k = "model.layers.0.self_attn.k_proj.lora_A.default"
    assert torch.equal(model.state_dict()[k], donor.state_dict()[k])


def test_a_target_that_the_file_lacks_is_missing(tmp_path: Path) -> None:
    # the config says q and v, the file and the model have q alone
    save_adapter(converted(target_modules=["q_proj"]), tmp_path)
    edit(tmp_path, target_modules=["q_proj", "v_proj"])
    refuses(converted(target_modules=["q_proj"]), tmp_path, "weights for 4 layers, got none for .*v_proj")
    edit(tmp_path, target_modules=r".*\.(q|v)_proj", exclude_modules=["v_proj"])
    load_adapter(converted(target_modules=["q_proj"]), tmp_path)
    edit(tmp_path, exclude_modules=None, layers_to_transform=[0], layers_pattern="layers")
    refuses(
        converted(target_modules=["q_proj"]),
        tmp_path,
        "weights for 3 layers, got none for model.layers.0.self_attn.v_proj",
    )


def test_extra_keys(saved: Path) -> None:
    extra = {
        "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32),
        "base_model.model.model.layers.9.self_attn.q_proj.lora_B.weight": torch.zeros(32, 4),
        "base_model.model.lm_head.weight": torch.zeros(2),
    }
    rewrite(saved, lambda t: t.update(extra))
    refuses(
        converted(), saved, "weights for the model's layers alone, got also base_model.model.lm_head.weight, .*layers.9"
    )
    model = randomize(converted(), seed=2)
    with pytest.warns(UserWarning, match="ignored base_model.model.lm_head.weight"):
        load_adapter(model, saved, strict=False)
    assert torch.equal(logits(model), logits(converted()))


def test_wrong_shapes_and_dtypes(saved: Path) -> None:
    good = load_file(saved / WEIGHTS)
    for key, tensor in (
        (f"{Q}.lora_A.weight", torch.zeros(5, 32)),
        (f"{Q}.lora_A.weight", torch.zeros(4, 31)),
        (f"{Q}.lora_B.weight", torch.zeros(4, 32)),
        (f"{Q}.lora_B.weight", torch.zeros(32 * 4)),
    ):
        save_file({**good, key: tensor}, saved / WEIGHTS)
        refuses(
            converted(),
            saved,
            rf"{key} of shape .*r=4 in adapter_config.json.*got shape \[{', '.join(map(str, tensor.shape))}\]",
        )
        refuses(converted(), saved, "of shape", strict=False)
    save_file({**good, f"{Q}.lora_A.weight": torch.zeros(4, 32, dtype=torch.int8)}, saved / WEIGHTS)
    refuses(converted(), saved, "in a floating dtype, got torch.int8", TypeError)
    save_file(good, saved / WEIGHTS)
    edit(saved, r=8)  # the config and the weights disagree
    refuses(converted(r=8), saved, r"of shape \[8, \d+\] .r=8 in adapter_config.json")


def test_another_rank_under_the_same_name(saved: Path) -> None:
    refuses(converted(r=2), saved, "r=2 for .*whose adapter 'default' has it, got r=4 .*another name")
    model = converted(r=2)
    load_adapter(model, saved, name="other")
    assert torch.equal(logits(model), logits(converted()))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"use_dora": True}, "lora_A, lora_B and lora_magnitude_vector of every layer, got no .*lora_magnitude_vector"),
        ({"bias": "lora_only"}, "bias 'none'"),
        ({"lora_bias": True}, "lora_bias off"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save off .*got modules_to_save=\['lm_head'\]"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out off"),
        ({"layer_replication": [[0, 2]]}, "layer_replication off"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices off"),
        ({"init_lora_weights": "pissa"}, "unchanged base weights .*got init_lora_weights='pissa'"),
        ({"peft_type": "LOHA"}, "peft_type 'LORA' in adapter_config.json, got 'LOHA'"),
        ({"use_something_new": True}, "settings that this version knows .*got use_something_new .strict=False"),
        ({"r": 0}, "an integer r >= 1"),
        ({"r": "4"}, "an integer r >= 1 .*got '4'"),
        ({"lora_alpha": None}, "a finite lora_alpha"),
        ({"lora_alpha": math.nan}, "a finite lora_alpha"),
        ({"lora_dropout": 1.5}, r"lora_dropout in \[0, 1\]"),
        ({"rank_pattern": {"q_proj": -1}}, "an integer r >= 1 for model.layers.0.self_attn.q_proj .*got -1"),
        ({"rank_pattern": {"(": 3}}, "a regular expression in rank_pattern"),
        ({"alpha_pattern": [1]}, "an object as alpha_pattern"),
        ({"target_modules": "("}, "a regular expression in target_modules"),
    ],
)
def test_configs_that_are_refused(saved: Path, changes: dict, match: str) -> None:
    edit(saved, **changes)
    refuses(converted(), saved, match)


def test_unknown_settings_are_ignored_when_asked(saved: Path) -> None:
    edit(saved, use_something_new=True)
    model = randomize(converted(), seed=2)
    with pytest.warns(UserWarning, match="settings ignored in adapter_config.json: use_something_new"):
        load_adapter(model, saved, strict=False)
    assert torch.equal(logits(model), logits(converted()))


def test_what_is_not_an_adapter_folder(tmp_path: Path, saved: Path) -> None:
    model = converted()
    refuses(model, tmp_path / "nowhere", "a folder with adapter_config.json", FileNotFoundError)
    refuses(model, saved / CONFIG, "which is not a folder", FileNotFoundError)
    (tmp_path / "empty").mkdir()
    refuses(model, tmp_path / "empty", "adapter_config.json in .*got nothing in it", FileNotFoundError)
    pickled = tmp_path / "pickled"
    shutil.copytree(saved, pickled)
    (pickled / WEIGHTS).rename(pickled / "adapter_model.bin")
    refuses(model, pickled, "adapter_model.safetensors in .*pickles are not read", FileNotFoundError)
    (saved / CONFIG).write_text('{"r": 4,')
    refuses(model, saved, "JSON in adapter_config.json")
    (saved / CONFIG).write_text("[]")
    refuses(model, saved, "a JSON object in adapter_config.json, got list")


def test_models_that_cannot_take_it(saved: Path) -> None:
    with pytest.raises(ValueError, match="load_adapter: model: expected FusedLoRALinear layers .*convert"):
        load_adapter(llama(), saved)
    with pytest.raises(TypeError, match="load_adapter: model: expected a torch.nn.Module, got str"):
        load_adapter("model", saved)
    with pytest.raises(ValueError, match="such a layer itself"):
        load_adapter(FusedLoRALinear(4, 4, r=2, alpha=2), saved)
    refuses(
        converted(target_modules=["q_proj"]),
        saved,
        "model: expected FusedLoRALinear where .*nn.Linear at .*convert them",
    )
    refuses(converted(), saved, "name: expected a non-empty string without dots", name="a.b")
    model = converted()
    model.model.layers[1].mlp.up_proj.merge()
    refuses(model, saved, "model: expected layers that are not merged, got model.layers.1.mlp.up_proj")
    meta = convert(llama().to("meta"), r=4)
    with pytest.raises(ValueError, match="parameters with storage, got .* on the meta device"):
        load_adapter(meta, saved)
    with pytest.raises(ValueError, match="parameters with storage, got .* on the meta device"):
        save_adapter(meta, saved)
    load_adapter(converted(), saved)  # a refused save left the folder whole


def test_saving_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save_adapter: name: expected one of default, got 'x'"):
        save_adapter(converted(), tmp_path / "a", name="x")
    with pytest.raises(ValueError, match="save_adapter: model: expected FusedLoRALinear layers"):
        save_adapter(llama(), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="save_adapter: path: expected a folder, got the file"):
        save_adapter(converted(), tmp_path / "file")


@pytest.mark.parametrize("where", ["weights", "config", "fsync"])
def test_a_failing_write_leaves_the_old_files_whole(saved: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    model = randomize(converted(r=6), seed=3)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    def full_after_half(tensors: dict, file: Path, metadata: object = None) -> None:
        Path(file).write_bytes(before[WEIGHTS][: len(before[WEIGHTS]) // 2])
        full()

    if where == "weights":
        monkeypatch.setattr("safetensors.torch.save_file", full_after_half)
    elif where == "config":
        monkeypatch.setattr(Path, "write_text", full)
    else:
        monkeypatch.setattr(peft_format.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(model, saved)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    load_adapter(converted(), saved)
    save_adapter(model, saved)
    assert sorted(file.name for file in saved.iterdir()) == [CONFIG, WEIGHTS]
    load_adapter(converted(r=6), saved)
