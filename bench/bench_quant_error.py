"""How far quantized weights are from dense ones: every format and quantizer, beside the packages that own the formats.

    python bench/bench_quant_error.py [--size 512] [--rank 16] [--csv FILE]

``error`` is ``||W - dequantize(Q) - B A|| / ||W||`` for ``W [size, size]`` from a fixed seed: Gaussian, and Student's
t with four degrees of freedom (heavy tails). ``bits`` are the bytes of ``Q``'s tensors, times 8, a weight;
``rank_bits`` those of a low-rank term in 16-bit numbers. ``peer_error`` is the same figure of the released package
named in ``peer``, where it is installed: bitsandbytes, torchao, HQQ. ``assign`` and ``lq`` rows are whole budgets:
three matrices of standard deviation 1, 2 and 4 share the bits, as ``assign_bits`` gives them out, without and with a
low-rank term, beside the best single format for all three within that budget (``plain``).
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import commit
from torch import Tensor

from lowmem.quant import QuantSpec, assign_bits, dequantize, loftq_init, lq_decompose, lq_specs, quantize

COLUMNS = "weights format group scales zero method rank bits rank_bits error peer peer_error commit".split()
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
BUDGETS = (2.25, 2.5, 2.75, 3.0)


def draw(kind: str, size: int, seed: int = 0) -> Tensor:
    """The same weights on every machine: torch's CPU generator."""
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(size, size, generator=g)
    if kind == "gauss":
        return normal
    return normal / torch.randn(4, size, size, generator=g).square().mean(0).sqrt()


def error(w: Tensor, dense: Tensor) -> float:
    return float((w - dense.to(w.dtype)).norm() / w.norm())


def peers() -> dict[tuple[str, int, bool, str], tuple[str, Callable[[Tensor], Tensor]]]:
    """``(format, group, double_quant, method)`` to a package's name and its weight after quantizing and back."""
    found: dict[Any, Any] = {}
    try:
        import bitsandbytes.functional as F

        def bnb(w: Tensor, kind: str, nested: bool) -> Tensor:
            return F.dequantize_4bit(*F.quantize_4bit(w, quant_type=kind, compress_statistics=nested))

        for kind, nested in itertools.product(("nf4", "fp4"), (False, True)):
            found[kind, 64, nested, "absmax"] = "bitsandbytes", lambda w, k=kind, n=nested: bnb(w, k, n)
    except ImportError:
        pass
    try:
        from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import IntxUnpackedToInt8Tensor

        for bits, group in itertools.product((2, 3, 4, 8), (32, 64, 128)):
            found[f"int{bits}", group, False, "absmax"] = (
                "torchao",
                lambda w, b=bits, g=group: (
                    IntxUnpackedToInt8Tensor.from_hp(w, [1, g], getattr(torch, f"int{b}")).dequantize()
                ),
            )
    except ImportError:
        pass
    try:
        from hqq.core.quantize import Quantizer

        def hqq(w: Tensor, bits: int, group: int) -> Tensor:
            packed, meta = Quantizer.quantize(w, nbits=bits, group_size=group, axis=1, device="cpu")
            return Quantizer.dequantize(packed, meta | {"compute_dtype": torch.float32})

        for bits, group in itertools.product((2, 3, 4, 8), (32, 64, 128)):
            found[f"int{bits}", group, False, "hqq"] = "hqq", lambda w, b=bits, g=group: hqq(w, b, g)
    except ImportError:
        pass
    return found


def formats() -> Iterator[tuple[QuantSpec, str]]:
    for f, nested in itertools.product(("nf4", "fp4", "nf3", "nf2"), (False, True)):
        for method in ("absmax",) if nested else ("absmax", "mse"):
            yield QuantSpec(f, 64, double_quant=nested), method
    for f in ("nf2", "nf3", "nf4"):  # LQ-LoRA's coarse scales
        yield QuantSpec(f, 32, double_quant=True, scale_bits=4, scale_group=256, scale_dtype=torch.bfloat16), "absmax"
    for f, group in itertools.product(("int8", "int4", "int3", "int2"), (32, 64, 128)):
        for method in ("absmax", "mse"):
            yield QuantSpec(f, group), method
        yield QuantSpec(f, group, zero_point=True), "absmax"
        yield QuantSpec(f, group, zero_point=True, scale_dtype=torch.float32), "hqq"


def row(kind: str, spec: QuantSpec, method: str, bits: float, found: float, **more: Any) -> dict[str, Any]:
    scales = f"{spec.scale_bits} bits / {spec.scale_group}" if spec.double_quant else DTYPES[spec.scales_in]
    return {
        "weights": kind,
        "format": spec.format,
        "group": spec.group_size,
        "scales": scales,
        "zero": int(spec.zero_point),
        "method": method,
        "rank": 0,
        "bits": f"{bits:.3f}",
        "error": f"{found:.5f}",
        **more,
    }


def budgets(kind: str, size: int, rank: int, quantizer: Any) -> Iterator[dict[str, Any]]:
    """LQ-LoRA under a budget against the best single normal-float format at no more bits."""
    model = {str(s): s * draw(kind, size, seed=s) for s in (1, 2, 4)}
    total = sum(w.numel() for w in model.values())
    norm = sum(float(w.square().sum()) for w in model.values()) ** 0.5
    specs = lq_specs()
    single = [s for s in specs if s.is_table] + [
        QuantSpec(f, g, scale_dtype=t) for f, g, t in itertools.product(("nf2", "nf3"), (16, 32, 64, 128), DTYPES)
    ]

    def bits_of(assigned: dict[str, QuantSpec]) -> float:
        return sum(8 * s.storage_bytes(*model[n].shape) for n, s in assigned.items()) / total

    def error_of(parts: list[Tensor]) -> float:
        return sum(float(p.square().sum()) for p in parts) ** 0.5 / norm

    for budget in BUDGETS:
        best = None
        for spec in (s for s in single if s.bits_per_weight(size, size) <= budget):
            # the closest in bits are enough: fewer bits of the same format are worse
            if spec.bits_per_weight(size, size) < budget - 0.3:
                continue
            found = error_of([w - dequantize(quantize(w, spec, method=quantizer)) for w in model.values()])
            best = min(best, (found, spec), key=lambda t: t[0]) if best else (found, spec)
        if best is not None:
            yield row(kind, best[1], f"plain {quantizer} {budget}", best[1].bits_per_weight(size, size), best[0])
        for r in (0, rank):
            assigned = assign_bits(model, budget, r=r, method=quantizer)
            rest = []
            for name, w in model.items():
                if r == 0:
                    rest.append(w - dequantize(quantize(w, assigned[name], method=quantizer)))
                    continue
                q, a, b = lq_decompose(w, r, assigned[name], method=quantizer, iterations=10)
                rest.append(w - dequantize(q) - b @ a)
            formats = "+".join(f"{s.format}g{s.group_size}" for s in assigned.values())
            extra = {"rank": r, "rank_bits": f"{32 * r / size:.3f}", "format": formats, "group": "", "scales": ""}
            method = f"lq {quantizer} {budget}" if r else f"assign {quantizer} {budget}"
            yield row(kind, assigned["1"], method, bits_of(assigned), error_of(rest)) | extra


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--budget-method", choices=("absmax", "mse"), default="absmax", help="mse takes minutes")
    parser.add_argument("--csv")
    args = parser.parse_args()
    theirs, rows = peers(), []
    for kind in ("gauss", "t4"):
        w = draw(kind, args.size)
        for spec, method in formats():
            q = quantize(w, spec, method=method)  # type: ignore[arg-type]
            found = row(kind, spec, method, q.bits_per_weight, error(w, dequantize(q)))
            same = spec.zero_point == (method == "hqq")
            peer = theirs.get((spec.format, spec.group_size, spec.double_quant, method)) if same else None
            if peer is not None:
                found |= {"peer": peer[0], "peer_error": f"{error(w, peer[1](w)):.5f}"}
            rows.append(found)
        for f, name in itertools.product(("nf4", "nf3", "nf2"), ("loftq", "lq")):
            spec = QuantSpec(f, 64, double_quant=True)
            make: Any = loftq_init if name == "loftq" else lq_decompose
            q, a, b = make(w, args.rank, spec, iterations=5 if name == "loftq" else 50)
            extra = {"rank": args.rank, "rank_bits": f"{32 * args.rank / args.size:.3f}"}
            rows.append(row(kind, spec, name, q.bits_per_weight, error(w, dequantize(q) + b @ a)) | extra)
        rows += budgets(kind, args.size, args.rank, args.budget_method)
    for r in rows:
        print("  ".join(f"{r.get(c, '')!s:>8}" for c in COLUMNS[:-1]))
    if args.csv:
        Path(args.csv).parent.mkdir(parents=True, exist_ok=True)
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows({**r, "commit": commit()} for r in rows)


if __name__ == "__main__":
    main()
