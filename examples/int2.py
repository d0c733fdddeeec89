"""INT2.1's recipe (arXiv 2306.08162): a model in 2 bits whose low-rank adapters first repair the quantization.

    python examples/int2.py [--quick]

1. Every linear layer is quantized to int2; adapters are put beside the frozen codes. The weights are multiplied as they
   are packed, forward and backward; no dense copy is kept.
2. The adapters learn to give the dense model's logits back (its source's text, the dense model as teacher).
3. They go on to learn a task, here prose, as any LoRA does.

The base is the small Llama that ``examples/finetune.py`` trains (and leaves in ``--out``).
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

try:
    import _data
    import _quantized
    import _report
    import finetune
    import torch
    import torch.nn.functional as F
    from _data import UsageError
    from _training import evaluate, loss_of, one_cycle
    from torch import nn
except ImportError as error:
    sys.exit(f"int2.py: {error} (pip install 'lowmem[demo]' brings what the demo needs)")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--repair-steps", type=int, help="steps of distillation (default: 60)")
    add("--steps", type=int, help="steps of the task (default: 30)")
    add("--r", type=int, default=16, help="rank of the adapters")
    add("--alpha", type=float, default=32.0, help="the adapters are scaled by alpha / r")
    add("--temperature", type=float, default=2.0, help="of the distillation")
    add("--lr", type=float, default=3e-3, help="AdamW's learning rate")
    add("--seed", type=int, default=0)
    add("--out", default="out", help="folder of the base model and the numbers")
    add("--quick", action="store_true", help="a tiny model and few steps, to see that all works")
    args = parser.parse_args()
    for name in ("repair_steps", "steps", "r"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    args.fresh, args.dtype = False, "bf16"
    return args


def in_two_bits(model: nn.Module, r: int, alpha: float) -> nn.Module:
    """``model`` with int2 codes in groups of at most 64, scales that fit best, and adapters beside them."""
    import lowmem
    from lowmem.nn import QuantLinear
    from lowmem.quant import QuantSpec

    for name, linear in _quantized.linear_layers(model).items():
        group = next(g for g in (64, 32, 16, -1) if g < 0 or linear.in_features % g == 0)
        _quantized.put(model, name, QuantLinear.from_linear(linear, QuantSpec("int2", group), method="mse"))
    return lowmem.convert(model, r=r, alpha=alpha)


def distance(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """``T^2 KL(teacher || student)`` a token, of logits ``[..., vocabulary]`` softened by T."""
    one, two = (F.log_softmax(t.float().flatten(0, -2) / temperature, -1) for t in (student, teacher))
    return F.kl_div(one, two, reduction="batchmean", log_target=True) * temperature**2


def train(model: nn.Module, batches: list[torch.Tensor], loss: Any, lr: float, title: str, out: Any) -> list[float]:
    """The adapters' steps on ``loss(ids)``."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    schedule, losses = one_cycle(optimizer, len(batches)), []
    model.train()
    with _report.bar(out, title, len(batches)) as progress:
        for ids in batches:
            value = loss(ids)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(value.item())
            progress.step(f"loss {losses[-1]:.3f}")
    return losses


def main() -> int:
    args = arguments()
    try:
        import transformers

        import lowmem  # noqa: F401
    except ImportError as error:
        raise UsageError(f"{error} (pip install 'lowmem[demo]' brings what the demo needs)") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    out, folder, started = _report.console(), Path(args.out), time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    size = finetune.QUICK if args.quick else finetune.Size()
    repair_steps = args.repair_steps or (40 if args.quick else 60)
    steps = args.steps or (20 if args.quick else 30)
    if args.quick:
        torch.set_num_threads(1)
    device = torch.device("cpu")
    name = str(folder / ("base-quick" if args.quick else "base"))
    out.print("base: " + finetune.train_base(Path(name), size, args, device, out))
    dense, tokenizer = finetune.load_base(name, args, size, device)
    dense.eval().requires_grad_(False)

    def text(texts: list[str], count: int, what: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        ours, held = (_data.encode(tokenizer, part) for part in _data.hold_out(texts))
        windows = _data.random_windows(ours, count, size.batch, size.seq, args.seed + 1, what)
        return windows, _data.consecutive_windows(held, size.eval_batches, size.batch, size.seq, what)

    source, source_held = text(_data.python_source(size.source_chars, args.seed), repair_steps, "Python's source")
    prose, prose_held = text(_data.prose(size.prose_chars), steps, "text")
    torch.manual_seed(args.seed)
    model = in_two_bits(copy.deepcopy(dense), args.r, args.alpha)
    weights, count = _quantized.weight_bytes(model)
    adapters = sum(2 * p.numel() for p in model.parameters() if p.requires_grad)  # as bf16
    results: dict[str, Any] = {
        "bits": 8 * weights / count,
        "bits_with_adapters": 8 * (weights + adapters) / count,
        "dense": {"source": evaluate(dense, source_held, device), "task": evaluate(dense, prose_held, device)},
        "int2": {"source": evaluate(model, source_held, device), "task": evaluate(model, prose_held, device)},
    }

    def repair(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = dense(input_ids=ids, use_cache=False).logits
        return distance(model(input_ids=ids, use_cache=False).logits, wanted, args.temperature)

    results["repair_losses"] = train(model, source, repair, args.lr, "repair", out)
    results["repaired"] = {"source": evaluate(model, source_held, device), "task": evaluate(model, prose_held, device)}
    results["task_losses"] = train(model, prose, lambda ids: loss_of(model, ids), args.lr, "task", out)
    results["tuned"] = {"source": evaluate(model, source_held, device), "task": evaluate(model, prose_held, device)}

    out.print(f"\n[bold]INT2.1's recipe[/bold]: {results['bits']:.2f} bits a weight of the linear layers, "
              f"{results['bits_with_adapters']:.2f} with adapters of rank {args.r} in bf16")  # fmt: skip
    for label, key in (
        ("dense, bf16", "dense"),
        ("int2", "int2"),
        ("int2, adapters repaired it", "repaired"),
        ("int2, then tuned", "tuned"),
    ):
        out.print(
            f"  {label:<28} held-out loss {results[key]['source']:.4f} on source, {results[key]['task']:.4f} on prose"
        )
    results["seconds"] = time.perf_counter() - started
    (folder / "int2.json").write_text(json.dumps(results, indent=1))
    out.print(f"numbers: {folder / 'int2.json'}   {results['seconds']:.0f} s in all")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UsageError as error:
        print(f"int2.py: {error}", file=sys.stderr)
        sys.exit(2)
