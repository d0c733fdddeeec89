"""The operators of the quant family on every device, format, dtype and shape, against their references in float64."""

import mmap
import sys
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quant_cases import SPECS, fits, packed, weight

from lowmem import memory
from lowmem._dispatch import CPU
from lowmem.memory import Workspace
from lowmem.ops import qmatmul, qscale_grad
from lowmem.ops import quant as ops
from lowmem.quant import QTensor, QuantSpec, dequantize, quantize
from lowmem.testing import (
    LAYOUTS,
    assert_close_to_reference,
    poison_empties,
    reference_pair,
    saved_bytes,
)

pytestmark = pytest.mark.usefixtures("poisoned")

every_spec = pytest.mark.parametrize("name", SPECS)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPS = torch.ops.lowmem
FP32 = torch.float32


def dequantized(reference, out, *args):
    result = out.clone()
    reference(result, *args)
    return result


@every_spec
def test_dequantize_rows_and_columns(name, device):
    spec = SPECS[name]
    for n, k in ((5, 64), (3, 37), (9, 96), (40, 256)):
        if not fits(spec, k):
            continue
        for float_zero in (False, True):
            q = packed(spec, n, k, device=device, float_zero=float_zero)
            whole = torch.empty(n, k, dtype=torch.float32, device=device)
            ops.dequantize_reference(whole, *q.tensors(), spec.code, k, 0, 0)
            for dtype in DTYPES:
                for row0, rows, col0, cols in ((0, n, 0, k), (1, 2, 0, k), (n - 1, 1, 3, k - 5), (2, 0, 0, k)):
                    for layout in ("contiguous", "transposed", "strided", "unaligned"):
                        out = LAYOUTS[layout](torch.zeros(rows, cols, dtype=dtype, device=device))
                        OPS.quant_dequantize_(out, *q.tensors(), spec.code, k, row0, col0)
                        want = whole[row0 : row0 + rows, col0 : col0 + cols]
                        assert torch.equal(out, want.to(dtype)), (n, k, dtype, row0, col0, layout)


def test_dequantize_writes_inside(device):
    q = packed(SPECS["nf4"], 8, 64, device=device)
    around = torch.full((10, 70), 7.0, device=device)
    OPS.quant_dequantize_(around[1:9, 3:67], *q.tensors(), q.spec.code, 64, 0, 0)
    inside = around[1:9, 3:67].clone()
    around[1:9, 3:67] = 7.0
    assert (around == 7.0).all() and torch.equal(inside, dequantize(q))


MATMULS = ("quant_matmul", "quant_matmul_small")


def check_matmul(op, q, x, bias, transposed, row0=0, n=None):
    n, k = n or q.shape[-2], q.shape[-1]
    args = (x, *q.tensors(), q.spec.code, n, k, row0, bias, transposed)
    exact, lowprec = reference_pair(ops.matmul_reference, *args)
    w = dequantize(q, torch.float64).view(-1, k)[row0 : row0 + n * (x.shape[0] if x.dim() == 3 else 1)].abs()
    w = w.view(-1, n, k) if x.dim() == 3 else w
    terms = x.double().abs() @ (w if transposed else w.mT)
    terms = terms if bias is None else terms + bias.double().abs()
    with poison_empties():
        got = getattr(OPS, op)(*args)
    assert_close_to_reference(got, exact, lowprec, terms=terms, what=f"{op} {q.spec} {tuple(x.shape)} {transposed}")


def inputs(q, m, dtype, transposed, device, draw=0):
    g = torch.Generator().manual_seed(draw + 7)
    n, k = q.shape[-2:]
    x = torch.randn(m, n if transposed else k, generator=g).to(device=device, dtype=dtype)
    bias = torch.randn(k if transposed else n, generator=g).to(device=device, dtype=dtype)
    return x, bias


@pytest.mark.parametrize("op", MATMULS)
@every_spec
def test_matmul(name, op, device):
    spec = SPECS[name]
    for n, k in ((33, 64), (7, 37), (40, 160)):
        if not fits(spec, k):
            continue
        q = packed(spec, n, k, device=device, float_zero=k == 160)
        for dtype in DTYPES if op == "quant_matmul" else DTYPES[1:]:  # the one for few rows leaves float64 to it
            for m in (1, 2, 5, 0, 35) if k == 64 else (1, 3):
                for transposed in (False, True):
                    x, bias = inputs(q, m, dtype, transposed, device)
                    check_matmul(op, q, x, None if transposed else bias, transposed)


@pytest.mark.parametrize("op", MATMULS)
def test_matmul_of_panels(op, device):
    # more rows and columns than one panel, and neither a multiple of it
    q = packed(QuantSpec("nf4", 64, double_quant=True), 1030, 640, device=device)
    for m in (1, 2, 3, 16, 37):
        for transposed in (False, True):
            x, bias = inputs(q, m, torch.bfloat16, transposed, device)
            check_matmul(op, q, x, None if transposed else bias, transposed)


BF16 = ["nf4", "nf4-g16-nested", "fp4", "nf3", "nf2", "int4-row", "int3-row", "int2-row", "int4-g64-zero", "nf4-nested"]


@pytest.mark.parametrize("name", BF16)
def test_matmul_of_bf16_and_many_groups(name, device):
    # what the level with BF16 products takes: K in 64s, groups of 64 or rows; more groups than a batch of scales; odd N
    own = {
        "int4-g64-zero": QuantSpec("int4", 64, zero_point=True),
        "nf4-nested": QuantSpec("nf4", 64, double_quant=True),
    }
    spec = own.get(name) or SPECS[name]
    for n, k in ((11, 64), (9, 2112), (6, 17024)):
        q = packed(spec, n, k, device=device, float_zero=k == 2112)
        for m in (1, 2, 3, 8, 13, 32):
            for transposed in (False, True):
                x, bias = inputs(q, m, torch.bfloat16, transposed, device)
                check_matmul("quant_matmul_small", q, x, None if transposed else bias, transposed)
    g4096 = packed(QuantSpec("nf4", 4096), 7, 1088, device=device)  # groups that end within rows
    for transposed in (False, True):
        x, bias = inputs(g4096, 5, torch.bfloat16, transposed, device)
        check_matmul("quant_matmul_small", g4096, x, None if transposed else bias, transposed)


@pytest.mark.skipif(sys.platform != "linux", reason="reserved address space")
def test_offsets_beyond_32_bits():
    # the last rows of a weight of more than 2**32 elements: address space whose other pages are never touched
    n, k = 2**20 + 3, 4096
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    flat = torch.frombuffer(mmap.mmap(-1, n * k // 2, flags=flags), dtype=torch.uint8)
    spec = QuantSpec("nf4", 4096, scale_dtype=torch.bfloat16)
    scale = torch.zeros(n, dtype=torch.bfloat16)
    scale[-3:] = 0.5
    flat[-3 * k // 2 :] = torch.randint(0, 256, (3 * k // 2,), dtype=torch.uint8)
    q = QTensor(flat, scale, spec, (n, k), torch.float32).check("test")
    small = QTensor(flat[-3 * k // 2 :].clone(), scale[-3:].clone(), spec, (3, k), torch.float32)
    out = torch.empty(3, k)
    OPS.quant_dequantize_(out, *q.tensors(), spec.code, k, n - 3, 0)
    assert torch.equal(out, dequantize(small))
    for dtype in (torch.float32, torch.bfloat16):
        for transposed in (False, True):
            x, _ = inputs(small, 2, dtype, transposed, "cpu")
            got = OPS.quant_matmul_small(x, *q.tensors(), spec.code, 3, k, n - 3, None, transposed)
            want = OPS.quant_matmul_small(x, *small.tensors(), spec.code, 3, k, 0, None, transposed)
            assert torch.equal(got, want)


@pytest.mark.parametrize("op", MATMULS)
def test_matmul_of_every_layout(op, device):
    q = packed(SPECS["nf4"], 33, 128, device=device)
    for layout in LAYOUTS:
        for dtype in (torch.float32, torch.bfloat16):
            for transposed in (False, True):
                x, bias = inputs(q, 5, dtype, transposed, device)
                check_matmul(op, q, LAYOUTS[layout](x), None if transposed else bias, transposed)


@pytest.mark.parametrize("op", MATMULS)
@pytest.mark.parametrize("name", ["nf4", "nf3-g16-nested", "int3-g32-zero", "int4-row"])
def test_matmul_of_experts(name, op, device):
    spec = SPECS[name]
    q = packed(spec, 3, 10, 96, device=device)
    w = dequantize(q, torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        for transposed in (False, True):
            g = torch.Generator().manual_seed(3)
            x = torch.randn(3, 4, 10 if transposed else 96, generator=g).to(device=device, dtype=dtype)
            check_matmul(op, q, x, None, transposed)
            check_matmul(op, q, x[1], None, transposed, row0=10)
    x = torch.randn(3, 2, 5, 96, device=device, dtype=torch.float64)
    torch.testing.assert_close(qmatmul(x, q), torch.einsum("eabk,enk->eabn", x, w))
    torch.testing.assert_close(qmatmul(x[0], q, expert=2), x[0] @ w[2].T)


@every_spec
def test_scale_grad(name, device):
    spec = SPECS[name]
    q = packed(spec, 9, 128, device=device)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        g = torch.Generator().manual_seed(5)
        x = torch.randn(13, 128, generator=g).to(device=device, dtype=dtype)
        dy = torch.randn(13, 9, generator=g).to(device=device, dtype=dtype)
        args = (dy, x, *q.tensors(), spec.code, 9, 128, 0)
        exact, lowprec = reference_pair(ops.scale_grad_reference, *args)
        got = OPS.quant_scale_grad(*args)
        values = (2**spec.bits) * (dy.double().abs().T @ x.double().abs()).view(9, -1, 128 // exact[0].shape[1]).sum(-1)
        assert_close_to_reference(got[0], exact[0], lowprec[0], terms=values)
        assert_close_to_reference(got[1], exact[1], lowprec[1], terms=values)


@pytest.mark.parametrize("name", ["int4-g32-zero", "int3-row", "int2-g32-zero", "int8-g32", "nf4"])
def test_scale_grad_is_autograd_of_the_dense_formula(name, device):
    spec = replace(SPECS[name], scale_dtype=torch.float32)
    q = quantize(weight(6, 64), spec).to(device)
    x = torch.randn(5, 64, dtype=torch.float64, device=device)
    dy = torch.randn(5, 6, dtype=torch.float64, device=device)
    codes = ops.codes_reference(q.packed, spec, 64, 0, 6)
    s = q.scale.double().requires_grad_()
    z = (q.zero.double() if q.zero is not None else torch.full_like(s, 2 ** (spec.bits - 1))).requires_grad_()
    values = codes.double() if not spec.is_table else ops.code_table(spec.format).double()[codes.long()].to(device)
    grouped = values.view(6, s.shape[-1], -1)
    w = (grouped if spec.is_table else grouped - z[..., None]) * s[..., None]
    (x @ w.view(6, 64).T).backward(dy)
    ds, dz = qscale_grad(dy, x, q)
    torch.testing.assert_close(ds, s.grad)
    assert (dz is None) == (q.zero is None)
    if dz is not None:
        torch.testing.assert_close(dz, z.grad)


@every_spec
def test_registration(name, device):
    spec = SPECS[name]
    q = packed(spec, 6, 64, device=device)
    x = torch.randn(3, 64, device=device)
    dy = torch.randn(3, 6, device=device)
    out = torch.zeros(2, 64, device=device)
    check = torch.library.opcheck
    check(OPS.quant_dequantize_.default, (out, *q.tensors(), spec.code, 64, 1, 0))
    for op in (OPS.quant_matmul.default, OPS.quant_matmul_small.default):
        check(op, (x, *q.tensors(), spec.code, 6, 64, 0, None, False))
        check(op, (dy, *q.tensors(), spec.code, 6, 64, 0, None, True))
    check(OPS.quant_scale_grad.default, (dy, x, *q.tensors(), spec.code, 6, 64, 0))
    check(OPS.quant_quantize.default, (weight(6, 64).to(device), spec.code, spec.zero_point, spec.scales_in))


@every_spec
def test_the_quantizer_is_the_reference(name):
    spec = SPECS[name]
    for n, k in ((5, 64), (3, 37), (9, 96), (40, 256), (1, 5), (7, 320)):
        if not fits(spec, k):
            continue
        for dtype in DTYPES:
            w = weight(n, k, dtype=dtype)
            w[0, :3], w.view(-1)[-1:] = 0, 3.0
            for layout in ("contiguous", "transposed", "strided"):
                args = (LAYOUTS[layout](w), spec.code, spec.zero_point, spec.scales_in)
                for got, want in zip(OPS.quant_quantize(*args), ops.quantize_reference(*args), strict=True):
                    assert torch.equal(got, want), (n, k, dtype, layout)


LEVELS = ("plain", "avx2", "avx512", "avx512_bf16")
IN_A_PROCESS = """
import sys
sys.path.insert(0, "tests")
import torch
from hypothesis import given
from hypothesis import strategies as st
from quant_cases import SPECS, fits, packed, weight
from lowmem.ops import quant as ops
from lowmem.testing import assert_close_to_reference, reference_pair

for name, spec in SPECS.items():
    for n, k in ((6, 37), (5, 128), (3, 1088)):
        if not fits(spec, k):
            continue
        q = packed(spec, n, k, float_zero=True)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            a, b = torch.empty(n, k, dtype=dtype), torch.empty(n, k, dtype=dtype)
            ops.dequantize_reference(a, *q.tensors(), spec.code, k, 0, 0)
            torch.ops.lowmem.quant_dequantize_(b, *q.tensors(), spec.code, k, 0, 0)
            assert torch.equal(a, b), (name, k, dtype)
            for m in (1, 2, 6):
                for transposed in (False, True):
                    x = torch.randn(m, n if transposed else k).to(dtype)
                    args = (x, *q.tensors(), spec.code, n, k, 0, None, transposed)
                    exact, low = reference_pair(ops.matmul_reference, *args)
                    got = torch.ops.lowmem.quant_matmul_small(*args)
                    assert_close_to_reference(got, exact, low, terms=exact.abs() + exact.abs().mean() * 30, what=name)
        w = weight(n, k)
        args = (w, spec.code, spec.zero_point, spec.scales_in)
        for got, want in zip(torch.ops.lowmem.quant_quantize(*args), ops.quantize_reference(*args)):
            assert torch.equal(got, want), (name, k)
print("same")
"""


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set(level, runs_under):
    # each level in a process of its own; what this processor lacks is an error that names the flag, and no result
    try:
        assert "same" in runs_under("cpu", IN_A_PROCESS, LOWMEM_CPU_ISA=level)
    except AssertionError as error:
        if "LOWMEM_CPU_ISA" not in str(error) and "lowmem/_C is not built" not in str(error):
            raise
        pytest.skip(f"this machine does not run {level}")


def test_the_number_of_threads_changes_nothing():
    q = packed(SPECS["nf4"], 300, 1088)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        parts = [dequantize(q), *OPS.quant_quantize(weight(300, 1088), q.spec.code, False, torch.float32)]
        for dtype in (torch.float32, torch.bfloat16):
            for transposed in (False, True):
                x, _ = inputs(q, 7, dtype, transposed, "cpu")
                parts.append(OPS.quant_matmul_small(x, *q.tensors(), q.spec.code, 300, 1088, 0, None, transposed))
        results.append(parts)
    torch.set_num_threads(1)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@given(
    st.sampled_from(sorted(SPECS)),
    st.integers(0, 2**31),
    st.sampled_from(["packed", "scale", "zero", "scale_code", "scale_absmax", "scale_offset"]),
    st.integers(1, 40),
)
def test_tensors_that_are_too_short_are_refused(name, draw, field, less):
    # whatever is cut off, no kernel reads beyond: it refuses before it computes
    spec = SPECS[name]
    q = packed(spec, 6, 64)
    tensor = getattr(q, field)
    if tensor is None:
        return
    g = torch.Generator().manual_seed(draw)
    flat = tensor.reshape(-1)
    q = replace(q, packed=torch.randint(0, 256, q.packed.shape, generator=g, dtype=torch.uint8))  # any bytes are codes
    assert dequantize(q).isfinite().all()
    cut = replace(q, **{field: flat[: max(flat.numel() - less, 0)].clone()})
    if field == "scale_offset" and cut.scale_offset.numel() == 1:
        return
    x = torch.randn(2, 64)
    for call in (
        lambda: OPS.quant_dequantize_(torch.empty(6, 64), *cut.tensors(), spec.code, 64, 0, 0),
        lambda: OPS.quant_matmul_small(x, *cut.tensors(), spec.code, 6, 64, 0, None, False),
        lambda: cut.check("test"),
    ):
        with pytest.raises((RuntimeError, ValueError, IndexError), match=f"lowmem|{field}|shape|index|size"):
            call()


def test_bad_arguments_of_the_kernels():
    q = packed(SPECS["int4-g32"], 6, 64)
    a, code = q.tensors(), q.spec.code
    if not CPU.loaded:
        pytest.skip(CPU.why_not)
    out, x = torch.empty(6, 64), torch.randn(2, 64)
    for message, call in (
        ("col0: expected columns within k = 64, got 1", lambda: OPS.quant_dequantize_(out, *a, code, 64, 0, 1)),
        ("packed: expected at least", lambda: OPS.quant_dequantize_(out, *a, code, 64, 1, 0)),
        ("row0: expected a row", lambda: OPS.quant_dequantize_(out, *a, code, 64, -1, 0)),
        ("spec: expected QuantSpec.code", lambda: OPS.quant_dequantize_(out, *a, 15, 64, 0, 0)),
        ("spec: expected QuantSpec.code", lambda: OPS.quant_dequantize_(out, *a, code | 3 << 9, 64, 0, 0)),
        ("k: expected a multiple of the group size 32", lambda: OPS.quant_dequantize_(out, *a, code, 65, 0, 0)),
        ("x: expected shape", lambda: OPS.quant_matmul_small(x[:, :63], *a, code, 6, 64, 0, None, False)),
        ("packed: expected at least", lambda: OPS.quant_matmul_small(x, *a, code, 7, 64, 0, None, False)),
        ("bias: expected 6 elements", lambda: OPS.quant_matmul_small(x, *a, code, 6, 64, 0, x[0], False)),
        (
            "w: expected columns that the group size 32 divides",
            lambda: OPS.quant_quantize(x[:, :63], code, False, FP32),
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


# ----------------------------------------------------------------------------------------------------------- qmatmul


@pytest.mark.parametrize("name", ["nf4", "nf2-g16-nested", "int3-g32-zero", "int8-row"])
def test_gradients(name, device):
    q = packed(SPECS[name], 7, 64, device=device)
    x = torch.randn(2, 3, 64, dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bias: qmatmul(x, q, bias=bias), (x, bias))
    with pytest.raises(RuntimeError, match="no derivative of its own"):
        OPS.quant_matmul(x[0], *q.tensors(), q.spec.code, 7, 64, 0, None, False)


def test_compile(device):
    q = packed(SPECS["nf4-g16-nested"], 24, 64, device=device)
    x = torch.randn(4, 64, device=device, requires_grad=True)

    def f(x):
        return qmatmul(x, q).sin()

    y = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    (want,) = torch.autograd.grad(f(x).sum(), x)
    assert torch.equal(y, f(x)) and torch.equal(grad, want)


def test_autocast(device):
    q = packed(SPECS["nf4"], 24, 64, device=device)
    x = torch.randn(4, 64, device=device)
    with torch.autocast(device, torch.bfloat16):
        y = qmatmul(x, q, bias=torch.zeros(24, device=device))
    assert y.dtype == torch.bfloat16 and torch.equal(y, qmatmul(x.bfloat16(), q))


def test_nothing_is_saved_but_the_weight(device):
    q = packed(SPECS["nf4-g16-nested"], 24, 64, device=device)
    x = torch.randn(4, 64, device=device, requires_grad=True)
    assert saved_bytes(lambda: qmatmul(x, q), exclude=[t for t in q.tensors() if t is not None]) == 0


def test_bad_input(device):
    q = packed(SPECS["nf4"], 24, 64, device=device)
    e = packed(SPECS["nf4"], 2, 24, 64, device=device)
    x = torch.randn(4, 64, device=device)
    for error, message, call in (
        (ValueError, r"x: expected shape \[\.\.\., 64\]", lambda: qmatmul(x[:, :63], q)),
        (TypeError, r"x: expected a floating dtype", lambda: qmatmul(x.long(), q)),
        (ValueError, r"bias: expected shape \[24\] in torch.float32", lambda: qmatmul(x, q, bias=x[0])),
        (ValueError, r"expert: expected None for a weight \[N, K\], got 0", lambda: qmatmul(x, q, expert=0)),
        (ValueError, r"expert: expected an index below 2, got 2", lambda: qmatmul(x, e, expert=2)),
        (ValueError, r"x: expected shape \[2, \.\.\., 64\] \(experts first\)", lambda: qmatmul(x, e)),
    ):
        with pytest.raises(error, match=rf"lowmem\.qmatmul: {message}"):
            call()
    dy = torch.randn(4, 24, device=device)
    with pytest.raises(ValueError, match=r"lowmem\.qscale_grad: dy: expected shape"):
        qscale_grad(dy[:3], x, q)
    odd = packed(SPECS["nf4"], 24, 33, device=device)
    with pytest.raises(ValueError, match=r"lowmem\.qscale_grad: q: expected a group size that divides K = 33, got 64"):
        qscale_grad(dy, x[:, :33], odd)


# ---------------------------------------------------------------------------------------------------------- workspace


def test_workspace_is_bounded_and_visible(device):
    pool, dev = Workspace(1000), torch.device(device)
    with pool.borrow((10, 20), torch.float32, dev) as a:
        assert a.shape == (10, 20) and a.dtype == torch.float32
        assert pool.state().lent == 800 and pool.state().held == 0
        with pool.borrow((100,), torch.uint8, dev) as b:
            assert a.untyped_storage()._cdata != b.untyped_storage()._cdata
            assert pool.state().lent == 900
    assert pool.state().held == 900 and pool.state().lent == 0 and pool.state().peak == 900
    with pool.borrow((50,), torch.uint8, dev) as c:  # the smallest that fits, no new one
        assert c.untyped_storage()._cdata == b.untyped_storage()._cdata
    with pool.borrow((300,), torch.float32, dev):  # larger than the limit: lent, and not kept
        assert pool.state().lent == 1200
    assert pool.state().held == 0
    with pytest.raises(RuntimeError), pool.borrow((8,), torch.uint8, dev):
        raise RuntimeError
    assert pool.state().lent == 0 and pool.release() == 8 and pool.state().held == 0
    with pytest.raises(ValueError, match=r"lowmem\.memory\.Workspace: limit: expected bytes"):
        pool.limit = -1


def test_workspace_of_two_threads():
    q = packed(SPECS["nf4"], 64, 128)
    x = torch.randn(20, 128)
    want = qmatmul(x, q)
    wrong = []

    def work():
        for _ in range(50):
            if not torch.equal(qmatmul(x, q), want):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and memory.workspace().lent == 0


def test_no_dense_weight_outlives_the_call(device):
    memory.release_workspace()
    q = packed(SPECS["nf4"], 1200, 256, device=device)
    x = torch.randn(20, 256, device=device, requires_grad=True)
    qmatmul(x, q).sum().backward()
    state = memory.workspace()
    # panels, not the weight: the largest is 512 columns of dX's, and nothing is lent
    assert state.lent == 0
    if device == "cpu":
        assert state.held <= ops.PANEL * max(1200, 256) * 4
    assert memory.release_workspace() == state.held and memory.workspace().held == 0
