"""Benchmarks of the lora family on whole blocks, on batches of several adapters, and of DoRA.

    python bench/bench_lora_block.py [--only block,adapters,dora] [--dtypes bf16,fp32] [--rounds 15] [--quick]

``block``     a Llama block (q, k, v, o, gate, up, down; attention and SwiGLU between; r = 16, p = 0.1), forward and
              backward: PEFT eager, PEFT under torch.compile, and ours.
``adapters``  four adapters on one layer, 64 rows each: one batch through MultiLoRALinear against four calls.
``dora``      a step of one layer with DoRA against LoRA's, and the memory it adds as a share of the weight.

Results go to bench/results/<device>/lora_block.csv (or ``--csv``). Columns and timing: bench/common.py.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler only counts memory here; its own messages are noise

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from common import Results, Target, ceilings, paired, peak_mb, print_targets, slug, speedup  # noqa: E402

import lowmem  # noqa: E402
from lowmem.nn import FusedLoRALinear, MultiLoRALinear  # noqa: E402

R, ALPHA, P, HEAD = 16, 32, 0.1, 128
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Block(nn.Module):
    """Attention and a SwiGLU MLP over ``[1, M, hidden]``, without norms: all that is timed runs through the linears."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        sizes = [(hidden, hidden)] * 4 + [(hidden, inner)] * 2 + [(inner, hidden)]
        for name, (k, n) in zip(NAMES, sizes, strict=True):
            setattr(self, name, nn.Linear(k, n, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""

        def heads(t: Tensor) -> Tensor:
            return t.view(*t.shape[:2], -1, min(HEAD, t.shape[2])).transpose(1, 2)

        q, k, v = (heads(one(x)) for one in (self.q_proj, self.k_proj, self.v_proj))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.o_proj(a)
        return x + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def stepper(run: Any, params: list[Tensor], x: Tensor, dy: Tensor) -> Any:
    """A call that runs forward and backward to ``x`` and ``params``."""
    return lambda _: torch.autograd.grad(run(x), [x, *params], dy)


def trainable(module: nn.Module) -> list[Tensor]:
    """The parameters that train."""
    return [p for p in module.parameters() if p.requires_grad]


def bench_block(out: Results, args: argparse.Namespace, dtype: torch.dtype) -> list[Target]:
    """PEFT eager, PEFT compiled and ours on one block."""
    from peft import LoraConfig, get_peft_model

    m, hidden, inner = (64, 128, 192) if args.quick else (2048, 2048, 5632)
    torch.manual_seed(0)
    block = Block(hidden, inner).to(args.device, dtype)
    config = LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=P, target_modules=NAMES)
    peft = get_peft_model(copy.deepcopy(block), config, autocast_adapter_dtype=False).train()
    ours = lowmem.convert(block, r=R, alpha=ALPHA, dropout=P, adapter_dtype=dtype).train()
    x = torch.randn(1, m, hidden, device=args.device).to(dtype).requires_grad_()
    dy = torch.randn(1, m, hidden, device=args.device).to(dtype)
    calls = {
        "PEFT eager": stepper(peft, trainable(peft), x, dy),
        f"PEFT compiled p={P}": stepper(torch.compile(peft), trainable(peft), x, dy),
        "lowmem": stepper(ours, trainable(ours), x, dy),
    }
    times = paired(calls, args.device, rounds=args.rounds)
    for name, series in times.items():
        mine = name == "lowmem"
        out.add(
            "block fwd+bwd p=0.1", f"M{m} hidden {hidden} inner {inner} r{R}", dtype, name, series,
            peak=peak_mb(calls[name], args.device), peer_times=times["PEFT eager"] if mine else None,
            compile_times=times[f"PEFT compiled p={P}"] if mine else None,
        )  # fmt: skip
    return []


def bench_adapters(out: Results, args: argparse.Namespace, dtype: torch.dtype) -> list[Target]:
    """Four adapters in one batch against four calls."""
    targets = []
    for k, n in [(128, 192)] if args.quick else [(2048, 2048), (2048, 5632), (4096, 4096)]:
        torch.manual_seed(0)
        base = nn.Linear(k, n, bias=False).to(args.device, dtype)
        options = {"r": R, "alpha": ALPHA, "dropout": P}
        layer = MultiLoRALinear(base, {f"job{j}": options for j in range(4)})
        singles = []
        for j in range(4):
            one = FusedLoRALinear.from_linear(base, **options)
            one.lora_A["default"], one.lora_B["default"] = layer.lora_A[f"job{j}"], layer.lora_B[f"job{j}"]
            singles.append(one)
        ids = torch.arange(4, device=args.device).repeat_interleave(64)
        x = torch.randn(256, k, device=args.device).to(dtype).requires_grad_()
        dy = torch.randn(256, n, device=args.device).to(dtype)
        parts = [(one, part.detach().requires_grad_(), d) for one, part, d in
                 zip(singles, x.chunk(4), dy.chunk(4), strict=True)]  # fmt: skip

        def four(_: int, parts: Any = parts) -> Any:
            return [torch.autograd.grad(one(t), [t, one.lora_A["default"], one.lora_B["default"]], d)
                    for one, t, d in parts]  # fmt: skip

        multi = stepper(lambda t, layer=layer, ids=ids: layer(t, adapter_ids=ids), trainable(layer), x, dy)
        calls = {"lowmem four calls": four, "lowmem one batch": multi}
        times = paired(calls, args.device, rounds=args.rounds)
        text = f"4 x 64 rows {k}->{n} r{R}"
        for name, series in times.items():
            peer = times["lowmem four calls"] if name == "lowmem one batch" else None
            out.add("four adapters p=0.1", text, dtype, name, series, peer_times=peer)
        value = speedup(times["lowmem four calls"], times["lowmem one batch"])
        targets.append(Target(f"{text} {str(dtype)[6:]}: one batch over four calls", value, 1.3, at_most=False))
    return targets


def bench_dora(out: Results, args: argparse.Namespace, dtype: torch.dtype) -> list[Target]:
    """A step with DoRA against one with LoRA."""
    m, k, n = (64, 128, 192) if args.quick else (2048, 4096, 4096)
    base = nn.Linear(k, n, bias=False).to(args.device, dtype)
    x = torch.randn(m, k, device=args.device).to(dtype).requires_grad_()
    dy = torch.randn(m, n, device=args.device).to(dtype)
    calls, layers = {}, {}
    for name, dora in (("lowmem LoRA", False), ("lowmem DoRA", True)):
        layers[name] = FusedLoRALinear.from_linear(base, r=R, alpha=ALPHA, dropout=P, use_dora=dora)
        calls[name] = stepper(layers[name], trainable(layers[name]), x, dy)
    times = paired(calls, args.device, rounds=args.rounds)
    peaks = {name: peak_mb(call, args.device) for name, call in calls.items()}
    for name, series in times.items():
        peer = times["lowmem LoRA"] if name == "lowmem DoRA" else None
        out.add("step p=0.1", f"M{m} {k}->{n} r{R}", dtype, name, series, peak=peaks[name], peer_times=peer)

    def held(layer: nn.Module) -> int:
        return sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))

    extra = (held(layers["lowmem DoRA"]) - held(layers["lowmem LoRA"])) / base.weight.nbytes
    text = f"M{m} {k}->{n} {str(dtype)[6:]}: DoRA's"
    return [
        Target(f"{text} step, of LoRA's", 1 / speedup(times["lowmem LoRA"], times["lowmem DoRA"]), 1.25),
        Target(f"{text} parameters and buffers beyond LoRA's, of the weight", extra, 0.05),
    ]


def main() -> None:
    """Run what --only names; print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", default="block,adapters,dora", help="parts, comma-separated")
    parser.add_argument("--dtypes", default="bf16,fp32", help="of bf16, fp32")
    parser.add_argument("--rounds", type=int, default=15, help="paired rounds")
    parser.add_argument("--quick", action="store_true", help="small shapes, three rounds: does it run?")
    parser.add_argument("--csv", type=Path, help="default: bench/results/<device>/lora_block.csv")
    args = parser.parse_args()
    dtypes = [{"bf16": torch.bfloat16, "fp32": torch.float32}[d] for d in args.dtypes.split(",")]
    args.rounds = 3 if args.quick else args.rounds
    out, targets = Results(ceilings(args.device, dtypes, quick=args.quick)), []
    out.header()
    parts = {"block": bench_block, "adapters": bench_adapters, "dora": bench_dora}
    for name in args.only.split(","):
        for dtype in dtypes:
            targets += parts[name](out, args, dtype)
    print_targets(targets)
    csv = args.csv or ROOT / "bench" / "results" / slug(args.device) / "lora_block.csv"
    out.write(csv)
    print(f"wrote {csv} ({len(out.rows)} rows)")


if __name__ == "__main__":
    main()
