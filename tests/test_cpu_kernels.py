"""What is particular to the C++ kernels of the CPU: every instruction set, any number of threads, the blocks of the
partition, tails. The operators' semantics on every shape and layout are in test_lora_ops.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lora_cases import OPERATORS, Case, check_case, tensors

from lowmem import _dispatch
from lowmem.ops.philox import keep_mask, pack_bits

pytestmark = pytest.mark.skipif(not _dispatch.CPU.loaded, reason=_dispatch.CPU.why_not or "lowmem/_C is loaded")

ROOT = Path(__file__).resolve().parent.parent
LEVELS = ("plain", "avx2", "avx512", "avx512_bf16")

# one process a level: the level is chosen at the first call
SCRIPT = """
import torch
from lora_cases import OPERATORS, Case, check_case
from lowmem.ops.philox import keep_mask, pack_bits

ops = torch.ops.lowmem
for precision in ("fp32", "fp64", "bf16", "fp16", "bf16+fp32", "fp16+fp32"):
    for m, k, n, r in ((1, 1, 1, 1), (3, 45, 70, 5), (18, 513, 161, 17), (35, 1057, 1090, 33), (0, 40, 9, 4)):
        for p, bits in ((0.0, True), (0.1, True), (0.5, False), (1.0, True)):
            for name in OPERATORS:
                check_case(name, Case(m=m, k=k, n=n, r=r, p=p, bits=bits, precision=precision))
for name in ("lora_shrink", "lora_expand", "lora_dx"):
    check_case(name, Case(m=17, k=96, n=64, r=600))
x = torch.zeros(37, 1111)
for p in (1e-6, 0.1, 0.5, 1 - 1e-5, 1.0):
    for seed in (0, 1, -1, 0x0123456789ABCDEF):
        seed = torch.tensor([seed])
        mask = ops.lora_shrink(x, x[:2], 1.0, p, seed, 7, True)[1]
        assert torch.equal(mask, pack_bits(keep_mask(37, 1111, p, seed, 7))), (p, seed)
print("all checked")
"""


def run_at(level: str, script: str = SCRIPT) -> subprocess.CompletedProcess:
    env = {**os.environ, "LOWMEM_CPU_ISA": level, "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), env.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set(level):
    done = run_at(level)
    if "that this processor has" in done.stderr:
        pytest.skip(f"this processor has no {level}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all checked" in done.stdout


def test_an_unknown_level_is_refused():
    done = run_at("sse9", "import torch, lowmem; x = torch.ones(2, 2); torch.ops.lowmem.lora_dy(x, x, x, 1.0)")
    message = r"lowmem: LOWMEM_CPU_ISA: expected one of plain, avx2, avx512 or avx512_bf16 that .* has, got sse9"
    assert done.returncode != 0 and re.search(message, done.stderr), done.stderr[-2000:]


@pytest.mark.parametrize("precision", ["fp32", "bf16+fp32", "fp64"])
@pytest.mark.parametrize("name", OPERATORS)
def test_any_number_of_threads_gives_the_same_bits(name, precision):
    # several row blocks, several column chunks of 1024, a ragged end of each
    case = Case(m=777, k=2085, n=1093, r=19, precision=precision)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(_run(name, case))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def _run(name: str, case: Case) -> tuple[torch.Tensor, ...]:
    t, ops = tensors(case), torch.ops.lowmem
    drop = (t["mask"], case.p, t["seed"], case.child)
    if name == "lora_shrink":
        return ops.lora_shrink(t["x"], t["a"], case.scale, case.p, t["seed"], case.child, True)
    if name == "lora_expand":
        return (ops.lora_expand(t["x"], None, t["s"], t["b"], None),)  # torch's own GEMM may depend on the threads
    if name == "lora_dy":
        return ops.lora_dy(t["dy"], t["b"], t["s"], case.scale)
    if name == "lora_dx":
        return (ops.lora_dx(t["dy"], None, t["ds"], t["a"], *drop),)
    if name == "lora_da":
        return (ops.lora_da(t["ds"], t["x"], *drop),)
    out = t["out"].clone()
    ops.lora_masked_expand_(out, t["ds"], t["a"], *drop, True)
    return (out,)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("r", [16, 64, 65, 96])
def test_both_sides_of_the_fused_rank(precision, r):
    # up to 64 the two sums over dy share one read, above it they are two passes
    check_case("lora_dy", Case(m=300, k=8, n=2100, r=r, precision=precision), threads=2)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_dropped_elements_keep_their_bits(precision):
    case = Case(m=9, k=131, precision=precision, p=0.5)
    t = tensors(case)
    out = t["out"]
    odd = torch.tensor([float("nan"), float("inf"), -0.0, torch.finfo(out.dtype).smallest_normal / 4], dtype=out.dtype)
    out.view(-1)[: 4 * (out.numel() // 4)] = odd.repeat(out.numel() // 4)
    kind = torch.int32 if out.element_size() == 4 else torch.int16
    before = out.view(kind).clone()
    torch.ops.lowmem.lora_masked_expand_(out, t["ds"], t["a"], t["mask"], case.p, None, 0, True)
    keep = keep_mask(case.m, case.k, case.p, t["seed"], case.child)
    assert 0.3 < keep.float().mean() < 0.7
    assert torch.equal(out.view(kind)[~keep], before[~keep])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 15, 16, 17, 31, 33, 511, 513, 1023, 1025])
def test_nothing_outside_a_row_is_read_or_written(dtype, k):
    # every neighbour of the rows is NaN or a sentinel, and every row starts off any vector's alignment
    wide = torch.full((5, k + 7), float("nan")).to(dtype)
    wide[:, 3 : 3 + k] = torch.randn(5, k).to(dtype)
    a, ds = torch.randn(3, k).to(dtype), torch.randn(5, 3).to(dtype)
    x = wide[:, 3 : 3 + k]
    seed = torch.tensor([5])
    s, mask = torch.ops.lowmem.lora_shrink(x, a, 1.0, 0.25, seed, 1, True)
    assert s.isfinite().all() and torch.equal(mask, pack_bits(keep_mask(5, k, 0.25, seed, 1)))
    assert torch.ops.lowmem.lora_da(ds, x, mask, 0.25, None, 1).isfinite().all()
    for accumulate in (True, False):
        target = torch.full((5, k + 7), 42.0).to(dtype)
        torch.ops.lowmem.lora_masked_expand_(target[:, 3 : 3 + k], ds, a, mask, 0.25, None, 1, accumulate)
        assert (target[:, :3] == 42).all() and (target[:, 3 + k :] == 42).all()


def test_subnormals_survive_the_library():
    # a library linked with -ffast-math would have switched them off for the whole process
    assert (torch.full((64,), 1e-40) * 1.0).min().item() > 0
