"""The step of AdamW8 against torch's fused AdamW in fp32 and against other 8-bit optimizers.

    python bench/bench_lowbit_optim.py [--millions 50] [--tensors 48] [--rounds 15] [--csv FILE] [--peers]

fp32 weights and gradients, ``--millions`` parameters in ``--tensors`` tensors, every optimizer on tensors of its own.
``checked`` is the default, which looks for infinities and NaNs in a pass of its own; ``unchecked`` is
``skip_nonfinite=False``, which is what torch's optimizer does. ``--peers`` times torchao's and bitsandbytes' optimizers
where they are installed (the extra ``bench``), for ``--peer-rounds`` rounds, interleaved with torch and one of ours.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import common
import torch
from common import Target, paired, print_targets, speedup

from lowmem.optim import AdamW8, Fp8AdamW

OURS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "log8/log8 unchecked": lambda p: AdamW8(p, m="log8", v="log8", skip_nonfinite=False),
    "log8/log8 checked": lambda p: AdamW8(p, m="log8", v="log8"),
    "de8/log8 unchecked": lambda p: AdamW8(p, skip_nonfinite=False),
    "de8/log8 checked": lambda p: AdamW8(p),
    "e4m3+exp unchecked": lambda p: Fp8AdamW(p, skip_nonfinite=False),
    "e4m3+exp checked": lambda p: Fp8AdamW(p),
}


def peers() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """8-bit optimizers of other packages, those that are installed."""
    found: dict[str, Callable[..., torch.optim.Optimizer]] = {}
    try:
        from torchao.optim import AdamW8bit, AdamWFp8

        found |= {"torchao AdamW8bit": lambda p: AdamW8bit(p), "torchao AdamWFp8": lambda p: AdamWFp8(p)}
    except Exception as error:  # a wheel built for another torch fails in its own ways
        print(f"no torchao: {error}")
    try:
        import bitsandbytes

        found["bitsandbytes AdamW8bit"] = lambda p: bitsandbytes.optim.AdamW8bit(p)
    except Exception as error:
        print(f"no bitsandbytes: {error}")
    return found


def make(build: Callable[..., torch.optim.Optimizer], tensors: int, numel: int, device: str) -> Callable[[int], None]:
    """A step over fresh parameters with gradients."""
    params = [torch.nn.Parameter(torch.randn(numel // 1024, 1024, device=device) * 0.02) for _ in range(tensors)]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    optimizer = build(params)
    return lambda _: optimizer.step()


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=50.0)
    parser.add_argument("--tensors", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=common.MIN_ROUNDS)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--peer-rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rounds = 2 if args.quick else args.rounds
    total = 1e6 if args.quick else args.millions * 1e6
    numel = int(total / args.tensors) // 1024 * 1024
    shape = f"{args.tensors} x {numel}"
    results = common.Results(common.ceilings(device, [torch.float32], quick=True))
    results.header()
    ours, rest = dict(OURS), peers() if args.peers else {}
    fused = {"torch fused": lambda p: torch.optim.AdamW(p, fused=True)}
    calls = {name: make(build, args.tensors, numel, device) for name, build in {**fused, **ours}.items()}
    times = paired(calls, device, rounds=rounds, warm=2)
    n = args.tensors * numel
    for name, found in times.items():
        nbytes = 28 * n if name == "torch fused" else 16 * n  # weights read and written, gradients read, states both
        base = times["torch fused"]
        results.add("adamw_step", shape, torch.float32, name, found, nbytes=nbytes, torch_times=base)
    ratio = {name: 1 / speedup(times["torch fused"], found) for name, found in times.items()}
    targets = [
        Target("log8 pair, over torch's fused AdamW", ratio["log8/log8 unchecked"], 1.0),
        Target("the default pair", ratio["de8/log8 unchecked"], 1.5),
        Target("COAT's pair", ratio["e4m3+exp unchecked"], 2.0),
    ]
    if rest:
        kept = {name: calls[name] for name in ("torch fused", "de8/log8 checked")}
        kept |= {name: make(build, args.tensors, numel, device) for name, build in rest.items()}
        others = paired(kept, device, rounds=min(rounds, args.peer_rounds), warm=1)
        mine = others["de8/log8 checked"]
        for name in rest:
            results.add("adamw_step", shape, torch.float32, name, others[name], torch_times=others["torch fused"])
            targets.append(
                Target(f"default, checked: times faster than {name}", speedup(others[name], mine), 5.0, False)
            )
    print_targets(targets)
    if args.csv:
        results.write(args.csv)


if __name__ == "__main__":
    main()
