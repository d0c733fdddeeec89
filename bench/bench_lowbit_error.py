"""What 8-bit states cost in accuracy: the error of m / sqrt(v) on real states, and training with them.

    python bench/bench_lowbit_error.py table [--steps 150]     # every pair of formats, states of the demo's small Llama
    python bench/bench_lowbit_error.py train [--steps 400]     # held-out loss of every optimizer, three seeds

``table`` trains the demo's base model (examples/finetune.py) with torch's AdamW in fp32, takes the moments of every
parameter of 4096 elements or more, rounds them to each format in groups of 128 and compares u = m / (sqrt(v) + 1e-8):
``relative`` is |u' - u| / |u| over all elements (x 1e-3), ``mse`` COAT's measure, the mean of (u' - u)^2 (x 1e-3).

``train`` trains a smaller one of the same kind from three seeds with each optimizer on the same batches.
Both write CSV (and a picture) into bench/results/<device>/.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import common
import torch

sys.path.insert(0, str(common.ROOT / "examples"))

from lowmem.ops import group_decode, group_encode
from lowmem.ops.codecs import CODECS
from lowmem.optim import AdamW8, Fp8AdamW

ORDER = ("e4m3", "e4m3+exp", "e5m2", "de8", "de8+exp", "log8", "int8", "int4")
assert sorted(ORDER) == sorted(CODECS)


def data(size: Any, seed: int, steps: int) -> tuple[Any, list[torch.Tensor], list[torch.Tensor]]:
    """The demo's tokenizer, batches of Python's source and held-out batches."""
    import _data

    texts = _data.python_source(size.source_chars, 0)
    tokenizer = _data.train_tokenizer(texts, size.vocab)
    train, held = _data.hold_out(texts)
    stream, held_stream = _data.encode(tokenizer, train), _data.encode(tokenizer, held)
    batches = _data.random_windows(stream, steps, size.base_batch, size.seq, seed, "Python's source")
    return tokenizer, batches, _data.consecutive_windows(held_stream, 16, size.batch, size.seq, "Python's source")


def model_of(size: Any, vocab: int, seed: int) -> torch.nn.Module:
    """The demo's small Llama with weights from ``seed``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).train()


def fit(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: list[torch.Tensor]) -> None:
    """Every batch once, learning rate and clipping as in the demo."""
    from finetune import one_cycle

    schedule = one_cycle(optimizer, len(batches))
    for ids in batches:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


# --------------------------------------------------------------------------------------------------------------- table


def rounded(x: torch.Tensor, codec: str, signed: bool) -> torch.Tensor:
    """``x`` through ``codec`` and back."""
    return group_decode(*group_encode(x, codec, signed=signed), codec, signed=signed, numel=x.numel()).view(-1)


def table(steps: int, folder: Path) -> None:
    """Train, take the moments, compare every pair."""
    import finetune

    size = finetune.Size()
    tokenizer, batches, _ = data(size, 0, steps)
    model = model_of(size, len(tokenizer), 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.base_lr, betas=(0.9, 0.95), weight_decay=0.1)
    fit(model, optimizer, batches)
    sums = {(m, v): [0.0, 0.0] for m in ORDER for v in ORDER}
    norm, count = 0.0, 0
    for state in optimizer.state.values():
        m, v = state["exp_avg"].reshape(-1), state["exp_avg_sq"].reshape(-1)
        if m.numel() < 4096:
            continue
        u = m / (v.sqrt() + 1e-8)
        norm, count = norm + u.double().square().sum().item(), count + u.numel()
        seconds = {codec: rounded(v, codec, False).sqrt() + 1e-8 for codec in ORDER}
        for first in ORDER:
            near = rounded(m, first, True)
            for second in ORDER:
                sums[first, second][0] += (near / seconds[second] - u).double().square().sum().item()
    rows = []
    for (first, second), (error, _) in sums.items():
        rows.append((first, second, 1e3 * (error / norm) ** 0.5, 1e3 * error / count, count, steps))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lowbit_error.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow("m v relative_1e-3 mse_1e-3 elements steps commit".split())
        writer.writerows([a, b, f"{x:.4g}", f"{y:.4g}", n, t, common.commit()] for a, b, x, y, n, t in rows)
    print(f"relative error of m / sqrt(v), x 1e-3, {count} elements after {steps} steps; columns: v")
    print(f"{'m':10s}" + "".join(f"{v:>10s}" for v in ORDER))
    found = {(a, b): x for a, b, x, *_ in rows}
    for first in ORDER:
        print(f"{first:10s}" + "".join(f"{found[first, v]:10.4g}" for v in ORDER))
    draw(found, folder / "lowbit_error.png")


def draw(found: dict[tuple[str, str], float], path: Path) -> None:
    """A map of the errors; needs matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    import math

    figure, axes = plt.subplots(figsize=(7, 5))
    values = [[math.log10(found[m, v]) for v in ORDER] for m in ORDER]
    axes.imshow(values, cmap="viridis_r")
    for i, m in enumerate(ORDER):
        for j, v in enumerate(ORDER):
            axes.text(j, i, f"{found[m, v]:.3g}", ha="center", va="center", fontsize=7, color="white")
    axes.set(xticks=range(len(ORDER)), xticklabels=ORDER, yticks=range(len(ORDER)), yticklabels=ORDER)
    axes.set(xlabel="format of v", ylabel="format of m", title="relative error of m / sqrt(v), x 1e-3")
    axes.tick_params(axis="x", rotation=45)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
    print(f"wrote {path}")


# --------------------------------------------------------------------------------------------------------------- train


def optimizers(lr: float) -> dict[str, tuple[torch.dtype, Any]]:
    """Weights' dtype and optimizer by name."""
    options: dict[str, Any] = {"lr": lr, "betas": (0.9, 0.95), "weight_decay": 0.1}
    wide, narrow = torch.float32, torch.bfloat16
    return {
        "AdamW fp32": (wide, lambda p: torch.optim.AdamW(p, **options)),
        "AdamW8 de8/log8": (wide, lambda p: AdamW8(p, **options)),
        "AdamW8 log8/log8": (wide, lambda p: AdamW8(p, m="log8", v="log8", **options)),
        "Fp8AdamW": (wide, lambda p: Fp8AdamW(p, **options)),
        "AdamW bf16": (narrow, lambda p: torch.optim.AdamW(p, **options)),
        "AdamW8 bf16+sr": (narrow, lambda p: AdamW8(p, weights="bf16+sr", **options)),
        "AdamW8 bf16+rem16": (narrow, lambda p: AdamW8(p, weights="bf16+rem16", **options)),
    }


def train(steps: int, lr: float, seeds: list[int], only: str, folder: Path) -> None:
    """Held-out loss after ``steps`` of every optimizer from every seed."""
    import dataclasses

    import finetune

    size = dataclasses.replace(finetune.QUICK, source_chars=1_000_000)
    losses: dict[str, list[float]] = {}
    started = time.perf_counter()
    for seed in seeds:
        tokenizer, batches, held = data(size, seed, steps)
        for name, (dtype, make) in optimizers(lr).items():
            if only not in name and name != "AdamW fp32":
                continue
            model = model_of(size, len(tokenizer), seed).to(dtype)
            torch.manual_seed(seed)
            fit(model, make(model.parameters()), batches)
            loss = finetune.evaluate(model.float(), held, torch.device("cpu"))
            losses.setdefault(name, []).append(loss)
            print(f"seed {seed} {name:20s} {loss:.4f}  [{time.perf_counter() - started:.0f} s]", flush=True)
    base = losses["AdamW fp32"]
    with open(folder / f"lowbit_train_lr{lr:g}.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["optimizer", *(f"loss_seed{s}" for s in seeds), "mean_pct_over_fp32", "steps", "lr", "commit"])
        for name, found in losses.items():
            over = statistics.mean(100 * (a / b - 1) for a, b in zip(found, base, strict=True))
            writer.writerow([name, *(f"{x:.4f}" for x in found), f"{over:.3f}", steps, lr, common.commit()])
            print(f"{name:20s} " + " ".join(f"{x:.4f}" for x in found) + f"  {over:+.2f} % over fp32")


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("table", "train"), default="table")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", default="", help="train: optimizers whose name holds this, and the baseline")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    folder = args.out or common.ROOT / "bench" / "results" / common.slug("cpu")
    if args.part == "table":
        table(args.steps or 150, folder)
    else:
        train(args.steps or 400, args.lr, args.seeds, args.only, folder)


if __name__ == "__main__":
    main()
