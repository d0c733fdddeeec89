"""Benchmarks of the lora family against PEFT's eager layer, the frozen GEMMs alone, and the references.

    python bench/bench_lora.py [--only layer,kernel,overhead] [--device cpu|cuda] [--rounds 15] [--seconds N] [--quick]

``layer``     forward and backward of one adapted linear layer, r = 16: the two frozen base GEMMs (y = x W^T, dx = dy W)
              alone, PEFT's eager layer, and ours, with p = 0.1 and p = 0, all interleaved. On a GPU also our own torch
              composition of LoRAFusion's split (dropped x and mask kept, cuBLAS), and compiled PEFT with ``--compile``.
``kernel``    each operator against its plain-torch reference (lowmem/ops/lora.py).
``overhead``  one row (M = 1): what a call costs, forward and forward + backward, beside PEFT's layer.

Results go to bench/results/<device>/lora.csv (or ``--csv``), with a roofline plot beside it; the last table holds the
family's targets. Columns and timing: bench/common.py. Method and findings: docs/performance.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler only counts memory here; its own messages are noise

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from common import (  # noqa: E402
    Results,
    Target,
    ceilings,
    overhead,
    paired,
    peak_mb,
    print_targets,
    rotation,
    slug,
    speedup,
)

import lowmem  # noqa: E402
from lowmem.nn import FusedLoRALinear  # noqa: E402
from lowmem.ops import lora as ref  # noqa: E402
from lowmem.ops import lora_linear  # noqa: E402

R, ALPHA, P = 16, 32, 0.1
SCALE = ALPHA / R
BF16, FP32 = torch.bfloat16, torch.float32
CPU_SHAPES = [(m, 4096, n) for n in (4096, 14336) for m in (512, 2048)]
GPU_SHAPES = [(8192, 4096, 4096), (8192, 4096, 1024), (8192, 4096, 14336), (8192, 14336, 4096)]  # Llama-3-8B's linears
OURS = "lowmem"


def draw_seed(device: str) -> Tensor:
    """A layer's seed, as the module draws it."""
    return torch.randint(0, 2**62, (1,), device=device)


def peft_layer(w: Tensor, p: float, adapter_dtype: torch.dtype) -> nn.Module:
    """PEFT's LoRA layer over ``w``."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    base = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
    base.weight = nn.Parameter(w, requires_grad=False)
    config = LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=p)
    layer = Linear(base, "default", config, r=R, lora_alpha=ALPHA).to(w.device)
    for part in (layer.lora_A, layer.lora_B):
        part.to(adapter_dtype)
    nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    return layer.train()


class SplitComposition(torch.autograd.Function):
    """LoRAFusion's split of the work in plain torch: dropped x and a byte mask are kept, every product is one GEMM."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: float, p: float) -> Tensor:
        """y = x w^T + scale * drop(x) a^T b^T."""
        dropped, mask = torch.native_dropout(x, p, True)
        s = dropped @ a.T
        y = (x @ w.T).addmm_(s, b.T, alpha=scale)
        ctx.save_for_backward(dropped, mask, s, w, a, b)
        ctx.scale, ctx.p = scale, p
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        """dx, da and db, over the materialised dropped x."""
        dropped, mask, s, w, a, b = ctx.saved_tensors
        ds = (dy @ b).mul_(ctx.scale)
        db = (dy.T @ s).mul_(ctx.scale)
        da = ds.T @ dropped
        dx = (dy @ w).add_((ds @ a).mul_(mask), alpha=1 / (1 - ctx.p))
        return dx, None, da, db, None, None


def layer_floor(m: int, k: int, n: int, dtype: torch.dtype, p: float, adapted: bool) -> tuple[float, float]:
    """(bytes, operations) that forward and backward need at the least; without adapters the two GEMMs'."""
    e = dtype.itemsize
    nbytes, flops = 2.0 * n * k * e + (2 * m * k + 2 * m * n) * e, 4.0 * m * n * k
    if adapted:  # dA reads x once more; the bits are written once and read once
        nbytes += m * k * e + (m * k / 4 if p > 0 else 0)
        flops += 6.0 * m * R * (k + n)
    return nbytes, flops


def bench_layer(
    out: Results, args: argparse.Namespace, shape: tuple[int, int, int], dtype: torch.dtype, adapters: torch.dtype
) -> list[Target]:
    """One shape: frozen GEMMs, PEFT and ours at p = 0.1 and 0, interleaved."""
    device, (m, k, n) = args.device, shape
    sets = rotation(device, (n * k + 2 * m * (k + n)) * dtype.itemsize)
    ws = [torch.randn(n, k, device=device).mul_(k**-0.5).to(dtype) for _ in range(sets)]
    xs = [torch.randn(m, k, device=device).to(dtype).requires_grad_() for _ in range(sets)]
    dys = [torch.randn(m, n, device=device).to(dtype) for _ in range(sets)]
    a = torch.randn(R, k, device=device).mul_(k**-0.5).to(adapters).requires_grad_()
    b = torch.randn(n, R, device=device).mul_(0.02).to(adapters).requires_grad_()

    def frozen(i: int) -> Any:
        i %= sets
        with torch.no_grad():
            return xs[i] @ ws[i].T, dys[i] @ ws[i]

    def ours(p: float) -> Callable[[int], Any]:
        def call(i: int) -> Any:
            i %= sets
            y = lora_linear(xs[i], ws[i], a, b, SCALE, p=p, seed=draw_seed(device) if p else None)
            return torch.autograd.grad(y, (xs[i], a, b), dys[i])

        return call

    def peft(p: float, compiled: bool = False) -> Callable[[int], Any]:
        layers = [peft_layer(w, p, adapters) for w in ws]
        runs = [torch.compile(layer) for layer in layers] if compiled else layers

        def call(i: int) -> Any:
            i %= sets
            y = runs[i](xs[i])
            return torch.autograd.grad(
                y, (xs[i], layers[i].lora_A["default"].weight, layers[i].lora_B["default"].weight), dys[i]
            )

        return call

    def split(i: int) -> Any:
        i %= sets
        y = SplitComposition.apply(xs[i], ws[i], a, b, SCALE, P)
        return torch.autograd.grad(y, (xs[i], a, b), dys[i])

    calls: dict[str, Callable[[int], Any]] = {"frozen GEMMs": frozen}
    for p in (P, 0.0):
        calls[f"PEFT eager p={p}"] = peft(p)
        calls[f"{OURS} p={p}"] = ours(p)
    if args.compile:
        calls[f"PEFT compiled p={P}"] = peft(P, True)
    if device == "cuda" and adapters == dtype:
        calls[f"split composition p={P}"] = split
    times = paired(calls, device, rounds=args.rounds, seconds=args.share)

    text = f"M{m} {k}->{n} r{R}" + ("" if adapters == dtype else f" {str(adapters)[6:]} A,B")
    for name, series in times.items():
        p = 0.0 if name.endswith("p=0.0") else P
        nbytes, flops = layer_floor(m, k, n, dtype, p, name != "frozen GEMMs")
        peer = None if name.startswith(("frozen", "PEFT eager")) else times[f"PEFT eager p={p}"]
        out.add(
            "layer fwd+bwd", text, dtype, name, series, nbytes=nbytes, flops=flops, peak=peak_mb(calls[name], device),
            torch_times=times["frozen GEMMs"], compile_times=times.get(f"PEFT compiled p={p}"), peer_times=peer,
        )  # fmt: skip
    return layer_targets(args, times, calls, f"{text} {str(dtype)[6:]}", shape, adapters == dtype)


def layer_targets(
    args: argparse.Namespace,
    times: dict[str, list[float]],
    calls: dict[str, Any],
    text: str,
    shape: tuple[int, int, int],
    strict: bool,
) -> list[Target]:
    """The targets that one shape decides alone; with adapters of another dtype nothing is promised."""
    frozen, eager, mine = times["frozen GEMMs"], times[f"PEFT eager p={P}"], times[f"{OURS} p={P}"]
    args.speedups.setdefault("peft" if strict else "peft, fp32 adapters", []).append(speedup(eager, mine))
    if not strict:
        return []
    if args.device == "cpu":
        share = overhead(mine, frozen) / overhead(eager, frozen)
        total = 1 / speedup(times["PEFT eager p=0.0"], times[f"{OURS} p=0.0"])
        return [
            Target(f"{text}: overhead p={P}, share of PEFT's", share, 0.5),
            Target(f"{text}: time p=0, of PEFT's", total, 1.02),
        ]
    args.speedups.setdefault("split", []).append(speedup(times[f"split composition p={P}"], mine))
    found = (
        [Target(f"{text}: time p={P}, of the frozen GEMMs", 1 / speedup(frozen, mine), 1.15)]
        if shape[1:] == (4096, 4096)
        else []
    )
    torch.manual_seed(1)
    first = calls[f"{OURS} p={P}"](0)
    torch.manual_seed(1)
    same = all(torch.equal(u, v) for u, v in zip(first, calls[f"{OURS} p={P}"](0), strict=True))
    return [*found, Target(f"{text}: same bits on two runs", float(same), 1.0, at_most=False)]


def kernel_cases(
    m: int, k: int, n: int, r: int, dtype: torch.dtype, device: str
) -> Iterator[tuple[str, Any, Any, float, float]]:
    """(operator, our call, the reference's call, bytes, operations)."""
    ops, e = torch.ops.lowmem, dtype.itemsize
    x, dy = torch.randn(m, k, device=device).to(dtype), torch.randn(m, n, device=device).to(dtype)
    w = torch.randn(n, k, device=device).mul_(k**-0.5).to(dtype)
    a, b = torch.randn(r, k, device=device).to(dtype), torch.randn(n, r, device=device).to(dtype)
    s, ds = torch.randn(m, r, device=device).to(dtype), torch.randn(m, r, device=device).to(dtype)
    seed = draw_seed(device)
    mask = ops.lora_shrink(x, a, 1.0, P, seed, 0, True)[1]
    out = torch.randn(m, k, device=device).to(dtype)
    bits = m * k / 8

    def case(name: str, op: Any, reference: Any, arguments: tuple[Any, ...], nbytes: float, flops: float) -> Any:
        return name, lambda _: op(*arguments), lambda _: reference(*arguments), nbytes, flops

    skinny = 2.0 * m * r
    for p, text in ((P, " p=0.1"), (0.0, " p=0")):
        use, at = (seed, bits) if p else (None, 0.0)
        arguments = (x, a, SCALE, p, use, 0, True)
        yield case("shrink" + text, ops.lora_shrink, ref.shrink_reference, arguments, m * k * e + at, skinny * k)
    yield case("dy", ops.lora_dy, ref.dy_reference, (dy, b, s, SCALE), m * n * e + 4 * n * r, 2 * skinny * n)
    for stored, p, text in ((mask, P, " bits"), (None, P, " seed"), (None, 0.0, " p=0")):
        use, at = seed if stored is None and p else None, 0.0 if stored is None else bits
        arguments = (out, ds, a, stored, p, use, 0, True)
        yield case(
            "masked_expand_" + text,
            ops.lora_masked_expand_,
            ref.masked_expand_reference,
            arguments,
            2 * m * k * e + at,
            skinny * k,
        )
        arguments = (ds, x, stored, p, use, 0)
        yield case("da" + text, ops.lora_da, ref.da_reference, arguments, m * k * e + at + 4 * r * k, skinny * k)
    flops, moved = 2.0 * m * n * k, (n * k + m * (k + n)) * e
    yield case("expand", ops.lora_expand, ref.expand_reference, (x, w, s, b, None), moved, flops + skinny * n)
    yield case(
        "dx bits", ops.lora_dx, ref.dx_reference, (dy, w, ds, a, mask, P, None, 0), moved + bits, flops + skinny * k
    )


def bench_kernels(
    out: Results, args: argparse.Namespace, shape: tuple[int, int, int], r: int, dtype: torch.dtype
) -> None:
    """Every operator of one shape against its reference."""
    m, k, n = shape
    for name, ours, reference, nbytes, flops in kernel_cases(m, k, n, r, dtype, args.device):
        times = paired({OURS: ours, "reference": reference}, args.device, rounds=args.rounds, seconds=args.share / 8)
        text = f"M{m} {k}->{n} r{r}"
        for backend, call in ((OURS, ours), ("reference", reference)):
            against = times["reference"] if backend == OURS else None
            out.add(
                f"lora_{name}", text, dtype, backend, times[backend], nbytes=nbytes, flops=flops,
                peak=peak_mb(call, args.device), torch_times=against,
            )  # fmt: skip


def bench_overhead(out: Results, args: argparse.Namespace, k: int, dtype: torch.dtype, p: float) -> list[Target]:
    """One row through one layer, k -> k."""
    device = args.device
    w = torch.randn(k, k, device=device).mul_(k**-0.5).to(dtype)
    x, dy = torch.randn(1, k, device=device).to(dtype).requires_grad_(), torch.randn(1, k, device=device).to(dtype)
    peft = peft_layer(w, p, dtype)
    fused = FusedLoRALinear(k, k, r=R, alpha=ALPHA, dropout=p, base=w, adapter_dtype=dtype).train()
    a, b = (t["default"] for t in (fused.lora_A, fused.lora_B))

    def function(_: int) -> Tensor:
        return lora_linear(x, w, a, b, SCALE, p=p, seed=draw_seed(device) if p else None)

    forward: dict[str, Any] = {"PEFT eager": lambda _: peft(x), OURS: function, f"{OURS} module": lambda _: fused(x)}
    weights = [*peft.lora_A.parameters(), *peft.lora_B.parameters()]

    def backward(call: Any, inputs: list[Tensor]) -> Callable[[int], Any]:
        return lambda i: torch.autograd.grad(call(i), inputs, dy)

    inputs = {name: [x, *weights] if name.startswith("PEFT") else [x, a, b] for name in forward}
    both = {name: backward(call, inputs[name]) for name, call in forward.items()}
    targets = []
    for label, calls in (("fwd", forward), ("fwd+bwd", both)):
        # about a millisecond a measurement, and many: a shared processor's pauses hit few, and the median drops those
        rounds = max(args.rounds, 31 if args.quick or k >= 2048 else 201)
        times = paired(calls, device, rounds=rounds, inner=10 if k < 2048 else 1)
        for name, series in times.items():
            against = None if name.startswith("PEFT") else times["PEFT eager"]
            out.add(f"overhead {label} p={p}", f"M1 {k}->{k} r{R}", dtype, name, series, peer_times=against)
            if against is not None:
                text = f"M1 {k}->{k} {str(dtype)[6:]} p={p} {label}: {name}'s time, of PEFT's"
                targets.append(Target(text, 1 / speedup(against, series), 1.5))
    return targets


def main() -> None:
    """Run what --only names; print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", default="layer,kernel,overhead", help="parts, comma-separated")
    parser.add_argument("--rounds", type=int, default=15, help="paired rounds at the least")
    parser.add_argument("--seconds", type=float, default=0.0, help="time to fill with further rounds")
    parser.add_argument("--compile", action="store_true", help="also PEFT under torch.compile")
    parser.add_argument("--dtypes", default="bf16,fp32", help="of bf16, fp32")
    parser.add_argument("--shape", help="of the layers: this one alone, as M,K,N")
    parser.add_argument("--quick", action="store_true", help="small shapes, three rounds: does it run?")
    parser.add_argument("--csv", type=Path, help="default: bench/results/<device>/lora.csv")
    args = parser.parse_args()
    parts, names = args.only.split(","), {"bf16": BF16, "fp32": FP32}
    dtypes = [names[d] for d in args.dtypes.split(",")]
    shapes, kernel_shapes, widths = (GPU_SHAPES if args.device == "cuda" else CPU_SHAPES), [], (64, 256, 4096)
    kernel_shapes = [((8192 if args.device == "cuda" else 2048, 4096, 4096), r) for r in (16, 64)]
    if args.quick:
        args.rounds, shapes, kernel_shapes, widths = 3, [(64, 128, 192)], [((64, 128, 192), 16)], (64,)
    if args.shape:
        shapes = [tuple(int(size) for size in args.shape.split(","))]
    args.share = args.seconds / max(1, len(shapes) * len(dtypes) + len(kernel_shapes) * len(dtypes))
    args.speedups = {}

    start = time.time()
    torch.manual_seed(0)
    top = ceilings(args.device, dtypes, quick=args.quick)
    out, targets = Results(top), []
    print(f"{out.name}, torch {torch.__version__}, lowmem {lowmem.__version__}, commit {out.commit}")
    rates = ", ".join(f"GEMM {str(d)[6:]} {r:.3f} TFLOP/s" for d, r in top.gemm_tflops.items())
    print(f"ceilings of this run: copy {top.copy_gbs:.1f} GB/s, {rates}")
    out.header()
    csv = args.csv or ROOT / "bench" / "results" / slug(args.device) / "lora.csv"
    if "overhead" in parts:
        for k in widths:
            for dtype in dtypes:
                for p in (0.0, P):
                    targets += bench_overhead(out, args, k, dtype, p)
    if "kernel" in parts:
        for shape, r in kernel_shapes:
            for dtype in dtypes:
                bench_kernels(out, args, shape, r, dtype)
    if "layer" in parts:
        for dtype in dtypes:
            for shape in shapes:
                targets += bench_layer(out, args, shape, dtype, dtype)
                out.write(csv)  # as it goes: the large shapes take minutes, and what is measured should not be lost
                if dtype == BF16:  # PEFT's own default keeps adapters in fp32 over a 16-bit base
                    targets += bench_layer(out, args, shape, dtype, FP32)
    if args.device == "cuda" and args.speedups:
        limits = {"peft": ("PEFT eager", 1.30), "split": ("the split composition", 1.03)}
        for key, (text, limit) in limits.items():
            mean = statistics.mean(args.speedups[key])
            targets.append(Target(f"mean speed-up over {text}, p={P}, four shapes", mean, limit, at_most=False))
    print_targets(targets)
    out.write(csv)
    print(f"wrote {csv} ({len(out.rows)} rows)")
    out.plot(csv.with_suffix(".png"), OURS)
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
