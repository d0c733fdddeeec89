"""Deliberately broken operators: the rigs that prove the real ones must reject each of them.

Every test breaks one thing in an otherwise correct operator, runs it through the same check as the real one (first
correct, so that the rig is seen to pass, then broken) and expects the rig to raise.
"""

import pytest
import torch
import torch.nn.functional as F
from lora_cases import (
    Case,
    arguments,
    check,
    check_linear,
    check_repeats,
    check_writes_inside,
    composed,
    linear_inputs,
    run_linear,
    tensors,
    upstream_like,
)
from torch.autograd.gradcheck import GradcheckError

from lowmem.ops import lora
from lowmem.ops.philox import inv_keep, keep_mask, pack_bits
from lowmem.testing import (
    LAYOUTS,
    assert_close_to_reference,
    error_bound,
    huge_view,
    max_error,
    poison_empties,
    saved_bytes,
    saved_for_backward,
    tiny,
)

CAUGHT = r"exceeds the bound|integers differ"


def caught(name, case, broken, match=CAUGHT, **kwargs):
    """The reference passes the check on ``case``, the ``broken`` implementation does not."""
    args = arguments(name, case) if isinstance(case, Case) else case
    good = getattr(lora, name.removeprefix("lora_").removesuffix("_") + "_reference")
    check(name, args, implementation=good, **kwargs)
    with pytest.raises(AssertionError, match=match):
        check(name, args, implementation=broken, **kwargs)


# ------------------------------------------------------------------------------------------------- wrong values caught


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16", "fp16"])
def test_an_off_by_one_mask_is_caught(precision):
    def next_bit(x, a, scale, p, seed, child, save_mask):  # element k takes the bit of k + 1
        keep = keep_mask(x.shape[0], x.shape[1] + 1, p, seed, child)[:, 1:]
        return (torch.where(keep, x, 0) @ a.T) * (scale * inv_keep(p)), pack_bits(keep)

    def next_row(out, ds, a, mask, p, seed, child, accumulate):
        lora.masked_expand_reference(out, ds, a, mask.roll(1, 0), p, seed, child, accumulate)

    def next_child(ds, x, mask, p, seed, child):
        return lora.da_reference(ds, x, mask, p, seed, child + 1)

    case = Case(precision=precision, m=33, k=100)
    caught("lora_shrink", case, next_bit)
    caught("lora_masked_expand_", case, next_row)
    caught("lora_da", case.but(bits=False), next_child)


def test_one_wrong_bit_of_a_saved_mask_is_caught():
    def flipped(*args):
        s, mask = lora.shrink_reference(*args)
        mask[-1, -1] ^= 1
        return s, mask

    caught("lora_shrink", Case(m=33, k=100), flipped, match="integers differ")


def test_spare_bits_of_the_last_word_are_caught():
    def spare(*args):
        s, mask = lora.shrink_reference(*args)
        mask[:, -1] |= -(2**31)  # bit 31 of a word that holds 4 columns
        return s, mask

    caught("lora_shrink", Case(m=33, k=100), spare, match="integers differ")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("block", [8, 16, 32, 64])
def test_a_dropped_tail_is_caught(block, precision):
    def shrink(x, a, *rest):  # the last K % block columns are never read
        whole = x.shape[1] // block * block
        return lora.shrink_reference(x[:, :whole], a[:, :whole], *rest)[0], lora.shrink_reference(x, a, *rest)[1]

    def dy(dy, b, s, scale):  # rows M % block are left out of the sum
        whole = dy.shape[0] // block * block
        return lora.dy_reference(dy, b, s, scale)[0], lora.dy_reference(dy[:whole], b, s[:whole], scale)[1]

    case = Case(m=65, k=100 if block < 64 else 65, precision=precision)
    caught("lora_shrink", case, shrink)
    caught("lora_dy", case, dy)


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16", "fp16"])
def test_a_missing_factor_is_caught(precision):
    def without_inv_keep(ds, x, mask, p, seed, child):
        return lora.da_reference(ds, x, mask, p, seed, child) / inv_keep(p)

    def exact_p(ds, x, mask, p, seed, child):  # 1 / (1 - p) instead of the probability that 16 bits express
        return lora.da_reference(ds, x, mask, p, seed, child) * ((1 / (1 - p)) / inv_keep(p))

    caught("lora_da", Case(precision=precision), without_inv_keep)
    if precision == "fp64":
        caught("lora_da", Case(precision=precision), exact_p)


def test_fp64_computed_through_fp32_is_caught():
    def through_fp32(ds, x, mask, p, seed, child):
        return lora.da_reference(ds.float(), x.float(), mask, p, seed, child).double()

    caught("lora_da", Case(precision="fp64"), through_fp32)


def test_fp32_computed_through_bf16_is_caught():
    def through_bf16(ds, x, mask, p, seed, child):
        return lora.da_reference(ds.bfloat16(), x.bfloat16(), mask, p, seed, child)

    caught("lora_da", Case(precision="fp32"), through_bf16)


def test_bf16_that_accumulates_in_bf16_is_caught():
    def narrow(ds, x, mask, p, seed, child):
        total = torch.zeros(ds.shape[1], x.shape[1], dtype=x.dtype)
        for row in range(x.shape[0]):
            total += torch.outer(ds[row], x[row])
        return total.float()

    caught("lora_da", Case(m=700, k=33, p=0.0, precision="bf16"), narrow)


def test_a_dropped_nan_that_is_multiplied_by_zero_is_caught():
    t = tensors(Case(m=12, k=70))
    row, column = (~t["keep"]).nonzero()[0].tolist()
    t["x"][row, column] = torch.nan

    def multiplied(x, a, scale, p, seed, child, save_mask):
        keep = keep_mask(*x.shape, p, seed, child)
        return (x * keep @ a.T) * (scale * inv_keep(p)), pack_bits(keep)

    caught("lora_shrink", (t["x"], t["a"], 1.0, 0.1, t["seed"], 3, True), multiplied)


def test_a_wrong_dtype_or_shape_is_caught():
    def half(*args):
        ds, db = lora.dy_reference(*args)
        return ds, db.to(ds.dtype)

    def transposed(*args):
        ds, db = lora.dy_reference(*args)
        return ds, db.T.contiguous()

    caught(
        "lora_dy", Case(precision="bf16"), half, match="expected shape .* in torch.float32, got .* in torch.bfloat16"
    )
    caught("lora_dy", Case(), transposed, match="expected shape")


# ------------------------------------------------------------------------------------------------- wrong memory caught


def test_memory_left_unwritten_is_caught():
    def last_row_forgotten(ds, x, mask, p, seed, child):
        out = torch.empty(ds.shape[1], x.shape[1])
        out[:-1] = lora.da_reference(ds, x, mask, p, seed, child)[:-1]
        return out

    with poison_empties():
        caught("lora_da", Case(), last_row_forgotten)


def test_a_read_beside_the_view_is_caught():
    def reads_rows_as_if_contiguous(x, a, *rest):
        flat = torch.as_strided(x, x.size(), (x.shape[1], 1), x.storage_offset())
        return lora.shrink_reference(flat, a, *rest)

    for layout in ("padded", "strided"):
        caught("lora_shrink", Case(m=9, k=33, layout=layout), reads_rows_as_if_contiguous)

    def from_the_storage_start(x, a, *rest):
        return lora.shrink_reference(torch.as_strided(x, x.size(), x.stride(), 0), a, *rest)

    caught("lora_shrink", Case(m=9, k=33, layout="unaligned"), from_the_storage_start)


def test_a_write_beside_the_view_is_caught():
    def one_too_far(out, *rest):
        lora.masked_expand_reference(out, *rest)
        torch.as_strided(out, (1,), (1,), out.storage_offset() + out.shape[1]).fill_(0)  # the first gap

    args = arguments("lora_masked_expand_", Case(layout="padded"))
    check_writes_inside(args, implementation=lora.masked_expand_reference)
    with pytest.raises(AssertionError, match="written outside the view"):
        check_writes_inside(args, implementation=one_too_far)
    with pytest.raises(AssertionError, match="nothing written"):
        check_writes_inside(args, implementation=lambda *_: None)


def test_a_32_bit_row_offset_is_caught():
    t = tensors(Case(m=3, k=45, precision="bf16"))
    huge = huge_view(3, 45, torch.bfloat16)
    huge.copy_(t["x"])

    def int32_offsets(x, a, *rest):
        rows = []
        for i in range(x.shape[0]):
            offset = (i * x.stride(0) + 2**31) % 2**32 - 2**31  # what an int makes of it
            if offset < 0:
                offset %= x.stride(0)  # on a GPU that is a fault or another tensor; stay inside here
            rows.append(torch.as_strided(x, (x.shape[1],), (1,), offset))
        return lora.shrink_reference(torch.stack(rows), a, *rest)

    caught("lora_shrink", (huge, t["a"], 1.0, 0.1, t["seed"], 3, True), int32_offsets)


def test_a_sum_whose_order_changes_from_run_to_run_is_caught():
    # right by the error rule, as a sum by atomics is, but with other last bits in every run
    def any_order(ds, x, *rest):
        order = torch.randperm(x.shape[0])
        return lora.da_reference(ds[order], x[order], *rest)

    args = arguments("lora_da", Case(m=200, p=0.0, precision="fp32"))
    check("lora_da", args, implementation=any_order)
    check_repeats("lora_da", args, implementation=lora.da_reference)
    with pytest.raises(AssertionError, match="two runs differ"):
        check_repeats("lora_da", args, implementation=any_order)


# ----------------------------------------------------------------------------------------------- wrong gradients caught


class Wrong(torch.autograd.Function):
    """A scaled linear with dropout whose backward is wrong in the way that ``kind`` names."""

    @staticmethod
    def forward(ctx, x, a, kind):
        seed = torch.tensor([5])
        ctx.keep = keep_mask(*x.shape, 0.5, seed)
        ctx.kind = kind
        ctx.save_for_backward(x, a)
        return torch.where(ctx.keep, x, 0) * 2 @ a.T * 1.7

    @staticmethod
    def backward(ctx, dy):
        x, a = ctx.saved_tensors
        keep = ctx.keep
        scale = 1.0 if ctx.kind == "scale" else 1.7
        if ctx.kind == "mask":
            keep = keep.roll(1, 1)
        dropped = x if ctx.kind == "undropped" else torch.where(keep, x, 0)
        dx = torch.where(keep, dy @ a * 2 * scale, 0)
        return dx, dy.T @ dropped * 2 * scale * (-1 if ctx.kind == "sign" else 1), None


@pytest.mark.parametrize("kind", ["scale", "mask", "undropped", "sign"])
def test_a_wrong_gradient_is_caught_by_gradcheck(kind):
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    a = torch.randn(2, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a: Wrong.apply(x, a, ""), (x, a))
    with pytest.raises(GradcheckError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda x, a: Wrong.apply(x, a, kind), (x, a))


@pytest.mark.parametrize("key", ["x", "a", "b"])
def test_a_wrong_gradient_is_caught_by_the_comparison_with_plain_torch(key):
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t.clone()

        @staticmethod
        def backward(ctx, g):
            g = g.clone()
            g.view(-1)[-1] *= 1.01  # one element, one per cent
            return g

    def broken(x, base, a, b, scale, save_mask, **kwargs):
        made = {"x": x, "a": a, "b": b}
        made[key] = Doubled.apply(made[key])
        return composed(made["x"], base, made["a"], made["b"], scale, **kwargs)

    # in 16 bits one per cent of one element is what rounding makes: float32 and float64 tell
    for precision in ("fp64", "fp32"):
        check_linear(Case(precision=precision), fn=lambda *a, save_mask, **k: composed(*a, **k))
        with pytest.raises(AssertionError, match=f"{key} of .*exceeds the bound"):
            check_linear(Case(precision=precision), fn=broken)


# ---------------------------------------------------------------------------------------------- wrong operators caught


@pytest.fixture
def library():
    with torch.library._scoped_library("lowmem_broken", "FRAGMENT") as made:
        yield made


def opcheck(name, *args):
    torch.library.opcheck(getattr(torch.ops.lowmem_broken, name).default, args)


def test_an_unregistered_fake_is_caught(library):
    library.define("shrink(Tensor x, Tensor a) -> Tensor")
    library.impl("shrink", lambda x, a: x @ a.T, "CPU")
    x, a = torch.randn(3, 10), torch.randn(2, 10)
    with pytest.raises(Exception, match="fake|meta|Meta"):
        opcheck("shrink", x, a)
    torch.library.register_fake("lowmem_broken::shrink", lambda x, a: x.new_empty(3, 2), lib=library)
    torch.library.opcheck(torch.ops.lowmem_broken.shrink.default, (x, a), test_utils="test_faketensor")


@pytest.mark.parametrize("fault", ["shape", "dtype"])
def test_a_wrong_fake_is_caught(library, fault):
    library.define("shrink(Tensor x, Tensor a) -> Tensor")
    library.impl("shrink", lambda x, a: x @ a.T, "CPU")

    def fake(x, a):
        return x.new_empty(3, 3) if fault == "shape" else x.new_empty(3, 2, dtype=torch.float64)

    torch.library.register_fake("lowmem_broken::shrink", fake, lib=library)
    with pytest.raises(Exception, match="mismatch|[Ss]hape|dtype|not.*equal"):
        opcheck("shrink", torch.randn(3, 10), torch.randn(2, 10))


def test_an_undeclared_write_is_caught(library):
    library.define("expand(Tensor out, Tensor ds) -> Tensor")
    library.impl("expand", lambda out, ds: out.add_(ds).clone(), "CPU")
    torch.library.register_fake("lowmem_broken::expand", lambda out, ds: torch.empty_like(out), lib=library)
    with pytest.raises(Exception, match="mutat"):
        opcheck("expand", torch.randn(3, 4), torch.randn(3, 4))


def test_a_missing_autograd_kernel_is_caught(library):
    library.define("shrink(Tensor x, Tensor a) -> Tensor")
    library.impl("shrink", lambda x, a: x @ a.T, "CPU")
    torch.library.register_fake("lowmem_broken::shrink", lambda x, a: x.new_empty(x.shape[0], a.shape[0]), lib=library)
    with pytest.raises(Exception, match="autograd|Autograd|grad"):
        opcheck("shrink", torch.randn(3, 10, requires_grad=True), torch.randn(2, 10))


# -------------------------------------------------------------------------------------------------- the rigs themselves


def test_a_copy_of_x_saved_for_backward_is_counted():
    x, w = torch.randn(64, 32, requires_grad=True), torch.nn.Parameter(torch.randn(16, 32))
    linear = saved_bytes(lambda: F.linear(x, w))
    assert linear == 64 * 32 * 4
    assert saved_bytes(lambda: F.linear(x.bfloat16(), w.bfloat16()).float(), exclude=w) >= 64 * 32 * 2
    # one storage under two views counts once, and whole
    assert saved_bytes(lambda: (F.linear(x, w), F.linear(x[:32], w))) == linear
    assert saved_bytes(lambda: F.linear(x[:32], w)) == linear
    # a parameter and a view of it never count, nor what is excluded
    assert saved_bytes(lambda: x @ w.t(), exclude=x) == 0
    frozen = torch.nn.Linear(32, 16).requires_grad_(False)
    assert saved_bytes(lambda: frozen(x), exclude=[frozen]) == 0
    # a tensor that dies at once is not mistaken for the next one in the same memory
    doubled = saved_for_backward(lambda: (x * 2).exp().log().exp())
    assert sum(s.bytes for s in doubled) == 2 * 64 * 32 * 4


def test_the_bound_is_torchs_own_error_and_no_more():
    exact = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)
    low = exact.float() + torch.tensor([0.0, 1e-3, 0.0])
    bound = error_bound(exact, low)
    assert 2e-3 < bound < 2.01e-3
    assert_close_to_reference(exact.float() + 1.9e-3, exact, low)
    with pytest.raises(AssertionError, match="exceeds the bound"):
        assert_close_to_reference(exact.float() + 2.1e-3, exact, low)
    # tiny: one rounding of the largest value, and one per unit of the partial sums
    eps = torch.finfo(torch.float32).eps
    assert tiny(exact, torch.float32) == pytest.approx(eps * 8)
    assert tiny(exact, torch.float32, terms=exact.abs() * 100) == pytest.approx(eps * 404)
    assert tiny(exact, torch.bfloat16, terms=exact) == pytest.approx(2**-7 * 4 + eps * 4)
    assert tiny(exact, torch.float32, rounded=[exact * 2], rounded_to=torch.bfloat16) == pytest.approx(
        2**-7 * 8, rel=1e-3
    )


def test_not_finite_values_must_agree_in_kind_and_place():
    nan, inf = torch.nan, torch.inf
    exact = torch.tensor([nan, inf, 1.0], dtype=torch.float64)
    assert max_error(torch.tensor([nan, inf, 1.0]), exact) == 0
    for wrong in ([0.0, inf, 1.0], [nan, -inf, 1.0], [nan, inf, nan], [nan, 3e38, 1.0], [inf, inf, 1.0]):
        with pytest.raises(AssertionError, match="exceeds the bound"):
            assert_close_to_reference(torch.tensor(wrong), exact, exact.float())
    with pytest.raises(ValueError, match="lowmem.error_bound: lowprec: expected finite"):
        error_bound(torch.tensor([1e9], dtype=torch.float64), torch.tensor([1e9]).half())


def test_poisoned_memory_is_nan_and_ends():
    before = torch.are_deterministic_algorithms_enabled()
    with poison_empties():
        x = torch.ones(2, 3)
        assert torch.empty(4).isnan().all() and x.new_empty(2, 2).isnan().all() and torch.empty_like(x).isnan().all()
        assert torch.empty_strided((2, 2), (1, 2)).isnan().all()
        assert (torch.empty(3, dtype=torch.int32) == 2**31 - 1).all()
    assert torch.are_deterministic_algorithms_enabled() == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_values_and_put_nan_into_gaps(layout):
    t = torch.randn(4, 6)
    made = LAYOUTS[layout](t)
    assert torch.equal(made, t[:1].expand(4, 6) if layout == "expanded" else t)
    whole = made.as_strided((made.untyped_storage().nbytes() // 4,), (1,), 0)
    assert int(whole.isnan().sum()) == whole.numel() - (6 if layout == "expanded" else 24) or layout == "expanded"
    assert LAYOUTS[layout](torch.empty(0, 5)).shape == (0, 5)


def test_huge_view_reaches_past_32_bits():
    view = huge_view(3, 5, torch.bfloat16)
    assert view.stride(0) * 2 >= 2**31 and not view.any()
    view[2, 4] = 3
    assert view[2, 4] == 3 and view.sum() == 3
    with pytest.raises(ValueError, match="lowmem.huge_view: rows, cols: expected rows >= 2"):
        huge_view(1, 5, torch.bfloat16)


def test_the_composition_that_judges_the_linear_agrees_with_the_references():
    # two independent statements of the same formula: plain torch's autograd, and the six references by hand
    case = Case(m=21, k=70, n=44, precision="fp64", p=0.3)
    inputs = linear_inputs(case)
    plain = run_linear(composed, inputs)
    x, base, a, b, scale = (inputs[key] for key in ("x", "base", "a", "b", "scale"))
    s, mask = lora.shrink_reference(x, a, scale, case.p, inputs["seed"], case.child, True)
    y = lora.expand_reference(x, base, s, b, inputs["bias"])
    ds, db = lora.dy_reference(upstream_like(y), b, s, scale)
    by_hand = {
        "y": y,
        "x": lora.dx_reference(upstream_like(y), base, ds, a, mask, case.p, None, case.child),
        "a": lora.da_reference(ds, x, mask, case.p, None, case.child),
        "b": db,
    }
    for key, value in by_hand.items():
        torch.testing.assert_close(value, plain[key], rtol=1e-12, atol=1e-12)
