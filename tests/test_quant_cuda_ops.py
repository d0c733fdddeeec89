"""The CUDA C++ kernels of the quant family on a CUDA device, called directly (``lowmem_c::<op>``), and the scratch way
across streams and CUDA graphs. tests/cuda_on_cpu runs the same kernels where no device is; tests/test_quant_ops.py
runs the launchers under ``lowmem::<op>`` on every device."""

import pytest
import torch
from quant_cases import SPECS, fits, packed

from lowmem import _dispatch, memory
from lowmem.ops import qmatmul
from lowmem.ops import quant as ops
from lowmem.quant import QuantSpec, dequantize
from lowmem.testing import LAYOUTS, assert_close_to_reference, huge_view, reference_pair

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

needs_library = pytest.mark.skipif(not _dispatch.CUDA.loaded, reason=_dispatch.CUDA.why_not or "loaded")
every_spec = pytest.mark.parametrize("name", SPECS)
BF16 = torch.bfloat16


def kernel(name):
    return getattr(torch.ops.lowmem_c, name)


def check_block(q, out, row0=0, col0=0):
    want = out.clone()
    args = (*q.tensors(), q.spec.code, q.cols, row0, col0)
    ops.dequantize_reference(want, *args)
    kernel("quant_dequantize_")(out, *args)
    assert torch.equal(out, want), f"{q.spec} {q.shape} {out.dtype} {tuple(out.shape)} from ({row0}, {col0})"


@needs_library
@every_spec
def test_dequantize(name):
    for n, k in ((5, 64), (3, 37), (9, 96), (130, 10272)):
        if not fits(SPECS[name], k):
            continue
        q = packed(SPECS[name], n, k, device="cuda", float_zero=n == 9)
        for dtype in (torch.float32, torch.float16, BF16):
            for rows, cols, row0, col0 in ((n, k, 0, 0), (2, k, n - 2, 0), (1, k - 5, 1, 3), (2, 16, 1, 16)):
                for layout in ("contiguous", "transposed", "padded", "unaligned"):
                    out = LAYOUTS[layout](torch.zeros(rows, cols, dtype=dtype, device="cuda"))
                    check_block(q, out, row0, col0)


@needs_library
def test_dequantize_offsets_beyond_32_bits():
    q = packed(SPECS["nf4"], 4, 96, device="cuda")
    far = huge_view(4, 96, BF16, "cuda")
    kernel("quant_dequantize_")(far, *q.tensors(), q.spec.code, 96, 0, 0)
    assert torch.equal(far, dequantize(q, BF16))


def check_product(name, q, m, dtype, bias=True):
    g = torch.Generator().manual_seed(m)
    n, k = q.shape[-2:]
    lead = (q.shape[0], m) if q.dim() == 3 else (m,)
    x = torch.randn(*lead, k, generator=g).to("cuda", dtype)
    b = torch.randn(n, generator=g).to("cuda", dtype) if bias else None
    args = (x, *q.tensors(), q.spec.code, n, k, 0, b, False)
    exact, lowprec = reference_pair(ops.matmul_reference, *args)
    w = dequantize(q, torch.float64).abs()
    terms = x.double().abs() @ w.mT + (0 if b is None else b.double().abs())
    got = kernel(name)(*args)
    assert_close_to_reference(got, exact, lowprec, terms=terms, what=f"{name} {q.spec} {m}")
    assert torch.equal(got, kernel(name)(*args)), "two runs differ"


@needs_library
@every_spec
def test_products(name):
    for n, k in ((33, 64), (21, 160), (1030, 4128)):
        if fits(SPECS[name], k):
            q = packed(SPECS[name], n, k, device="cuda", float_zero=k == 160)
            for dtype in (BF16, torch.float16):
                for m in (1, 2, 5, 8):
                    check_product("quant_gemv", q, m, dtype)
                for m in (1, 8, 17, 64):
                    check_product("quant_mma", q, m, dtype)
            check_product("quant_gemv", q, 3, torch.float32)


@needs_library
@pytest.mark.parametrize("name", ["quant_gemv", "quant_mma"])
def test_products_of_experts(name):
    check_product(name, packed(SPECS["nf4-g16-nested"], 5, 70, 256, device="cuda"), 4, BF16, bias=False)


BAD = {
    "packed: expected at least 1056 contiguous elements, got 1055": lambda a: a.update(packed=a["packed"][:-1]),
    "packed: expected torch.Byte, got torch.Int": lambda a: a.update(packed=a["packed"].int()),
    "packed: expected device cuda:0 (out's), got": lambda a: a.update(packed=a["packed"].cpu()),
    "scale: expected at least 33 contiguous elements, got 32": lambda a: a.update(scale=a["scale"][:-1]),
    "scale: expected float32, float16 or bfloat16, got": lambda a: a.update(scale=a["scale"].double()),
    "spec: expected QuantSpec.code, got 15": lambda a: a.update(spec=15),
    "row0: expected a row of the weight, got -1": lambda a: a.update(row0=-1),
    "packed: expected at least 1088": lambda a: a.update(row0=1),
    "col0: expected out's columns inside the weight's 64, got 1": lambda a: a.update(col0=1),
    "zero: expected None for a table format": lambda a: a.update(zero=a["packed"]),
    "out: expected elements with places of their own": lambda a: a.update(out=a["out"][:1].expand(33, 64)),
    "out: expected float32, float16 or bfloat16, got": lambda a: a.update(out=a["out"].double()),
    "scale_code: expected a tensor": lambda a: a.update(spec=QuantSpec("nf4", 64, double_quant=True).code),
}


@needs_library
@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_before_anything_is_written(message):
    q = packed(SPECS["nf4"], 33, 64, device="cuda")
    out = torch.full((33, 64), 7.0, device="cuda")
    given = {"out": out, "packed": q.packed.reshape(-1), "scale": q.scale.reshape(-1), "zero": None}
    given |= dict(scale_code=None, scale_absmax=None, scale_offset=None, spec=q.spec.code, k=64, row0=0, col0=0)
    BAD[message](given)
    with pytest.raises(RuntimeError) as caught:
        kernel("quant_dequantize_")(*given.values())
    assert f"lowmem.quant_dequantize_: {message}" in str(caught.value)
    assert (out == 7.0).all()


# ------------------------------------------------------------------------------------------- scratch, streams, graphs


def test_streams_have_their_own_scratch():
    q = packed(QuantSpec("nf4", 64, double_quant=True), 1024, 2048, device="cuda")
    w = dequantize(q, BF16)
    xs = [torch.randn(256, 2048, device="cuda", dtype=BF16) for _ in range(6)]
    want = [x @ w.T for x in xs]
    memory.release_workspace()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    got = []
    for i, x in enumerate(xs):
        with torch.cuda.stream(streams[i % 3]):
            got.append(qmatmul(x, q))
    torch.cuda.synchronize()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert memory.workspace().held <= max(3 * w.nbytes, memory.workspace().limit)
    assert memory.workspace().lent == 0


@pytest.mark.parametrize("m", [1, 20, 256])
def test_a_captured_graph_replays(m):
    q = packed(QuantSpec("nf4", 64, double_quant=True), 512, 1024, device="cuda")
    x = torch.randn(m, 1024, device="cuda", dtype=BF16)
    qmatmul(x, q)  # compiles and chooses outside the capture
    torch.cuda.synchronize()
    held = memory.workspace().held
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = qmatmul(qmatmul(x, q).repeat(1, 2), q)
    assert memory.workspace().held == held
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(y, qmatmul(qmatmul(x, q).repeat(1, 2), q))


def test_no_dense_copy_outlives_the_call():
    q = packed(QuantSpec("nf4", 64, double_quant=True), 2048, 2048, device="cuda")
    x = torch.randn(256, 2048, device="cuda", dtype=BF16, requires_grad=True)
    qmatmul(x, q).sum().backward()
    memory.release_workspace()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = qmatmul(x, q)
    y.sum().backward()
    memory.release_workspace()
    assert torch.cuda.memory_allocated() - before <= y.nbytes + 4096
