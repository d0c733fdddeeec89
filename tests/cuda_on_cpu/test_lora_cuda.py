"""The CUDA kernels of the lora family, executed: against the references by the error rule, and for the same bits in
every order of threads and blocks (each call of the rig runs four times)."""

import pytest
import torch
from lora_cases import SEED, Case, arguments, check, check_case, tensors

from lowmem.ops.philox import keep_mask, pack_bits
from lowmem.testing import LAYOUTS

pytestmark = pytest.mark.emulate

RANKS = (1, 3, 16, 40, 64, 130)
PRECISIONS = ("fp32", "bf16", "fp16", "bf16+fp32", "fp16+fp32")


@pytest.fixture
def expand(rig):
    def run(out, *rest, **kwargs):
        out.copy_(rig.masked_expand(out, *rest, **kwargs))

    return run


# --------------------------------------------------------------------------------------------------- masked expand


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("r", RANKS)
def test_expand_ranks_and_precisions(expand, r, precision):
    case = Case(m=37, k=150, r=r, precision=precision, bits=r % 2 == 0, accumulate=r != 16)
    check_case("lora_masked_expand_", case, implementation=expand)


@pytest.mark.parametrize("m, k", [(1, 1), (2, 8), (31, 7), (33, 128), (40, 257), (65, 32), (100, 129)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_expand_shapes(expand, m, k, precision):
    for p, bits, accumulate in ((0.0, True, False), (0.3, True, True), (0.3, False, False)):
        case = Case(m=m, k=k, r=5, precision=precision, p=p, bits=bits, accumulate=accumulate)
        check_case("lora_masked_expand_", case, implementation=expand)


def test_expand_many_rows_on_few_blocks(expand):
    # one multiprocessor: every block walks over several tiles, and stages `a` once
    args = arguments("lora_masked_expand_", Case(m=1000, k=40, r=17, precision="bf16"))

    def one(out, *rest):
        expand(out, *rest, multiprocessors=1)

    check("lora_masked_expand_", args, implementation=one)
    args = arguments("lora_masked_expand_", Case(m=1000, k=40, r=70, precision="bf16"))
    check("lora_masked_expand_", args, implementation=one)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)])
def test_expand_empty(expand, shape):
    out = torch.empty(shape)
    expand(out, torch.ones(shape[0], 3), torch.ones(3, shape[1]), None, 0.0, None, 0, False)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_expand_bits_equal_seed(rig, precision):
    t = tensors(Case(m=45, k=203, r=9, precision=precision, p=0.37, child=12))
    mask = pack_bits(keep_mask(45, 203, 0.37, t["seed"], 12))
    by_bits = rig.masked_expand(t["out"], t["ds"], t["a"], mask, 0.37, None, 12, True)
    by_seed = rig.masked_expand(t["out"], t["ds"], t["a"], None, 0.37, t["seed"], 12, True)
    assert torch.equal(by_bits, by_seed)
    kept = keep_mask(45, 203, 0.37, t["seed"], 12)
    plain = rig.masked_expand(torch.zeros_like(t["out"]), t["ds"], t["a"], None, 0.37, t["seed"], 12, False)
    assert torch.equal(plain != 0, kept)


def test_expand_everything_dropped(rig):
    t = tensors(Case(m=9, k=50, r=4))
    assert torch.equal(rig.masked_expand(t["out"], t["ds"], t["a"], None, 1.0, t["seed"], 0, True), t["out"])
    gone = rig.masked_expand(t["out"], t["ds"], t["a"], None, 1.0, t["seed"], 0, False)
    assert torch.equal(gone, torch.zeros_like(gone))


def test_expand_dropped_elements_are_zero_whatever_the_product(rig):
    t = tensors(Case(m=5, k=64, r=4, precision="bf16", p=0.5))
    t["a"][0, 3] = torch.inf
    t["a"][1, 17] = torch.nan
    got = rig.masked_expand(t["out"], t["ds"], t["a"], t["mask"], 0.5, None, 3, False)
    assert torch.equal(got[~t["keep"]], torch.zeros_like(got[~t["keep"]]))
    assert got[:, 17][t["keep"][:, 17]].isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_expand_layouts(expand, layout, precision):
    case = Case(m=35, k=72, r=24, precision=precision, layout=layout, adapters=layout)
    check_case("lora_masked_expand_", case, implementation=expand)


@pytest.mark.parametrize("place", ["start", "end"])
@pytest.mark.parametrize("k", [8, 64, 65, 129, 136])
@pytest.mark.parametrize("r", [8, 10])
def test_expand_stays_inside_its_arguments(rig, place, k, r):
    # flush against a page that cannot be touched, at either end; gaps are compared after the run
    for precision in ("fp32", "bf16"):
        args = arguments("lora_masked_expand_", Case(m=33, k=k, r=r, precision=precision))
        rig.masked_expand(*args, place=place)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("k", [9, 31, 123, 255])
def test_expand_ragged_row_end_beside_aligned_rows(rig, k, precision):
    # rows start on 16 bytes, so all but the last columns are taken 16 bytes at a time; what follows them is compared
    args = arguments("lora_masked_expand_", Case(m=33, k=k, r=12, precision=precision, bits=k % 3 == 0))
    wide = {"out": (k + 16 - k % 8, 1), "a": (k + 24 - k % 8, 1), "ds": (16, 1)}
    for place in ("start", "end"):
        assert torch.equal(rig.masked_expand(*args, strides=wide, place=place), rig.masked_expand(*args))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_expand_offsets_beyond_32_bits(rig, precision):
    t = tensors(Case(m=6, k=96, r=8, precision=precision))
    args = (t["out"], t["ds"], t["a"], t["mask"], 0.1, None, 3, True)
    far = {"out": (2**29 + 8, 1), "ds": (2**30, 1), "mask": (2**29 + 1, 1)}
    assert torch.equal(rig.masked_expand(*args, strides=far), rig.masked_expand(*args))
    assert torch.equal(rig.masked_expand(*args, strides={"a": (2**29, 1)}), rig.masked_expand(*args))


def test_expand_rows_beyond_two_tiles_of_seed_use_their_own_row(rig):
    # a mask that repeated between tiles or columns of blocks would show here
    t = tensors(Case(m=70, k=300, r=2, precision="fp32", p=0.5))
    got = rig.masked_expand(torch.zeros(70, 300), t["ds"], t["a"], None, 0.5, torch.tensor([SEED]), 7, False)
    assert torch.equal(got != 0, keep_mask(70, 300, 0.5, torch.tensor([SEED]), 7))


# --------------------------------------------------------------------------------------------------------- dy pass


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("r", RANKS)
def test_dy_ranks_and_precisions(rig, r, precision):
    check_case("lora_dy", Case(m=37, n=300, r=r, precision=precision), implementation=rig.dy)


@pytest.mark.parametrize("m, n", [(1, 1), (2, 8), (16, 512), (17, 7), (33, 513), (130, 40), (300, 100)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dy_shapes(rig, m, n, precision):
    check_case("lora_dy", Case(m=m, n=n, r=5, precision=precision), implementation=rig.dy)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("multiprocessors", [1, 4])
def test_dy_cut_in_both_dimensions(rig, precision, multiprocessors):
    def run(*args):
        return rig.dy(*args, multiprocessors=multiprocessors)

    case = Case(m=200, n=600, r=16, precision=precision)
    check_case("lora_dy", case, implementation=run)
    width, panels, slabs, *_ = rig.module.dy_plan("f32" if precision == "fp32" else "bf16", 200, 600, 16)
    assert panels >= 2 and slabs >= (1 if multiprocessors == 1 else 2) and width == 16


@pytest.mark.parametrize("shape", [(0, 40), (40, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dy_empty_gives_zeros(rig, shape, dtype):
    m, n = shape
    ds, db = rig.dy(torch.ones(m, n, dtype=dtype), torch.ones(n, 3, dtype=dtype), torch.ones(m, 3, dtype=dtype), 2.0)
    assert torch.equal(ds, torch.zeros(m, 3, dtype=dtype)) and torch.equal(db, torch.zeros(n, 3))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dy_layouts(rig, layout, precision):
    check_case(
        "lora_dy", Case(m=35, n=72, r=24, precision=precision, layout=layout, adapters=layout), implementation=rig.dy
    )


@pytest.mark.parametrize("place", ["start", "end"])
@pytest.mark.parametrize("n", [8, 64, 65, 520])
@pytest.mark.parametrize("r", [8, 10])
def test_dy_stays_inside_its_arguments(rig, place, n, r):
    for precision in ("fp32", "bf16"):
        rig.dy(*arguments("lora_dy", Case(m=19, n=n, r=r, precision=precision)), place=place)


def test_dy_ragged_row_end_is_copied_in_part(rig):
    # rows start on 16 bytes, and the last piece of each is 3 elements: cp.async reads these and fills up with zeros
    args = arguments("lora_dy", Case(m=20, n=67, r=11, precision="bf16"))
    padded = {"dy": (72, 1), "s": (16, 1)}
    plain, far = rig.dy(*args), rig.dy(*args, strides=padded)
    assert torch.equal(plain[0], far[0]) and torch.equal(plain[1], far[1])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dy_offsets_beyond_32_bits(rig, precision):
    args = arguments("lora_dy", Case(m=6, n=40, r=8, precision=precision))
    plain = rig.dy(*args)
    far = rig.dy(*args, strides={"dy": (2**29 + 8, 1), "s": (2**30, 1)})
    assert torch.equal(plain[0], far[0]) and torch.equal(plain[1], far[1])


def test_dy_not_finite_stays_where_it_belongs(rig):
    dy, b, s, scale = arguments("lora_dy", Case(m=20, n=30, r=4, precision="bf16"))
    dy[3, 5] = torch.inf
    ds, db = rig.dy(dy, b, s, scale)
    assert not ds[3].isfinite().any() and ds[torch.arange(20) != 3].isfinite().all()
    assert not db[5].isfinite().any() and db[torch.arange(30) != 5].isfinite().all()
