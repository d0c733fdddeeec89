"""Benchmarks of the activation family: the loss without the logits, and the elementwise kernels.

    python bench/bench_activation.py [--only loss,kernel] [--device cpu|cuda] [--rounds 7] [--quick]

``loss``    forward and backward of the output layer with its loss: plain torch (logits, cross_entropy in fp32), ours
            with a trained and with a frozen weight, and ours recomputing. Peak memory is beyond dW, which all make.
``kernel``  norms, SwiGLU, activations and FP8 groups, forward and backward, against plain torch's functions (those that
            torch has) or the references; floors are the bytes that must move.

Results go to bench/results/<device>/activation.csv (or ``--csv``); the last table holds the family's targets. Columns
and timing: bench/common.py.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler only counts memory here; its own messages are noise

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from common import Results, Target, ceilings, paired, peak_mb, print_targets, slug, speedup  # noqa: E402

import lowmem  # noqa: E402
from lowmem.ops import activation as ref  # noqa: E402
from lowmem.ops import activation_norm as ref_norm  # noqa: E402
from lowmem.ops import linear_cross_entropy  # noqa: E402
from lowmem.ops.activation_saved import pack_reference, packed_bytes, unpack_reference  # noqa: E402

OURS = "lowmem"
VOCABULARY = 150_000
Call = Callable[[int], Any]


def bench_loss(out: Results, args: argparse.Namespace, m: int, k: int, v: int, dtype: torch.dtype) -> list[Target]:
    """One shape: plain torch, and ours in its forms, interleaved."""
    device = args.device
    x = torch.randn(m, k, device=device).to(dtype).requires_grad_()
    weight = torch.randn(v, k, device=device).mul_(k**-0.5).to(dtype).requires_grad_()
    frozen = weight.detach()
    target = torch.randint(0, v, (m,), device=device)

    def plain(w: torch.Tensor) -> Call:
        inputs = [t for t in (x, w) if t.requires_grad]
        return lambda _: torch.autograd.grad(F.cross_entropy(F.linear(x, w).float(), target), inputs)

    def ours(w: torch.Tensor, save: Any = "grad") -> Call:
        inputs = [t for t in (x, w) if t.requires_grad]
        return lambda _: torch.autograd.grad(linear_cross_entropy(x, w, target, save=save), inputs)

    calls = {
        "torch": plain(weight),
        OURS: ours(weight),
        f"{OURS} recompute": ours(weight, "recompute"),
        "torch, frozen weight": plain(frozen),
        f"{OURS}, frozen weight": ours(frozen),
    }
    times = paired(calls, device, rounds=args.rounds, warm=1)
    text, item = f"M{m} K{k} V{v}", dtype.itemsize
    logits, limit = m * v * item / 1e6, max(0.05 * m * v * item, m * k * item + 64e6) / 1e6
    targets = []
    for name, series in times.items():
        trained = "frozen" not in name
        gemms = (3 if trained else 2) + (name == f"{OURS} recompute")
        against = times["torch" if trained else "torch, frozen weight"] if name.startswith(OURS) else None
        peak = peak_mb(calls[name], device) - (v * k * item / 1e6 if trained else 0)
        nbytes = (gemms * v * k + 2 * m * k) * item
        flops = 2.0 * m * v * k * (3 if trained else 2)
        out.add("loss fwd+bwd", text, dtype, name, series, nbytes=nbytes, flops=flops, peak=peak, torch_times=against)
        if against is None:
            continue
        label = f"{text} {str(dtype)[6:]}: {name}"
        if "recompute" not in name:
            targets.append(Target(f"{label}, time, of torch's", 1 / speedup(against, series), 1.1))
        targets.append(Target(f"{label}, peak MB (logits {logits:.0f})", peak, limit))
    return targets


def kernel_cases(m: int, k: int, dtype: torch.dtype, device: str) -> Iterator[tuple[str, Call, Call, float]]:
    """``(name, ours, torch's or the reference, bytes that must move)``."""
    ops, e = torch.ops.lowmem, dtype.itemsize
    x, u, dy = (torch.randn(m, k, device=device).to(dtype) for _ in range(3))
    w = torch.rand(k, device=device).to(dtype)
    packed, stats = ops.norm_forward(x, None, w, None, 1e-6, False, 1)[2:]
    each, full = packed_bytes(m, k), m * k * e

    def norm(*options: Any) -> Call:
        return lambda _: ops.norm_forward(x, u, w, None, 1e-6, False, *options)

    def torch_norm(_: int) -> Any:
        return F.rms_norm(x + u, (k,), w, 1e-6)

    yield "residual+rms", norm(0), torch_norm, 4 * full
    yield "residual+rms+fp8", norm(1), lambda _: (torch_norm(0), pack_reference(x)), 4 * full + each
    grads = (dy, u, packed, w, stats, False, 1, False, False)
    yield (
        "rms backward, fp8",
        lambda _: ops.norm_backward(*grads),
        lambda _: ref_norm.norm_grad_reference(*grads),
        3 * full + each,
    )
    yield "swiglu", lambda _: ops.swiglu_forward(x, u, 0), lambda _: F.silu(x) * u, 3 * full
    yield (
        "swiglu+fp8",
        lambda _: ops.swiglu_forward(x, u, 1),
        lambda _: ref.swiglu_reference(x, u, 1),
        3 * full + 2 * each,
    )
    g8, u8 = ops.fp8_pack(x), ops.fp8_pack(u)
    yield (
        "swiglu backward, fp8",
        lambda _: ops.swiglu_backward(dy, g8, u8, 1),
        lambda _: ref.swiglu_grad_reference(dy, g8, u8, 1),
        3 * full + 2 * each,
    )
    yield "gelu+deriv4", lambda _: ops.act_forward(x, 1, 2), lambda _: F.gelu(x), 2 * full + m * k / 2
    codes = ops.act_forward(x, 1, 2)[1]
    yield (
        "gelu backward, deriv4",
        lambda _: ops.act_backward(dy, codes, 1, 2),
        lambda _: torch.ops.aten.gelu_backward(dy, x),
        2 * full + m * k / 2,
    )
    yield "fp8_pack", lambda _: ops.fp8_pack(x), lambda _: pack_reference(x), full + each
    yield (
        "fp8_unpack",
        lambda _: ops.fp8_unpack(packed, m, k, dtype),
        lambda _: unpack_reference(packed, m, k, dtype),
        full + each,
    )


def bench_kernels(out: Results, args: argparse.Namespace, m: int, k: int, dtype: torch.dtype) -> None:
    """Every kernel of one shape."""
    for name, ours, other, nbytes in kernel_cases(m, k, dtype, args.device):
        times = paired({OURS: ours, "torch": other}, args.device, rounds=args.rounds)
        for backend, call in ((OURS, ours), ("torch", other)):
            against = times["torch"] if backend == OURS else None
            out.add(
                name, f"M{m} K{k}", dtype, backend, times[backend], nbytes=nbytes, flops=0.0,
                peak=peak_mb(call, args.device), torch_times=against,
            )  # fmt: skip


def main() -> None:
    """Run what --only names; print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", default="loss,kernel", help="parts, comma-separated")
    parser.add_argument("--rounds", type=int, default=7, help="paired rounds")
    parser.add_argument("--dtypes", default="bf16,fp32", help="of bf16, fp32")
    parser.add_argument("--quick", action="store_true", help="small shapes, three rounds: does it run?")
    parser.add_argument("--csv", type=Path, help="default: bench/results/<device>/activation.csv")
    args = parser.parse_args()
    names = {"bf16": torch.bfloat16, "fp32": torch.float32}
    dtypes = [names[d] for d in args.dtypes.split(",")]
    big = args.device == "cuda"
    losses = [(8192, 4096, VOCABULARY)] if big else [(512, 1024, VOCABULARY)]
    kernels = [(8192, 4096), (8192, 11008)] if big else [(2048, 4096)]
    if args.quick:
        args.rounds, losses, kernels = 3, [(64, 64, 3000)], [(64, 256)]
    start = time.time()
    torch.manual_seed(0)
    top = ceilings(args.device, dtypes, quick=args.quick or not big)
    out, targets = Results(top), []
    print(f"{out.name}, torch {torch.__version__}, lowmem {lowmem.__version__}, commit {out.commit}")
    print(f"ceilings of this run: copy {top.copy_gbs:.1f} GB/s")
    out.header()
    for dtype in dtypes:
        if "kernel" in args.only:
            for m, k in kernels:
                bench_kernels(out, args, m, k, dtype)
        if "loss" in args.only:
            for m, k, v in losses:
                targets += bench_loss(out, args, m, k, v, dtype)
    print_targets(targets)
    csv = args.csv or ROOT / "bench" / "results" / slug(args.device) / "activation.csv"
    out.write(csv)
    print(f"wrote {csv} ({len(out.rows)} rows)")
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
