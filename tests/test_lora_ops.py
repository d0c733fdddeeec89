"""The six operators of the lora family on every device, dtype, shape and memory layout, against their references."""

import resource
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_cases import (
    OPERATORS,
    PRECISIONS,
    SEED,
    Case,
    arguments,
    check,
    check_case,
    check_repeats,
    check_writes_inside,
    functional,
    served,
    tensors,
)

from lowmem.ops.philox import inv_keep, keep_mask, pack_bits
from lowmem.testing import LAYOUTS, RANKS, assert_close_to_reference, huge_view, reference_pair

pytestmark = pytest.mark.usefixtures("poisoned")

every_operator = pytest.mark.parametrize("name", OPERATORS)
every_precision = pytest.mark.parametrize("precision", PRECISIONS)

# (M, K, N): one, odd, below / at / above a mask word and a vector, multiples of nothing, empty
SHAPES = [(1, 1, 1), (1, 257, 33), (7, 31, 32), (2, 32, 3), (33, 100, 65), (65, 257, 31), (0, 40, 9), (3, 515, 129)]


@every_precision
@every_operator
def test_matches_the_reference(name, precision, device):
    base = Case(precision=precision, device=device)
    for draw, (m, k, n) in enumerate(SHAPES):
        for p in (0.0, 0.1, 0.5, 1.0):
            for bits in (True, False) if p else (True,):
                check_case(name, base.but(m=m, k=k, n=n, p=p, bits=bits, draw=draw))


@every_precision
@every_operator
def test_every_rank(name, precision, device):
    for r in RANKS:
        check_case(name, Case(m=9, k=70, n=45, r=r, precision=precision, device=device))
        check_case(name, Case(m=9, k=70, n=45, r=r, precision=precision, device=device, p=0.0))


@every_operator
def test_rank_512(name, device):
    for precision in ("fp32", "bf16"):
        check_case(name, Case(m=17, k=1093, n=1031, r=512, precision=precision, device=device), threads=2)


@pytest.mark.parametrize("layout", LAYOUTS)
@every_operator
def test_every_layout(name, layout, device):
    for precision in ("fp64", "fp32", "bf16", "fp16+fp32"):
        for m, k, n in ((9, 77, 40), (1, 33, 1), (0, 8, 8), (34, 128, 64)):
            case = Case(m=m, k=k, n=n, precision=precision, device=device)
            check_case(name, case.but(layout=layout))
            check_case(name, case.but(adapters=layout, bits=False))


@pytest.mark.parametrize(
    "option", [{"bias": False}, {"base": False}, {"base": False, "bias": False}, {"accumulate": False}]
)
@every_operator
def test_without(name, option, device):
    for precision in ("fp32", "bf16"):
        for p in (0.0, 0.1):
            check_case(name, Case(precision=precision, device=device, p=p, **option))


@every_operator
def test_scale_of_any_sign(name, device):
    for scale in (0.0, -2.5, 1e-3):
        check_case(name, Case(scale=scale, device=device))


@every_operator
@given(
    m=st.integers(0, 70),
    k=st.integers(1, 300),
    n=st.integers(1, 140),
    r=st.integers(1, 70),
    precision=st.sampled_from(sorted(PRECISIONS)),
    p=st.one_of(st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.floats(0, 1)),
    bits=st.booleans(),
    base=st.booleans(),
    bias=st.booleans(),
    accumulate=st.booleans(),
    layout=st.sampled_from(sorted(LAYOUTS)),
    adapters=st.sampled_from(sorted(LAYOUTS)),
    child=st.integers(0, 2**31 - 1),
    draw=st.integers(0, 1000),
)
def test_any_case(name, **fields):
    check_case(name, Case(**fields))


# --------------------------------------------------------------------------------------------- what an operator writes


def test_shrink_mask_is_the_reference_mask(device):
    case = Case(m=13, k=203, device=device)
    t = tensors(case)
    _, mask = torch.ops.lowmem.lora_shrink(t["x"], t["a"], 1.0, case.p, t["seed"], case.child, True)
    assert torch.equal(mask, pack_bits(t["keep"]))
    for p, save in ((0.0, True), (0.1, False)):
        _, none = torch.ops.lowmem.lora_shrink(t["x"], t["a"], 1.0, p, t["seed"], case.child, save)
        assert none.dtype == torch.int32 and none.numel() == 0


def test_bits_and_seed_give_the_same_bits_of_result(device):
    for precision in ("fp32", "bf16"):
        for name in ("lora_masked_expand_", "lora_dx", "lora_da"):
            case = Case(m=17, k=130, precision=precision, device=device)
            from_bits = served(name)(*arguments(name, case))
            from_seed = served(name)(*arguments(name, case.but(bits=False)))
            assert torch.equal(from_bits[0], from_seed[0]), (name, precision)


@pytest.mark.parametrize("layout", ["padded", "strided", "unaligned", "transposed"])
def test_masked_expand_writes_only_its_view(layout, device):
    for accumulate in (True, False):
        args = arguments("lora_masked_expand_", Case(layout=layout, accumulate=accumulate, device=device))
        check_writes_inside(args)


def test_masked_expand_without_accumulate_ignores_what_was_there(device):
    args = arguments("lora_masked_expand_", Case(accumulate=False, device=device))
    out = torch.full_like(args[0], torch.nan)
    torch.ops.lowmem.lora_masked_expand_(out, *args[1:])
    assert out.isfinite().all()


def test_p_of_one_gives_zero(device):
    for bits in (True, False):
        case = Case(p=1.0, bits=bits, device=device)
        s, mask = torch.ops.lowmem.lora_shrink(*arguments("lora_shrink", case))
        assert not s.any() and not mask.any()
        assert not torch.ops.lowmem.lora_da(*arguments("lora_da", case)).any()
        out, *rest = arguments("lora_masked_expand_", case)
        before = out.clone()
        torch.ops.lowmem.lora_masked_expand_(out, *rest)
        assert torch.equal(out, before)


@every_operator
def test_two_runs_give_the_same_bits(name, device):
    for precision in ("fp32", "bf16"):
        check_repeats(name, arguments(name, Case(m=300, k=515, n=260, r=16, precision=precision, device=device)))


def test_kept_elements_do_not_depend_on_other_rows(device):
    # the same row through a batch of one and a batch of 65: the mask belongs to the row's number
    case = Case(m=65, k=203, device=device)
    x, a, scale, p, seed, child, _ = arguments("lora_shrink", case)
    many, mask = torch.ops.lowmem.lora_shrink(x, a, scale, p, seed, child, True)
    one, row = torch.ops.lowmem.lora_shrink(x[:1], a, scale, p, seed, child, True)
    assert torch.equal(mask[:1], row)
    torch.testing.assert_close(many[:1], one)


# ------------------------------------------------------------------------------------------------------ not finite


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_x_counts_where_kept_and_nowhere_else(value, device):
    for precision in ("fp32", "bf16"):
        t = tensors(Case(m=12, k=70, precision=precision, device=device))
        x, keep = t["x"], t["keep"]
        dropped, kept = int((~keep[4]).nonzero()[0]), int(keep[7].nonzero()[0])
        x[4, dropped] = value
        x[7, kept] = value
        args = (x, t["a"], 1.0, 0.1, t["seed"], 3, True)
        s, _ = check("lora_shrink", args)
        bad_rows = ~s.isfinite().all(1)
        assert bad_rows.nonzero().flatten().tolist() == [7]
        for mask, seed in ((t["mask"], None), (None, t["seed"])):
            (da,) = check("lora_da", (t["ds"], x, mask, 0.1, seed, 3))
            bad_columns = ~da.isfinite().all(0)
            assert bad_columns.nonzero().flatten().tolist() == [kept]


def test_nan_gradient_stays_in_its_row_and_out_of_dropped_places(device):
    t = tensors(Case(m=12, k=70, device=device))
    for mask, seed in ((t["mask"], None), (None, t["seed"])):
        out, ds = t["out"].clone(), t["ds"].clone()
        ds[5, 0] = torch.nan
        torch.ops.lowmem.lora_masked_expand_(out, ds, t["a"], mask, 0.1, seed, 3, True)
        assert torch.equal(out.isnan().any(1).nonzero().flatten().cpu(), torch.tensor([5]))
        assert torch.equal(out[5].isnan(), t["keep"][5])


# ----------------------------------------------------------------------------------------------- beyond 2**31 elements


def resident_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 * 1024 if sys.platform == "darwin" else 1024)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("argument", ["x", "dy", "s", "out"])
def test_rows_further_apart_than_32_bits_reach(argument, precision, device):
    case = Case(m=3, k=45, n=33, r=5, precision=precision, device=device)
    t = tensors(case)
    small = t[argument]
    before = resident_mb()
    huge = huge_view(*small.shape, small.dtype, device)
    huge.copy_(small)
    # every row starts 2**30 elements behind the one before: the last at 2**31, past int32
    drop = (t["mask"], case.p, None, case.child)
    if argument == "x":
        calls = {
            "lora_shrink": (huge, t["a"], case.scale, case.p, t["seed"], case.child, True),
            "lora_expand": (huge, t["w"], t["s"], t["b"], t["bias"]),
            "lora_da": (t["ds"], huge, *drop),
        }
    elif argument == "dy":
        calls = {"lora_dy": (huge, t["b"], t["s"], case.scale), "lora_dx": (huge, t["w"], t["ds"], t["a"], *drop)}
    elif argument == "s":
        calls = {
            "lora_expand": (t["x"], t["w"], huge, t["b"], t["bias"]),
            "lora_dy": (t["dy"], t["b"], huge, case.scale),
        }
    else:
        calls = {}
        expected = reference_pair(functional("lora_masked_expand_", _expand_into), small, t["ds"], t["a"], *drop, True)
        torch.ops.lowmem.lora_masked_expand_(huge, t["ds"], t["a"], *drop, True)
        assert_close_to_reference(huge.contiguous(), expected[0][0], expected[1][0], terms=expected[0][0].abs() + 10)
    for name, args in calls.items():
        check(name, args, what=f"{argument} at huge strides")
    if device == "cpu":
        assert resident_mb() - before < 500, "huge_view touched the memory between its rows"


def _expand_into(*args):
    from lowmem.ops.lora import masked_expand_reference

    masked_expand_reference(*args)


def test_columns_further_apart_than_32_bits_reach(device):
    t = tensors(Case(m=5, k=3, precision="bf16", device=device))
    huge = huge_view(3, 5, torch.bfloat16, device).t()
    huge.copy_(t["x"])
    check("lora_shrink", (huge, t["a"], 1.0, 0.1, t["seed"], 3, True))
    check("lora_da", (t["ds"], huge, t["mask"], 0.1, None, 3))


# ------------------------------------------------------------------------------------------ torch's view of an operator


@pytest.mark.parametrize("p", [0.0, 0.1])
@every_operator
def test_opcheck(name, p, device):
    op = getattr(torch.ops.lowmem, name).default
    for case in (
        Case(p=p, device=device),
        Case(p=p, bits=False, base=False, bias=False, precision="bf16", device=device),
    ):
        torch.library.opcheck(op, arguments(name, case))


@every_operator
def test_fake_agrees_on_shape_dtype_and_strides(name, device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for case in (Case(device=device), Case(layout="transposed", device=device), Case(m=0, device=device, p=0.0)):
        args = arguments(name, case)
        if name == "lora_masked_expand_":
            continue
        real = served(name)(*args)
        with FakeTensorMode() as mode:
            fake = served(name)(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
        for r, f in zip(real, fake, strict=True):
            assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride()), case


@every_operator
def test_differentiating_through_a_bare_operator_raises(name, device):
    args = tuple(
        a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in arguments(name, Case(device=device))
    )
    op = getattr(torch.ops.lowmem, name)
    with pytest.raises(RuntimeError, match=f"lowmem.{name}: the operator has no derivative of its own"):
        op(*args)
    with torch.no_grad():
        op(*args)
    with torch.inference_mode():
        op(*arguments(name, Case(device=device)))


@pytest.mark.parametrize(
    ("name", "position", "change"),
    [
        ("lora_shrink", 1, lambda a: a[:, :-1]),
        ("lora_dy", 1, lambda b: b[:-1]),
        ("lora_dy", 2, lambda s: s[:-1]),
        ("lora_masked_expand_", 1, lambda ds: ds[:-1]),
        ("lora_masked_expand_", 2, lambda a: a[:, :-1]),
        ("lora_masked_expand_", 3, lambda mask: mask[:, :-1]),
        ("lora_dx", 3, lambda a: a[:-1]),
        ("lora_da", 1, lambda x: x[:-1]),
        ("lora_da", 2, lambda mask: mask[:-1]),
    ],
)
def test_mismatched_shapes_raise_and_write_nothing(name, position, change, device):
    args = list(arguments(name, Case(m=40, k=100, device=device)))
    args[position] = change(args[position])
    before = args[0].clone()
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        getattr(torch.ops.lowmem, name)(*args)
    assert torch.equal(args[0], before)


def test_the_mask_scale_is_exact_for_p_in_65536ths(device):
    # with ds = a = 1 the kept elements are inv_keep itself, in fp32 to the last bit
    for p in (0.1, 0.5, 0.9, 65535 / 65536):
        out = torch.zeros(64, 64, device=device)
        one = torch.ones(64, 1, device=device)
        torch.ops.lowmem.lora_masked_expand_(out, one, one.t(), None, p, torch.tensor([SEED], device=device), 0, True)
        keep = keep_mask(64, 64, p, torch.tensor([SEED], device=device))
        torch.testing.assert_close(out, keep * inv_keep(p), rtol=2e-7, atol=0)


@every_operator
def test_large_enough_to_be_split_over_threads(name, device):
    # several row and column blocks, none of them full
    for precision, p, bits in (("fp32", 0.0, True), ("fp32", 0.1, True), ("bf16", 0.1, False)):
        case = Case(m=523, k=1093, n=1031, r=24, precision=precision, p=p, bits=bits, device=device)
        check_case(name, case, threads=2)
