"""The Triton kernels of the activation family against the references: in the interpreter (fp32, fp16), or on a GPU."""

from __future__ import annotations

import pytest
import test_activation
import torch
from interpreted import everywhere

from lowmem.ops import activation as family
from lowmem.ops import activation_loss as loss_family
from lowmem.ops import activation_saved as forms
from lowmem.testing import LAYOUTS, assert_close_to_reference, huge_view

pytestmark = pytest.mark.usefixtures("poisoned", "kernels")
FLOATS = (torch.float32, torch.float16)


class _Launchers:
    """The launchers under the operators' names."""

    def __getattr__(self, name):
        from lowmem.triton_kernels import activation

        return getattr(activation, {"fp8_pack": "pack", "fp8_unpack": "unpack"}.get(name, name))


@pytest.fixture
def launchers(monkeypatch):
    """``check_all`` and ``check_codes`` of test_activation.py over the launchers in place of the operators."""
    ours = _Launchers()
    monkeypatch.setattr(test_activation, "ops", ours)
    return ours


@everywhere
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("m, k", [(1, 1), (13, 33), (2, 300), (5, 128)])
def test_every_operator(where, dtype, m, k, launchers):
    test_activation.check_all(*test_activation.problem(m, k, dtype, where))


@everywhere
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_layouts(where, layout, launchers):
    test_activation.check_all(*test_activation.problem(3, 130, torch.float32, where, layout))


@everywhere
def test_packed_bits(where, launchers):
    """FP8 groups to the bit: every code, every kind of value, wide magnitudes."""
    x = torch.randn(4, 400, device=where) * torch.exp(torch.randn(4, 400, device=where) * 8)
    x[0, :6] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-42])
    x[1, 128:256] = 0.0
    x[2, :128] = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(448.0) * 2.0**-40
    x[3, 256:384] = 2.0**-140
    x[3, 384:] = torch.linspace(-1e38, 1e38, 16)
    x[1, :126] = test_activation.halfway(where)
    packed = launchers.fp8_pack(x)
    assert torch.equal(packed, forms.pack_reference(x))
    back, want = launchers.fp8_unpack(packed, 4, 400, torch.float32), forms.unpack_reference(packed, 4, 400, x.dtype)
    assert torch.equal(back.nan_to_num(7.0), want.nan_to_num(7.0))
    assert launchers.fp8_pack(x[:0]).numel() == 0


@everywhere
def test_offsets_beyond_32_bits(where, launchers):
    x = huge_view(3, 40, torch.float16, where)
    x[2] = torch.randn(40)
    dense = x.clone()
    assert torch.equal(launchers.fp8_pack(x), launchers.fp8_pack(dense))
    assert torch.equal(launchers.norm_forward(x, x, None, None, 1e-5, False, 0)[0],
                       launchers.norm_forward(dense, dense, None, None, 1e-5, False, 0)[0])  # fmt: skip


@everywhere
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("options", [(0.0, 0.0, 0.0), (0.1, 1e-3, 4.0)], ids=str)
@pytest.mark.parametrize("v", [1, 37, 600])
def test_rows_of_logits(where, dtype, options, v):
    from lowmem.triton_kernels import activation_loss as launcher

    for biased in (False, True):
        logits = torch.randn(5, v, device=where).to(dtype)
        target = torch.randint(0, v, (5,), device=where)
        target[2] = -1
        logits[2, 0] = torch.nan  # an ignored row may hold anything
        bias = torch.randn(v, device=where) if biased else None
        factor = torch.rand(5, device=where)

        def reference(logits, bias, factor, target=target):
            grad, loss = logits.clone(), logits.new_empty(5, dtype=family.accumulate_dtype(logits.dtype))
            loss_family.rows_reference(grad, loss, target, bias, factor, -1, *options)
            return grad, loss

        exact = reference(logits.double(), None if bias is None else bias.double(), factor.double())
        lowprec = reference(logits, bias, factor)
        loss, alone = (logits.new_empty(5, dtype=torch.float32) for _ in range(2))
        before = logits.clone()
        launcher.rows_(logits, alone, target, bias, None, -1, *options)
        assert torch.equal(logits.nan_to_num(), before.nan_to_num()), "without a factor the logits stay"
        launcher.rows_(logits, loss, target, bias, factor, -1, *options)
        assert torch.equal(alone, loss)
        for a, e, low, terms in zip((logits, loss), exact, lowprec, (factor, torch.tensor(16.0)), strict=True):
            assert_close_to_reference(a, e, low, terms=terms)


@everywhere
def test_rows_that_are_not_finite(where):
    from lowmem.triton_kernels import activation_loss as launcher

    logits = torch.randn(4, 300, device=where)
    logits[0, 280], logits[1, 3], logits[2, :256] = torch.nan, torch.inf, -torch.inf
    want = torch.nn.functional.cross_entropy(logits, torch.full((4,), 290, device=where), reduction="none")
    loss = torch.empty(4, device=where)
    launcher.rows_(logits, loss, torch.full((4,), 290, device=where), None, torch.ones(4, device=where), -100, 0, 0, 0)
    torch.testing.assert_close(loss, want, equal_nan=True)
