"""lora_linear under autocast, compile, checkpointing, inference mode and functorch; what it says to bad input."""

import itertools

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from lora_cases import Case, check_linear, composed, linear_inputs, run_linear
from torch.utils.checkpoint import checkpoint

from lowmem.ops import lora_linear

# ------------------------------------------------------------------------------------------------------------ autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_inputs_own(dtype, device):
    inputs = linear_inputs(Case(m=20, p=0.3, device=device))
    with torch.autocast(device, dtype=dtype):
        mixed = run_linear(lora_linear, inputs, trainable=("x", "base", "bias", "a", "b"))
        expected = F.linear(inputs["x"], inputs["base"]).dtype
    assert mixed["y"].dtype == expected == dtype
    assert all(mixed[key].dtype == torch.float32 for key in ("x", "base", "bias", "a", "b"))
    # the same as casting x, base and bias by hand: A and B keep their dtype
    cast = {**inputs, **{key: inputs[key].to(dtype) for key in ("x", "base", "bias")}}
    by_hand = run_linear(lora_linear, cast, trainable=("x", "base", "bias", "a", "b"))
    for key, got in mixed.items():
        assert torch.equal(got, by_hand[key].to(got.dtype)), key


def test_autocast_leaves_float64_alone_and_ends_with_the_call(device):
    inputs = linear_inputs(Case(precision="fp64", device=device))
    with torch.autocast(device, dtype=torch.bfloat16):
        y = run_linear(lora_linear, inputs)["y"]
        assert y.dtype == torch.float64
        assert torch.is_autocast_enabled(device)


def test_autocast_over_a_16_bit_base(device):
    inputs = linear_inputs(Case(precision="bf16+fp32", device=device))
    inputs["x"] = inputs["x"].float()  # a norm under autocast hands out fp32
    with torch.autocast(device, dtype=torch.bfloat16):
        y = run_linear(lora_linear, inputs)["y"]
    assert y.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------------- compile


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def block(x, base, a, b, scale, **kwargs):
    """The linear between elementwise neighbours, as in a model."""
    return torch.tanh(lora_linear(torch.sin(x), base, a, b, scale, **kwargs)) * 2


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("p", "save_mask"), [(0.0, True), (0.3, True), (0.3, False)])
def test_compile_aot_eager_gives_eager_bits(p, save_mask, device):
    inputs = linear_inputs(Case(m=20, p=p, precision="fp32", device=device))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    eager = run_linear(block, inputs, save_mask=save_mask)
    for key, got in run_linear(compiled, inputs, save_mask=save_mask).items():
        assert torch.equal(got, eager[key]), key


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("precision", ["fp32", "bf16+fp32"])
def test_compile_inductor_draws_the_same_mask(precision, device):
    compiled = torch.compile(lora_linear, fullgraph=True, backend="inductor")
    check_linear(Case(m=20, p=0.3, precision=precision, device=device), fn=compiled)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compile_with_dynamic_rows_compiles_once(device):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lora_linear, fullgraph=True, backend=counter, dynamic=True)
    for rows in (6, 9, 64):  # none of them another size of the case: dynamo would take the two for one symbol
        inputs = linear_inputs(Case(m=rows, p=0.3, device=device))
        eager = run_linear(lora_linear, inputs)
        for key, got in run_linear(compiled, inputs).items():
            assert torch.equal(got, eager[key]), (rows, key)
        if rows == 6:
            first = counter.frame_count  # a restart to specialise the float p may count here
    assert counter.frame_count == first


@pytest.mark.usefixtures("fresh_dynamo")
def test_compile_under_no_grad_and_autocast(device):
    inputs = linear_inputs(Case(m=20, p=0.3, device=device))
    x, base, a, b, scale = (inputs.pop(key) for key in ("x", "base", "a", "b", "scale"))
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(compiled(x, base, a, b, scale, **inputs), lora_linear(x, base, a, b, scale, **inputs))


# ------------------------------------------------------------------------------------------------------- checkpointing


def layer_with_its_own_seed(x, base, a, b, scale, *, bias, p, child, save_mask=True, **_):
    seed = torch.randint(0, 2**62, (1,), device=x.device)  # drawn inside, as the module does
    y = lora_linear(torch.sin(x), base, a, b, scale, bias=bias, p=p, seed=seed, child=child, save_mask=save_mask)
    return torch.tanh(y)


@pytest.mark.parametrize("save_mask", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_same_mask_again(reentrant, save_mask, device):
    inputs = linear_inputs(Case(m=40, p=0.5, device=device))

    def recomputed(x, base, a, b, scale, **kwargs):
        # another draw between forward and recomputation must not matter: the checkpoint restores the generator
        y = checkpoint(lambda *t: layer_with_its_own_seed(*t, scale, **kwargs), x, base, a, b, use_reentrant=reentrant)
        torch.randint(0, 2**62, (1,), device=x.device)
        return y

    torch.manual_seed(3)
    plain = run_linear(layer_with_its_own_seed, inputs, save_mask=save_mask)
    torch.manual_seed(3)
    again = run_linear(recomputed, inputs, save_mask=save_mask)
    assert all(torch.equal(plain[key], again[key]) for key in plain)
    torch.manual_seed(4)
    other = run_linear(layer_with_its_own_seed, inputs, save_mask=save_mask)
    assert not torch.equal(plain["y"], other["y"])


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("reentrant", [True, False])
def test_compile_around_checkpointing_keeps_forward_and_backward_on_one_mask(reentrant, device):
    # y is linear in x where dropout is the only difference: x . dx = y tells whether both used the same mask
    k = 200
    a, b = torch.ones(1, k, device=device), torch.ones(1, 1, device=device)

    def layer(x):
        seed = torch.randint(0, 2**62, (1,), device=x.device)
        return lora_linear(x, None, a, b, 1.0, p=0.5, seed=seed)

    compiled = torch.compile(lambda x: checkpoint(layer, x, use_reentrant=reentrant), backend="aot_eager")
    x = torch.randn(16, k, device=device, requires_grad=True)
    y = compiled(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close((x * dx).sum(1).detach(), y[:, 0].detach())
    assert 0.4 < (dx != 0).float().mean() < 0.6


# ---------------------------------------------------------------------------------------- modes that have no gradient


def test_double_backward_raises_clearly(device):
    inputs = linear_inputs(Case(device=device))
    leaves = [inputs[key].requires_grad_() for key in ("x", "a", "b")]
    y = lora_linear(leaves[0], inputs["base"], *leaves[1:], 1.0, p=0.1, seed=inputs["seed"])
    with pytest.raises(RuntimeError, match="lowmem.lora_dy: the operator has no derivative of its own"):
        torch.autograd.grad(y.sum(), leaves, create_graph=True)


def test_inference_mode_and_no_grad(device):
    inputs = linear_inputs(Case(p=0.3, device=device))
    expected = run_linear(lora_linear, inputs)["y"]
    x, base, a, b, scale = (inputs.pop(key) for key in ("x", "base", "a", "b", "scale"))
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            y = lora_linear(x.clone().requires_grad_(), base, a, b, scale, **inputs)
        assert not y.requires_grad and torch.equal(y, expected)


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad, torch.func.jacrev])
def test_functorch_says_that_it_is_not_served(transform, device):
    inputs = linear_inputs(Case(device=device))
    x = inputs["x"].unsqueeze(0) if transform is torch.vmap else inputs["x"]

    def fn(x):
        y = lora_linear(x, inputs["base"], inputs["a"], inputs["b"], 1.0)
        return y if transform is torch.vmap else y.sum()

    with pytest.raises(RuntimeError, match="autograd.Function|setup_context|functorch"):
        transform(fn)(x)


def test_forward_mode_says_that_it_is_not_served(device):
    import torch.autograd.forward_ad as forward_ad

    inputs = linear_inputs(Case(device=device))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward.*AD|jvp"):
        x = forward_ad.make_dual(inputs["x"], torch.ones_like(inputs["x"]))
        lora_linear(x, inputs["base"], inputs["a"], inputs["b"], 1.0)


def test_nan_in_x_reaches_its_row_and_the_gradients_torch_would_give_it(device):
    for precision in ("fp32", "bf16"):
        inputs = linear_inputs(Case(m=9, p=0.0, precision=precision, device=device))
        inputs["x"][4, 7] = torch.nan
        got, plain = run_linear(lora_linear, inputs), run_linear(composed, inputs)
        assert got["y"].isnan().all(1).nonzero().flatten().tolist() == [4]
        for key in got:
            assert torch.equal(got[key].isnan(), plain[key].isnan()), key


def test_inputs_are_never_written(device):
    for p, save_mask in itertools.product((0.0, 0.3), (True, False)):
        inputs = linear_inputs(Case(p=p, device=device))
        before = {k: (v.clone(), v._version) for k, v in inputs.items() if isinstance(v, torch.Tensor)}
        run_linear(lora_linear, inputs, save_mask=save_mask, trainable=("x", "base", "bias", "a", "b"))
        for key, (value, version) in before.items():
            assert torch.equal(inputs[key], value) and inputs[key]._version == version, key


def test_changing_x_in_place_before_backward_raises(device):
    inputs = linear_inputs(Case(device=device))
    a = inputs["a"].requires_grad_()
    y = lora_linear(inputs["x"], inputs["base"], a, inputs["b"], 1.0)
    inputs["x"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ----------------------------------------------------------------------------------------------------------- bad input

i32 = torch.int32
BAD = {
    "x: expected a floating dtype, got torch.int32": {"x": lambda t: t.to(i32)},
    "x: expected at least one dimension": {"x": lambda t: t[0, 0]},
    r"A: expected shape \[r, 100\] with r >= 1.*got shape \(5, 99\)": {"a": lambda t: t[:, :-1]},
    r"A: expected shape \[r, 100\] with r >= 1.*got shape \(0, 100\)": {"a": lambda t: t[:0]},
    r"A: expected shape \[r, 100\].*got shape \(500,\)": {"a": lambda t: t.reshape(-1)},
    "A: expected a floating dtype, got torch.int32": {"a": lambda t: t.to(i32)},
    r"B: expected shape \[N, 5\].*got shape \(33, 4\)": {"b": lambda t: t[:, :-1]},
    r"B: expected shape \[N, 5\].*got shape \(165,\)": {"b": lambda t: t.reshape(-1)},
    "B: expected a floating dtype, got torch.int32": {"b": lambda t: t.to(i32)},
    r"base: expected shape \[33, 100\].*got shape \(32, 100\)": {"base": lambda t: t[:-1]},
    r"base: expected shape \[33, 100\].*got shape \(100, 33\)": {"base": lambda t: t.t()},
    "base: expected x's dtype torch.float32, got torch.bfloat16": {"base": lambda t: t.bfloat16()},
    r"bias: expected shape \[33\] in torch.float32, got shape \(32,\)": {"bias": lambda t: t[:-1]},
    r"bias: expected shape \[33\] in torch.float32, got.*torch.float16": {"bias": lambda t: t.half()},
    r"p: expected a probability in \[0, 1\], got -0.1": {"p": lambda _: -0.1},
    r"p: expected a probability in \[0, 1\], got 1.5": {"p": lambda _: 1.5},
    r"p: expected a probability in \[0, 1\], got nan": {"p": lambda _: float("nan")},
    r"seed: expected an int64.*got None \(torch.randint": {"seed": lambda _: None},
    "seed: expected int64 of one element.*got torch.int32 of 1": {"seed": lambda t: t.to(i32)},
    "seed: expected int64 of one element.*got torch.int64 of 2": {"seed": lambda t: torch.cat([t, t])},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_by_name(message, device):
    inputs = linear_inputs(Case(device=device))
    for key, change in BAD[message].items():
        inputs[key] = change(inputs[key])
    x, base, a, b, scale = (inputs.pop(key) for key in ("x", "base", "a", "b", "scale"))
    with pytest.raises((ValueError, TypeError), match=f"^lowmem.lora_linear: {message}"):
        lora_linear(x, base, a, b, scale, **inputs)


@pytest.mark.parametrize(
    ("key", "name"), [("a", "A"), ("b", "B"), ("base", "base"), ("bias", "bias"), ("seed", "seed")]
)
def test_a_tensor_on_another_device_is_refused_by_name(key, name, device):
    inputs = linear_inputs(Case(device=device))
    inputs[key] = inputs[key].to("meta")
    x, base, a, b, scale = (inputs.pop(k) for k in ("x", "base", "a", "b", "scale"))
    with pytest.raises(ValueError, match=f"^lowmem.lora_linear: {name}: expected .*{device}.*got .*meta"):
        lora_linear(x, base, a, b, scale, **inputs)
