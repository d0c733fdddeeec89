"""Norms, activations and SwiGLU: every form of what backward keeps, against float64, within the bound of that form."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_cpu_kernels import run_at
from torch import nn

import lowmem
from lowmem.ops import activation as family
from lowmem.ops import activation_norm as norms
from lowmem.ops import activation_saved as saved_forms
from lowmem.ops import rms_norm, swiglu
from lowmem.testing import (
    COLUMNS,
    DTYPES,
    LAYOUTS,
    ROWS,
    assert_close_to_reference,
    huge_view,
    poison_empties,
    reference_pair,
    saved_bytes,
)

pytestmark = pytest.mark.usefixtures("poisoned")
ops = torch.ops.lowmem
FORMS = {"norm": (0, 1), "act": (0, 1, 2, 3), "swiglu": (0, 1)}


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


def check(actual, fn, *args, terms=None):
    """The accuracy rule on every floating result; byte results must be the reference's."""
    exact, lowprec = reference_pair(fn, *args)
    for i, (a, e, low) in enumerate(zip(as_tuple(actual), as_tuple(exact), as_tuple(lowprec), strict=True)):
        if a.is_floating_point():
            assert_close_to_reference(a, e, low, terms=terms, what=f"{fn.__name__}[{i}]")
        else:
            assert torch.equal(a, low), f"{fn.__name__}[{i}]: {int((a != low).sum())} of {a.numel()} bytes differ"


def check_all(x, u, dy, weight, bias):
    """Every operator on one problem: x, u and dy ``[M, K]``, weight and bias ``[K]``."""
    k = x.shape[1]
    for center in (False, True):
        for residual in (None, u):
            y, summed, _, stats = ops.norm_forward(x, residual, weight, bias, 1e-5, center, 0)

            def norm(x, residual, weight, bias, center=center):
                y, summed, _, stats = norms.norm_reference(x, residual, weight, bias, 1e-5, center, 0)
                return y, summed, stats

            large = None if stats.numel() == 0 else stats[:, -1].abs().max().double() * x.double().abs().sum()
            check((y, summed, stats), norm, x, residual, weight, bias, terms=large)
        for form in FORMS["norm"]:
            y, _, packed, stats = ops.norm_forward(x, None, weight, bias, 1e-5, center, form)
            kept = packed if form else x

            def norm_grad(dy, dsum, kept, weight, stats, center=center, form=form):
                return norms.norm_grad_reference(dy, dsum, kept, weight, stats, center, form, True, True)

            got = ops.norm_backward(dy, u, kept, weight, stats, center, form, True, True)
            terms = None
            if dy.numel():
                n = stats[:, -1].double().abs().max() * (x.double().abs().max() + 1)
                terms = n * dy.double().abs().sum() * (1 + weight.double().abs().max())
            check(got, norm_grad, dy, u, kept, weight, stats, terms=terms)
    for kind in range(3):
        for form in FORMS["act"]:

            def act(x, kind=kind):
                return family.act_reference(x, kind, 0)[0]

            def act_grad(dy, kept, kind=kind, form=form):
                return family.act_grad_reference(dy, kept, kind, form)

            y, codes = ops.act_forward(x, kind, form)
            check(y, act, x)
            kept = codes if form else x
            check(ops.act_backward(dy, kept, kind, form), act_grad, dy, kept)
            if form:
                check_codes(x, codes, kind, form)
    for form in FORMS["swiglu"]:
        h, packed_g, packed_u = ops.swiglu_forward(x, u, form)
        check(h, lambda g, u: family.swiglu_reference(g, u, 0)[0], x, u)
        kept = (packed_g, packed_u) if form else (x, u)

        def glu_grad(dh, g, u, form=form):
            return family.swiglu_grad_reference(dh, g, u, form)

        check(ops.swiglu_backward(dy, *kept, form), glu_grad, dy, *kept)
        if form:
            assert torch.equal(packed_g, saved_forms.pack_reference(x))
            again = ops.swiglu_from_fp8(packed_g, packed_u, x.shape[0], k, x.dtype)
            g, u8 = (ops.fp8_unpack(t, x.shape[0], k, torch.float64) for t in kept)
            lowprec = family.swiglu_reference(g.to(x.dtype), u8.to(x.dtype), 0)[0]
            assert_close_to_reference(again, family.swiglu_reference(g, u8, 0)[0], lowprec)


def check_codes(x, codes, kind, form):
    """FP8 groups and 2-bit codes to the bit; a 4-bit code may fall to the neighbour where f' lies on a boundary."""
    want = family.act_reference(x, kind, form)[1]
    if form != family.DERIV4:
        assert torch.equal(codes, want)
        return
    ours, theirs = (family.unpack_codes(t, 4, 2 * t.shape[1]) for t in (codes, want))
    assert int((ours - theirs).abs().max() if ours.numel() else 0) <= 1
    slope = family.evaluate(x.double(), kind)[1] * family.STEPS[kind]
    edge = (slope - slope.floor() - 0.5).abs() < 1e-4
    assert bool((edge | (ours == theirs)[:, : x.shape[1]]).all())
    assert bool((ours[:, x.shape[1] :] == 1).all())


def problem(m, k, dtype, device="cpu", layout="contiguous"):
    x, u, dy = (torch.randn(m, k, device=device) * scale for scale in (3, 1, 1))
    vary = LAYOUTS[layout] if m else (lambda t: t)
    weight, bias = torch.randn(k, device=device), torch.randn(k, device=device)
    return *(vary(t).to(dtype) if layout == "contiguous" else vary(t.to(dtype)) for t in (x, u, dy)), weight, bias


# ----------------------------------------------------------------------------------------------------------- operators


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shape(device, dtype):
    for m, k in [(m, k) for i, m in enumerate(ROWS) for k in COLUMNS[i % 2 :: 2]]:
        check_all(*problem(m, k, dtype, device))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(device, layout):
    for dtype in (torch.float32, torch.bfloat16):
        check_all(*problem(7, 260, dtype, device, layout))


@given(st.integers(1, 5), st.integers(1, 300), st.sampled_from(DTYPES))
def test_hypothesis_shapes(m, k, dtype):
    with poison_empties():
        check_all(*problem(m, k, dtype))


def test_offsets_beyond_32_bits(device):
    x = huge_view(3, 40, torch.bfloat16, device)
    x[2] = torch.randn(40)
    dense = x.clone()
    assert torch.equal(ops.norm_forward(x, x, None, None, 1e-5, False, 1)[0],
                       ops.norm_forward(dense, dense, None, None, 1e-5, False, 1)[0])  # fmt: skip
    assert torch.equal(ops.fp8_pack(x), ops.fp8_pack(dense))
    assert all(map(torch.equal, ops.act_forward(x, 0, 2), ops.act_forward(dense, 0, 2)))
    assert all(map(torch.equal, ops.swiglu_backward(x, x, x, 0), ops.swiglu_backward(dense, dense, dense, 0)))


def test_registration(device):
    x, u, dy, weight, bias = problem(3, 130, torch.float32, device)
    opcheck = torch.library.opcheck
    packed = ops.fp8_pack(x)
    opcheck(ops.fp8_pack.default, (x,))
    opcheck(ops.fp8_unpack.default, (packed, 3, 130, torch.bfloat16))
    for center, form in ((False, 1), (True, 0)):
        args = (x, u, weight, bias, 1e-5, center, form)
        opcheck(ops.norm_forward.default, args)
        _, _, n, stats = ops.norm_forward(*args)
        opcheck(ops.norm_backward.default, (dy, u, n if form else x, weight, stats, center, form, True, not center))
    for form in range(4):
        opcheck(ops.act_forward.default, (x, 0, form))
        kept = ops.act_forward(x, 0, form)[1] if form else x
        opcheck(ops.act_backward.default, (dy, kept, 0, form))
    for form, kept in ((0, (x, u)), (1, (packed, packed))):
        opcheck(ops.swiglu_forward.default, (x, u, form))
        opcheck(ops.swiglu_backward.default, (dy, *kept, form))
    opcheck(ops.swiglu_from_fp8.default, (packed, packed, 3, 130, torch.float32))


def test_two_threads_give_the_same_bits(two_threads):
    x, u, dy, weight, bias = problem(200, 300, torch.float32)
    stats = ops.norm_forward(x, None, weight, bias, 1e-5, True, 0)[3]
    two = ops.norm_backward(dy, None, x, weight, stats, True, 0, True, True)
    torch.set_num_threads(1)
    assert all(map(torch.equal, two, ops.norm_backward(dy, None, x, weight, stats, True, 0, True, True)))


# one process a level: the level is chosen at the first call
LEVEL_SCRIPT = """
import torch
import test_activation, test_activation_loss

torch.manual_seed(0)
for dtype in test_activation.DTYPES:
    for m, k in ((1, 1), (3, 33), (5, 260)):
        test_activation.check_all(*test_activation.problem(m, k, dtype))
test_activation.test_every_code_survives("cpu")
test_activation.test_ties_go_to_the_even_code("cpu")
test_activation_loss.test_the_rows_operator_against_its_reference("cpu")
print("all checked")
"""


@pytest.mark.slow
@pytest.mark.parametrize("level", ["plain", "avx2", "avx512"])
def test_every_instruction_set(level):
    done = run_at(level, LEVEL_SCRIPT)
    if "that this processor has" in done.stderr:
        pytest.skip(f"this processor has no {level}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all checked" in done.stdout


# ---------------------------------------------------------------------------------------------------------- FP8 groups


def test_every_code_survives(device):
    """Each finite E4M3 value, at several scales, packs to its own code."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).float()
    finite = values.isfinite()
    row = torch.cat([values[finite], torch.full((2,), 448.0)]).view(2, 128).to(device)
    for exponent in (-100, -3, 0, 7, 100):
        packed = ops.fp8_pack(row * 2.0**exponent)
        assert torch.equal(packed[:254].cpu(), codes[finite])
        assert packed[256:].tolist() == [127 + exponent] * 2
        assert torch.equal(ops.fp8_unpack(packed, 2, 128, torch.float32), row * 2.0**exponent)


def halfway(device):
    """The middles between neighbouring positive codes (ties go to the even one), and the largest value: ``[126]``."""
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return torch.cat([(values[1:-1] + values[2:]) / 2, values[-1:]]).to(device)


def test_ties_go_to_the_even_code(device):
    codes = ops.fp8_pack(halfway(device)[None])[:126].cpu().int()
    below = torch.arange(1, 126)
    assert torch.equal(codes[:125], (below + below % 2).int()) and int(codes[125]) == 126


@given(st.integers(1, 400), st.floats(-30, 30), st.integers(0, 2**31))
def test_the_error_of_an_element(k, magnitude, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, k, generator=generator) * torch.exp(torch.randn(2, k, generator=generator) * 3) * 2**magnitude
    back = ops.fp8_unpack(ops.fp8_pack(x), 2, k, torch.float32)
    most = F.pad(x.abs(), (0, -k % 128)).view(2, -1, 128).amax(2).repeat_interleave(128, 1)[:, :k]
    assert bool(((back - x).abs() <= torch.maximum(x.abs() / 16, most / 223 / 1024)).all())


def test_special_values(device):
    inf, nan = math.inf, math.nan
    row = torch.tensor([[0.0, -0.0, inf, -inf, nan, 1.0, -2.0, 2.0**-149]], device=device)
    back = ops.fp8_unpack(ops.fp8_pack(row), 1, 8, torch.float32)[0]
    assert bool(back[2:5].isnan().all()), "not finite must stay visible"
    assert back[5:].tolist() == [1.0, -2.0, 0.0] and back[:2].tolist() == [0.0, 0.0]
    for value in (0.0, 3.0, -1e-40, 3e38, inf, nan):  # groups of one value, as COAT's own format cannot hold
        x = torch.full((1, 130), value, device=device)
        back = ops.fp8_unpack(ops.fp8_pack(x), 1, 130, torch.float32)
        if math.isfinite(value):
            assert bool(((back - x).abs() <= abs(value) / 16 + 2.0**-136).all())
        else:
            assert bool(back.isnan().all())
    assert ops.fp8_pack(torch.zeros(0, 5, device=device)).numel() == 0
    with pytest.raises(RuntimeError, match=r"fp8_unpack: packed: expected 6 contiguous bytes"):
        ops.fp8_unpack(torch.zeros(5, dtype=torch.uint8), 1, 5, torch.float32)


# ------------------------------------------------------------------------------------ gradients of public functions


def exact_gradient(fn, inputs, upstream):
    wide = [t.detach().double().requires_grad_() for t in inputs]
    y = fn(*wide)
    return y, torch.autograd.grad(y, wide, upstream.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", family.KINDS)
def test_derivative_forms_within_their_stated_bounds(device, dtype, kind):
    """|dx - exact| per option: rounding; max|f''| |x - x8|; 1 / (2 s); deriv2's largest distance."""
    x = torch.linspace(-12, 12, 5003, device=device)[None].to(dtype).requires_grad_()
    dy = torch.randn(1, 5003, device=device).to(dtype)
    f = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}[kind]
    _, (exact,) = exact_gradient(f, [x], dy)
    torch_dx = torch.autograd.grad(f(x), x, dy)[0].double()
    rounding = exact.abs() * torch.finfo(dtype).eps + 2 * (torch_dx - exact).abs().max()
    x8 = ops.fp8_unpack(ops.fp8_pack(x.detach()), 1, 5003, torch.float64)
    bend = 0.5 if kind == "silu" else 0.8
    step = 1 / (2 * family.STEPS[family.KINDS[kind]])
    far = 0.541 if kind == "silu" else 0.55
    bounds = {
        "bf16": 0 * exact,
        "recompute": 0 * exact,
        "fp8": bend * (x8 - x.double()).abs(),
        "deriv4": torch.full_like(exact, step),
        "deriv2": torch.full_like(exact, far),
    }
    for save, bound in bounds.items():
        y = lowmem.ops.act(x, kind, save=save)
        (dx,) = torch.autograd.grad(y, x, dy)
        error = (dx.double() - exact).abs()
        assert bool((error <= bound * dy.double().abs() + rounding).all()), save
        assert torch.equal(y, lowmem.ops.act(x, kind)), "the output does not depend on what is kept"
    # the codes' mean error over N(0, 1) inputs, against the mean derivative of a half
    normal = torch.randn(1, 100_000, device=device)
    slope = family.evaluate(normal.double(), family.KINDS[kind])[1]
    for save in ("deriv4", "deriv2"):
        form = saved_forms.FORMS[save]
        codes = ops.act_forward(normal, family.KINDS[kind], form)[1]
        got = ops.act_backward(torch.ones_like(normal), codes, family.KINDS[kind], form).double()
        assert abs(float((got - slope).mean())) < 0.01


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_gradients(device, center, dtype):
    x, other, dy, weight, bias = problem(9, 320, dtype, device)
    weight = (weight.abs() + 1).requires_grad_()
    bias = bias.requires_grad_() if center else None
    ours = lowmem.ops.layer_norm if center else rms_norm
    theirs = (
        (lambda x, w, b: F.layer_norm(x, (320,), w, b, 1e-5)) if center else lambda x, w: F.rms_norm(x, (320,), w, 1e-5)
    )
    inputs = [x.requires_grad_(), weight] + ([bias] if center else [])
    _, exact = exact_gradient(theirs, inputs, dy)
    for options in ({}, {"save": "recompute"}, {"save": "fp8"}, {"share_output": True}):
        y = ours(*inputs, eps=1e-5, **options)
        got = torch.autograd.grad(y, inputs, dy)
        rms = x.detach().double().std(1, keepdim=True, unbiased=False) if center else (
            x.detach().double().square().mean(1, keepdim=True).sqrt())  # fmt: skip
        n = (x.detach().double() - (x.detach().double().mean(1, keepdim=True) if center else 0)) / rms
        eps = torch.finfo(dtype).eps
        off = (n.abs() + (bias.double().abs() if center else 0)) * eps * 2 * bool(options.get("share_output"))
        if options.get("save") == "fp8":
            off = n.abs() / 16 + n.abs().amax(1, keepdim=True) / 223 / 1024
        dn = dy.double() * weight.detach().double()
        slope, shake = (dn * n).mean(1, keepdim=True).abs(), (dn.abs() * off).mean(1, keepdim=True)
        bound = (slope * off + (n.abs() + off) * shake) / rms
        rounding = exact[0].abs() * eps + (dn.abs().amax() / rms) * 4e-6 + 1e-6
        assert bool(((got[0].double() - exact[0]).abs() <= bound + rounding).all()), options
        dw = (dy.double().abs() * off).sum(0) + exact[1].abs() * eps + 1e-3
        assert bool(((got[1].double() - exact[1]).abs() <= dw).all()), options
        if center:
            torch.testing.assert_close(got[2].double(), exact[2], rtol=eps, atol=1e-4)


def test_residual_in_one_pass(device):
    x, other, dy, weight, _ = problem(5, 96, torch.float64, device)
    x, other = x.requires_grad_(), other.requires_grad_()
    weight = weight.double().requires_grad_()
    for save in norms.NORM_SAVES[::2]:
        y, summed = rms_norm(x, weight, residual=other, save=save)
        want = x + other, F.rms_norm(x + other, (96,), weight, 1e-6)
        torch.testing.assert_close((summed, y), want)
        upstream = (dy, dy * 0.3)
        got = torch.autograd.grad((summed, y), (x, other, weight), upstream)
        torch.testing.assert_close(got, torch.autograd.grad(want, (x, other, weight), upstream))
        (alone,) = torch.autograd.grad(rms_norm(x, weight, residual=other, save=save)[1], x, dy)
        assert torch.equal(alone, dy)


def test_swiglu_gradients(device):
    for dtype in (torch.float32, torch.bfloat16):
        g, u, dh, _, _ = problem(6, 300, dtype, device)
        g, u = g.requires_grad_(), u.requires_grad_()
        _, exact = exact_gradient(lambda g, u: F.silu(g) * u, [g, u], dh)
        for save in norms.NORM_SAVES:
            got = torch.autograd.grad(swiglu(g, u, save=save), (g, u), dh)
            eps = torch.finfo(dtype).eps
            off_g, off_u = ((ops.fp8_unpack(ops.fp8_pack(t.detach()), 6, 300, torch.float64) - t.double()).abs()
                            if save == "fp8" else 0 * t.double() for t in (g, u))  # fmt: skip
            d = dh.double().abs()
            bounds = d * (1.1 * off_u + 0.5 * off_g * (u.double().abs() + off_u)), d * 1.1 * off_g
            for a, e, bound in zip(got, exact, bounds, strict=True):
                assert bool(((a.double() - e).abs() <= bound + e.abs() * eps + 1e-5).all()), save


def test_gradcheck(device):
    x, u, _, weight, bias = problem(3, 5, torch.float64, device)
    x, u, weight, bias = (t.double().requires_grad_() for t in (x, u, weight, bias))
    gradcheck = torch.autograd.gradcheck
    for share in (False, True):
        assert gradcheck(lambda x, u, w, s=share: rms_norm(x, w, residual=u, share_output=s), (x, u, weight))
        assert gradcheck(lambda x, w, b, s=share: lowmem.ops.layer_norm(x, w, b, share_output=s), (x, weight, bias))
    for kind in family.KINDS:
        assert gradcheck(lambda x, kind=kind: lowmem.ops.act(x, kind), (x,))
    assert gradcheck(swiglu, (x, u))
    for y in (rms_norm(x), swiglu(x, u), lowmem.ops.act(x, "silu")):
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(y.sum(), x, create_graph=True)


# ------------------------------------------------------------------------------------------------------------- modules

MODULES = [
    (lowmem.nn.RMSNorm, (40,), norms.NORM_SAVES),
    (lowmem.nn.LayerNorm, (40,), norms.NORM_SAVES),
    (lowmem.nn.SiLU, (), family.ACT_SAVES),
    (lowmem.nn.GELU, (), family.ACT_SAVES),
    (lowmem.nn.SwiGLU, (), norms.NORM_SAVES),
]
CASES = [pytest.param(cls, args, save, id=f"{cls.__name__}-{save}") for cls, args, saves in MODULES for save in saves]


def inputs_of(cls, device, shape=(2, 3, 40), dtype=torch.float32):
    count = 2 if cls is lowmem.nn.SwiGLU else 1
    return [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(count)]


@pytest.mark.parametrize("cls, args, save", CASES)
def test_saved_bytes_by_formula(device, cls, args, save):
    """16-bit inputs of 6 rows and 256 columns, which have two groups each."""
    module = cls(*((256,) if args else ()), save=save).to(device)
    inputs = inputs_of(cls, device, (2, 3, 256), torch.bfloat16)
    got = saved_bytes(lambda: module(*inputs))
    each = {"bf16": 512, "recompute": 512, "fp8": 258, "deriv4": 128, "deriv2": 64}[save] * 6
    stats = {lowmem.nn.RMSNorm: 4, lowmem.nn.LayerNorm: 8}.get(cls, 0) * 6
    assert got == each * len(inputs) + stats


@pytest.mark.parametrize("cls, args, save", CASES)
def test_compile_and_checkpoint(device, cls, args, save):
    module = cls(*args, save=save).to(device)
    inputs = inputs_of(cls, device)
    want = module(*inputs)
    upstream = torch.randn_like(want)
    grads = torch.autograd.grad(want, inputs, upstream)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close((compiled, *torch.autograd.grad(compiled, inputs, upstream)), (want, *grads))
    for reentrant in (True, False):
        y = torch.utils.checkpoint.checkpoint(module, *inputs, use_reentrant=reentrant)
        for t in inputs:
            t.grad = None
        y.backward(upstream)
        assert torch.equal(y, want) and all(torch.equal(t.grad, g) for t, g in zip(inputs, grads, strict=True))


def test_modules_are_drop_in(device):
    x = torch.randn(4, 40, device=device)
    for ours, theirs in (
        (lowmem.nn.RMSNorm(40), nn.RMSNorm(40, eps=1e-6)),
        (lowmem.nn.LayerNorm(40), nn.LayerNorm(40)),
        (lowmem.nn.LayerNorm(40, bias=False), nn.LayerNorm(40, bias=False)),
        (lowmem.nn.RMSNorm(40, elementwise_affine=False), nn.RMSNorm(40, 1e-6, elementwise_affine=False)),
        (lowmem.nn.GELU(), nn.GELU()),
        (lowmem.nn.GELU("tanh"), nn.GELU("tanh")),
        (lowmem.nn.SiLU(), nn.SiLU()),
    ):
        theirs = theirs.to(device)
        assert set(ours.state_dict()) == set(theirs.state_dict())
        for value in theirs.state_dict().values():
            value.normal_()
        ours.to(device).load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(x), theirs(x))
        assert repr(ours)


def test_recipes_rebuild_the_output(device):
    x, u, _, weight, bias = problem(5, 200, torch.bfloat16, device)
    x, u = x.requires_grad_(), u.requires_grad_()
    made = []
    for save in ("recompute", "fp8"):
        made += [(rms_norm(x, weight, save=save), save), (lowmem.ops.layer_norm(x, weight, bias, save=save), save)]
        made += [(swiglu(x, u, save=save), save), (lowmem.ops.act(x, "gelu", save=save), save)]
    for y, save in made:
        recipe = saved_forms.offered(y)
        with torch.no_grad():
            again = saved_forms.rebuild(recipe.how, recipe.numbers, recipe.tensors, 5, 200, torch.bfloat16)
        if save == "recompute":
            assert torch.equal(again, y), recipe.how
        else:
            # each factor is within 1 / 16
            assert float((again - y).detach().float().norm() / y.detach().float().norm()) < 2 / 16, recipe.how
    y = made[0][0]
    with torch.no_grad():
        y.mul_(2)
    assert saved_forms.offered(y) is None, "y was written to"
    assert saved_forms.offered(swiglu(x, u)) is None
    with torch.no_grad():
        assert saved_forms.offered(swiglu(x, u, save="fp8")) is None


# ----------------------------------------------------------------------------------------------------------- bad input


def test_not_finite_input_shows(device):
    for value in (math.nan, math.inf):
        x = torch.randn(2, 130, device=device)
        x[0, 3] = value
        for save in norms.NORM_SAVES:
            y = rms_norm(x.requires_grad_(), save=save)
            assert not bool(y[0].isfinite().all()) and bool(y[1].isfinite().all())
            (dx,) = torch.autograd.grad(y.sum(), x)
            assert bool(dx[0].isnan().any()) and bool(dx[1].isfinite().all())
            x = x.detach()
        for save in family.ACT_SAVES:
            y = lowmem.ops.act(x.requires_grad_(), "silu", save=save)
            assert not bool(y[0, 3].isfinite()) and int((~y.isfinite()).sum()) == 1
            (dx,) = torch.autograd.grad(y.sum(), x)
            others = torch.cat([dx[0, :3], dx[0, 4:], dx[1]])
            assert bool(others.isfinite().all())
            if save.startswith("deriv"):  # a code cannot hold NaN: derivative 0; infinity has its limit 1
                assert abs(float(dx[0, 3]) - (1.0 if value == math.inf else 0.0)) < 1e-5
            x = x.detach()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (1,), (7,), (2, 2, 1)])
def test_empty_and_odd_shapes(device, shape):
    x, u = (torch.randn(shape, device=device).requires_grad_() for _ in range(2))
    weight = torch.ones(shape[-1], device=device).requires_grad_()
    for save in norms.NORM_SAVES:
        y = rms_norm(x, weight, save=save), swiglu(x, u, save=save), lowmem.ops.act(x, "gelu", save=save)
        grads = torch.autograd.grad([t.sum() for t in y], (x, u, weight))
        assert [t.shape for t in grads] == [x.shape, u.shape, weight.shape]
        assert all(bool(t.isfinite().all()) for t in grads) and (x.numel() or not grads[2].any())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: rms_norm(x.long()), "rms_norm: x: expected a floating dtype"),
        (lambda x: rms_norm(x.to(torch.float8_e5m2)), "rms_norm: x: expected float64"),
        (lambda x: rms_norm(torch.tensor(1.0)), r"rms_norm: x: expected shape \[..., K\]"),
        (lambda x: rms_norm(x[:, :0]), r"rms_norm: x: expected shape \[..., K\] with K >= 1"),
        (lambda x: rms_norm(x, torch.ones(3)), r"rms_norm: weight: expected shape \[4\]"),
        (lambda x: rms_norm(x, torch.ones(4).long()), "rms_norm: weight: expected a floating dtype"),
        (lambda x: rms_norm(x, residual=x.double()), "rms_norm: residual: expected shape"),
        (lambda x: rms_norm(x, eps=-1.0), "rms_norm: eps: expected a finite number"),
        (lambda x: rms_norm(x, save="deriv4"), "rms_norm: save: expected 'bf16', 'fp8' or 'recompute', got 'deriv4'"),
        (lambda x: rms_norm(x, save="fp8", share_output=True), "rms_norm: share_output: expected save='bf16'"),
        (lambda x: lowmem.ops.layer_norm(x, None, torch.ones(5)), r"layer_norm: bias: expected shape \[4\]"),
        (lambda x: swiglu(x, x[:1]), "swiglu: up: expected shape"),
        (lambda x: swiglu(x, x, save="deriv2"), "swiglu: save: expected"),
        (lambda x: lowmem.ops.act(x, "relu"), "act: kind: expected 'silu'"),
        (lambda x: lowmem.ops.act(x, "silu", save="int8"), "act: save: expected"),
        (lambda x: lowmem.nn.RMSNorm(0), "RMSNorm: normalized_shape: expected"),
        (lambda x: lowmem.nn.LayerNorm((3, 4)), "LayerNorm: normalized_shape: expected"),
        (lambda x: lowmem.nn.LayerNorm(4, save="x"), "LayerNorm: save: expected"),
        (lambda x: lowmem.nn.GELU("erf"), "GELU: approximate: expected"),
        (lambda x: lowmem.nn.SwiGLU("deriv2"), "SwiGLU: save: expected"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises((ValueError, TypeError), match=rf"lowmem\.{message}"):
        call(torch.ones(2, 4))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, b: ops.norm_forward(x, x[:1], None, None, 0.0, False, 0), "norm_forward: residual"),
        (lambda x, b: ops.norm_forward(x, None, None, None, 0.0, False, 2), "norm_forward: form"),
        (
            lambda x, b: ops.norm_backward(x, None, b, None, x[:, :1].clone(), False, 1, False, False),
            "norm_backward: saved",
        ),
        (lambda x, b: ops.act_forward(x, 3, 0), "act_forward: kind"),
        (lambda x, b: ops.act_backward(x, b, 0, 2), "act_backward: saved"),
        (lambda x, b: ops.swiglu_backward(x, x, x.double(), 0), "swiglu_backward: u"),
        (lambda x, b: ops.fp8_pack(x[0]), "fp8_pack: x"),
    ],
)
def test_the_compiled_operators_check_their_arguments(call, message):
    with pytest.raises(RuntimeError, match=rf"lowmem\.{message}: expected"):
        call(torch.ones(2, 4), torch.zeros(3, dtype=torch.uint8))
