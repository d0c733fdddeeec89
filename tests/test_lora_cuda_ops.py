"""The CUDA C++ kernels of the lora family on a CUDA device, called directly (``lowmem_c::<op>``), whichever kernel the
launchers under ``lowmem::<op>`` would choose. tests/cuda_on_cpu runs the same kernels where no device is."""

import pytest
import torch
from lora_cases import Case, arguments, check_case

from lowmem import _dispatch
from lowmem.testing import LAYOUTS, huge_view

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _dispatch.CUDA.loaded, reason=_dispatch.CUDA.why_not or "loaded"),
    pytest.mark.usefixtures("poisoned"),
]

OPERATORS = ("lora_masked_expand_", "lora_dy")
RANKS = (1, 3, 16, 40, 64, 130, 512)


def kernel(name):
    return getattr(torch.ops.lowmem_c, name)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "bf16+fp32"])
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("name", OPERATORS)
def test_against_the_reference(name, r, precision):
    for m, k, n in ((37, 150, 300), (1000, 1032, 1544)):
        case = Case(m=m, k=k, n=n, r=r, precision=precision, bits=r % 2 == 0, device="cuda")
        check_case(name, case, implementation=kernel(name))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERATORS)
def test_layouts(name, layout):
    case = Case(m=65, k=72, n=72, r=24, precision="bf16", layout=layout, adapters=layout, device="cuda")
    check_case(name, case, implementation=kernel(name))


@pytest.mark.parametrize("m, k", [(0, 8), (8, 0), (1, 1)])
@pytest.mark.parametrize("name", OPERATORS)
def test_empty_and_single(name, m, k):
    check_case(name, Case(m=m, k=k, n=k, r=3, precision="bf16", device="cuda"), implementation=kernel(name))


def test_two_runs_give_the_same_bits():
    args = arguments("lora_dy", Case(m=4100, n=1030, r=16, precision="bf16", device="cuda"))
    first, second = (kernel("lora_dy")(*args) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_offsets_beyond_32_bits():
    t = arguments("lora_masked_expand_", Case(m=4, k=96, r=8, precision="bf16", device="cuda"))
    out = huge_view(4, 96, torch.bfloat16, "cuda")
    out.copy_(t[0])
    kernel("lora_masked_expand_")(out, *t[1:])
    kernel("lora_masked_expand_")(*t)
    assert torch.equal(out, t[0])


def test_another_stream_and_its_order():
    args = arguments("lora_dy", Case(m=500, n=700, r=16, precision="bf16", device="cuda"))
    want = kernel("lora_dy")(*args)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        got = kernel("lora_dy")(*args)
        total = [t.clone() for t in got]
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(want, total, strict=True))


BAD = {
    "ds: expected shape [7, *], got shape (6, 5)": lambda a: a.update(ds=a["ds"][:6]),
    "ds: expected torch.Float, got torch.BFloat16": lambda a: a.update(ds=a["ds"].bfloat16()),
    "a: expected shape [5, 100], got": lambda a: a.update(a=a["a"][:, :99]),
    "a: expected float32, float16 or bfloat16, got": lambda a: a.update(a=a["a"].double()),
    "a: expected device cuda:0 (out's), got": lambda a: a.update(a=a["a"].cpu()),
    "mask: expected shape [7, 4], got": lambda a: a.update(mask=a["mask"][:, :3]),
    "p: expected a probability in [0, 1], got": lambda a: a.update(p=-0.1),
    "seed: expected an int64 tensor of one element": lambda a: a.update(mask=None),
    "child: expected an integer in [0, 2**32), got -1": lambda a: a.update(child=-1),
    "out: expected elements with places of their own": lambda a: a.update(out=a["out"][:1].expand(7, 100)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_before_anything_is_written(message):
    names = ("out", "ds", "a", "mask", "p", "seed", "child", "accumulate")
    given = dict(zip(names, arguments("lora_masked_expand_", Case(device="cuda")), strict=True))
    before = given["out"].clone()
    whole = given["out"]
    BAD[message](given)
    with pytest.raises(RuntimeError) as caught:
        kernel("lora_masked_expand_")(*given.values())
    assert f"lowmem.lora_masked_expand_: {message}" in str(caught.value)
    assert torch.equal(whole, before)
