"""The Triton kernels of the quant family against the plain-torch references, in the interpreter or on a GPU (as
test_interpret_lora.py): dequantization bit for bit, gradients of scales by the error rule."""

from __future__ import annotations

import pytest
import torch
from interpreted import DTYPES, everywhere
from quant_cases import SPECS, fits, packed

from lowmem.ops import quant as ops
from lowmem.quant import QuantSpec
from lowmem.testing import LAYOUTS, assert_close_to_reference, huge_view, reference_pair

pytestmark = pytest.mark.usefixtures("poisoned", "kernels")

every_spec = pytest.mark.parametrize("name", SPECS)


def launch():
    from lowmem.triton_kernels import quant

    return quant


def check_block(q, out, row0=0, col0=0):
    want = out.clone()
    args = (*q.tensors(), q.spec.code, q.cols, row0, col0)
    ops.dequantize_reference(want, *args)
    launch().dequantize_triton_(out, *args)
    assert torch.equal(out, want), f"{q.spec} {q.shape} {out.dtype} {tuple(out.shape)} from ({row0}, {col0})"


@everywhere
@every_spec
def test_dequantize(where, name):
    spec = SPECS[name]
    for n, k, dtype in ((5, 64, torch.float32), (3, 37, torch.float16), (9, 160, torch.float16)):
        if fits(spec, k):
            q = packed(spec, n, k, device=where, float_zero=n == 9)
            for rows, cols, row0, col0 in ((n, k, 0, 0), (2, k, n - 2, 0), (1, k - 5, 1, 3), (2, 16, 1, 16)):
                check_block(q, torch.full((rows, cols), torch.nan, dtype=dtype, device=where), row0, col0)


@everywhere
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
def test_dequantize_layouts(where, layout):
    for name in ("nf4-g16-nested", "int3-g32-zero"):
        q = packed(SPECS[name], 6, 96, device=where)
        check_block(q, LAYOUTS[layout](torch.zeros(4, 96, device=where)), row0=1)


@everywhere
def test_dequantize_empty_and_far(where):
    q = packed(SPECS["nf4"], 8, 64, device=where)
    for shape in ((0, 64), (4, 0)):
        check_block(q, torch.zeros(shape, device=where))
    far = huge_view(3, 64, torch.float16, where)
    check_block(q, far, row0=2)


def check_scale_grad(q, m, dtype, draw=0, dy=None, x=None):
    g = torch.Generator().manual_seed(draw + 3)
    n, k = q.shape[-2:]
    lead = (q.shape[0], m) if q.dim() == 3 else (m,)
    x = torch.randn(*lead, k, generator=g).to(q.device, dtype) if x is None else x
    dy = torch.randn(*lead, n, generator=g).to(q.device, dtype) if dy is None else dy
    args = (dy, x, *q.tensors(), q.spec.code, n, k, 0)
    exact, lowprec = reference_pair(ops.scale_grad_reference, *args)
    got = launch().scale_grad(*args)
    wide = q.to(q.device)
    w = torch.empty(q.rows, k, dtype=torch.float64, device=q.device)
    ops.dequantize_reference(w, *wide.tensors(), q.spec.code, k, 0, 0)
    # bounds of every partial sum: |dW| times the largest unit of its group, and times the scale
    dw = (dy.double().abs().mT @ x.double().abs()).view(*exact[0].shape, -1).sum(-1)
    unit = 1.0 if q.spec.is_table else 2.0**q.spec.bits
    assert_close_to_reference(got[0], exact[0], lowprec[0], terms=dw * unit, what=f"ds {q.spec}")
    assert got[1].shape == lowprec[1].shape
    if q.zero is not None:
        index = torch.arange(exact[1].numel(), device=q.device).view(exact[1].shape)
        s = ops.scales_reference(*(t for i, t in enumerate(q.tensors()) if i not in (0, 2)), q.spec, index).double()
        assert_close_to_reference(got[1], exact[1], lowprec[1], terms=dw * s.abs(), what=f"dz {q.spec}")


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@every_spec
def test_scale_grad(where, name, dtype):
    # 20 rows of W and 192 columns: several tiles both ways, neither whole
    check_scale_grad(packed(SPECS[name], 20, 192, device=where, float_zero=True), 19, dtype)


@everywhere
@pytest.mark.parametrize("name", ["int4-row", "int3-row", "int8-row"])
def test_scale_grad_of_whole_rows(where, name):
    for n, k, m in ((1, 1, 1), (3, 37, 5), (17, 200, 40)):
        check_scale_grad(packed(SPECS[name], n, k, device=where), m, torch.float32)


@everywhere
def test_scale_grad_of_wide_groups_experts_and_parts(where):
    check_scale_grad(packed(QuantSpec("int4", 256, zero_point=True), 5, 512, device=where), 9, torch.float32)
    check_scale_grad(packed(QuantSpec("nf4", 512), 5, 1024, device=where), 9, torch.float32)
    check_scale_grad(packed(SPECS["int4-g32-zero"], 3, 6, 64, device=where), 9, torch.float32)
    check_scale_grad(packed(SPECS["int4-g32-zero"], 6, 64, device=where), 1000, torch.float32)  # rows of x in parts
    check_scale_grad(packed(SPECS["int8-row"], 6, 72, device=where), 1000, torch.float32)


@everywhere
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scale_grad_layouts(where, layout):
    q = packed(SPECS["int4-g32-zero"], 20, 96, device=where)
    g = torch.Generator().manual_seed(2)
    x, dy = (LAYOUTS[layout](torch.randn(18, c, generator=g).to(where)) for c in (96, 20))
    check_scale_grad(q, 18, torch.float32, x=x, dy=dy)


@everywhere
def test_scale_grad_repeats_and_of_nothing(where):
    q = packed(SPECS["int4-g32-zero"], 6, 64, device=where)
    g = torch.Generator().manual_seed(2)
    x, dy = torch.randn(900, 64, generator=g).to(where), torch.randn(900, 6, generator=g).to(where)
    first, again = (launch().scale_grad(dy, x, *q.tensors(), q.spec.code, 6, 64, 0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    none = launch().scale_grad(dy[:0], x[:0], *q.tensors(), q.spec.code, 6, 64, 0)
    assert all(torch.equal(t, torch.zeros_like(t)) for t in none)


# ------------------------------------------------------------------------------------------------------------- LR-QAT


def lattice_problem(where, n, k, r, bits, groups, phi_dtype, dtype):
    g = torch.Generator().manual_seed(bits)
    half = 2 ** (bits - 1)
    phi = (torch.rand(n, k, generator=g) * 2 - 1) * half * 1.2
    phi = (phi * 2.0 ** (8 - bits)).round().clamp(-128, 127) if phi_dtype is torch.int8 else phi
    a, b = torch.randn(r, k, generator=g) * k**-0.5, torch.randn(n, r, generator=g) * 3
    scale = torch.rand(n, groups, generator=g) + 0.5
    return [phi.to(phi_dtype).to(where), *(t.to(where, dtype) for t in (a, b, scale))]


LATTICES = [
    (20, 96, 4, 4, 3, torch.int8, torch.float32),
    (17, 130, 33, 3, 1, torch.int8, torch.float32),
    (1, 1, 1, 2, 1, torch.float32, torch.float32),
    (40, 72, 16, 8, 9, torch.float16, torch.float16),
]


@everywhere
@pytest.mark.parametrize("case", LATTICES)
def test_lattice_codes(where, case):
    from lowmem.ops import quant_lattice as lattice
    from lowmem.triton_kernels import quant_lattice as lattice_kernels

    n, k, r, bits, *_ = case
    phi, a, b, _ = lattice_problem(where, *case)
    exact = phi.double() * (1.0 if phi.is_floating_point() else 2.0 ** (bits - 8)) + 0.7 * (b.double() @ a.double())
    terms = exact.abs() + 0.7 * (b.double().abs() @ a.double().abs())
    near_half = ((exact - exact.floor() - 0.5).abs() <= 4 * torch.finfo(torch.float32).eps * terms).cpu()
    whole = lattice_kernels.lattice_codes(phi, a, b, 0.7, bits, 0, n)
    want = lattice.codes_reference(phi, a, b, 0.7, bits, 0, n)
    assert whole.dtype is torch.int16 and torch.equal(whole.cpu()[~near_half], want.cpu()[~near_half])
    assert near_half.sum() <= 2 + n * k // 50 and (n < 17 or not torch.equal(whole.abs().max(), whole.abs().min()))
    part = lattice_kernels.lattice_codes(phi, a, b, 0.7, bits, n // 3, n - n // 3)
    assert torch.equal(part, whole[n // 3 :]), "the codes of a row depend on the rows asked for"


@everywhere
@pytest.mark.parametrize("case", LATTICES)
def test_lattice_matmul_multiplies_with_its_own_codes(where, case):
    from lowmem.triton_kernels import quant_lattice as lattice_kernels

    n, k, _, bits, groups, _, dtype = case
    phi, a, b, scale = lattice_problem(where, *case)
    half = 2 ** (bits - 1)
    codes = lattice_kernels.lattice_codes(phi, a, b, 0.7, bits, 0, n).clamp(-half, half - 1)
    w = (codes.view(n, groups, -1).float() * scale.float()[..., None]).view(n, k).to(dtype)
    g = torch.Generator().manual_seed(1)
    for transposed in (False, True):
        x = torch.randn(5, n if transposed else k, generator=g).to(where, dtype)
        bias = None if transposed else torch.randn(n, generator=g).to(where, dtype)
        got = lattice_kernels.lattice_matmul(x, phi, a, b, scale, 0.7, bits, bias, transposed)
        want = x @ w if transposed else (x @ w.T).add_(bias)
        assert torch.equal(got, want)


@everywhere
def test_lattice_rounds_half_to_even(where):
    from lowmem.triton_kernels import quant_lattice as lattice_kernels

    phi = torch.tensor([[-9.5, -8.5, -7.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 6.5, 7.5, 8.5, 1e30, -1e30]], device=where)
    a, b = torch.zeros(1, 14, device=where), torch.zeros(1, 1, device=where)
    got = lattice_kernels.lattice_codes(phi, a, b, 1.0, 4, 0, 1)
    assert got.tolist() == [[-9, -8, -8, -2, -2, 0, 0, 2, 2, 6, 8, 8, 8, -9]]
