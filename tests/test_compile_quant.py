"""The `quant` launchers' own calls, compiled: what they hand to Triton compiles for each GPU, within its limits."""

from __future__ import annotations

import pytest
from triton_compile import calls_compiled_for, measure_cubin, usable

pytestmark = [pytest.mark.compile, pytest.mark.skipif(not usable(), reason="needs Triton, and TRITON_INTERPRET unset")]


@pytest.mark.parametrize(
    "arch, m, n, k",
    [("sm_90", 512, 256, 512), ("sm_90", 37, 33, 96), ("sm_90", 1, 1, 32), ("sm_80", 512, 256, 512)]
    + [("sm_100", 512, 256, 512)],
)
def test_what_the_launchers_call_compiles(arch, m, n, k):
    import torch
    from quant_cases import SPECS, packed

    from lowmem.triton_kernels import device as gpu
    from lowmem.triton_kernels import quant, quant_lattice

    names = ("nf4-g16-nested", "int3-g32-zero", "int8-row") if arch == "sm_90" and k == 512 else ("int3-g32-nested",)
    with calls_compiled_for(arch) as compiled:
        for name in names:
            q = packed(SPECS[name], n, k)
            for dtype in (torch.bfloat16, torch.float32):
                quant.dequantize_(torch.zeros(n, k, dtype=dtype), *q.tensors(), q.spec.code, k, 0, 0)
            quant.dequantize_(torch.zeros(k, n)[:, :1].T, *q.tensors(), q.spec.code, k, 0, 0)
            x, dy = torch.zeros(m, k, dtype=torch.bfloat16), torch.zeros(m, n, dtype=torch.bfloat16)
            quant.scale_grad(dy, x, *q.tensors(), q.spec.code, n, k, 0)
        phi, a, b = torch.zeros(n, k, dtype=torch.int8), torch.zeros(5, k), torch.zeros(n, 5)
        quant_lattice.lattice_codes(phi, a, b, 2.0, 4, 0, n)
        quant_lattice.lattice_matmul(x, phi, a, b, torch.ones(n, 1), 2.0, 4, None, False)
    lattice = ["lattice_kernel"] * 2
    assert [name for name, _ in compiled] == [*["dequantize_kernel"] * 3, "scale_grad_kernel"] * len(names) + lattice
    for name, kernel in compiled:
        assert kernel.metadata.shared <= gpu.SHARED_LIMIT[arch], name
        assert measure_cubin(kernel)["local"] == 0, f"{name} spills"
        assert not kernel.metadata.enable_fp_fusion or name != "dequantize_kernel", "products and sums are rounded"
