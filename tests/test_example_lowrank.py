"""``examples/pretrain_lowrank.py`` as a user runs it, in a process of its own."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def test_quick_run(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "examples" / "pretrain_lowrank.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    with open(tmp_path / "pretrain_lowrank.csv") as file:
        rows = {row["optimizer"]: row for row in csv.DictReader(file)}
    assert len(rows) == 9 and {row["tokens"] for row in rows.values()} == {str(12 * 8 * 128)}
    for name, row in rows.items():
        assert 0.9 < float(row["loss_over_adamw"]) < 1.1, name
        assert (float(row["state_over_adamw"]) < 0.6) is (name != "AdamW")
    with open(tmp_path / "pretrain_lowrank_ranks.csv") as file:
        ranks = list(csv.DictReader(file))
    adaptive = [row for row in ranks if row["run"] == "AdaRankGrad"]
    assert len({row["layer"] for row in adaptive}) == 2 * 7
    assert all(float(row["captured"]) >= 0.9 - 1e-3 for row in adaptive)
    assert any(row["run"] == "AdaRankGrad, fine-tuning" for row in ranks)
    assert (tmp_path / "pretrain_lowrank.png").exists()
