"""Products with a frozen quantized weight on this machine, against torch's dense bf16 and against released peers.

    python bench/bench_quant.py [--rounds 15] [--shapes 4096,4096;4096,14336] [--rows 1,16,512,2048] [--quick]

``dense`` is ``F.linear`` on the bf16 weight. Peers, where they are installed (constraints-peers.txt): bitsandbytes'
``Linear4bit`` (nf4) in training mode and, forward only, in evaluation mode, where it re-packs its weight for the CPU;
torchao's nf4 tensor and its packed int4 for the CPU (forward only). ``vs_torch`` is against dense, ``vs_peer`` against
the fastest peer of the same line. ``fwd+bwd`` is the layer and the gradient of its input. Rows ``quantize`` make a
weight from fp32; ``dequantize`` writes it as bf16.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F
from common import ROOT, Call, Results, Target, ceilings, paired, print_targets, slug, speedup
from torch import Tensor, nn

import lowmem
from lowmem.nn import QuantLinear
from lowmem.quant import QuantSpec, quantize

BF16 = torch.bfloat16
OURS = {
    "lowmem nf4": QuantSpec("nf4", 64),
    "lowmem nf4 nested": QuantSpec("nf4", 64, double_quant=True),
    "lowmem int4": QuantSpec("int4", 128),
    "lowmem int3": QuantSpec("int3", 128),
    "lowmem int2": QuantSpec("int2", 128),
}


def bitsandbytes_layer(w: Tensor, train: bool) -> nn.Module | None:
    """``Linear4bit`` over ``w`` in nf4, groups of 64, or None where bitsandbytes is not installed."""
    try:
        import bitsandbytes as bnb
    except ImportError:
        return None
    layer = bnb.nn.Linear4bit(w.shape[1], w.shape[0], bias=False, compute_dtype=BF16, quant_type="nf4",
                              compress_statistics=False)  # fmt: skip
    layer.weight = bnb.nn.Params4bit(w.clone(), requires_grad=False, quant_type="nf4", compress_statistics=False)
    return layer.to(w.device).train(train)


def torchao_calls(w: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """torchao's nf4 and its packed int4 for the CPU, those of them that this machine has."""
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    try:
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import linear_nf4, to_nf4

        packed = to_nf4(w, 64, 256)
        found["torchao nf4"] = lambda x: linear_nf4(x, packed)
    except (ImportError, RuntimeError, AssertionError):
        pass
    try:
        from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor

        int4 = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype)
        int4.weight = nn.Parameter(Int4OpaqueTensor.from_hp(w, [1, 128]), requires_grad=False)
        int4(w[:1])
        found["torchao int4 packed"] = int4
    except (ImportError, RuntimeError, AssertionError, TypeError, NotImplementedError):
        pass
    return found


def forward_backward(call: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Call:
    """The gradient of x through ``call``."""
    return lambda _: torch.autograd.grad(call(x), x, dy)


def bench_products(out: Results, args: argparse.Namespace, n: int, k: int, rows: list[int]) -> list[Target]:
    """Forward, and forward with backward, of one weight."""
    w = (torch.randn(n, k) * k**-0.5).to(BF16)
    ours = {name: QuantLinear.from_qtensor(quantize(w, spec)) for name, spec in OURS.items()}
    trained, evaluated = bitsandbytes_layer(w, True), bitsandbytes_layer(w, False)
    peers: dict[str, Callable[[Tensor], Tensor]] = torchao_calls(w)
    if trained is not None and evaluated is not None:
        peers |= {"bitsandbytes train": trained, "bitsandbytes eval": evaluated}
    targets = []
    for m in rows:
        x, dy = torch.randn(m, k).to(BF16), torch.randn(m, n).to(BF16)
        leaf = x.clone().requires_grad_()
        for what in ("fwd", "fwd+bwd"):
            train = what != "fwd"
            calls: dict[str, Callable[[Tensor], Tensor]] = {"dense": lambda x: F.linear(x, w), **ours}
            forward_only = ("bitsandbytes eval", "torchao int4 packed")
            calls |= {name: call for name, call in peers.items() if not (train and name in forward_only)}
            if train:
                timed: dict[str, Call] = {name: forward_backward(call, leaf, dy) for name, call in calls.items()}
            else:
                timed = {name: (lambda _, call=call, x=x: call(x)) for name, call in calls.items()}
            with torch.set_grad_enabled(train):
                times = paired(timed, "cpu", rounds=args.rounds if m <= 512 else max(args.rounds // 3, 3))
            names = [name for name in calls if name in peers]
            best = min(names, key=lambda name: sorted(times[name])[len(times[name]) // 2], default=None)
            text, passes = f"M{m} {k}->{n}", 2 if train else 1
            for name, series in times.items():
                spec = OURS.get(name)
                stored = spec.storage_bytes(n, k) if spec else n * k * 2 if name == "dense" else n * k / 2
                out.add(
                    f"quant {what}", text, BF16, name, series, nbytes=passes * (stored + 2 * m * (n + k)),
                    flops=passes * 2 * m * n * k, torch_times=times["dense"] if name != "dense" else None,
                    peer_times=times[best] if best and spec else None,
                )  # fmt: skip
            out.write(args.csv)  # as it goes: what is measured should not be lost
            mine = times["lowmem nf4"]
            if m == 512 or m <= 16:
                limit = 1.10 if m == 512 else 1.0
                targets.append(
                    Target(f"{text} {what}: nf4's time, of dense's", 1 / speedup(times["dense"], mine), limit)
                )
            for name in names:
                ratio = 1 / speedup(times[name], mine)
                targets.append(Target(f"{text} {what}: nf4's time, of {name}'s", ratio, 1.0))
    return targets


def bench_conversions(out: Results, args: argparse.Namespace, n: int, k: int) -> list[Target]:
    """Quantize and dequantize one weight."""
    w = torch.randn(n, k) * k**-0.5
    dense, rounds, text = torch.empty(n, k, dtype=BF16), max(args.rounds // 3, 3), f"{n}x{k}"
    calls: dict[str, Any] = {name: (lambda _, spec=spec: quantize(w, spec)) for name, spec in OURS.items()}
    q = {name: quantize(w, spec) for name, spec in OURS.items()}
    write: dict[str, Any] = {
        name: (lambda _, q=one: torch.ops.lowmem.quant_dequantize_(dense, *q.tensors(), q.spec.code, k, 0, 0))
        for name, one in q.items()
    }
    try:
        import bitsandbytes.functional as peer

        calls["bitsandbytes"] = lambda _: peer.quantize_4bit(w, blocksize=64, quant_type="nf4")
        packed, state = peer.quantize_4bit(w.to(BF16), blocksize=64, quant_type="nf4")
        write["bitsandbytes"] = lambda _: peer.dequantize_4bit(packed, state)
    except ImportError:
        pass
    targets = []
    for what, timed in (("quantize", calls), ("dequantize", write)):
        times = paired(timed, "cpu", rounds=rounds, warm=1)
        against = times.get("bitsandbytes")
        for name, series in times.items():
            spec = OURS.get(name)
            nbytes = n * k * (4 if what == "quantize" else 2) + (spec.storage_bytes(n, k) if spec else n * k / 2)
            out.add(what, text, torch.float32 if what == "quantize" else BF16, name, series, nbytes=nbytes,
                    peer_times=against if spec else None)  # fmt: skip
        if against:
            ratio = 1 / speedup(against, times["lowmem nf4"])
            targets.append(Target(f"{what} {text}: nf4's time, of bitsandbytes'", ratio, 1.0))
    return targets


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="paired rounds")
    parser.add_argument("--shapes", default="4096,4096;4096,14336", help="N,K of the weights, separated by semicolons")
    parser.add_argument("--rows", default="1,16,512,2048", help="rows of x")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, by its processor time")
    parser.add_argument("--quick", action="store_true", help="one small shape, three rounds: does it run?")
    parser.add_argument("--csv", type=Path, help="default: bench/results/<device>/quant.csv")
    args = parser.parse_args()
    shapes = [tuple(int(size) for size in shape.split(",")) for shape in args.shapes.split(";")]
    rows = [int(m) for m in args.rows.split(",")]
    if args.quick:
        shapes, rows, args.rounds = [(128, 256)], [1, 40], 3
    if args.cpu_time:
        torch.set_num_threads(1)
        common.CLOCK = time.process_time
    start = time.time()
    torch.manual_seed(0)
    out = Results(ceilings("cpu", [BF16, torch.float32], quick=True))
    print(f"{out.name}, torch {torch.__version__}, lowmem {lowmem.__version__}, commit {out.commit}")
    out.header()
    targets = []
    args.csv = args.csv or ROOT / "bench" / "results" / slug("cpu") / "quant.csv"
    for n, k in shapes:
        targets += bench_conversions(out, args, n, k)
        out.write(args.csv)
        targets += bench_products(out, args, n, k, rows)
    print_targets(targets)
    print(f"wrote {args.csv} ({len(out.rows)} rows), {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
