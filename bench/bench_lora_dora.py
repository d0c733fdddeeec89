"""DoRA's step beside LoRA's: one layer of each shape of a Llama block, and the block's seven linears at once.

    python bench/bench_lora_dora.py [--device cpu|cuda] [--hidden 2048] [--rows 2048] [--rounds 15] [--quick]

Forward and backward, r = 16, p = 0.1, on our layers and on PEFT's (``--peft``). The block is q/k/v/o and gate/up/down
without attention, converted by ``lowmem.convert``; LoRA's q/k/v and gate/up are grouped there and DoRA's are not.
Results go to bench/results/<device>/lora_dora.csv (or ``--csv``); columns and timing: bench/common.py. The target: at
most 1.25 of LoRA's time.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler only counts memory here; its own messages are noise

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from common import Results, Target, ceilings, paired, peak_mb, print_targets, slug, speedup  # noqa: E402

import lowmem  # noqa: E402

R, ALPHA, P, LIMIT = 16, 32, 0.1, 1.25
OPTIONS = {"LoRA": False, "DoRA": True}


class Block(nn.Module):
    """A Llama block's linear layers, with what lies between them but attention."""

    def __init__(self, hidden: int, inner: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()

        def linear(k: int, n: int) -> nn.Linear:
            return nn.Linear(k, n, bias=False, dtype=dtype, device=device)

        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (linear(hidden, hidden) for _ in range(4))
        self.gate_proj, self.up_proj, self.down_proj = (
            linear(hidden, inner),
            linear(hidden, inner),
            linear(inner, hidden),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[M, hidden]`` to ``[M, hidden]``."""
        x = x + self.o_proj(self.q_proj(x) + self.k_proj(x) + self.v_proj(x))
        return x + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class One(nn.Module):
    """One linear layer by a name that ``convert`` can be told."""

    def __init__(self, k: int, n: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.layer = nn.Linear(k, n, bias=False, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """``[M, K]`` to ``[M, N]``."""
        return self.layer(x)


def adapted(make: Callable[[], nn.Module], dora: bool, peft: bool) -> nn.Module:
    """The module with adapters whose B is not zero, so that nothing is a product with zeros."""
    torch.manual_seed(0)
    model = make()
    if peft:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=P, target_modules=r".*(layer|_proj)", use_dora=dora)
        model = get_peft_model(model, config)
    else:
        lowmem.convert(model, r=R, alpha=ALPHA, dropout=P, use_dora=dora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    return model.train()


def measure(out: Results, args: argparse.Namespace, text: str, make: Any, m: int, k: int, dtype: torch.dtype) -> Target:
    """LoRA and DoRA of one module in paired rounds; the target of ours."""
    x = torch.randn(m, k, device=args.device).to(dtype).requires_grad_()
    calls = {}
    for peer in ("lowmem", "PEFT") if args.peft else ("lowmem",):
        for name, dora in OPTIONS.items():
            model = adapted(make, dora, peer == "PEFT")
            dy = torch.randn_like(model(x))
            leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
            calls[f"{peer} {name}"] = lambda _, f=model, dy=dy, leaves=leaves: torch.autograd.grad(f(x), leaves, dy)
    times = paired(calls, args.device, rounds=args.rounds)
    for name, series in times.items():
        twin = times["PEFT " + name.split()[1]] if args.peft and name.startswith("lowmem") else None
        against = times[name.split()[0] + " LoRA"] if name.endswith("DoRA") else None
        peak = peak_mb(calls[name], args.device)
        out.add("dora step", text, dtype, name, series, peak=peak, torch_times=against, peer_times=twin)
    return Target(
        f"{text} {str(dtype)[6:]}: DoRA's step, of LoRA's", speedup(times["lowmem DoRA"], times["lowmem LoRA"]), LIMIT
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtypes", default="bf16,fp32", help="of bf16, fp32")
    parser.add_argument("--parts", default="layer,block")
    parser.add_argument("--peft", action="store_true", help="PEFT's layers too")
    parser.add_argument("--quick", action="store_true", help="small shapes, three rounds: does it run?")
    parser.add_argument("--csv", type=Path, help="default: bench/results/<device>/lora_dora.csv")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.hidden, args.rounds = 64, 128, 3
    m, hidden, inner, device = args.rows, args.hidden, args.hidden * 11 // 4, args.device  # Llama's 5632 at 2048
    dtypes = [{"bf16": torch.bfloat16, "fp32": torch.float32}[name] for name in args.dtypes.split(",")]
    start, targets = time.time(), []
    out = Results(ceilings(device, dtypes, quick=True))
    print(f"{out.name}, torch {torch.__version__}, lowmem {lowmem.__version__}, commit {out.commit}")
    out.header()
    for dtype in dtypes:
        for k, n in ((hidden, hidden), (hidden, inner), (inner, hidden)) if "layer" in args.parts else ():
            make = lambda k=k, n=n, dtype=dtype: One(k, n, dtype, device)  # noqa: E731
            targets.append(measure(out, args, f"M{m} {k}->{n} r{R}", make, m, k, dtype))
        if "block" in args.parts:
            make = lambda dtype=dtype: Block(hidden, inner, dtype, device)  # noqa: E731
            targets.append(measure(out, args, f"M{m} block of {hidden} r{R}", make, m, hidden, dtype))
    print_targets(targets)
    csv = args.csv or ROOT / "bench" / "results" / slug(device) / "lora_dora.csv"
    out.write(csv)
    print(f"wrote {csv} ({len(out.rows)} rows)\n{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
