"""``examples/multi_adapter.py`` as a user runs it, in its tiny configuration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")

ROOT = Path(__file__).resolve().parents[1]


def multi_adapter(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    command = [sys.executable, str(ROOT / "examples" / "multi_adapter.py"), "--device", "cpu", "--quick", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_four_adapters_learn_together_what_they_learn_alone(tmp_path: Path) -> None:
    done = multi_adapter(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out" / "multi_adapter.json").read_text())
    alone, together = results["sides"]["one after another"], results["sides"]["together"]
    assert results["largest_difference"] <= 1e-3
    assert [len(steps) for steps in together["losses"]] == [8] * 4  # 16 samples in global batches of 2
    for one, two in zip(alone["losses"], together["losses"], strict=True):
        assert two == pytest.approx(one, rel=1e-3)
    assert together["tokens"] == alone["tokens"] and together["passes"] <= 0.5 * alone["passes"]
    assert together["filled"] > 1.3 * alone["filled"]
    assert together["held_at_once_bytes"] < 0.7 * alone["held_at_once_bytes"]
    for words in ("tokens/s", "passes over the base", "peak memory of a pass", "job 3, r=32", "equal to rounding"):
        assert words in done.stdout


def test_bad_arguments(tmp_path: Path) -> None:
    done = multi_adapter(tmp_path, "--capacity", "4")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "multi_adapter.py: --samples, --capacity: expected at least 1 and 8, got 16 and 4" in done.stderr
