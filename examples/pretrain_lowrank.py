"""AdaRankGrad's claim put to the test: does the gradients' rank fall in training, and what does following it cost?

    python examples/pretrain_lowrank.py              # some minutes on a CPU
    python examples/pretrain_lowrank.py --quick      # does it run?

A small Llama is pre-trained on the standard library's source with AdamW and with every low-rank optimizer in turn: same
start, same batches, same learning rate. Then AdamW's model is fine-tuned on this machine's licence and documentation
texts with the adaptive rank. Written to --out: ``pretrain_lowrank.csv`` (held-out loss, state bytes), the rank and
captured energy of every layer at every refresh (``pretrain_lowrank_ranks.csv``), and a picture of both.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _data
import torch
from torch import nn

from lowmem import optim

Batches = list[torch.Tensor]


def optimizers(args: argparse.Namespace) -> dict[str, Callable[[nn.Module], torch.optim.Optimizer]]:
    """The candidates. All get the same learning rate; the subspace's step is not scaled down (``scale=1``), as a
    scale is only another learning rate."""
    common: dict[str, Any] = {"lr": args.lr, "betas": (0.9, 0.95), "weight_decay": 0.1, "seed": args.seed}
    rank, gap = args.rank, args.refresh
    rule = optim.OnConverged(tol=0.5, max_gap=gap, min_gap=10)

    def low(preset: Callable[..., Any], **options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
        return lambda model: preset(optim.lowrank_groups(model), **{**common, "scale": 1.0, **options})

    def adamw(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    return {
        "AdamW": adamw,
        f"fixed rank {rank}": low(optim.ProjAdamW, rank=rank, refresh=gap),
        f"fixed rank {rank}, every 10 steps": low(optim.ProjAdamW, rank=rank, refresh=10, projector="power"),
        "AdaRankGrad": low(optim.AdaRankGrad, energy=0.9, refresh=rule),
        f"AdaRankGrad, rank >= {rank}": low(optim.AdaRankGrad, energy=0.9, refresh=rule, rank_min=rank),
        f"GaLore, rank {rank}": low(optim.GaLore, rank=rank, refresh=gap),
        f"Fira, rank {rank}": low(optim.Fira, rank=rank, refresh=gap),
        "FRUGAL, density 0.25": low(optim.FRUGAL, refresh=gap, residual_scale=0.1),
        f"APOLLO, rank {rank}": low(optim.Apollo, rank=rank, refresh=gap),
    }


def held_out_loss(model: nn.Module, held: Batches) -> float:
    """Mean loss a token over the held-out windows."""
    model.eval()
    with torch.no_grad():
        losses = [(model(input_ids=ids, labels=ids).loss.item(), ids.numel()) for ids in held]
    model.train()
    return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)


def matrix_state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the state of the projected weights (for AdamW: of the same weights)."""
    wanted = {id(p) for p in optim.lowrank_groups(model)[0]["params"] for p in [p[1]]}
    return sum(t.nbytes for p, s in optimizer.state.items() if id(p) in wanted for t in s.values())


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches, held: Batches, every: int
) -> tuple[list[tuple[int, float]], float]:
    """Held-out loss along the way and seconds a step; one-cycle learning rate, clipping at 1."""
    peak = [group["lr"] for group in optimizer.param_groups]
    curve, started, spent = [], time.perf_counter(), 0.0
    for step, ids in enumerate(batches):
        warm = max(1, len(batches) // 10)
        factor = min(1.0, (step + 1) / warm) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / len(batches))))
        for group, lr in zip(optimizer.param_groups, peak, strict=True):
            group["lr"] = lr * factor
        model(input_ids=ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % every == 0 or step + 1 == len(batches):
            spent += time.perf_counter() - started
            curve.append((step + 1, held_out_loss(model, held)))
            started = time.perf_counter()
    return curve, spent / len(batches)


def plot(path: Path, curves: dict[str, list[tuple[int, float]]], ranks: list[dict[str, Any]]) -> None:
    """Held-out loss, and mean rank and captured energy of the layers over the steps."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    figure, (loss, rank, energy) = plt.subplots(1, 3, figsize=(15, 4.5))
    for name, curve in curves.items():
        loss.plot(*zip(*curve, strict=True), label=name)
    loss.set(xlabel="step", ylabel="held-out loss", title="pre-training")
    loss.legend(fontsize=7)
    for run in dict.fromkeys(row["run"] for row in ranks):
        if not run.startswith("AdaRankGrad"):
            continue
        for kind in ("attn", "mlp"):
            rows = [row for row in ranks if row["run"] == run and kind in row["layer"]]
            window = max(1, max(row["step"] for row in rows) // 12)
            bins: dict[int, list[dict[str, Any]]] = {}
            for row in rows:
                bins.setdefault(row["step"] // window * window, []).append(row)
            xs = sorted(bins)
            rank.plot(xs, [statistics.fmean(r["rank"] for r in bins[x]) for x in xs], label=f"{run}: {kind}")
            energy.plot(xs, [statistics.fmean(r["captured"] for r in bins[x]) for x in xs], label=f"{run}: {kind}")
    rank.set(xlabel="step", ylabel="rank, mean over the layers", title="rank at 90 % of the energy")
    rank.legend(fontsize=7)
    energy.set(xlabel="step", ylabel="captured energy", title="captured energy at the refreshes")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Train with each; write tables and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--steps", type=int, default=300)
    add("--finetune-steps", type=int, default=100)
    add("--hidden", type=int, default=128)
    add("--layers", type=int, default=3)
    add("--batch", type=int, default=8)
    add("--seq", type=int, default=128)
    add("--vocab", type=int, default=1024)
    add("--rank", type=int, default=32)
    add("--refresh", type=int, default=40)
    add("--lr", type=float, default=2e-3)
    add("--seed", type=int, default=0)
    add("--only", default="", help="candidates whose name contains this")
    add("--quick", action="store_true", help="a few steps of a tiny model")
    add("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    if args.quick:
        args.steps, args.finetune_steps, args.hidden, args.layers, args.rank, args.vocab = 12, 6, 64, 2, 16, 512
        args.refresh = 5
    from transformers import LlamaConfig, LlamaForCausalLM

    characters = 300_000 if args.quick else 3_000_000
    texts = _data.python_source(characters, args.seed)
    tokenizer = _data.train_tokenizer(texts, args.vocab)
    learn, kept = _data.hold_out(texts)
    batches = _data.random_windows(
        _data.encode(tokenizer, learn), args.steps, args.batch, args.seq, args.seed, "Python's source"
    )
    held = _data.consecutive_windows(_data.encode(tokenizer, kept), 4 if args.quick else 24, args.batch, args.seq, "it")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=args.hidden, intermediate_size=args.hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 32, num_key_value_heads=args.hidden // 32,
        max_position_embeddings=args.seq, tie_word_embeddings=True,
    )  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    ranks: list[dict[str, Any]] = []
    curves: dict[str, list[tuple[int, float]]] = {}
    start: dict[str, torch.Tensor] = {}
    trained: dict[str, torch.Tensor] = {}

    def note(run: str, optimizer: torch.optim.Optimizer) -> list[Any]:
        report = optimizer.report() if isinstance(optimizer, optim.ProjAdamW) else []
        for entry in report:
            for step, rank, energy in entry["history"]:
                ranks.append({"run": run, "layer": entry["name"], "step": step, "rank": rank, "captured": energy})
        return report

    def write() -> None:
        for name, table in (("pretrain_lowrank.csv", rows), ("pretrain_lowrank_ranks.csv", ranks)):
            if table:
                with open(args.out / name, "w", newline="") as file:
                    writer = csv.DictWriter(file, fieldnames=list(table[0]), lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(
                        {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in r.items()} for r in table
                    )

    print(f"{'':36}{'held-out':>9}{'vs AdamW':>9}{'state':>8}{'ms/step':>9}   rank, first and last third of the steps")
    for name, make in optimizers(args).items():
        if args.only not in name:
            continue
        torch.manual_seed(args.seed)
        model = LlamaForCausalLM(config)
        if start:
            model.load_state_dict(start)
        start = start or {key: value.clone() for key, value in model.state_dict().items()}
        optimizer = make(model)
        curve, seconds = train(model, optimizer, batches, held, max(1, args.steps // 5))
        curves[name] = curve
        report, state = note(name, optimizer), matrix_state_bytes(model, optimizer)
        if name == "AdamW":
            trained = {key: value.clone() for key, value in model.state_dict().items()}
        base = rows[0] if rows else {"held_out_loss": curve[-1][1], "state_bytes": state}
        row = {
            "optimizer": name, "held_out_loss": curve[-1][1], "loss_over_adamw": curve[-1][1] / base["held_out_loss"],
            "state_bytes": state, "state_over_adamw": state / base["state_bytes"], "ms_step": seconds * 1e3,
            "steps": args.steps, "tokens": args.steps * args.batch * args.seq, "seed": args.seed,
        }  # fmt: skip
        rows.append(row)
        early = [r for e in report for t, r, _ in e["history"] if t < args.steps / 3]
        late = [r for e in report for t, r, _ in e["history"] if t >= args.steps * 2 / 3]
        shown = f"{statistics.fmean(early):.1f} -> {statistics.fmean(late):.1f}" if early and late else ""
        print(
            f"{name:<36}{row['held_out_loss']:>9.4f}{row['loss_over_adamw']:>9.3f}{row['state_over_adamw']:>8.3f}"
            f"{row['ms_step']:>9.1f}   {shown}",
            flush=True,
        )
        write()
    if args.finetune_steps and trained:
        prose_learn, prose_held = _data.hold_out(_data.prose(characters))
        more = _data.random_windows(
            _data.encode(tokenizer, prose_learn), args.finetune_steps, args.batch, args.seq, args.seed, "the prose"
        )
        check = _data.consecutive_windows(_data.encode(tokenizer, prose_held), 4, args.batch, args.seq, "the prose")
        model = LlamaForCausalLM(config)
        model.load_state_dict(trained)
        before = held_out_loss(model, check)
        rule = optim.OnConverged(tol=0.5, max_gap=max(2, args.refresh // 2), min_gap=5)
        groups = optim.lowrank_groups(model)
        optimizer = optim.AdaRankGrad(groups, args.lr / 4, energy=0.9, refresh=rule, seed=args.seed)
        curve, _ = train(model, optimizer, more, check, args.finetune_steps)
        note("AdaRankGrad, fine-tuning", optimizer)
        print(f"fine-tuning on prose with AdaRankGrad: held-out loss {before:.4f} -> {curve[-1][1]:.4f}")
    write()
    plot(args.out / "pretrain_lowrank.png", curves, ranks)
    print(f"wrote {args.out}/pretrain_lowrank.csv, pretrain_lowrank_ranks.csv and pretrain_lowrank.png")


if __name__ == "__main__":
    main()
