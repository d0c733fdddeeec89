"""The main job, as a user runs it: ``examples/finetune.py`` in a process of its own."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def finetune(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "120",
    }
    command = [sys.executable, str(ROOT / "examples" / "finetune.py"), "--device", "cpu", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict]:
    """One quick run: its folder, what it printed, and the numbers it wrote."""
    folder = tmp_path_factory.mktemp("job")
    done = finetune(folder, "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out", done.stdout, json.loads((folder / "out" / "finetune.json").read_text())


def test_both_runs_learn(job: tuple[Path, str, dict]) -> None:
    _, _, results = job
    theirs, ours = results["runs"]["PEFT"], results["runs"]["lowmem"]
    for run in (theirs, ours):
        assert len(run["losses"]) == len(run["seconds"]) == 24 and all(map(math.isfinite, run["losses"]))
        assert run["held_out_after"] < run["held_out_before"] - 0.02
        assert sum(run["losses"][-6:]) < sum(run["losses"][:6])
        assert run["tokens_per_s"] > 0 and run["peak_bytes"] > 0
    # one base and adapters that start at zero: before training both are the same function
    assert ours["held_out_before"] == pytest.approx(theirs["held_out_before"], abs=1e-4)
    assert ours["losses"][0] == pytest.approx(theirs["losses"][0], abs=1e-3)
    # the gain of one is the gain of the other, up to another dropout mask and bf16
    gains = [run["held_out_before"] - run["held_out_after"] for run in (theirs, ours)]
    assert gains[1] == pytest.approx(gains[0], rel=0.25)


def test_what_is_saved_for_backward(job: tuple[Path, str, dict]) -> None:
    _, _, results = job
    theirs, ours = results["runs"]["PEFT"], results["runs"]["lowmem"]
    assert 0 < ours["saved_bytes"] < 0.85 * theirs["saved_bytes"]
    assert ours["saved_bytes_other"] < 0.6 * theirs["saved_bytes_other"]  # fp32 adapters: PEFT keeps x in fp32 too
    for same in ("frozen", "trained", "gradients", "optimizer"):
        assert ours[same] == theirs[same] > 0
    assert ours["gradients"] == ours["trained"] and ours["optimizer"] >= 2 * ours["trained"]


def test_what_is_printed(job: tuple[Path, str, dict]) -> None:
    _, printed, results = job
    for words in (
        "held-out loss after", "tokens/s", "saved for backward", "peak resident memory of a step", "gradients",
        "optimizer state", "equal logits", "LoRA, taking turns",
    ):  # fmt: skip
        assert words in printed
    for run in results["runs"].values():
        assert f"{run['held_out_after']:.4f}" in printed and f"{run['tokens_per_s']:,.0f}" in printed


def test_quantized_bases(job: tuple[Path, str, dict]) -> None:
    _, printed, results = job
    dense, nf4, lq = (results["quantized"][name] for name in ("dense", "NF4", "2.25-bit LQ-LoRA"))
    assert dense["bits"] == 16 and 4.1 < nf4["bits"] < 4.8 and 2 < lq["bits"] <= 2.25
    assert dense["held_out_after"] == results["runs"]["lowmem"]["held_out_after"]
    for run in (nf4, lq):
        assert run["trained"] == dense["trained"] and run["weight_bytes"] < dense["weight_bytes"] / 3
        assert run["held_out_after"] < run["held_out_before"] - 0.02
        assert run["held_out_after"] < dense["held_out_after"] + 0.05
    for words in ("NF4", "2.25-bit LQ-LoRA", "bits a weight", f"{lq['held_out_after']:.4f}"):
        assert words in printed


def test_the_picture(job: tuple[Path, str, dict]) -> None:
    from matplotlib.image import imread

    folder, _, _ = job
    pixels = imread(folder / "finetune.png")  # raises on what is no whole PNG
    assert pixels.shape[0] > 300 and pixels.shape[1] > 600
    assert pixels[..., :3].reshape(-1, 3).std(0).min() > 0.02  # something is drawn on it


def test_peft_reloads_the_adapter(job: tuple[Path, str, dict]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import lowmem
    from lowmem.integrations import load_adapter

    folder, _, results = job
    assert results["reloads_equal"] and results["reload"]["float32"] <= 1e-5
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(Path("out") / "base-quick") and config["r"] == 16

    def base() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder / "base-quick", dtype=torch.float32)

    ids = torch.arange(40).view(2, 20) * 11 % 512
    theirs = PeftModel.from_pretrained(base(), folder / "adapter").eval()
    ours = lowmem.convert(base(), r=16, alpha=32)
    load_adapter(ours, folder / "adapter")
    with torch.no_grad():
        plain, one, two = (model.eval()(input_ids=ids).logits for model in (base(), theirs, ours))
    assert (one - plain).abs().max() > 0.05  # it was trained
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)


def test_a_second_run_takes_the_base_and_other_data(job: tuple[Path, str, dict], tmp_path: Path) -> None:
    folder, _, _ = job
    lines = [json.dumps({"text": f"Line {i}: " + " ".join(str(i * k) for k in range(1, 40))}) for i in range(200)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    done = finetune(tmp_path, "--model", str(folder / "base-quick"), "--data", "data.jsonl", "--quick", "--steps", "8",
                    "--adapter-dtype", "fp32", "--out", "elsewhere", "--no-quantized")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "elsewhere" / "finetune.json").read_text())
    assert results["adapter_dtype"] == "fp32" and results["reloads_equal"]
    assert len(results["runs"]["lowmem"]["losses"]) == 8
    assert "base: " not in done.stdout and "data.jsonl" in done.stdout


NOWHERE = "a text file, a folder or a .jsonl file, got 'nowhere.txt', which does not exist"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.txt"], f"--data: expected {NOWHERE}"),
        (["--model", "no-such-folder-or-model"], "--model: expected a folder or hub name of a causal language model"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = finetune(tmp_path, "--quick", *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"finetune.py: {message}" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "empty.txt"], "--data: expected text, got 'empty.txt', where there is none"),
        (["--data", "folder"], "--data: expected a folder with UTF-8 text files, got 'folder', where there is none"),
        (["--data", "binary.bin"], "--data: expected UTF-8 text, got 'binary.bin', which is not"),
        (["--data", "w.jsonl"], '--data: expected a string under "text" on every line of w.jsonl, got line 2: words'),
        (["--data", "torn.jsonl"], "--data: expected JSON on every line of torn.jsonl, got line 1: "),
        (["--dropout", "1.5"], "--dropout: expected a probability in [0, 1), got 1.5"),
        (["--steps", "1"], "--steps: expected at least 4, got 1"),
        (["--r", "0"], "--r: expected at least 1, got 0"),
        (["--lr", "nan"], "--lr: expected a positive number, got nan"),
        (["--out", "empty.txt"], "--out: expected a folder, got the file 'empty.txt'"),
    ],
)  # fmt: skip
def test_bad_arguments_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    Path("empty.txt").write_text("\n \n")
    Path("w.jsonl").write_text('{"text": "fine"}\n{"words": 1}\n')
    Path("torn.jsonl").write_text('{"text": "fi')
    Path("binary.bin").write_bytes(bytes(range(256)))
    Path("folder").mkdir()
    import finetune

    monkeypatch.setattr(sys, "argv", ["finetune.py", *arguments])
    with pytest.raises(finetune.UsageError) as error:
        finetune.main()
    assert str(error.value).startswith(message)
    assert not Path("out").exists()


def test_too_little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import _data

    with pytest.raises(_data.UsageError, match="--data: expected at least 65 tokens for --seq 64, got 64"):
        _data.random_windows(torch.arange(64), 2, 2, 64, 0, "--data")
    with pytest.raises(_data.UsageError, match="--data: expected at least 64 held-out tokens for --seq 64, got 63"):
        _data.consecutive_windows(torch.arange(63), 2, 2, 64, "--data")


def test_held_out_text_is_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import _data

    texts = ["\n\n".join(f"paragraph {i} of {k} " + "x" * 90 for i in range(300)) for k in range(3)]
    texts += ["\n\n".join(f"paragraph {i} of 0 " + "x" * 90 for i in range(300))]  # one of them again
    distinct = list(_data._distinct_paragraphs(texts))
    assert sum(text.count("paragraph") for text in distinct) == 900
    train, held = _data.hold_out(distinct)
    assert 0.05 < sum(map(len, held)) / sum(map(len, train)) < 0.2
    assert sum(map(len, train + held)) == sum(map(len, distinct))
    paragraphs = [{p for block in side for p in block.split("\n\n") if p} for side in (train, held)]
    assert not paragraphs[0] & paragraphs[1]
