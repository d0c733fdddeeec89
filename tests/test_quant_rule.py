"""The rule that chooses how a GPU multiplies with a packed weight, its launchers' plumbing, and the scratch way, on the
CPU: what needs no kernel is tested where there is none."""

import importlib.util

import pytest
import torch
from quant_cases import SPECS, packed

from lowmem import memory
from lowmem.memory import WORKSPACE
from lowmem.ops import quant as ops
from lowmem.ops import quant_rule as rule
from lowmem.quant import QuantSpec, dequantize

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.fixture
def limit():
    """Sets the workspace's limit; the former one returns."""
    before = WORKSPACE.limit
    memory.release_workspace()

    def set_to(value):
        WORKSPACE.limit = value

    yield set_to
    WORKSPACE.limit = before
    memory.release_workspace()


@pytest.mark.parametrize(
    "m, k, dtype, transposed, cuda_cpp, way",
    [
        (1, 4096, BF16, False, True, "gemv"),
        (2, 4096, FP16, False, True, "gemv"),
        (3, 4096, BF16, False, True, "mma"),
        (64, 4096, BF16, False, True, "mma"),
        (65, 4096, BF16, False, True, "scratch"),
        (8, 4096, FP32, False, True, "gemv"),  # no tensor cores for fp32: as many rows as the kernel serves
        (9, 4096, FP32, False, True, "scratch"),
        (8, 4104, BF16, False, True, "gemv"),  # 32 does not divide k
        (9, 4104, BF16, False, True, "scratch"),
        (1, 4100, BF16, False, True, "scratch"),  # 8 does not
        (1, 4096, BF16, True, True, "scratch"),
        (1, 4096, BF16, False, False, "scratch"),
        (1, 4096, FP64, False, True, "scratch"),
        (0, 4096, BF16, False, True, "scratch"),
    ],
)
def test_way(m, k, dtype, transposed, cuda_cpp, way):
    assert rule.matmul_way("a GPU", m, k, dtype, transposed, cuda_cpp) == way


def test_way_of_a_measured_gpu(monkeypatch):
    monkeypatch.setitem(rule.MEASURED, "a GPU", rule.Rows(gemv=0, mma=16))
    assert [rule.matmul_way("a GPU", m, 4096, BF16, False, True) for m in (1, 16, 17)] == ["mma", "mma", "scratch"]
    assert rule.matmul_way("a GPU", 1, 4096, FP32, False, True) == "scratch"
    assert rule.matmul_way("another", 1, 4096, BF16, False, True) == "gemv"


def test_the_rule_stays_within_the_kernels():
    for rows in (rule.ROWS, *rule.MEASURED.values()):
        assert 0 <= rows.gemv <= rule.GEMV_MOST and 0 <= rows.mma <= rule.MMA_MOST


def arguments(q, transposed=False, bias=None):
    return (*q.tensors(), q.spec.code, *q.shape[-2:], 0, bias, transposed)


@pytest.mark.parametrize("transposed", [False, True])
def test_scratch_is_the_whole_weight_or_panels_within_the_limit(limit, transposed, monkeypatch):
    q = packed(QuantSpec("nf4", 64), 1030, 1088)
    w = dequantize(q, FP32)
    x = torch.randn(5, 1030 if transposed else 1088)
    bias = None if transposed else torch.randn(1030)
    blocks = []
    real = ops.dequantize_reference
    monkeypatch.setattr(WORKSPACE, "_peak", 0)
    monkeypatch.setattr(ops, "PANEL", 512)  # two whole panels and a rest, whatever the tuned size

    def watch(out, *args):
        blocks.append((tuple(out.shape), out.data_ptr()))
        real(out, *args)

    class Ops:
        quant_dequantize_ = staticmethod(watch)

    for bytes_, count in ((2**30, 1), (600 * 1088 * 4, 3), (1, 3)):
        limit(bytes_)
        blocks.clear()
        with monkeypatch.context() as m:
            m.setattr(torch.ops, "lowmem", Ops)
            y = ops.matmul_scratch(x, *arguments(q, transposed, bias))
        torch.testing.assert_close(y, x @ w if transposed else x @ w.T + bias, rtol=1e-4, atol=1e-4)
        assert len(blocks) == count and len({at for _, at in blocks}) == 1, "one buffer serves all panels"
        assert all(a * b * 4 <= max(bytes_, ops.PANEL * 1088 * 4) for (a, b), _ in blocks)
        assert memory.workspace().held <= bytes_ and memory.workspace().lent == 0


def test_scratch_is_shared_by_layers_and_dtypes(limit):
    limit(2**24)
    for n, k in ((512, 256), (256, 512), (512, 1024)):
        for dtype in (BF16, FP32):
            ops.matmul_scratch(torch.randn(3, k).to(dtype), *arguments(packed(SPECS["nf4"], n, k)))
    state = memory.workspace()
    assert state.lent == 0 and state.held == 512 * 1024 * 4, "one buffer of the largest layer"


def test_scratch_of_experts_takes_one_expert_at_a_time(limit):
    limit(2**24)
    q = packed(SPECS["int4-g32-zero"], 3, 20, 96)
    x = torch.randn(3, 5, 96)
    torch.testing.assert_close(ops.matmul_scratch(x, *arguments(q)), x @ dequantize(q, FP32).mT)
    assert memory.workspace().held == 20 * 96 * 4


def test_nothing_is_pooled_while_a_graph_is_captured(limit, monkeypatch):
    limit(2**24)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    class Device:  # looks like a CUDA device to the pool, allocates on the CPU
        type, index = "cuda", 0

    monkeypatch.setattr(torch, "empty", lambda shape, dtype, device: torch.zeros(shape, dtype=dtype))
    with WORKSPACE.borrow((4, 8), FP32, Device()) as scratch:
        assert scratch.shape == (4, 8) and memory.workspace().lent == 0
    assert memory.workspace().held == 0


def test_streams_do_not_share_scratch(limit, monkeypatch):
    limit(2**24)

    class Stream:
        cuda_stream = 1

    class Device:
        type, index = "cuda", 0

    real = torch.empty
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, device: real(shape, dtype=dtype))

    def borrowed():
        with WORKSPACE.borrow((64,), FP32, Device()) as scratch:
            return scratch.data_ptr()

    first = borrowed()
    assert borrowed() == first, "the same stream gets its buffer again"
    Stream.cuda_stream = 2
    second = borrowed()
    assert second != first
    Stream.cuda_stream = 1
    assert borrowed() == first and memory.workspace().held == 512


# ---------------------------------------------------------------------------------------------------------- launchers


@pytest.fixture
def launchers():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    from lowmem.triton_kernels import quant

    return quant


def test_the_launcher_hands_each_way_its_arguments(launchers, monkeypatch):
    q = packed(SPECS["nf4"], 24, 64)
    calls = []

    def kernel(name):
        def run(x, *args):
            calls.append(name)
            assert x.is_contiguous() and x.data_ptr() % 16 == 0 and args[-1] is False
            return ops.matmul_reference(x, *args)

        return run

    class Kernels:
        quant_gemv, quant_mma = staticmethod(kernel("gemv")), staticmethod(kernel("mma"))

    monkeypatch.setattr(launchers, "_cuda_cpp", lambda t: True)
    monkeypatch.setattr(torch.ops, "lowmem_c", Kernels)
    for m, way in ((1, "gemv"), (5, "mma"), (100, None)):
        for layout in (lambda t: t, lambda t: t.t().contiguous().t(), lambda t: torch.cat([t[:1], t])[1:]):
            calls.clear()
            x, bias = layout(torch.randn(m, 64).to(BF16)), torch.randn(24).to(BF16)
            got = launchers.matmul(x, *arguments(q, bias=bias))
            assert calls == ([way] if way else [])
            torch.testing.assert_close(got, ops.matmul_reference(x, *arguments(q, bias=bias)), rtol=0.02, atol=0.02)
    calls.clear()
    launchers.matmul_small(torch.randn(7, 64).to(BF16), *arguments(q))
    launchers.matmul_small(torch.randn(9, 64).to(BF16), *arguments(q))
    launchers.matmul(torch.randn(1, 24).to(BF16), *arguments(q, transposed=True))
    assert calls == ["mma", "mma"]
    assert launchers.matmul(torch.randn(1, 64, dtype=FP64), *arguments(q)).dtype is FP64


def test_a_weight_off_16_bytes_goes_through_scratch(launchers, monkeypatch):
    q = packed(SPECS["nf4"], 24, 64)
    shifted = torch.empty(q.packed.numel() + 1, dtype=torch.uint8)[1:].copy_(q.packed.reshape(-1))
    monkeypatch.setattr(launchers, "_cuda_cpp", lambda t: True)
    args = (shifted, *arguments(q)[1:])
    x = torch.randn(1, 64)
    torch.testing.assert_close(launchers.matmul(x, *args), x @ dequantize(q, FP32).T)
