"""INT2.1's recipe: ``examples/int2.py`` as a user runs it, and the optimum that its repair has in closed form."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quant_cases import weight

from lowmem.nn import FusedLoRALinear
from lowmem.quant import QuantSpec, dequantize, quantize

ROOT = Path(__file__).resolve().parents[1]


def test_repair_reaches_the_truncated_svd():
    """With ``X^T X = 1`` the adapters that give ``X W^T`` back best are the SVD of ``W - dequantize(Q)``, cut at r."""
    w = weight(24, 32)
    q = quantize(w, QuantSpec("int2", 32), method="mse")
    layer = FusedLoRALinear(32, 24, r=4, alpha=8, base=q)
    x = torch.linalg.qr(torch.randn(48, 32)).Q
    target = x @ w.T
    rest = torch.linalg.svdvals(w - dequantize(q))
    best = float(rest[4:].square().sum())
    assert best < 0.8 * float(rest.square().sum())
    factors = [p for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.LBFGS(factors, max_iter=400, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (layer(x) - target).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert best * (1 - 1e-4) <= closure().item() <= best * (1 + 1e-3)
    assert sum(p.nbytes for p in factors) == 4 * 4 * (24 + 32) and layer.weight.nbytes == 24 * 32 // 4


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    for package in ("transformers", "rich", "matplotlib"):
        pytest.importorskip(package)
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    command = [sys.executable, str(ROOT / "examples" / "int2.py"), "--quick"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "int2.json").read_text())
    assert 2 < found["bits"] < 2.6
    losses = found["repair_losses"]
    assert len(losses) == 40 and sum(losses[-10:]) < 0.6 * sum(losses[:10])
    assert abs(found["repaired"]["source"] - found["dense"]["source"]) < 0.01
    assert found["tuned"]["task"] < found["repaired"]["task"] - 0.02
    assert "int2, adapters repaired it" in done.stdout
    bad = subprocess.run([*command, "--r", "0"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert bad.returncode == 2 and bad.stderr == "int2.py: --r: expected at least 1, got 0\n"
