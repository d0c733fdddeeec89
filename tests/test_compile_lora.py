"""The `lora` launchers' own calls, compiled: what they hand to Triton compiles for each GPU, within its limits."""

from __future__ import annotations

import pytest
from triton_compile import calls_compiled_for, measure_cubin, usable

pytestmark = [pytest.mark.compile, pytest.mark.skipif(not usable(), reason="needs Triton, and TRITON_INTERPRET unset")]


@pytest.mark.parametrize(
    "arch, m, k, n, r",
    [
        ("sm_90", 1024, 512, 512, 16),
        ("sm_90", 1000, 504, 520, 5),  # rows of 16 bytes, but not of 32
        ("sm_90", 999, 333, 77, 130),
        ("sm_90", 1, 1, 1, 1),  # sizes and strides of 1 become constants
        ("sm_90", 1, 512, 512, 1),
        ("sm_80", 1024, 512, 512, 16),
        ("sm_100", 1024, 512, 512, 16),
    ],
)
def test_what_the_launchers_call_compiles(arch, m, k, n, r):
    import torch

    from lowmem.triton_kernels import device as gpu
    from lowmem.triton_kernels import lora

    assert gpu.architecture(torch.device("cpu")) is None
    half = {"dtype": torch.bfloat16}
    x, dy, w = torch.zeros(m, k, **half), torch.zeros(m, n, **half), torch.zeros(n, k, **half)
    a, b, seed = torch.zeros(r, k), torch.zeros(n, r), torch.zeros(1, dtype=torch.int64)
    with calls_compiled_for(arch) as compiled:
        s, bits = lora.shrink(x, a, 2.0, 0.1, seed, 1, True)
        lora.shrink(x[:64], a, 2.0, 0.0, None, 0, False)
        ds, _ = lora.dy_fused(dy, b, s, 2.0)
        lora.da(ds, x, bits, 0.1, None, 1)
        lora.da(ds, x, None, 0.1, seed, 1)
        lora.masked_expand_fused(x, ds, a, bits, 0.1, None, 1, False)
        lora.expand_fused(x, w, s, b, torch.zeros(n, **half))
        lora.dx_fused(dy, w, ds, a, bits, 0.1, None, 1)
    names = [name for name, _ in compiled]
    assert {"shrink_kernel", "dy_kernel", "da_kernel", "draw_kernel", "masked_expand_kernel"} <= set(names)
    assert "reduce_kernel" in names or m == 1, "no sum was split"
    by_descriptor = arch != "sm_80" and k % 8 == 0 and n % 8 == 0
    for name in ("expand", "dx"):
        assert (f"{name}_descriptor_kernel" in names) is by_descriptor
        assert (f"{name}_kernel" in names) is not by_descriptor
    for name, kernel in compiled:
        assert kernel.metadata.shared <= gpu.SHARED_LIMIT[arch], name
        assert measure_cubin(kernel)["local"] == 0, f"{name} spills"


@pytest.mark.parametrize(
    "arch, m, k, n, ranks, by_order",
    [
        ("sm_90", 1024, 512, 512, (16, 16, 8), True),
        ("sm_90", 1024, 512, 512, (16, 5), False),
        ("sm_90", 999, 333, 77, (130, 1), True),
        ("sm_90", 1, 1, 1, (1,), True),
        ("sm_80", 1024, 512, 512, (16, 64), True),
        ("sm_100", 1024, 512, 512, (16, 5), True),
    ],
)
def test_what_the_launchers_of_many_adapters_call_compiles(arch, m, k, n, ranks, by_order):
    import torch

    from lowmem.ops.lora_multi import adapter_table
    from lowmem.triton_kernels import device as gpu
    from lowmem.triton_kernels import lora_multi as lora

    half, count = {"dtype": torch.bfloat16}, len(ranks)
    x, dy = torch.zeros(m, k, **half), torch.zeros(m, n, **half)
    a, b, seeds = [torch.zeros(r, k) for r in ranks], [torch.zeros(n, r) for r in ranks], torch.arange(count)
    offsets = torch.tensor([0] * count + [m])
    at = (torch.arange(m) if by_order else None, offsets)
    table = adapter_table(ranks, (1.0,) * count, (0.1,) * count, "cpu")
    with calls_compiled_for(arch) as compiled:
        s, bits = lora.shrink(x, a, table, seeds, *at, True, True)
        lora.shrink(x[:64], a, table, None, *at, False, False)
        ds, _ = lora.dy(dy, b, s, table, *at)
        lora.da(ds, x, list(ranks), table, bits, None, *at, True)
        lora.da(ds, x, list(ranks), table, None, seeds, *at, True)
        lora.expand_(x, ds, a, table, bits, None, *at, True)
        lora.expand_(dy, s, [one.T for one in b], table, None, None, *at, False)
    names = [name for name, _ in compiled]
    passes = ("shrink", "dy", "da", "draw", "expand")
    assert {f"multi_{one}_kernel" for one in passes} | {"blocks_kernel"} <= set(names)
    # one launch for all adapters a pass: the number of launches does not depend on theirs
    assert [names.count(f"multi_{one}_kernel") for one in passes] == [2, 1, 2, 1, 2]
    assert "sum_kernel" in names or m == 1, "no sum was split"
    for name, kernel in compiled:
        assert kernel.metadata.shared <= gpu.SHARED_LIMIT[arch], name
        assert measure_cubin(kernel)["local"] == 0, f"{name} spills"
