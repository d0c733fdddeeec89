"""Family ``template``. Copy to tests/test_<family>.py: the same tests on every device."""

import pytest
import torch

from lowmem.ops.template import scale_reference, template_scale
from lowmem.testing import (
    COLUMNS,
    DTYPES,
    LAYOUTS,
    ROWS,
    assert_close_to_reference,
    huge_view,
    reference_pair,
    terms_of,
)

ALPHA = 0.7
# what a kernel forgets to write shows as NaN
pytestmark = pytest.mark.usefixtures("poisoned")


def check(kernel, x):
    exact, lowprec = reference_pair(scale_reference, x, ALPHA)
    assert_close_to_reference(kernel(x, ALPHA), exact, lowprec, terms=terms_of(scale_reference, x, ALPHA))


# `device` is the CPU always and a CUDA device where there is one: the same tests serve both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_every_shape(device, dtype, rows):
    for cols in COLUMNS:
        check(torch.ops.lowmem.template_scale, torch.randn(rows, cols, device=device).to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(device, layout):
    check(torch.ops.lowmem.template_scale, LAYOUTS[layout](torch.randn(33, 100, device=device)))


def test_offsets_beyond_32_bits(device):
    x = huge_view(3, 40, torch.bfloat16, device)
    x[2] = torch.arange(40)
    check(torch.ops.lowmem.template_scale, x)


def test_registration(device):
    # schema, fake and kernels agree, also under dynamic shapes
    torch.library.opcheck(torch.ops.lowmem.template_scale.default, (torch.randn(5, 7, device=device), ALPHA))


def test_gradient(device):
    x = torch.randn(2, 3, 5, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(template_scale, (x, ALPHA))
    with pytest.raises(RuntimeError, match="no derivative of its own"):
        torch.ops.lowmem.template_scale(x[0], ALPHA)


def test_compile(device):
    x = torch.randn(4, 8, device=device, requires_grad=True)
    y = torch.compile(template_scale, fullgraph=True, backend="aot_eager")(x, ALPHA)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, template_scale(x, ALPHA)) and torch.equal(grad, torch.full_like(x, ALPHA))


def test_bad_input():
    with pytest.raises(TypeError, match=r"lowmem\.template_scale: x: expected a floating dtype, got torch\.int64"):
        template_scale(torch.arange(3), ALPHA)
    with pytest.raises(ValueError, match=r"lowmem\.template_scale: x: expected at least one dimension"):
        template_scale(torch.tensor(1.0), ALPHA)


# its own process: TRITON_INTERPRET=1 pytest -m interpret. Small sizes: a program takes some milliseconds. The
# interpreter's bf16 is not exact, so fp32 and fp16 here; bf16 is for the GPU.
@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_triton_in_the_interpreter(dtype, layout):
    from lowmem.triton_kernels import template as kernels

    for rows, cols in [(0, 5), (1, 1), (7, 33), (33, 100)]:
        check(kernels.scale, LAYOUTS[layout](torch.randn(rows or 1, cols))[:rows].to(dtype))


# no GPU: the Triton kernel becomes a binary for each target; tests/test_compile_targets.py adds the budgets
@pytest.mark.compile
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_triton_compiles(arch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lowmem.triton_kernels import template as kernels

    signature = {"x_ptr": "*bf16", "y_ptr": "*bf16", "alpha": "fp32", "rows": "i64", "cols": "i64"}
    signature |= {"row_stride": "i64", "col_stride": "i64", "BLOCK": "constexpr"}
    source = ASTSource(kernels.scale_kernel, signature, constexprs={"BLOCK": 1024})
    assert triton.compile(source, target=GPUTarget("cuda", arch, 32)).asm["cubin"]
