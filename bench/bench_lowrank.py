"""The low-rank optimizers: a step against its own two GEMMs, and a warm refresh against torch's SVD.

    python bench/bench_lowrank.py                 # all of it; the first run trains two small models for gradients
    python bench/bench_lowrank.py --capture       # only those, into .cache/lowrank_gradients
    python bench/bench_lowrank.py --quick         # does it run?

Step rows, for a weight m x n at r = 128 in fp32 and bf16: a whole ``ProjAdamW.step()`` between two refreshes, with its
check for NaN. "GEMMs" are the two products of a step alone (R = P^T G, U = P N), ``torch.mm`` with ``out=``; "torch" is
torch.optim.AdamW(fused=True) on the same weight; "peer" is galore_torch 1.0's step, where it is installed.

Refresh rows: power steps from the basis of some steps before (``lowmem.factor.power_iteration``), on gradients captured
from a Llama with layers of these sizes that trains on the standard library's source. "torch" is ``torch.linalg.svd``.
The energy that the new basis captures is given as a share of the best possible.
"""

from __future__ import annotations

import argparse
import csv as csv_module
import functools
import importlib.util
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import ROOT, Results, Target, ceilings, overhead, paired, peak_mb, print_targets, slug, speedup

import lowmem
from lowmem.factor import power_iteration
from lowmem.optim import ProjAdamW

RANK = 128
SHAPES = [(1024, 2816), (4096, 4096)]
CACHE = ROOT / ".cache" / "lowrank_gradients"
BF16, FP32 = torch.bfloat16, torch.float32
VOCABULARY = 4096
# hidden, intermediate, layers, weight, steps, tokens a step, steps between the two gradients; these see 2048 tokens
MODELS = {
    (1024, 2816): (1024, 2816, 2, "model.layers.1.mlp.down_proj.weight", 120, 512, 10),
    (4096, 4096): (4096, 4096, 1, "model.layers.0.self_attn.q_proj.weight", 25, 256, 5),
}


def source_tokens(limit: int) -> torch.Tensor:
    """The standard library's source as tokens of a byte-pair encoding trained on it."""
    sys.path.insert(0, str(ROOT / "examples"))
    import _data

    texts = _data.python_source(limit, 0)
    return _data.encode(_data.train_tokenizer(texts, VOCABULARY), texts)


def captured(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Two gradients of one weight, some steps apart."""
    path = CACHE / f"{shape[0]}x{shape[1]}.pt"
    if path.exists():
        return tuple(torch.load(path, weights_only=True))  # type: ignore[return-value]
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, layers, name, steps, tokens, lag = MODELS[shape]
    seq, heads = 128, hidden // 64
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=VOCABULARY, max_position_embeddings=seq,
    )  # fmt: skip
    model, data = LlamaForCausalLM(config), source_tokens(2_000_000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    weight = dict(model.named_parameters())[name]
    kept = []
    for step in range(steps):
        keep = step in (steps - 1 - lag, steps - 1)
        at = torch.randint(0, len(data) - seq, ((2048 if keep else tokens) // seq,)).tolist()
        batch = torch.stack([data[a : a + seq] for a in at])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        if keep:
            kept.append(weight.grad.clone())
        optimizer.step()
        optimizer.zero_grad()
    print(f"captured {name} of a Llama with hidden size {hidden}, {lag} steps apart, loss {loss.item():.3f}")
    CACHE.mkdir(parents=True, exist_ok=True)
    torch.save(kept, path)
    return kept[0], kept[1]


@functools.cache
def released_galore() -> Any:
    """galore_torch's AdamW without its package's import of bitsandbytes, or None."""
    spec = importlib.util.find_spec("galore_torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    package = types.ModuleType("galore_torch")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["galore_torch"] = package
    return importlib.import_module("galore_torch.adamw").AdamW


def weight_of(shape: tuple[int, int], dtype: torch.dtype, device: str) -> torch.nn.Parameter:
    weight = torch.nn.Parameter(torch.randn(shape, device=device).to(dtype))
    weight.grad = torch.randn(shape, device=device).to(dtype)
    return weight


def step_calls(shape: tuple[int, int], dtype: torch.dtype, device: str) -> dict[str, Callable[[int], Any]]:
    """The candidates of one step, each with weights of its own."""
    m, n = shape
    left = m < n
    weight = weight_of(shape, dtype, device)
    grad = weight.grad
    p = torch.linalg.qr(torch.randn(m if left else n, RANK)).Q.to(device, dtype)
    thin = torch.randn((RANK, n) if left else (m, RANK), device=device).to(dtype)
    r, u = torch.empty_like(thin), torch.empty_like(weight)

    def gemms(_: int) -> None:
        if left:
            torch.mm(p.T, grad, out=r)
            torch.mm(p, thin, out=u)
        else:
            torch.mm(grad, p, out=r)
            torch.mm(thin, p.T, out=u)

    def stepper(optimizer: Any) -> Callable[[int], Any]:
        return lambda _: optimizer.step()

    calls: dict[str, Callable[[int], Any]] = {"GEMMs": gemms}
    options = {"rank": RANK, "refresh": 10**9, "projector": "random", "weight_decay": 0.1}
    calls["lowmem"] = stepper(ProjAdamW([weight_of(shape, dtype, device)], 1e-3, **options))
    if dtype == BF16:
        made = ProjAdamW([weight_of(shape, dtype, device)], 1e-3, rounding="stochastic", **options)
        calls["lowmem stochastic"] = stepper(made)
    for residual in ("fira", "sign", "apollo"):
        made = ProjAdamW([weight_of(shape, dtype, device)], 1e-3, residual=residual, **options)
        calls[f"lowmem {residual}"] = stepper(made)
    calls["torch AdamW"] = stepper(torch.optim.AdamW([weight_of(shape, dtype, device)], lr=1e-3, fused=True))
    galore = released_galore()
    if galore is not None:
        group = {
            "params": [weight_of(shape, dtype, device)], "rank": RANK, "update_proj_gap": 10**9, "scale": 0.25,
            "proj_type": "std",
        }  # fmt: skip
        calls["galore_torch"] = stepper(galore([group], lr=1e-3, no_deprecation_warning=True))
    return calls


def bench_step(out: Results, args: Any, shape: tuple[int, int], dtype: torch.dtype) -> list[Target]:
    m, n = shape
    calls = step_calls(shape, dtype, args.device)
    times = paired(calls, args.device, rounds=args.rounds, warm=1)
    size, flops = torch.empty(0, dtype=dtype).element_size(), 4.0 * m * n * RANK
    long = max(m, n)
    for name, taken in times.items():
        reads = 2 if name.split()[-1] in ("fira", "sign", "apollo") else 1
        nbytes = m * n * size * (2 + reads) + RANK * long * 16
        low = name.startswith("lowmem")
        out.add(
            "step", f"{m}x{n} r={RANK}", dtype, name, taken,
            nbytes=nbytes if low else None, flops=flops if low else None,
            peak=peak_mb(calls[name], args.device) if low else None, torch_times=times["torch AdamW"],
            peer_times=times.get("galore_torch"),
        )  # fmt: skip
    ratio = 1 / speedup(times["GEMMs"], times["lowmem"])
    extra = overhead(times["lowmem"], times["GEMMs"])
    print(f"{'':22} step / its two GEMMs {ratio:.3f}, {extra:.2f} ms beyond them")
    held = peak_mb(calls["lowmem"], args.device)
    what = f"{m}x{n} {str(dtype)[6:]}: "
    return [
        Target(what + "step / its two GEMMs", ratio, 1.2),
        Target(what + "most memory held in a step / m x n", held * 1e6 / (m * n * size), 0.99),
    ]


def bench_refresh(out: Results, args: Any, shape: tuple[int, int]) -> list[Target]:
    m, n = shape
    old, g = (torch.randn(shape), torch.randn(shape)) if args.quick else captured(shape)
    a = g if m <= n else g.T
    stale = torch.svd_lowrank(old if m <= n else old.T, RANK, niter=6)[0].contiguous()
    best = float((torch.linalg.svdvals(a)[:RANK].double() ** 2).sum())

    def share(p: torch.Tensor) -> float:
        return float(((p.double().T @ a.double()) ** 2).sum()) / best

    seed = torch.tensor([1], device=a.device)
    # (steps, columns beyond the rank, dtype of the products); the conversion to it is in the time
    kinds = [(1, 0, None), (1, 0, BF16), (2, 64, None), (2, 64, BF16)]
    calls: dict[str, Callable[[int], Any]] = {}
    for steps, more, products in kinds:
        name = f"power {steps}" + (f" +{more}" if more else "") + (" bf16" if products else "")
        options = {"iters": steps, "oversample": more, "seed": seed, "products": products}
        calls[name] = lambda _, options=options: power_iteration(a, stale, **options)
    shares = {name: share(call(0)[0]) for name, call in calls.items()}
    calls["torch.linalg.svd"] = lambda _: torch.linalg.svd(a, full_matrices=False)
    times = paired(calls, args.device, rounds=args.svd_rounds, warm=0)
    fit = {}
    for name, taken in times.items():
        label = f"{name} ({shares.get(name, 1.0):.4f})"
        out.add("refresh", f"{m}x{n} r={RANK}", FP32, label, taken, torch_times=times["torch.linalg.svd"])
        if shares.get(name, 0.0) >= 0.995:
            fit[name] = speedup(times["torch.linalg.svd"], taken)
    print(f"{'':22} the stale basis captures {share(stale):.4f} of the best energy")
    limit = 30.0 if shape == (1024, 2816) else 100.0
    top = max(fit.values(), default=0.0)
    what = f"{m}x{n}: SVD / the fastest warm refresh with 99.5 % of the best energy"
    return [Target(what, top, limit, at_most=False)]


def main() -> None:
    """Run what --only names; print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", default="step,refresh", help="parts, comma-separated")
    parser.add_argument("--rounds", type=int, default=15, help="paired rounds of a step")
    parser.add_argument(
        "--svd-rounds", type=int, default=3, help="paired rounds of a refresh: torch's SVD takes seconds"
    )
    parser.add_argument("--capture", action="store_true", help="make the gradients, measure nothing")
    parser.add_argument("--quick", action="store_true", help="a small shape, three rounds: does it run?")
    parser.add_argument("--shape", help="this one alone, as 4096x4096; the file's rows of other shapes and parts stay")
    parser.add_argument("--csv", type=Path, help="default: bench/results/<device>/lowrank.csv")
    args = parser.parse_args()
    if args.capture:
        for shape in SHAPES:
            captured(shape)
        return
    shapes = [(256, 384)] if args.quick else SHAPES
    if args.shape:
        shapes = [shape for shape in SHAPES if f"{shape[0]}x{shape[1]}" == args.shape]
    if args.quick:
        args.rounds = args.svd_rounds = 3
    start = time.time()
    torch.manual_seed(0)
    dtypes = [FP32, BF16]
    out, targets = Results(ceilings(args.device, dtypes, quick=True)), []
    print(f"{out.name}, torch {torch.__version__}, lowmem {lowmem.__version__}, commit {out.commit}")
    out.header()
    csv = args.csv or ROOT / "bench" / "results" / slug(args.device) / "lowrank.csv"
    before = list(csv_module.DictReader(open(csv))) if args.shape and csv.exists() else []

    def write() -> None:
        new = {(row["op"], row["shape"], row["dtype"]) for row in out.rows}
        kept = [row for row in before if (row["op"], row["shape"], row["dtype"]) not in new]
        Results(out.top, kept + out.rows, commit=out.commit).write(csv)

    for shape in shapes:
        if "step" in args.only:
            for dtype in dtypes:
                targets += bench_step(out, args, shape, dtype)
                write()
        if "refresh" in args.only:
            targets += bench_refresh(out, args, shape)
            write()
    print_targets(targets)
    print(f"wrote {csv} ({len(out.rows)} rows), {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
