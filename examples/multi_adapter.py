"""Four adapters on one base: trained together in shared microbatches, and one after another, in one run.

    python examples/multi_adapter.py [--capacity 256] [--samples 64] [--dtype fp32|bf16] [--out out] [--quick]

Four jobs have their own text, rank and learning rate. ``lowmem.sched.pack_microbatches`` packs their samples, of
unequal length, into microbatches of at most ``--capacity`` tokens; ``lowmem.nn.routed`` sends each row through its
job's adapter, all in one pass over the frozen base; each job's optimizer steps when its own global batch is done. The
same jobs are also trained alone, packed the same way. The two sides take turns, so that a slow moment of the machine
falls on both. It ends in a table: tokens a second, memory, and every adapter's losses, equal to rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see finetune.py

try:
    import _data
    import _measure
    import _report
    import finetune
    import torch
    import torch.nn.functional as F
    from _data import UsageError
    from rich.table import Table
    from torch import Tensor, nn
except ImportError as error:
    sys.exit(f"multi_adapter.py: {error} (pip install 'lowmem[demo]' brings what the examples need)")

RANKS, RATES, BATCHES = (4, 8, 16, 32), (4e-3, 3e-3, 2e-3, 1e-3), (2, 2, 2, 2)  # a job's rank, rate, samples a step
LONGEST = 32  # tokens of a sample
TOGETHER, ALONE = "together", "one after another"
SIZE = finetune.Size(hidden=256, layers=4, intermediate=704, vocab=2048, base_steps=120, source_chars=1_000_000,
                     prose_chars=1_000_000)  # fmt: skip


@dataclass
class Side:
    """One way of training the four: its microbatches, and what was seen of them."""

    passes: int
    tokens: int
    slots: int
    work: Iterator[float]
    seconds: list[float] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=lambda: [[] for _ in RANKS])


def names(side: str) -> list[str]:
    """The adapters' names of one side; both sides' adapters live on one model."""
    return [f"{side.split()[0]}-{j}" for j in range(len(RANKS))]


def build(base: nn.Module) -> nn.Module:
    """The base with eight adapters: four a side, equal in pairs at the start."""
    import lowmem

    model = lowmem.convert(base, r=RANKS[0], alpha=2 * RANKS[0], name=names(TOGETHER)[0])
    for _, layer in lowmem.nn.lora_layers(model):
        for side in (TOGETHER, ALONE):
            for name, r in zip(names(side), RANKS, strict=True):
                if name not in layer.lora_A:
                    layer.add_adapter(name, r=r, alpha=2 * r)
        with torch.no_grad():
            for one, two in zip(names(TOGETHER), names(ALONE), strict=True):
                layer.lora_A[two].copy_(layer.lora_A[one])
    return model.train()


def parameters(model: nn.Module, name: str) -> list[Tensor]:
    """Adapter ``name``'s tensors in all layers."""
    from lowmem.nn import lora_layers

    return [part[name] for _, layer in lora_layers(model) for part in (layer.lora_A, layer.lora_B)]


def packed(microbatch: Any, jobs: list[list[Tensor]], device: torch.device) -> dict[str, Any]:
    """The model's arguments for one microbatch: all samples in one row, each seeing itself alone; and the labels."""
    pieces = [jobs[j][i] for j, i in zip(microbatch.job_ids, microbatch.sample_ids, strict=True)]
    places = torch.cat([torch.arange(len(piece)) for piece in pieces])
    labels = torch.cat([torch.cat([piece[1:], piece.new_tensor([-100])]) for piece in pieces])
    made = {"ids": torch.cat(pieces)[None], "positions": places[None], "labels": labels}
    return {key: value.to(device) for key, value in made.items()} | {"bounds": microbatch.cu_seqlens.tolist()}


def attention_within_samples(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention function for packed rows ``[1, heads, tokens, size]``: causal inside each sample. A mask
    over the whole row would cost its length squared."""
    bounds = kwargs["cu_seq_lens_q"]
    parts = [
        F.scaled_dot_product_attention(
            *(t[:, :, low:high] for t in (query, key, value)), is_causal=True, scale=scaling, enable_gqa=True
        )
        for low, high in zip(bounds, bounds[1:], strict=False)
    ]
    return torch.cat(parts, 2).transpose(1, 2), None


def token_losses(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The loss of every row, ``[tokens]``; 0 where there is nothing to predict."""
    logits = model(
        input_ids=batch["ids"], position_ids=batch["positions"], cu_seq_lens_q=batch["bounds"], use_cache=False
    ).logits[0]
    return F.cross_entropy(logits.float(), batch["labels"], ignore_index=-100, reduction="none")


def switch(model: nn.Module, side: str, jobs: list[int]) -> None:
    """Let the adapters of ``side``'s jobs train: what a run of its own does once."""
    from lowmem.nn import set_adapter, train_adapters

    if side == ALONE:
        set_adapter(model, names(side)[jobs[0]])
    else:
        train_adapters(model, names(side))


def forward(model: nn.Module, m: Any, batch: dict[str, Any], side: str) -> Tensor:
    """The rows' losses of microbatch ``m``."""
    from lowmem.nn import routed

    if side == ALONE:  # one active adapter, no routing
        return token_losses(model, batch)
    bounds = torch.from_numpy(m.job_cu_seqlens.copy()).to(batch["ids"].device)
    with routed(model, names(side), cu_seqlens=bounds, rows=m.tokens):
        return token_losses(model, batch)


def train(model: nn.Module, samples: list[list[Tensor]], capacity: int, side: str, which: list[int], into: Any) -> Any:
    """A generator that trains jobs ``which`` along one schedule, a microbatch at a time, and yields its seconds."""
    from lowmem.sched import pack_microbatches

    lengths = [[len(s) for s in samples[j]] for j in which]
    schedule = pack_microbatches(lengths, capacity, global_batch_size=[BATCHES[j] for j in which])
    schedule.validate()
    device = next(model.parameters()).device
    optimizers = [torch.optim.AdamW(parameters(model, names(side)[j]), lr=RATES[j], weight_decay=0.0) for j in which]
    sums, step = [0.0] * len(which), [0] * len(which)
    into.passes, into.slots = into.passes + len(schedule), into.slots + len(schedule) * capacity
    into.tokens += schedule.stats.tokens

    def work() -> Iterator[float]:
        for t, m in enumerate(schedule):
            switch(model, side, which)
            start = time.perf_counter()
            batch = packed(m, [samples[j] for j in which], device)
            losses = forward(model, m, batch, side)
            parts = []
            for k, (low, high) in enumerate(zip(m.job_cu_seqlens, m.job_cu_seqlens[1:], strict=False)):
                size = BATCHES[which[k]]
                targets = sum(length - 1 for length in lengths[k][step[k] * size : (step[k] + 1) * size])
                parts.append(losses[low:high].sum() / targets)
                sums[k] += parts[-1].item()
            sum(parts).backward()
            for k in schedule.stepping_after(t):
                optimizers[k].step()
                optimizers[k].zero_grad()
                into.losses[which[k]].append(sums[k])
                sums[k], step[k] = 0.0, step[k] + 1
            yield time.perf_counter() - start

    return work()


def sides(model: nn.Module, samples: list[list[Tensor]], capacity: int) -> dict[str, Side]:
    """Both ways, ready to run."""
    made = {name: Side(0, 0, 0, iter(())) for name in (ALONE, TOGETHER)}
    every = list(range(len(RANKS)))
    made[TOGETHER].work = train(model, samples, capacity, TOGETHER, every, made[TOGETHER])
    runs = [train(model, samples, capacity, ALONE, [j], made[ALONE]) for j in every]
    made[ALONE].work = (seconds for run in runs for seconds in run)
    return made


def take_turns(both: dict[str, Side], out: Any) -> None:
    """Run both sides to their ends, always the one that is less far."""
    with _report.bar(out, "training", sum(side.passes for side in both.values())) as progress:
        while True:
            left = [side for side in both.values() if len(side.seconds) < side.passes]
            if not left:
                return
            side = min(left, key=lambda one: len(one.seconds) / one.passes)
            side.seconds.append(next(side.work))
            progress.step()


def peaks(model: nn.Module, samples: list[list[Tensor]], capacity: int, device: torch.device) -> dict[str, int]:
    """Most memory of one pass over the fullest microbatch of each side, above what is held between passes."""
    from lowmem.sched import pack_microbatches

    steps = {}
    for side, which in ((ALONE, [len(RANKS) - 1]), (TOGETHER, list(range(len(RANKS))))):
        lengths = [[len(s) for s in samples[j]] for j in which]
        schedule = pack_microbatches(lengths, capacity, global_batch_size=[BATCHES[j] for j in which])
        m = max(schedule, key=lambda one: one.tokens)
        batch = packed(m, [samples[j] for j in which], device)

        def step(m: Any = m, batch: Any = batch, side: str = side, which: list[int] = which) -> None:
            switch(model, side, which)
            forward(model, m, batch, side).sum().backward()
            model.zero_grad()

        steps[side] = step
    return _measure.alternating_peaks(steps, device, 3)


def show(out: Any, results: dict[str, Any]) -> None:
    """The table."""
    one, two = results["sides"][ALONE], results["sides"][TOGETHER]
    table = Table(header_style="bold")
    for column, justify in (("", "left"), (ALONE, "right"), (TOGETHER, "right"), ("ratio", "right")):
        table.add_column(column, justify=justify, no_wrap=True)

    def row(label: str, key: str, show: Any, ratio: bool = True) -> None:
        table.add_row(label, show(one[key]), show(two[key]), f"{two[key] / one[key]:.2f}x" if ratio else "")

    mib = _report.mib
    row("tokens/s (forward, backward, update)", "tokens_per_s", "{:,.0f}".format)
    row("seconds", "seconds", "{:.1f}".format)
    row("passes over the base", "passes", "{:,}".format)
    row("tokens of a pass, of the capacity", "filled", "{:.0%}".format)
    table.add_section()
    row("peak memory of a pass", "peak_bytes", mib)
    row("base, adapters, optimizers", "held_bytes", mib)
    row("the same, four runs at once", "held_at_once_bytes", mib)
    table.add_section()
    for j, r in enumerate(RANKS):
        a, b = one["losses"][j], two["losses"][j]
        table.add_row(f"job {j}, r={r}: loss, first to last step of {len(a)}", f"{a[0]:.4f} to {a[-1]:.4f}",
                      f"{b[0]:.4f} to {b[-1]:.4f}", "")  # fmt: skip
    out.print(f"\n[bold]{results['title']}[/bold]")
    out.print(table)
    out.print(f"largest difference of a step's loss: {results['largest_difference']:.1e} (relative)")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--capacity", type=int, help="most tokens of a microbatch (default: 256)")
    parser.add_argument("--samples", type=int, help="samples of each job (default: 64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the base (default: fp32)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", default="out", help="folder for the numbers and the small base model")
    parser.add_argument("--fresh", action="store_true", help="train the small base model anew")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few samples, to see that all works")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    size = finetune.QUICK if args.quick else SIZE
    capacity, count = args.capacity or 256, args.samples or (16 if args.quick else 64)
    longest = min(LONGEST, capacity)
    if count < 1 or capacity < 8:
        raise UsageError(f"--samples, --capacity: expected at least 1 and 8, got {count} and {capacity}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device: expected a CUDA device, got none that torch {torch.__version__} can use")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    started, out, folder = time.perf_counter(), _report.console(), Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    if args.quick:
        torch.set_num_threads(1)
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    where = folder / ("multi-base-quick" if args.quick else "multi-base")
    out.print(f"[bold]Four adapters on one base[/bold] on {device}; torch {torch.__version__}")
    out.print("base: " + finetune.train_base(where, size, args, device, out))
    base, tokenizer = finetune.load_base(str(where), args, size, device)
    transformers.AttentionInterface.register("within_samples", attention_within_samples)
    base.config._attn_implementation = "within_samples"
    texts = _data.prose(size.prose_chars)
    quarter = -(-len(texts) // len(RANKS))
    parts = [texts[j * quarter : (j + 1) * quarter] for j in range(len(RANKS))]
    samples = [_data.samples(tokenizer, part, count, longest, args.seed + j) for j, part in enumerate(parts)]
    torch.manual_seed(args.seed)
    model = build(base)
    frozen = _measure.storage_bytes(p for n, p in model.named_parameters() if "lora_" not in n)

    for warm in peaks(model, samples, capacity, device).values():  # every code path has run before the clock does
        assert warm >= 0
    both = sides(model, samples, capacity)
    take_turns(both, out)
    peak = peaks(model, samples, capacity, device)
    trained = sum(_measure.storage_bytes(parameters(model, name)) for name in names(TOGETHER))
    million = sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n) / 1e6
    own = 4 * trained  # parameters, gradients, and AdamW's two moments
    largest = max(
        abs(a - b) / max(abs(a), 1e-6)
        for one, two in zip(both[ALONE].losses, both[TOGETHER].losses, strict=True)
        for a, b in zip(one, two, strict=True)
    )
    results = {
        "title": f"four jobs of {count} samples, up to {longest} tokens each, {capacity} a microbatch; "
        f"{million:.1f} M parameters in {args.dtype}",
        "largest_difference": largest,
        "sides": {
            name: {
                "passes": side.passes,
                "tokens": side.tokens,
                "seconds": sum(side.seconds),
                "tokens_per_s": side.tokens / sum(side.seconds),
                "filled": side.tokens / side.slots,
                "losses": side.losses,
                "peak_bytes": peak[name],
                "held_bytes": frozen + own,
                "held_at_once_bytes": frozen * (len(RANKS) if name == ALONE else 1) + own,
            }
            for name, side in both.items()
        },
    }
    show(out, results)
    (folder / "multi_adapter.json").write_text(json.dumps(results, indent=1))
    equal = largest <= (1e-3 if args.dtype == "fp32" else 5e-2)
    out.print("losses: " + ("[green]equal to rounding[/green]" if equal else "[red]DIFFERENT[/red]"))
    out.print(f"{time.perf_counter() - started:.0f} s in all")
    return 0 if equal else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UsageError as error:
        print(f"multi_adapter.py: {error}", file=sys.stderr)
        sys.exit(2)
