"""The demo's second half: the same base in 4 and in about 2 bits, tuned by the same steps."""

from __future__ import annotations

import argparse
import time
from typing import Any

import _measure
import _report
import torch
from _training import Run, evaluate, loss_of, one_cycle
from torch import nn

BUDGET = 2.25  # bits a weight of the linear layers, scales included


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def qlora(model: nn.Module, args: argparse.Namespace, dtype: torch.dtype) -> nn.Module:
    """NF4 in groups of 64, scales doubly quantized, adapters that start at nothing (arXiv 2305.14314)."""
    import lowmem
    from lowmem.quant import QuantSpec

    nf4 = QuantSpec("nf4", 64, double_quant=True)
    return lowmem.convert(model, r=args.r, alpha=args.alpha, dropout=args.dropout, adapter_dtype=dtype, quant=nf4)


def lq_lora(model: nn.Module, args: argparse.Namespace, dtype: torch.dtype) -> nn.Module:
    """``W ~ Q + s B A`` with a format for each layer that spends ``BUDGET`` bits best (arXiv 2311.12023)."""
    import lowmem
    from lowmem.nn import QuantLinear, lora_layers
    from lowmem.quant import QuantSpec, assign_bits, lq_decompose

    layers = linear_layers(model)
    choices = [
        QuantSpec(f, g, double_quant=True, scale_bits=b, scale_dtype=torch.bfloat16, scale_group=64)
        for f in ("int2", "int3")
        for g in (16, 32, 64)
        for b in (4, 8)
    ]
    # scales that clip are worth most at 2 bits
    specs = assign_bits({n: m.weight for n, m in layers.items()}, BUDGET, specs=choices, r=args.r, method="mse")
    factors = {}
    for name, linear in layers.items():
        r = min(args.r, *linear.weight.shape)
        q, a, b = lq_decompose(linear.weight, r, specs[name], scale=args.alpha / args.r, method="mse", iterations=5)
        factors[name] = a, b
        put(model, name, QuantLinear.from_qtensor(q, linear.bias))
    model = lowmem.convert(model, r=args.r, alpha=args.alpha, dropout=args.dropout, adapter_dtype=dtype)
    with torch.no_grad():
        for name, layer in lora_layers(model):
            a, b = factors[name]
            layer.lora_A["default"][: len(a)] = a
            layer.lora_B["default"][:, : len(a)] = b
    return model


WAYS = {"NF4": qlora, f"{BUDGET:g}-bit LQ-LoRA": lq_lora}


def weight_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes that the linear layers' weights take, and how many weights they are."""
    layers = list(linear_layers(model).values())
    frozen = [p for m in layers for n, p in m.named_parameters() if n.startswith("weight")]
    return _measure.storage_bytes(frozen), sum(m.in_features * m.out_features for m in layers)


def tune(
    models: dict[str, nn.Module],
    batches: list[torch.Tensor],
    held_out: list[torch.Tensor],
    args: argparse.Namespace,
    lr: float,
    device: torch.device,
    out: Any,
) -> dict[str, Run]:
    """Every model by the same steps; ``held_out_before`` is what quantization alone cost."""
    runs = {}
    for name, model in models.items():
        size, count = weight_bytes(model)
        numbers: dict[str, Any] = {"losses": [], "weight_bytes": size, "bits": 8 * size / count}
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
        runs[name] = Run(model, optimizer, one_cycle(optimizer, len(batches)), numbers)
        numbers["held_out_before"] = evaluate(model, held_out, device)
        with _report.bar(out, name, len(batches)) as progress:
            for i, ids in enumerate(batches):
                torch.manual_seed(args.seed + i)
                loss = loss_of(model, ids.to(device))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                runs[name].schedule.step()
                numbers["losses"].append(loss.item())
                progress.step(f"loss {loss.item():.3f}")
        numbers["held_out_after"] = evaluate(model, held_out, device)
        numbers |= _measure.state_bytes(model, optimizer)
    return runs


def compare(
    load: Any,
    bf16: dict[str, Any],
    batches: list[torch.Tensor],
    held_out: list[torch.Tensor],
    args: argparse.Namespace,
    lr: float,
    dtype: torch.dtype,
    device: torch.device,
    out: Any,
) -> dict[str, dict[str, Any]]:
    """The numbers of each way of :data:`WAYS`, with those of LoRA over the dense base (``bf16``) in front.

    ``load()`` gives the base anew."""
    results: dict[str, dict[str, Any]] = {}
    for name, make in WAYS.items():
        base = load()
        if not results:
            size, count = weight_bytes(base)
            results["dense"] = {**bf16, "weight_bytes": size, "bits": 8 * size / count, "quantize_seconds": 0.0}
        torch.manual_seed(args.seed)
        started = time.perf_counter()
        model = make(base, args, dtype)
        seconds = time.perf_counter() - started
        run = tune({name: model}, batches, held_out, args, lr, device, out)[name]
        results[name] = {**run.numbers, "quantize_seconds": seconds}
        del base, model, run
    return results
