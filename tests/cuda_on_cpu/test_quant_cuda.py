"""The CUDA kernels of the quant family, executed: dequantization bit for bit, products by the error rule, the same bits
in every order of threads and blocks (each call of the rig runs four times)."""

import pytest
import torch
from quant_cases import SPECS, fits, packed

from lowmem.ops import quant as ops
from lowmem.quant import QuantSpec, dequantize
from lowmem.testing import LAYOUTS, assert_close_to_reference, reference_pair

pytestmark = pytest.mark.emulate

every_spec = pytest.mark.parametrize("name", SPECS)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TIGHT = ("nf4", "fp4-g16-nested", "nf3", "nf2", "int8-row", "int4-g32", "int3-row", "int2-row")
KERNELS = ("quant_gemv", "quant_mma")


def block(rig, q, out, row0=0, col0=0, **kwargs):
    """The kernel's ``out``, asserted equal to the reference's, bit for bit."""
    want = out.clone()
    ops.dequantize_reference(want, *q.tensors(), q.spec.code, q.cols, row0, col0)
    got = rig.quant_dequantize(out, q.tensors(), q.spec.code, q.cols, row0, col0, **kwargs)
    assert torch.equal(got, want), f"{q.spec} {q.shape} {out.dtype} {tuple(out.shape)} from ({row0}, {col0})"
    return got


# ------------------------------------------------------------------------------------------------------- dequantize


@every_spec
def test_dequantize(rig, name):
    spec = SPECS[name]
    for n, k, dtype in ((5, 64, torch.bfloat16), (3, 37, torch.float32), (9, 96, torch.float16), (3, 4160, FLOATS[1])):
        if fits(spec, k):
            q = packed(spec, n, k, float_zero=n == 9)
            block(rig, q, torch.full((n, k), torch.nan, dtype=dtype))
            block(rig, q, torch.full((2, k), torch.nan, dtype=dtype), row0=n - 2)
            block(rig, q, torch.full((1, k - 5), torch.nan, dtype=dtype), row0=1, col0=3)
            block(rig, q, torch.full((2, 16), torch.nan, dtype=dtype), row0=1, col0=16)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
@pytest.mark.parametrize("name", ["nf4-g16-nested", "nf3", "int3-g32-zero", "int8-row"])
def test_dequantize_layouts(rig, name, layout):
    q = packed(SPECS[name], 6, 96)
    for dtype in (torch.float32, torch.bfloat16):
        block(rig, q, LAYOUTS[layout](torch.zeros(4, 96, dtype=dtype)), row0=1)


@pytest.mark.parametrize("name", ["nf4", "nf3-g16-nested", "nf2", "int8-g32-zero", "int4-row", "int3-g32", "int2-row"])
def test_dequantize_several_tiles(rig, name):
    # a row of more than one block's 8192 elements, and the whole matrix as one row where rows lie end to end
    q = packed(SPECS[name], 3, 10272)
    block(rig, q, torch.full((3, 10272), torch.nan, dtype=torch.bfloat16))
    block(rig, q, torch.full((2, 9000), torch.nan, dtype=torch.bfloat16), row0=1, col0=64)


@pytest.mark.parametrize("place", ["start", "end"])
@pytest.mark.parametrize(
    "name", ["nf4", "fp4-g16-nested", "nf3", "nf2", "int8-row", "int4-g32", "int3-row", "int2-row"]
)
def test_dequantize_stays_inside_its_arguments(rig, name, place):
    # flush against a page that cannot be touched, at either end, on 16 bytes (the last shape) and not
    for n, k in ((1, 32), (2, 64), (3, 544), (32, 128)):
        block(rig, packed(SPECS[name], n, k), torch.zeros(n, k, dtype=torch.bfloat16), place=place)
    if not SPECS[name].is_table and SPECS[name].group_size > 0:
        return
    for n, k in ((1, 1), (3, 5), (5, 77), (7, 100)):
        block(rig, packed(SPECS[name], n, k), torch.zeros(n, k), place=place)


@pytest.mark.parametrize("name", ["nf4-g16-nested", "int3-g32-zero"])
def test_dequantize_offsets_beyond_32_bits(rig, name):
    q = packed(SPECS[name], 4, 96)
    for dtype in (torch.float32, torch.bfloat16):
        block(rig, q, torch.zeros(4, 96, dtype=dtype), strides=(2**29 + 8, 1))


@pytest.mark.parametrize("shape", [(0, 64), (4, 0)])
def test_dequantize_empty(rig, shape):
    block(rig, packed(SPECS["nf4"], 8, 64), torch.zeros(shape))


def test_dequantize_zero_groups_and_infinite_scales_stay_apart(rig):
    q = packed(SPECS["nf4"], 4, 128)
    q.scale.view(-1)[1] = 0.0
    q.scale.view(-1)[4] = torch.inf
    got = rig.quant_dequantize(torch.zeros(4, 128), q.tensors(), q.spec.code, 128, 0, 0)
    assert torch.equal(got[0, 64:], torch.zeros(64)) and got[[0, 1, 3]].isfinite().all()
    assert not got[2, :64].isfinite().all() and got[2, 64:].isfinite().all()


# --------------------------------------------------------------------------------------------------------- products


def product(rig, kernel, q, x, bias=None, row0=0, n=None, **kwargs):
    """``x W^T + bias`` by ``kernel``, held to the error rule."""
    n, k = n or q.shape[-2], q.shape[-1]
    args = (x, *q.tensors(), q.spec.code, n, k, row0, bias, False)
    exact, lowprec = reference_pair(ops.matmul_reference, *args)
    w = dequantize(q, torch.float64).view(-1, k)[row0 : row0 + n * (x.shape[0] if x.dim() == 3 else 1)].abs()
    terms = x.double().abs() @ (w.view(-1, n, k) if x.dim() == 3 else w).mT
    terms = terms if bias is None else terms + bias.double().abs()
    got = rig.quant_small(kernel, x, q.tensors(), q.spec.code, n, row0, bias, **kwargs)
    what = f"{kernel} {q.spec} {tuple(x.shape)}"
    # the weight rounded to x's dtype, by one kernel or by torch, is a rounding of each term
    assert_close_to_reference(got, exact, lowprec, terms=terms, what=what)
    return got


def values(*shape, dtype=torch.bfloat16, draw=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(draw + 7)).to(dtype)


@pytest.mark.parametrize("kernel", KERNELS)
@every_spec
def test_products(rig, kernel, name):
    spec = SPECS[name]
    for n, k, m, dtype in ((33, 64, 3, torch.bfloat16), (21, 160, 1, torch.float16), (17, 1056, 8, torch.bfloat16)):
        if fits(spec, k):
            q = packed(spec, n, k, float_zero=k == 160)
            product(rig, kernel, q, values(m, k, dtype=dtype), values(n, dtype=dtype) if m != 8 else None)


@pytest.mark.parametrize("m", [1, 2, 5, 8])
@pytest.mark.parametrize("name", ["nf4", "nf3-g16-nested", "int8-g32-zero", "int3-row"])
def test_gemv_in_fp32_and_odd_depths(rig, name, m):
    for n, k in ((9, 96), (1, 2080), (10, 1000)):
        if fits(SPECS[name], k):
            for dtype in (torch.float32, torch.bfloat16):
                q = packed(SPECS[name], n, k)
                product(rig, "quant_gemv", q, values(m, k, dtype=dtype), values(n, dtype=dtype))


@pytest.mark.parametrize("name", ["nf4", "nf3-g16-nested", "int8-g32-zero", "int2-row"])
def test_gemv_deeper_than_its_ring(rig, name):
    # seven chunks through three stages: each stage is filled again while others may still read it
    for n, m in ((9, 1), (10, 4)):
        product(rig, "quant_gemv", packed(SPECS[name], n, 6240), values(m, 6240))


@pytest.mark.parametrize("m", [1, 7, 9, 16, 33, 64])
@pytest.mark.parametrize("name", ["nf4-g16-nested", "nf3", "nf2", "int8-row", "int4-g32-zero", "int2-g32"])
def test_mma_rows(rig, name, m):
    product(rig, "quant_mma", packed(SPECS[name], 70, 192), values(m, 192), values(70))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_split_over_depth(rig, dtype):
    q = packed(QuantSpec("nf4", 64, double_quant=True), 65, 2144)
    rig.module.configure(0, 2)
    assert rig.module.quant_mma_plan(1, 5, 65, 2144)[0] > 1
    product(rig, "quant_mma", q, values(5, 2144, dtype=dtype), values(65, dtype=dtype))
    product(rig, "quant_mma", q, values(5, 2144, dtype=dtype), values(65, dtype=dtype), multiprocessors=0)
    assert rig.module.quant_mma_plan(1, 5, 65, 2144) == (1, 17, 0)  # as the last call had it


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["nf4", "nf3-g16-nested", "int3-g32-zero", "int4-row"])
def test_experts_and_row_ranges(rig, kernel, name):
    q = packed(SPECS[name], 3, 20, 96)
    got = product(rig, kernel, q, values(3, 4, 96))
    one = product(rig, kernel, q, values(3, 4, 96)[1].contiguous(), row0=20)
    assert torch.equal(got[1], one)
    product(rig, kernel, q, values(2, 96), row0=13, n=31)


@pytest.mark.parametrize("place", ["start", "end"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_products_stay_inside_their_arguments(rig, kernel, place):
    # weights whose bytes are a multiple of 16, so that the last lies against the page that cannot be touched
    for name, n, k in (("nf4", 16, 96), ("nf3", 4, 128), ("int8-row", 3, 96), ("int3-g32", 4, 128), ("nf2", 2, 128)):
        product(rig, kernel, packed(SPECS[name], n, k), values(8, k), values(n), place=place)


def test_gemv_layouts(rig):
    q = packed(SPECS["nf4"], 9, 128)
    plain = values(4, 128)
    want = product(rig, "quant_gemv", q, plain)
    for strides in ((136, 1), (130, 1), (1, 4), (2**30, 1)):
        assert torch.equal(product(rig, "quant_gemv", q, plain, strides=strides), want)


def test_what_is_not_served_is_refused(rig):
    q, x = packed(SPECS["nf4"], 4, 60), values(2, 60)
    for kernel in KERNELS:
        with pytest.raises(ValueError, match="does not serve"):
            rig.quant_small(kernel, x, q.tensors(), q.spec.code, 4, 0, None)
    q = packed(SPECS["nf4"], 4, 64)
    for kernel, m in (("quant_gemv", 9), ("quant_mma", 65)):
        with pytest.raises(ValueError, match="does not serve"):
            rig.quant_small(kernel, values(m, 64), q.tensors(), q.spec.code, 4, 0, None)


def test_not_finite_stays_in_its_row(rig):
    q = packed(SPECS["nf4"], 20, 128)
    x = values(4, 128)
    x[2, 5] = torch.inf
    for kernel in KERNELS:
        got = rig.quant_small(kernel, x, q.tensors(), q.spec.code, 20, 0, None)
        assert got[[0, 1, 3]].isfinite().all() and not got[2].isfinite().any()
    q.scale.view(-1)[4] = torch.nan  # row 2, first half
    for kernel in KERNELS:
        got = rig.quant_small(kernel, values(4, 128), q.tensors(), q.spec.code, 20, 0, None)
        assert got[:, 2].isnan().all() and got[:, torch.arange(20) != 2].isfinite().all()
