"""Projected mode: forward, backward and step without the m x n gradient, against the dense layer with torch's AdamW.

    python bench/bench_lowrank_projected.py            # layers, then the whole step of the demo's Llama
    python bench/bench_lowrank_projected.py --quick    # does it run?

"layer" rows: one linear layer at 4096 tokens, r = 128, forward + backward (input gradient too) + optimizer step between
two refreshes; "torch" is nn.Linear with torch.optim.AdamW(fused=True). "model" rows: the whole training step of a Llama
with the sizes of the demo's, one refreshed layer in the steps where one falls due; --refresh sets the period.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import ROOT, Results, Target, ceilings, paired, print_targets, slug, speedup

import lowmem
from lowmem import optim
from lowmem.nn import ProjectedLinear

BF16, FP32 = torch.bfloat16, torch.float32
LAYER_LIMIT = {BF16: 0.75, FP32: 0.78}
MODEL_LIMIT = {BF16: 1.03, FP32: 1.08}
NEVER = 10**9


def layer_calls(shape: tuple[int, int], tokens: int, rank: int, dtype: torch.dtype) -> dict[str, Callable[[int], Any]]:
    """Forward, backward and step of the layer, dense and projected on either side."""
    m, n = shape
    x = torch.randn(tokens, n).to(dtype).requires_grad_()
    dy = torch.randn(tokens, m).to(dtype)

    def stepper(layer: torch.nn.Module, optimizer: Any) -> Callable[[int], Any]:
        def call(_: int) -> None:
            layer(x).backward(dy)
            optimizer.step()
            optimizer.zero_grad()
            x.grad = None

        return call

    dense = torch.nn.Linear(n, m, bias=False, dtype=dtype)
    calls = {"torch AdamW": stepper(dense, torch.optim.AdamW(dense.parameters(), lr=1e-5, fused=True))}
    for side in ("right", "left"):
        layer = ProjectedLinear(n, m, bias=False, rank=rank, side=side, dtype=dtype)
        made = optim.ProjAdamW([layer.lowrank_grad], 1e-5, rank=rank, projector="random", refresh=NEVER, stagger=False)
        calls[f"lowmem {side}"] = stepper(layer, made)
    return calls


def bench_layer(out: Results, args: Any, shape: tuple[int, int], dtype: torch.dtype) -> list[Target]:
    m, n = shape
    tokens, rank = (64, 8) if args.quick else (4096, 128)
    times = paired(layer_calls(shape, tokens, rank, dtype), "cpu", rounds=args.rounds, warm=1)
    for name, taken in times.items():
        flops = (
            6.0 * tokens * m * n if name.startswith("torch") else 4.0 * tokens * m * n + 2.0 * tokens * rank * (m + n)
        )
        out.add("projected layer", f"{m}x{n} T={tokens} r={rank}", dtype, name, taken, flops=flops,
                torch_times=times["torch AdamW"])  # fmt: skip
    side = "lowmem left" if m < n else "lowmem right"  # what side="auto" takes
    what = f"layer {m}x{n} {str(dtype)[6:]}: forward + backward + step / the dense one's"
    return [Target(what, 1 / speedup(times["torch AdamW"], times[side]), LAYER_LIMIT[dtype])]


def bench_model(out: Results, args: Any, dtype: torch.dtype) -> list[Target]:
    from transformers import LlamaConfig, LlamaForCausalLM

    # examples/finetune.py's base model
    hidden, inner, layers, batch, seq, rank = (64, 176, 1, 2, 16, 8) if args.quick else (320, 896, 6, 8, 256, 48)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, vocab_size=4096, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    dense, low = LlamaForCausalLM(config).to(dtype), LlamaForCausalLM(config).to(dtype)
    low.load_state_dict(dense.state_dict())
    optim.project_(low, rank)
    made = {
        "torch AdamW": (dense, torch.optim.AdamW(dense.parameters(), lr=1e-4, fused=True)),
        "lowmem": (low, optim.ProjAdamW(optim.lowrank_groups(low), 1e-4, rank=rank, refresh=args.refresh,
                                        projector="power")),
    }  # fmt: skip
    ids = torch.randint(0, 4096, (batch, seq))

    def stepper(model: Any, optimizer: Any) -> Callable[[int], Any]:
        def call(_: int) -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return call

    times = paired({name: stepper(*pair) for name, pair in made.items()}, "cpu", rounds=args.rounds, warm=2)
    for name, taken in times.items():
        label = f"Llama {hidden}x{layers} T={batch * seq} r={rank}"
        out.add("projected model", label, dtype, name, taken, torch_times=times["torch AdamW"])
    what = f"Llama {hidden}x{layers} {str(dtype)[6:]}: training step with AdamW / projected"
    return [Target(what, speedup(times["torch AdamW"], times["lowmem"]), MODEL_LIMIT[dtype], at_most=False)]


def main() -> None:
    """Run what --only names; print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="layer,model", help="parts, comma-separated")
    parser.add_argument("--rounds", type=int, default=15, help="paired rounds")
    parser.add_argument("--refresh", type=int, default=200, help="the model's refresh period")
    parser.add_argument("--shapes", default="1024x2816", help="m x n, comma-separated")
    parser.add_argument("--quick", action="store_true", help="small shapes, three rounds: does it run?")
    parser.add_argument("--csv", type=Path, help="default: bench/results/<device>/lowrank_projected.csv")
    args = parser.parse_args()
    start = time.time()
    torch.manual_seed(0)
    shapes = [tuple(int(k) for k in shape.split("x")) for shape in args.shapes.split(",")]
    if args.quick:
        args.rounds, shapes = 3, [(64, 96)]
    out, targets = Results(ceilings("cpu", [FP32, BF16], quick=True)), []
    print(f"{out.name}, torch {torch.__version__}, lowmem {lowmem.__version__}, commit {out.commit}")
    out.header()
    csv = args.csv or ROOT / "bench" / "results" / slug("cpu") / "lowrank_projected.csv"
    for dtype in (BF16, FP32):
        if "layer" in args.only:
            for shape in shapes:
                targets += bench_layer(out, args, shape, dtype)  # type: ignore[arg-type]
        if "model" in args.only:
            targets += bench_model(out, args, dtype)
        out.write(csv)
    print_targets(targets)
    print(f"wrote {csv} ({len(out.rows)} rows), {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
