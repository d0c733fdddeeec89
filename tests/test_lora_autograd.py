"""lora_linear's values and gradients against plain torch, in every dtype and shape; gradcheck; what is saved."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_cases import PRECISIONS, SEED, Case, check_linear, composed, linear_inputs, run_linear, upstream_like

from lowmem.ops import lora_linear
from lowmem.ops.philox import keep_mask
from lowmem.testing import LAYOUTS, RANKS, saved_for_backward

ALL = ("x", "base", "bias", "a", "b")


@pytest.mark.parametrize("bits", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_matches_plain_torch(precision, bits, device):
    shapes = ((1, 9, 5, 2), (33, 100, 65, 7), (0, 40, 9, 3), (50, 257, 33, 16))
    for (m, k, n, r), p in itertools.product(shapes, (0.0, 0.1, 0.5, 1.0)):
        check_linear(Case(m=m, k=k, n=n, r=r, p=p, precision=precision, bits=bits, device=device))


@pytest.mark.parametrize("option", [{"bias": False}, {"base": False}, {"base": False, "bias": False}])
def test_without_base_or_bias(option, device):
    for precision, p in itertools.product(("fp32", "bf16", "fp16+fp32"), (0.0, 0.1)):
        check_linear(Case(precision=precision, p=p, device=device, **option))


@pytest.mark.parametrize(
    "trainable", [subset for size in range(1, 6) for subset in itertools.combinations(ALL, size)], ids="-".join
)
def test_every_subset_of_gradients(trainable, device):
    for p, bits in ((0.0, True), (0.3, True), (0.3, False)):
        check_linear(Case(m=21, k=70, n=44, p=p, bits=bits, device=device), trainable=trainable)
    check_linear(Case(m=21, k=70, n=44, precision="bf16", device=device), trainable=trainable)


@pytest.mark.parametrize("trainable", [("gate",), ("gate", "b"), ("x", "gate"), (*ALL, "gate")], ids="-".join)
def test_gate(trainable, device):
    for precision, p in itertools.product(("fp64", "fp32", "bf16", "bf16+fp32"), (0.0, 0.3)):
        check_linear(Case(m=21, k=70, n=44, p=p, precision=precision, gate=True, device=device), trainable=trainable)


@pytest.mark.parametrize("r", [*RANKS, 512])
def test_every_rank(r, device):
    for precision in ("fp32", "bf16+fp32"):
        check_linear(Case(m=9, k=70, n=45, r=r, precision=precision, device=device))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout, device):
    for precision in ("fp32", "bf16"):
        check_linear(Case(layout=layout, precision=precision, device=device), trainable=ALL)
        check_linear(Case(adapters=layout, precision=precision, device=device), trainable=ALL)


@pytest.mark.parametrize("lead", [(), (1,), (12,), (3, 4), (2, 3, 2), (0,), (2, 0, 3), (1, 1, 12)])
def test_any_leading_shape(lead, device):
    rows = torch.Size(lead).numel()
    inputs = linear_inputs(Case(m=rows, device=device))
    flat = run_linear(lora_linear, inputs)
    shaped = run_linear(lora_linear, {**inputs, "x": inputs["x"].view(*lead, 100)})
    assert shaped["y"].shape == (*lead, 33) and shaped["x"].shape == (*lead, 100)
    assert torch.equal(shaped["y"].reshape(rows, 33), flat["y"])
    if rows:
        check_linear(Case(m=rows, device=device), lead=lead)
    else:
        assert not shaped["a"].any() and not shaped["b"].any()


def test_three_dimensional_input_whose_rows_do_not_lie_in_one_stride(device):
    # [B, T, K] as a transposed [T, B, K]: reshape has to copy, and backward has to agree with it
    inputs = linear_inputs(Case(m=12, device=device))
    x = inputs["x"].view(4, 3, -1).transpose(0, 1)
    for key, got in run_linear(lora_linear, {**inputs, "x": x}).items():
        torch.testing.assert_close(got, run_linear(composed, {**inputs, "x": x})[key])


def test_upstream_gradient_of_any_stride(device):
    inputs = linear_inputs(Case(m=12, n=32, device=device))
    for shape in ((1, 1), (12, 1), (1, 32)):  # what sum() and mean() send: expanded, stride 0
        grads = []
        for fn in (lora_linear, composed):
            leaves = [inputs[k].detach().requires_grad_() for k in ("x", "a", "b")]
            y = fn(leaves[0], inputs["base"], *leaves[1:], 1.0, p=0.1, seed=inputs["seed"])
            up = upstream_like(y)[: shape[0], : shape[1]].expand(12, 32)
            grads.append(torch.autograd.grad(y, leaves, up))
        for got, expected in zip(*grads, strict=True):
            torch.testing.assert_close(got, expected)


@given(
    m=st.integers(0, 40),
    k=st.integers(1, 150),
    n=st.integers(1, 90),
    r=st.integers(1, 40),
    precision=st.sampled_from(sorted(PRECISIONS)),
    p=st.one_of(st.just(0.0), st.floats(0, 1)),
    bits=st.booleans(),
    base=st.booleans(),
    bias=st.booleans(),
    layout=st.sampled_from(sorted(LAYOUTS)),
    draw=st.integers(0, 1000),
    trainable=st.sets(st.sampled_from(["x", "a", "b"]), min_size=1),
)
def test_any_case(trainable, **fields):
    check_linear(Case(**fields), trainable=tuple(sorted(trainable)))


# ----------------------------------------------------------------------------------------------------------- gradcheck

GRADCHECK = """
import torch
from lowmem.ops import lora_linear
torch.manual_seed(0)
seed = torch.tensor([0x0123456789ABCDEF])
for m, k, n, r, p, bits, base, bias in [
    (3, 5, 4, 2, 0.0, True, True, True),
    (3, 9, 3, 1, 0.5, False, True, False),
    (2, 9, 3, 5, 0.3, True, False, True),
    (2, 6, 3, 2, 1.0, True, True, True),
    (9, 67, 5, 3, 0.3, True, True, True),
]:
    leaf = lambda *shape: torch.randn(*shape, dtype=torch.float64, device=DEVICE, requires_grad=True)
    inputs = (leaf(m, k), leaf(n, k) if base else None, leaf(r, k), leaf(n, r), leaf(n) if bias else None)
    def run(x, w, a, b, c):
        return lora_linear(x, w, a, b, -1.3, bias=c, p=p, seed=seed.to(DEVICE), child=1, save_mask=bits)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=k > 9)
print("checked", torch.ops.lowmem.lora_shrink.default)
"""


def test_gradcheck(device):
    exec(compile(GRADCHECK, "gradcheck", "exec"), {"DEVICE": device})


def test_gradcheck_of_the_reference(runs_under):
    assert "checked" in runs_under("reference", f"DEVICE = 'cpu'\n{GRADCHECK}")


# ------------------------------------------------------------------------------------------------------------ the mask


def test_the_mask_of_backward_is_the_mask_of_forward(device):
    # with base None, A = ones [1, K], B = 1: dx is nonzero exactly where an element was kept, for bits and seed alike
    seed = torch.tensor([SEED], device=device)
    keep = keep_mask(19, 77, 0.4, seed, 5)
    for bits in (True, False):
        x = torch.randn(19, 77, device=device, requires_grad=True)
        a, b = torch.ones(1, 77, device=device), torch.ones(1, 1, device=device)
        y = lora_linear(x, None, a, b, 1.0, p=0.4, seed=seed, child=5, save_mask=bits)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(dx != 0, keep)
        torch.testing.assert_close(y[:, 0], (x.detach() * dx).sum(1))


def test_same_seed_same_bits_and_another_seed_or_child_another_mask(device):
    inputs = linear_inputs(Case(m=40, p=0.5, device=device))
    first = run_linear(lora_linear, inputs)
    again = run_linear(lora_linear, inputs)
    assert all(torch.equal(first[k], again[k]) for k in first)
    for change in ({"child": 4}, {"seed": inputs["seed"] + 1}, {"seed": inputs["seed"] + 2**32}):
        assert not torch.equal(run_linear(lora_linear, {**inputs, **change})["y"], first["y"])


def test_bits_and_seed_only_give_the_same_gradients(device):
    for precision in ("fp32", "bf16+fp32"):
        inputs = linear_inputs(Case(m=40, k=203, precision=precision, device=device))
        bits, drawn = (run_linear(lora_linear, inputs, save_mask=save) for save in (True, False))
        assert all(torch.equal(bits[k], drawn[k]) for k in bits)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_thread_count_does_not_change_a_bit_of_what_our_kernels_compute(precision):
    # base None leaves torch's own GEMMs of the base out: they promise no such thing
    inputs = linear_inputs(Case(m=300, k=515, n=260, r=16, precision=precision))
    t = {key: inputs[key] for key in ("x", "a", "b")}
    s = torch.randn(300, 16).to(t["x"].dtype)
    dy = upstream_like(torch.empty(300, 260, dtype=t["x"].dtype))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            ops = torch.ops.lowmem
            out = torch.zeros_like(t["x"])
            shrunk, mask = ops.lora_shrink(t["x"], t["a"], 1.0, 0.1, inputs["seed"], 0, True)
            ds, db = ops.lora_dy(dy, t["b"], s, 1.0)
            ops.lora_masked_expand_(out, s, t["a"], mask, 0.1, None, 0, True)
            results.append((shrunk, mask, ds, db, out, ops.lora_da(s, t["x"], mask, 0.1, None, 0)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[2], strict=True)), "two runs with two threads"
    from lowmem import _dispatch

    if _dispatch.CPU.loaded:
        assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True)), "one thread against two"


# ------------------------------------------------------------------------------------------------------ what is saved


def saved(inputs, save_mask=True, trainable=("x", "a", "b")):
    leaves = {k: torch.nn.Parameter(inputs[k]) if k in trainable and k != "x" else inputs[k] for k in inputs}
    if "x" in trainable:
        leaves["x"] = inputs["x"].detach().requires_grad_()
    x, base, a, b, scale = (leaves.pop(k) for k in ("x", "base", "a", "b", "scale"))
    fn = lambda: lora_linear(x, base, a, b, scale, save_mask=save_mask, **leaves)  # noqa: E731
    return saved_for_backward(fn, exclude=[t for t in (base, a, b, leaves["bias"]) if t is not None])


@pytest.mark.parametrize("precision", ["bf16", "bf16+fp32"])
def test_saved_for_backward_is_x_s_and_one_bit_an_element(precision, device):
    m, k, n, r = 64, 256, 96, 8
    inputs = linear_inputs(Case(m=m, k=k, n=n, r=r, precision=precision, device=device))
    kept = {(s.shape, s.dtype): s.bytes for s in saved(inputs)}
    assert kept == {
        ((m, k), torch.bfloat16): 2 * m * k,
        ((m, r), torch.bfloat16): 2 * m * r,
        ((m, k // 32), torch.int32): m * k // 8,
    }
    seed_only = sum(s.bytes for s in saved(inputs, save_mask=False))
    assert seed_only == 2 * m * (k + r) + 8
    no_dropout = sum(s.bytes for s in saved({**inputs, "p": 0.0}))
    assert no_dropout == 2 * m * (k + r)


def test_what_no_gradient_needs_is_not_saved(device):
    m, k, r = 64, 320, 8
    inputs = linear_inputs(Case(m=m, k=k, n=96, r=r, precision="bf16", device=device))
    assert [s.shape for s in saved(inputs, trainable=("b",))] == [(m, r), (1,)]  # S and the seed; no x, no bits
    assert (m, k) not in [s.shape for s in saved(inputs, trainable=("x", "b"))]
    assert (m, r) not in [s.shape for s in saved(inputs, trainable=("x", "a"))]


def test_three_layers_over_one_input_hold_it_once(device):
    m, k, n, r = 64, 256, 96, 8
    parts = [linear_inputs(Case(m=m, k=k, n=n, r=r, precision="bf16", draw=d, device=device)) for d in range(3)]
    x = parts[0]["x"].requires_grad_()

    def qkv():
        return [
            lora_linear(x, i["base"], i["a"].requires_grad_(), i["b"].requires_grad_(), 1.0, p=0.1, seed=i["seed"])
            for i in parts
        ]

    weights = [i[key] for i in parts for key in ("base", "a", "b")]
    total = sum(s.bytes for s in saved_for_backward(qkv, exclude=weights))
    assert total == 2 * m * k + 3 * (2 * m * r + m * k // 8)
