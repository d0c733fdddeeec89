"""LoRA fine-tuning of a causal language model, once with PEFT and once with lowmem, on real text, in one run.

    python examples/finetune.py                                      # a small Llama, text that every machine has
    python examples/finetune.py --model <folder or hub name> --data <text file, folder or .jsonl>

Without ``--model`` a Llama of 8 M parameters is first trained, briefly, on the source of Python's standard library.
Both runs then start from one frozen base (a single copy in memory), the same initial adapters and the same seed, see
the same batches in the same order, and take turns: a step of one, the same step of the other, the first of each pair
changing. It ends in a table, a picture, and an adapter in PEFT's format that PEFT loads again with equal logits. The
same steps then tune the base in NF4 and in 2.25 bits (``--no-quantized`` leaves that out).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import shutil
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# before torch loads its OpenMP: threads that spin while they wait cost 3x and more where other programs want the cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

try:
    import _data
    import _measure
    import _quantized
    import _report
    import torch
    from _data import UsageError
    from _training import Run, evaluate, loss_of, one_cycle
    from torch import nn
except ImportError as error:
    sys.exit(f"finetune.py: {error} (pip install 'lowmem[demo]' brings what the demo needs)")

WARM_UP = 3  # steps of each run that train but are not timed
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Size:
    """The base model of the demo, and how much of everything."""

    hidden: int = 320
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    intermediate: int = 896
    vocab: int = 4096
    base_steps: int = 400
    base_batch: int = 2
    base_lr: float = 3e-3
    lr: float = 5e-3
    source_chars: int = 2_500_000
    prose_chars: int = 1_000_000
    steps: int = 50
    batch: int = 8
    seq: int = 256
    eval_batches: int = 12
    rounds: int = 3


QUICK = Size(
    hidden=96,
    layers=2,
    heads=4,
    kv_heads=2,
    intermediate=256,
    vocab=512,
    base_steps=50,
    base_batch=4,
    base_lr=5e-3,
    source_chars=300_000,
    prose_chars=150_000,
    steps=24,
    batch=4,
    seq=64,
    eval_batches=8,
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="a causal language model: a folder, or a hub name (default: train a small Llama here)")
    add(
        "--data",
        help='a text file, a folder of text files, or a .jsonl with "text" (default: licences and documentation here)',
    )
    add("--steps", type=int, help="fine-tuning steps of each run (default: 50)")
    add("--batch", type=int, help="sequences a step (default: 8)")
    add("--seq", type=int, help="tokens a sequence (default: 256)")
    add("--r", type=int, default=16, help="rank of the adapters")
    add("--alpha", type=float, default=32.0, help="the adapters are scaled by alpha / r")
    add("--dropout", type=float, default=0.1, help="dropout on the adapters' input")
    add("--lr", type=float, help="AdamW's learning rate (default: 0.005)")
    add("--seed", type=int, default=0)
    add("--out", default="out", help="folder for the picture, the adapter, the numbers and the small base model")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one")
    add("--dtype", choices=tuple(DTYPES), default="bf16", help="of the model")
    add("--adapter-dtype", choices=("model", "fp32"), default="model", help="of the adapters, in both runs")
    add(
        "--fresh", action="store_true", help="train the small base model anew even if --out holds one of these settings"
    )
    add(
        "--quantized",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="tune the base in NF4 and in 2.25 bits too, and report losses and bytes",
    )
    add("--quick", action="store_true", help="a tiny model and few steps, to see that all works")
    return parser.parse_args()


def check(args: argparse.Namespace) -> Size:
    """The sizes of this run; complains of arguments that make no sense before anything is loaded."""
    size = QUICK if args.quick else Size()
    given = {key: value for key in ("steps", "batch", "seq", "lr") if (value := getattr(args, key)) is not None}
    size = Size(**{**asdict(size), **given})
    for key in ("steps", "batch", "seq", "r"):
        value = args.r if key == "r" else getattr(size, key)
        least = {"steps": WARM_UP + 1, "seq": 2}.get(key, 1)
        if value < least:
            raise UsageError(f"--{key}: expected at least {least}, got {value}")
    if not 0 <= args.dropout < 1:
        raise UsageError(f"--dropout: expected a probability in [0, 1), got {args.dropout}")
    if not (math.isfinite(size.lr) and size.lr > 0):
        raise UsageError(f"--lr: expected a positive number, got {size.lr}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device: expected a CUDA device, got none that torch {torch.__version__} can use")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise UsageError(f"--out: expected a folder, got the file {args.out!r}")
    return size


# ---------------------------------------------------------------------------------------------------------- base model


def train_base(folder: Path, size: Size, args: argparse.Namespace, device: torch.device, out: Any) -> str:
    """A small Llama trained on the standard library's source, with its tokenizer, in ``folder``; says what was done.

    One that is there already is taken if it was made from the same sizes, seed and text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    texts = _data.python_source(size.source_chars, args.seed)
    later = ("lr", "steps", "batch", "prose_chars", "eval_batches", "rounds")
    made_of = {key: value for key, value in asdict(size).items() if key not in later}
    made_of |= {"seed": args.seed, "text": _data.digest(texts)}
    marker = folder / "made_of.json"
    if not args.fresh and marker.is_file() and json.loads(marker.read_text()).get("of") == made_of:
        return f"taken from {folder}, where an earlier run left it (--fresh trains it again)"

    started = time.perf_counter()
    tokenizer = _data.train_tokenizer(texts, size.vocab)
    train, held = _data.hold_out(texts)
    stream, held_stream = _data.encode(tokenizer, train), _data.encode(tokenizer, held)
    batches = _data.random_windows(stream, size.base_steps, size.base_batch, size.seq, args.seed, "Python's source")
    held_out = _data.consecutive_windows(held_stream, size.eval_batches, size.batch, size.seq, "Python's source")
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=max(512, size.seq),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.base_lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = one_cycle(optimizer, size.base_steps)
    with _report.bar(out, "base model", size.base_steps) as progress:
        for ids in batches:
            ids = ids.to(device)
            with torch.autocast(
                device.type, torch.bfloat16
            ):  # fp32 weights; the result is rounded to --dtype on loading
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.step(f"loss {loss.item():.3f}")
    with torch.autocast(device.type, torch.bfloat16):
        final = evaluate(model, held_out, device)
    half = folder.with_name(f".{folder.name}.{os.getpid()}")
    model.save_pretrained(half)
    tokenizer.save_pretrained(half)
    (half / marker.name).write_text(json.dumps({"of": made_of, "held_out_loss": final}))
    shutil.rmtree(folder, ignore_errors=True)
    half.rename(folder)
    seconds = time.perf_counter() - started
    return f"trained in {seconds:.0f} s to a held-out loss of {final:.2f} on Python's source, in {folder}"


def load_base(name: str, args: argparse.Namespace, size: Size, device: torch.device) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local = Path(name).expanduser()
    try:
        tokenizer = AutoTokenizer.from_pretrained(local if local.exists() else name)
        model = AutoModelForCausalLM.from_pretrained(local if local.exists() else name, dtype=DTYPES[args.dtype])
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        expected = "a folder or hub name of a causal language model with its tokenizer"
        raise UsageError(f"--model: expected {expected}, got {name!r}: {reason}") from None
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest and size.seq > longest:
        raise UsageError(f"--seq: expected at most {longest}, the model's longest, got {size.seq}")
    return model.to(device), tokenizer


# ------------------------------------------------------------------------------------------------------------ the runs


def build(base: nn.Module, args: argparse.Namespace) -> dict[str, nn.Module]:
    """The base with PEFT's adapters and the base with lowmem's: frozen weights shared, initial adapters equal."""
    from peft import LoraConfig, get_peft_model

    import lowmem
    from lowmem.nn import lora_layers

    twin = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    torch.manual_seed(args.seed)
    config = LoraConfig(r=args.r, lora_alpha=args.alpha, lora_dropout=args.dropout, target_modules="all-linear",
                        task_type="CAUSAL_LM")  # fmt: skip
    in_fp32 = args.adapter_dtype == "fp32"
    theirs = get_peft_model(base, config, autocast_adapter_dtype=in_fp32)
    dtype = torch.float32 if in_fp32 else DTYPES[args.dtype]
    ours = lowmem.convert(
        twin, r=args.r, alpha=args.alpha, dropout=args.dropout, target_modules="all-linear", adapter_dtype=dtype
    )
    with torch.no_grad():
        for name, layer in lora_layers(ours):
            peer = theirs.get_submodule(f"base_model.model.{name}")
            layer.lora_A["default"].copy_(peer.lora_A["default"].weight)
            layer.lora_B["default"].copy_(peer.lora_B["default"].weight)
    trained = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (theirs, ours)]
    if trained[0] != trained[1]:
        raise UsageError(
            f"--model: expected one set of linear layers for PEFT and lowmem, got {trained} trained parameters"
        )
    return {"PEFT": theirs.train(), "lowmem": ours.train()}


def saved(model: nn.Module, ids: torch.Tensor, seed: int) -> int:
    from lowmem.testing import saved_bytes

    torch.manual_seed(seed)
    return saved_bytes(lambda: loss_of(model, ids), exclude=(ids, model))


def saved_with(model: nn.Module, dtype: torch.dtype, ids: torch.Tensor, seed: int) -> int:
    """Bytes saved for backward, were the adapters in ``dtype``: cast, count, cast back (before any training)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.data for p in trained]
    for p in trained:
        p.data = p.data.to(dtype)
    count = saved(model, ids, seed)
    for p, data in zip(trained, before, strict=True):
        p.data = data
    return count


def train(
    runs: dict[str, Run], batches: list[torch.Tensor], args: argparse.Namespace, device: torch.device, out: Any
) -> None:
    """All steps of both runs, in turns; the first of each pair changes, so that neither always comes second."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    losses = {name: math.nan for name in runs}
    with _report.bar(out, "LoRA, taking turns", 2 * len(batches)) as progress:
        for i, ids in enumerate(batches):
            ids = ids.to(device)
            for name in list(runs) if i % 2 == 0 else list(runs)[::-1]:
                run = runs[name]
                torch.manual_seed(args.seed + i)  # the dropout of step i does not depend on whose turn it was
                start = clock()
                loss = loss_of(run.model, ids)
                loss.backward()
                if i == 0:
                    run.numbers["gradients"] = _measure.gradient_bytes(run.model)
                run.optimizer.step()
                run.optimizer.zero_grad()
                seconds = clock() - start
                run.schedule.step()
                losses[name] = loss.item()
                run.numbers["losses"].append(losses[name])
                run.numbers["seconds"].append(seconds)
                progress.step("  ".join(f"{key} {value:.3f}" for key, value in losses.items()))


def compare(
    base: nn.Module, tokenizer: Any, size: Size, args: argparse.Namespace, device: torch.device, out: Any
) -> tuple[dict[str, Run], list[torch.Tensor], list[torch.Tensor]]:
    """Both fine-tunings, measured; the batches, and the held-out ones."""
    texts = _data.user_texts(args.data) if args.data else _data.prose(size.prose_chars)
    what = "--data" if args.data else "text"
    train_texts, held_texts = _data.hold_out(texts)
    stream, held_stream = _data.encode(tokenizer, train_texts), _data.encode(tokenizer, held_texts)
    batches = _data.random_windows(stream, size.steps, size.batch, size.seq, args.seed + 1, what)
    held_out = _data.consecutive_windows(held_stream, size.eval_batches, size.batch, size.seq, what)
    out.print(f"text: {len(stream):,} tokens to train on, {sum(b.numel() for b in held_out):,} held out, "
              f"{args.data or 'licences and documentation of this machine'}")  # fmt: skip

    models, ids = build(base, args), batches[0].to(device)
    runs: dict[str, Run] = {}
    other = torch.float32 if args.adapter_dtype == "model" else DTYPES[args.dtype]
    differs = args.dtype != "fp32"
    with _report.bar(out, "before tuning", 2 * len(held_out)) as progress:
        for name, model in models.items():
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=size.lr, weight_decay=0.0)
            numbers: dict[str, Any] = {"losses": [], "seconds": []}
            numbers["saved_bytes"] = saved(model, ids, args.seed)
            numbers["saved_bytes_other"] = saved_with(model, other, ids, args.seed) if differs else None
            numbers["held_out_before"] = evaluate(model, held_out, device, progress)
            runs[name] = Run(model, optimizer, one_cycle(optimizer, size.steps), numbers)
    train(runs, batches, args, device, out)
    with _report.bar(out, "after tuning", 2 * len(held_out) + 1) as progress:
        for run in runs.values():
            run.numbers["held_out_after"] = evaluate(run.model, held_out, device, progress)
            run.numbers |= _measure.state_bytes(run.model, run.optimizer)
            run.numbers["tokens_per_s"] = ids.numel() / statistics.median(run.numbers["seconds"][WARM_UP:])

        def step(model: nn.Module) -> None:
            loss_of(model, ids).backward()
            model.zero_grad()

        peaks = _measure.alternating_peaks(
            {name: lambda m=run.model: step(m) for name, run in runs.items()}, device, size.rounds
        )
        for name, peak in peaks.items():
            runs[name].numbers["peak_bytes"] = peak
        progress.step()
    return runs, batches, held_out


# ------------------------------------------------------------------------------------------------------- the adapter


@torch.no_grad()
def reload_in_peft(ours: nn.Module, base_name: str, folder: Path, ids: torch.Tensor) -> dict[str, float]:
    """Save lowmem's adapter, let PEFT load it onto a base that is loaded anew, and compare logits.

    Largest difference over largest logit, by dtype: the model's, where the two round differently, and fp32, unless the
    model is so large (over 10**9 parameters) that a second copy in fp32 would be too much to ask."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lowmem.integrations import save_adapter

    save_adapter(ours, folder, base_model_name_or_path=base_name)
    dtype = ours.dtype
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_name, dtype=dtype), folder)
    theirs = theirs.to(ids.device).eval()
    ours.eval()
    found = {}
    for kind in (torch.float32, dtype):  # fp32 first: nothing is rounded before it
        if kind == dtype or sum(p.numel() for p in ours.parameters()) < 10**9:
            one, two = (m.to(kind)(input_ids=ids, use_cache=False).logits.float() for m in (ours, theirs))
            found[str(kind).removeprefix("torch.")] = ((one - two).abs().max() / two.abs().max()).item()
    return found


def main() -> int:
    args = arguments()
    size = check(args)
    if args.data:
        _data.user_texts(args.data)  # complain of it before anything that takes long
    try:  # found missing now, not after minutes of training
        import matplotlib  # noqa: F401
        import peft  # noqa: F401
        import transformers

        import lowmem  # noqa: F401
    except ImportError as error:
        raise UsageError(f"{error} (pip install 'lowmem[demo]' brings what the demo needs)") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    out, folder, started = _report.console(), Path(args.out), time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    if args.quick:
        torch.set_num_threads(1)  # matrices this small gain nothing from more, and lose where the cores are taken
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if cuda else f"the CPU, {torch.get_num_threads()} thread(s)"
    out.print(f"[bold]LoRA with PEFT and with lowmem[/bold] on {where}; torch {torch.__version__}")
    base_name = args.model or str(folder / ("base-quick" if args.quick else "base"))
    if not args.model:
        out.print("base: " + train_base(Path(base_name), size, args, device, out))
    base, tokenizer = load_base(base_name, args, size, device)
    count = sum(p.numel() for p in base.parameters())
    runs, batches, held_out = compare(base, tokenizer, size, args, device, out)
    held = held_out[0].to(device)

    adapter_dtype = args.dtype if args.adapter_dtype == "model" else "fp32"
    results: dict[str, Any] = {
        "title": f"LoRA r={args.r}, dropout {args.dropout:g}, all linear layers; {count / 1e6:.1f} M parameters in "
        f"{args.dtype}, {size.steps} steps of {size.batch} x {size.seq} tokens",
        "device": device.type,
        "where": where,
        "torch": torch.__version__,
        "dtype": args.dtype,
        "adapter_dtype": adapter_dtype,
        "peak_method": _measure.peak_method(device),
        "runs": {name: run.numbers for name, run in runs.items()},
    }
    _report.show(out, results, WARM_UP, size.rounds)
    picture, adapter = folder / "finetune.png", folder / "adapter"
    _report.picture(results, picture)

    results["reload"] = reload_in_peft(runs["lowmem"].model, base_name, adapter, held)
    if args.quantized:
        del base
        results["quantized"] = _quantized.compare(
            lambda: load_base(base_name, args, size, device)[0],
            {key: runs["lowmem"].numbers[key] for key in ("losses", "held_out_before", "held_out_after", "trained")},
            batches,
            held_out,
            args,
            size.lr,
            torch.float32 if args.adapter_dtype == "fp32" else DTYPES[args.dtype],
            device,
            out,
        )
        _report.show_quantized(out, results["quantized"], args.dtype)
    equal = results["reload"].get("float32", 0.0) <= 1e-5 and max(results["reload"].values()) <= 2e-2
    results["reloads_equal"] = equal
    results["seconds"] = time.perf_counter() - started
    (folder / "finetune.json").write_text(json.dumps(results, indent=1))
    differences = ", ".join(f"{value:.1e} in {kind}" for kind, value in results["reload"].items())
    verdict = "[green]equal logits[/green]" if equal else "[red]DIFFERENT LOGITS[/red]"
    out.print(f"picture: {picture}   numbers: {folder / 'finetune.json'}")
    out.print(f"adapter: {adapter}, loaded by PEFT onto {base_name}: {verdict}")
    out.print(f"         (largest difference over largest logit: {differences})")
    out.print(f"{results['seconds']:.0f} s in all")
    return 0 if equal else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UsageError as error:
        print(f"finetune.py: {error}", file=sys.stderr)
        sys.exit(2)
