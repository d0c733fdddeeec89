"""Known defects of other LoRA implementations that concern one adapter, each as a test that this package passes.

LoRAFusion (CentML/lorafusion) and PEFT are the two; the names of the tests say what goes wrong there.
"""

import random

import pytest
import torch
import torch.nn.functional as F
from lora_cases import Case, check_linear, linear_inputs, run_linear
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lowmem.ops import lora_linear
from lowmem.ops.philox import keep_mask
from lowmem.testing import saved_bytes, saved_for_backward

pytestmark = pytest.mark.usefixtures("poisoned")


# ---------------------------------------------------------------------------------------------------------- LoRAFusion


@pytest.mark.parametrize("p", [0, 0.0, -0.0])
def test_lorafusion_backward_crashes_without_dropout(p, device):
    grads = check_linear(Case(p=p, device=device))
    assert grads["a"].any() and grads["b"].any() and grads["x"].any()


def test_lorafusion_crashes_on_two_dimensional_input(device):
    two = check_linear(Case(m=24, device=device))
    three = check_linear(Case(m=24, device=device), lead=(2, 12))
    four = check_linear(Case(m=24, device=device), lead=(2, 3, 4))
    assert torch.equal(two["y"], three["y"].view(24, -1)) and torch.equal(two["y"], four["y"].view(24, -1))
    one = run_linear(lora_linear, linear_inputs(Case(m=1, device=device), ()))
    assert one["y"].shape == (33,) and one["x"].shape == (100,)


@pytest.mark.parametrize("r", [1, 2, 3, 5, 7, 8, 12, 15, 17, 24, 48, 96, 100, 129, 511])
def test_lorafusion_wants_a_rank_that_is_a_power_of_two_and_at_least_16(r, device):
    for precision in ("fp32", "bf16"):
        check_linear(Case(m=19, k=96, n=64, r=r, precision=precision, device=device))


@pytest.mark.parametrize("k", [1, 8, 255, 257, 384, 11, 777])
def test_lorafusion_wants_k_divisible_by_256(k, device):
    for precision in ("fp32", "bf16"):
        check_linear(Case(m=19, k=k, n=37, precision=precision, device=device))


@pytest.mark.parametrize("n", [1, 8, 129, 255, 300])
def test_lorafusion_wants_n_to_fit_its_blocks(n, device):
    check_linear(Case(m=130, k=96, n=n, precision="bf16", device=device))


@pytest.mark.parametrize("precision", ["bf16+fp32", "fp16+fp32"])
def test_lorafusion_wants_all_tensors_in_one_dtype(precision, device):
    grads = check_linear(Case(m=19, precision=precision, device=device))
    assert grads["a"].dtype == grads["b"].dtype == torch.float32
    assert grads["x"].dtype == grads["y"].dtype != torch.float32


@pytest.mark.parametrize("reentrant", [True, False])
def test_lorafusion_draws_another_mask_when_a_checkpoint_recomputes(reentrant, device):
    # there the seed comes from Python's random, which no checkpoint restores
    a, b = torch.ones(1, 200, device=device), torch.ones(1, 1, device=device)
    masks = []

    def layer(x):
        seed = torch.randint(0, 2**62, (1,), device=x.device)
        masks.append(keep_mask(16, 200, 0.5, seed))
        return lora_linear(x, None, a, b, 1.0, p=0.5, seed=seed)

    random.seed(0)
    x = torch.randn(16, 200, device=device, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=reentrant)
    random.random()
    torch.rand(1, device=device)
    y.sum().backward()
    assert len(masks) == 2 and torch.equal(*masks)
    assert torch.equal(x.grad != 0, masks[0])
    torch.testing.assert_close((x.detach() * x.grad).sum(1), y[:, 0].detach())


def test_lorafusion_accepts_only_four_models_of_gpu(device, monkeypatch):
    def refuse(*_):
        raise AssertionError("a kernel asked for the device's name")

    if device == "cpu":
        # nothing on the way to the CPU kernels may ask torch about a GPU
        for name in ("get_device_name", "get_device_properties", "get_device_capability"):
            monkeypatch.setattr(torch.cuda, name, refuse)
    else:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA Unheard-of 9000")
    check_linear(Case(m=19, precision="bf16", device=device))


def test_lorafusion_materialises_the_dropped_input_and_a_byte_mask(device):
    # 3 bytes an element there (X-hat in 16 bits, mask in 8); here one bit, x itself being shared
    m, k, n, r = 128, 512, 64, 16
    inputs = linear_inputs(Case(m=m, k=k, n=n, r=r, precision="bf16", bias=False, device=device))
    w, a, b = inputs["base"], inputs["a"].requires_grad_(), inputs["b"].requires_grad_()
    x = inputs["x"].requires_grad_()

    def fn():
        return lora_linear(x, w, a, b, 1.0, p=0.1, seed=inputs["seed"])

    assert saved_bytes(fn, exclude=[x, w, a, b]) == m * k // 8 + 2 * m * r
    assert all(s.dtype not in (torch.bool, torch.uint8) for s in saved_for_backward(fn))


@pytest.mark.usefixtures("two_threads")
def test_lorafusion_sums_db_with_atomics_in_any_order(device):
    inputs = linear_inputs(Case(m=700, k=300, n=515, r=16, precision="bf16", device=device))
    first = run_linear(lora_linear, inputs)
    for _ in range(4):
        again = run_linear(lora_linear, inputs)
        assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("p", [1.0, 1 - 1e-9, 65535.6 / 65536])
def test_a_16_bit_threshold_overflows_at_p_of_one(p, device):
    for bits in (True, False):
        inputs = linear_inputs(Case(p=p, bits=bits, device=device))
        got = run_linear(lora_linear, inputs, save_mask=bits)
        plain = F.linear(inputs["x"], inputs["base"], inputs["bias"])
        torch.testing.assert_close(got["y"], plain)
        assert not got["a"].any() and not got["b"].any()
        assert all(t.isfinite().all() for t in got.values())


def test_two_layers_of_different_dropout_in_one_model(device):
    # different rates raise there; here each layer has its own
    x = linear_inputs(Case(m=12, device=device))["x"].requires_grad_()
    outputs = []
    for child, p in enumerate((0.0, 0.1, 0.9)):
        i = linear_inputs(Case(m=12, p=p, child=child, device=device))
        outputs.append(lora_linear(x, i["base"], i["a"], i["b"], 1.0, p=p, seed=i["seed"], child=child))
    sum(outputs).sum().backward()
    assert x.grad.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------- PEFT


class Eager(nn.Module):
    """What PEFT's layer computes: adapters in their own dtype, x cast to it, dropout materialised."""

    def __init__(self, w, a, b, scale, p):
        super().__init__()
        self.w, self.a, self.b = (nn.Parameter(t.detach(), requires_grad=t is not w) for t in (w, a, b))
        self.scale, self.p = scale, p

    def forward(self, x):
        dropped = F.dropout(x.to(self.a.dtype), self.p)
        return F.linear(x, self.w) + (F.linear(F.linear(dropped, self.a), self.b) * self.scale).to(x.dtype)


@pytest.mark.parametrize("precision", ["bf16", "bf16+fp32"])
def test_peft_copies_x_for_every_adapter_and_again_to_fp32(precision, device):
    # q, k and v over one input, as peft#1514, #2196 and #2426 report it
    m, k, n, r = 256, 512, 512, 16
    parts = [
        linear_inputs(Case(m=m, k=k, n=n, r=r, precision=precision, bias=False, draw=d, device=device))
        for d in range(3)
    ]
    x = parts[0]["x"].requires_grad_()
    eager = [Eager(i["base"], i["a"], i["b"], 1.0, 0.1) for i in parts]

    def ours():
        return [lora_linear(x, e.w, e.a, e.b, 1.0, p=0.1, seed=i["seed"]) for e, i in zip(eager, parts, strict=True)]

    theirs = saved_bytes(lambda: [layer(x) for layer in eager])
    kept = saved_for_backward(ours)
    assert sum(s.bytes for s in kept) <= 0.30 * theirs
    assert [s.shape for s in kept].count((m, k)) == 1, "x is held once"
    assert not any(s.dtype == torch.float32 and s.shape == (m, k) for s in kept), "and not in fp32"


def test_peft_saves_x_for_an_adapter_that_is_frozen(device):
    inputs = linear_inputs(Case(m=64, k=256, precision="bf16", device=device))
    x, b = inputs["x"].requires_grad_(), nn.Parameter(inputs["b"])
    weights = [inputs["base"], inputs["a"], b]

    def fn():  # A frozen (LoRA-FA): S alone
        return lora_linear(x, inputs["base"], inputs["a"], b, 1.0)

    assert saved_bytes(fn, exclude=weights) == 64 * 5 * 2


def test_peft_leaves_dropout_and_bias_off_the_fast_path(device):
    # unsloth#23: "dropout = 0 and bias = none are optimised" there; here all four take the same operators
    for p in (0.0, 0.1):
        for bias in (True, False):
            check_linear(Case(m=19, p=p, bias=bias, precision="bf16", device=device))


def test_peft_breaks_the_graph_under_compile(device):
    torch._dynamo.reset()
    inputs = linear_inputs(Case(m=19, p=0.1, device=device))
    explained = torch._dynamo.explain(lambda x: lora_linear(x, *[inputs[k] for k in ("base", "a", "b", "scale")]))
    assert explained(inputs["x"]).graph_break_count == 0
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------ what our own design invites


class NoItem(TorchDispatchMode):
    """Raises where a tensor's value is read into Python."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a tensor's value was read"
        return func(*args, **(kwargs or {}))


def test_nothing_reads_a_tensor_on_the_host(device):
    # the seed stays a tensor: an .item() would stall a GPU once a layer, and break compile
    inputs = linear_inputs(Case(m=19, device=device))
    for save_mask in (True, False):
        leaves = [inputs[key].detach().requires_grad_() for key in ("x", "a", "b")]
        with NoItem():
            y = lora_linear(
                leaves[0], inputs["base"], *leaves[1:], 1.0, p=0.1, seed=inputs["seed"], save_mask=save_mask
            )
            y.sum().backward()


@pytest.mark.gpu
def test_no_synchronisation_on_a_gpu():
    inputs = linear_inputs(Case(m=130, k=512, n=256, r=16, precision="bf16", device="cuda"))
    run_linear(lora_linear, inputs)
    upstream = torch.randn(130, 256, device="cuda").bfloat16()
    leaves = [inputs[key].detach().requires_grad_() for key in ("x", "a", "b")]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = lora_linear(leaves[0], inputs["base"], *leaves[1:], 1.0, p=0.1, seed=inputs["seed"])
        y.backward(upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
