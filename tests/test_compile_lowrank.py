"""The `lowrank` launchers' own calls, compiled: what they hand to Triton compiles for each GPU, within its limits."""

from __future__ import annotations

import pytest
from triton_compile import calls_compiled_for, measure_cubin, usable

pytestmark = [pytest.mark.compile, pytest.mark.skipif(not usable(), reason="needs Triton, and TRITON_INTERPRET unset")]


@pytest.mark.parametrize(
    "arch, m, n, r",
    [
        ("sm_90", 1024, 512, 128),
        ("sm_90", 999, 333, 5),
        ("sm_90", 1, 1, 1),  # sizes and strides of 1 become constants
        ("sm_100", 512, 1024, 200),
    ],
)
def test_what_the_launchers_call_compiles(arch, m, n, r):
    import torch

    from lowmem.triton_kernels import device as gpu
    from lowmem.triton_kernels import lowrank

    half = {"dtype": torch.bfloat16}
    w, g, seed = torch.zeros(m, n, **half), torch.zeros(m, n, **half), torch.zeros(1, dtype=torch.int64)
    numbers = (0.9, 0.99, 0.5, 0.5, 1e-8)
    with calls_compiled_for(arch) as compiled:
        for left in (True, False):
            r = min(r, m if left else n)
            p = torch.zeros(m if left else n, r, **half)
            thin = torch.zeros((r, n) if left else (m, r))
            f = torch.zeros(n if left else m)
            lowrank.project(g, p, left)
            lowrank.project_adam(thin.clone(), thin.clone(), g, p, left, *numbers)
            lowrank.adam(thin.clone(), thin.clone(), thin.bfloat16(), *numbers)
            lowrank.update(w, p, thin.bfloat16(), left, 0.1, 0.9, seed)
            lowrank.update(w, p, thin.bfloat16(), left, 0.1, 0.9, seed, g=g, f=f)
            lowrank.update(w, p, thin.bfloat16(), left, 0.1, 0.9, None, g=g, r=thin.bfloat16(), beta=0.1)
    assert {name for name, _ in compiled} == {"project_kernel", "adam_kernel", "update_kernel"}
    for name, kernel in compiled:
        assert kernel.metadata.shared <= gpu.SHARED_LIMIT[arch], name
        assert measure_cubin(kernel)["local"] == 0, f"{name} spills"
