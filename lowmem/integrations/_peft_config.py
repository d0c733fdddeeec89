"""``adapter_config.json``: writing it, reading it, and PEFT's rules for which layer gets which rank and alpha."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from .._errors import bad
from ..nn.lora_layer import LoRALayer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Settings that change what an adapter computes in a way that FusedLoRALinear does not: they must be off.
_UNSUPPORTED = {
    "lora_bias": "a bias on lora_B",
    "modules_to_save": "whole modules saved beside the adapter",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "adapters on bare parameters",
    "layer_replication": "replicated layers",
    "fan_in_fan_out": "transposed base weights (Conv1D)",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
}
# Settings that are served, or do not change what a saved adapter computes.
_KNOWN = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "init_lora_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
    "ensure_weight_tying", "use_dora",
}  # fmt: skip
_KEEPS_BASE = ("gaussian", "eva", "orthogonal")  # initialisations by name that leave the base weights alone


class Settings(NamedTuple):
    """What a config says about one layer's adapter."""

    r: int
    alpha: float
    dropout: float
    use_rslora: bool
    use_dora: bool


# --------------------------------------------------------------------------------------------------------------- write


def _named_by(suffixes: Iterable[str], name: str) -> bool:
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _target_modules(names: list[str], others: set[str]) -> list[str] | str:
    """The shortest ``target_modules`` that names just ``names``: their last parts, whole names, or an expression."""
    for candidate in (sorted({_last(name) for name in names}), sorted(names)):
        if not any(_named_by(candidate, other) for other in others):
            return candidate
    return "|".join(re.escape(name) for name in sorted(names))


def _default_and_pattern(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The most frequent value, and a pattern for the layers that have another one."""
    default = Counter(values.values()).most_common(1)[0][0]
    groups: dict[str, set[float]] = defaultdict(set)
    for name, value in values.items():
        groups[_last(name)].add(value)
    pattern = {}
    for name, value in values.items():
        if value != default:
            alike = len(groups[_last(name)]) == 1
            pattern[re.escape(_last(name)) if alike else f"^{re.escape(name)}"] = value
    return default, pattern


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)


def _task_type(model: nn.Module) -> str | None:
    """PEFT's task type where the class name tells it and PEFT attaches no extra modules for it; None is valid too."""
    kind = type(model).__name__
    if kind.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return "SEQ_2_SEQ_LM" if kind.endswith("ForConditionalGeneration") and encoder_decoder else None


def make(
    model: nn.Module, layers: Mapping[str, LoRALayer], others: set[str], name: str, base: str | None
) -> dict[str, Any]:
    """The config of adapter ``name`` on ``layers``; ``others`` are the names of the model's other modules."""
    dora = {name in layer.lora_magnitude for layer in layers.values()}
    if len(dora) > 1:
        bad("save_adapter", "name", "DoRA on all of an adapter's layers or on none, as PEFT's format", "on some")
    rslora = all(layer.use_rslora[name] for layer in layers.values())
    alphas = {}
    for key, layer in layers.items():
        # one use_rslora serves the whole file: where layers differ, alpha / sqrt(r) is written as an alpha over plain r
        fold = layer.use_rslora[name] and not rslora
        alphas[key] = layer.alpha[name] * math.sqrt(layer.r[name]) if fold else layer.alpha[name]
    r, rank_pattern = _default_and_pattern({key: layer.r[name] for key, layer in layers.items()})
    alpha, alpha_pattern = _default_and_pattern(alphas)
    dropouts = Counter(layer.dropout[name] for layer in layers.values())
    dropout = dropouts.most_common(1)[0][0]
    if len(dropouts) > 1:
        warnings.warn(
            f"lowmem.save_adapter: {name}: the layers' dropouts are {sorted(dropouts)}; PEFT's format holds one, "
            f"{dropout} is written (the adapter computes the same in evaluation)",
            stacklevel=3,
        )
    return {
        "peft_type": "LORA",
        "task_type": _task_type(model),
        "auto_mapping": None,
        "base_model_name_or_path": base or getattr(model, "name_or_path", None) or None,
        "revision": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": _number(alpha),
        "lora_dropout": dropout,
        "rank_pattern": rank_pattern,
        "alpha_pattern": {key: _number(value) for key, value in alpha_pattern.items()},
        "use_rslora": rslora,
        "use_dora": dora.pop(),
        "bias": "none",
        "lora_bias": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": _target_modules(list(layers), others),
        "exclude_modules": None,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


# ---------------------------------------------------------------------------------------------------------------- read


def _bad(expected: str, got: object, hint: str = "") -> Any:
    bad("load_adapter", "path", f"{expected} in {CONFIG}", got, hint=hint)


def read(folder: Path, strict: bool) -> dict[str, Any]:
    """The config in ``folder``, refused where :class:`FusedLoRALinear` would compute something else than PEFT."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        _bad("JSON", error)
    if not isinstance(config, dict):
        _bad("a JSON object", type(config).__name__)
    if config.get("peft_type") != "LORA":
        _bad("peft_type 'LORA'", repr(config.get("peft_type")))
    for key, what in _UNSUPPORTED.items():
        if config.get(key):
            _bad(f"{key} off (no {what})", f"{key}={config[key]!r}")
    if config.get("bias", "none") != "none":
        _bad("bias 'none' (no trained base biases)", repr(config["bias"]))
    init = config.get("init_lora_weights", True)
    if not (init is None or isinstance(init, bool) or init in _KEEPS_BASE):
        hint = "it changes the base weights: save with PEFT's path_initial_model_for_weight_conversion"
        _bad("an adapter over unchanged base weights", f"init_lora_weights={init!r}", hint)
    unknown = sorted(key for key, value in config.items() if value and key not in _KNOWN and key not in _UNSUPPORTED)
    if unknown and strict:
        _bad("settings that this version knows", ", ".join(unknown), "strict=False ignores them")
    if unknown:
        warnings.warn(f"lowmem.load_adapter: settings ignored in {CONFIG}: {', '.join(unknown)}", stacklevel=3)
    return config


def _from_pattern(config: dict[str, Any], key: str, default: Any, layer: str) -> Any:
    pattern = config.get(key) or {}
    if not isinstance(pattern, dict):
        _bad(f"an object as {key}", type(pattern).__name__)
    for expression, value in pattern.items():
        if _match(rf"(?:.*\.)?(?:{expression})$", layer, key):
            return value
    return default


def _match(expression: str, name: str, key: str) -> bool:
    try:
        return re.match(expression, name) is not None
    except re.error as error:
        return _bad(f"a regular expression in {key}", f"{expression!r} ({error})")


def _real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def settings(config: dict[str, Any], layer: str) -> Settings:
    """Rank, alpha, dropout and rsLoRA of ``layer``: the first pattern that matches its name, else the config's own."""
    r = _from_pattern(config, "rank_pattern", config.get("r", 8), layer)
    alpha = _from_pattern(config, "alpha_pattern", config.get("lora_alpha", 8), layer)
    dropout = config.get("lora_dropout") or 0.0
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        _bad(f"an integer r >= 1 for {layer}", repr(r))
    if not _real(alpha):
        _bad(f"a finite lora_alpha for {layer}", repr(alpha))
    if not _real(dropout) or not 0.0 <= dropout <= 1.0:
        _bad("lora_dropout in [0, 1]", repr(dropout))
    return Settings(r, float(alpha), float(dropout), bool(config.get("use_rslora")), bool(config.get("use_dora")))


def _at_wanted_index(config: dict[str, Any], name: str) -> bool:
    wanted, stacks = config.get("layers_to_transform"), config.get("layers_pattern") or []
    if wanted is None or wanted == []:
        return True
    wanted = [wanted] if isinstance(wanted, int) else wanted
    stacks = [stacks] if isinstance(stacks, str) else stacks
    parts = name.split(".")
    for stack, index in zip(parts, parts[1:-1], strict=False):
        if index.isdigit() and (not stacks or stack in stacks):
            return int(index) in wanted
    return False


def targeted(config: dict[str, Any], names: Iterable[str]) -> set[str]:
    """Which of ``names`` the config puts an adapter on; empty where it does not say (``"all-linear"``, null)."""
    targets = config.get("target_modules")
    if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
        return set()

    def named(key: str, name: str) -> bool:
        rule = config.get(key) or []
        return _match(rf"(?:{rule})\Z", name, key) if isinstance(rule, str) else _named_by(rule, name)

    chosen = (name for name in names if named("target_modules", name) and not named("exclude_modules", name))
    return {name for name in chosen if _at_wanted_index(config, name)}
