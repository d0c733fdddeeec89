"""The adapters beside plain LoRA: DoRA, gates (SoRA), SVFit, LoRA-FA, LoRA+."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowmem
from lowmem.nn import FusedLoRALinear
from lowmem.optim import lora_plus_groups, prox_l1_
from lowmem.testing import saved_bytes

F64 = torch.float64


def layer(k=40, n=24, dtype=F64, **options):
    made = FusedLoRALinear(k, n, **({"r": 4, "alpha": 8, "bias": True, "dtype": dtype} | options))
    with torch.no_grad():
        for part in (made.lora_B, made.lora_gate):
            for p in part.values():
                p.normal_()
        for p in made.lora_magnitude.values():
            p.mul_(torch.rand_like(p) + 0.5)
    return made


def grads(module, x, y=None):
    x = x.detach().requires_grad_()
    y = module(x)
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))]


# ------------------------------------------------------------------------------------------------------------ DoRA


def peft_dora(fused):
    peft = pytest.importorskip("peft")
    linear = nn.Linear(fused.in_features, fused.out_features, bias=fused.bias is not None, dtype=fused.weight.dtype)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], use_dora=True)
    twin = peft.get_peft_model(nn.Sequential(linear), config, autocast_adapter_dtype=False).base_model.model[0]
    with torch.no_grad():
        twin.base_layer.weight.copy_(fused.weight)
        twin.base_layer.bias.copy_(fused.bias)
        twin.lora_A["default"].weight.copy_(fused.lora_A["default"])
        twin.lora_B["default"].weight.copy_(fused.lora_B["default"])
        twin.lora_magnitude_vector["default"].weight.copy_(fused.lora_magnitude["default"])
    return twin


def test_dora_equals_peft_without_dropout():
    fused = layer(use_dora=True)
    x = torch.randn(2, 5, 40, dtype=F64)
    for ours, theirs in zip(grads(fused, x), grads(peft_dora(fused), x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_dora_at_the_start_changes_nothing():
    linear = nn.Linear(40, 24, dtype=F64)
    x = torch.randn(3, 40, dtype=F64)
    torch.testing.assert_close(FusedLoRALinear.from_linear(linear, r=4, alpha=8, use_dora=True)(x), linear(x))


def test_dora_with_dropout_scales_the_dropped_lora_output():
    fused = layer(use_dora=True, dropout=0.4, bias=False)
    plain = copy.deepcopy(fused)
    del plain.lora_magnitude["default"]
    x = torch.randn(6, 40, dtype=F64)
    torch.manual_seed(1)
    ours = fused(x)
    torch.manual_seed(1)
    torch.testing.assert_close(ours, plain(x) * fused._row_factor("default"))


def test_dora_norm_makes_no_dense_copy_of_the_weight():
    fused = layer(512, 512, dtype=torch.bfloat16, r=8, use_dora=True)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor)]
            own = fused.weight.untyped_storage().data_ptr()
            sizes.extend(t.nbytes for t in made if t.untyped_storage().data_ptr() != own)
            return out

    with Watch():
        fused._row_factor("default")
    assert max(sizes) <= 0.05 * fused.weight.nbytes, (max(sizes), fused.weight.nbytes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_doras_own_memory_is_at_most_5_percent_of_the_weight(dtype):
    n = k = 1024
    plain, fused = (layer(k, n, dtype=dtype, r=16, bias=False, use_dora=dora) for dora in (False, True))

    def held(module):
        return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))

    fused._row_factor("default")  # |W_n|^2 is kept from here on
    extra = held(fused) - held(plain)
    assert extra == 2 * 4 * n  # the magnitudes and the norms of W's rows, fp32
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        fused._row_factor("default")
    now = most = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    assert 0 < most and extra + most <= 0.05 * fused.weight.nbytes, (extra, most)


def test_dora_state_and_saved_bytes():
    fused = layer(64, 32, dtype=torch.bfloat16, use_dora=True, bias=False)
    assert list(fused.state_dict()) == ["weight", "lora_A.default", "lora_B.default", "lora_magnitude.default"]
    x = torch.randn(48, 64, dtype=torch.bfloat16, requires_grad=True)
    # x, S, the output before the magnitude, and per column: the factor in bf16 and what makes its gradient (norm)
    assert saved_bytes(lambda: fused(x)) == 48 * (64 + 4 + 32) * 2 + 32 * (2 + 4)


def test_dora_zero_row_gives_no_nan():
    linear = nn.Linear(8, 4, bias=False)
    with torch.no_grad():
        linear.weight[1] = 0
    fused = FusedLoRALinear.from_linear(linear, r=2, alpha=2, use_dora=True)
    y = fused(torch.randn(3, 8))
    y.sum().backward()
    assert y.isfinite().all() and fused.lora_magnitude["default"].grad.isfinite().all()


# ------------------------------------------------------------------------------------------- gates: SoRA and SVFit


def test_gate_against_autograd_of_the_formula():
    fused = layer(gate=True)
    x = torch.randn(7, 40, dtype=F64)

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.g = (
                nn.Parameter(p["default"].clone()) for p in (fused.lora_A, fused.lora_B, fused.lora_gate)
            )

        def forward(self, x):
            return F.linear(x, fused.weight, fused.bias) + 2.0 * ((x @ self.a.T) * self.g) @ self.b.T

    for ours, theirs in zip(grads(fused, x), grads(Plain(), x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_gate_saves_what_lora_saves():
    x = torch.randn(48, 64, dtype=torch.bfloat16, requires_grad=True)
    plain, gated = (layer(64, 32, dtype=torch.bfloat16, dropout=0.1, gate=gate).train() for gate in (False, True))
    assert saved_bytes(lambda: gated(x)) == saved_bytes(lambda: plain(x)) == 48 * (2 * 64 + 2 * 4 + 64 // 8)


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_gate_gradcheck(scale):
    x, a, b, g = (torch.randn(*s, dtype=F64, requires_grad=True) for s in [(5, 9), (3, 9), (4, 3), (3,)])
    seed = torch.tensor([99])
    assert torch.autograd.gradcheck(
        lambda *t: lowmem.ops.lora_linear(t[0], None, t[1], t[2], scale, gate=t[3], p=0.25, seed=seed), (x, a, b, g)
    )


def test_prox_soft_thresholds():
    g = nn.Parameter(torch.tensor([0.12, 0.19, -0.15, 0.05, 0.0]))
    prox_l1_(g, 0.1)
    torch.testing.assert_close(g.data, torch.tensor([0.02, 0.09, -0.05, 0.0, 0.0]))
    with pytest.raises(ValueError, match="lowmem.prox_l1_: threshold: expected a finite number >= 0, got -1"):
        prox_l1_([g], -1)
    with pytest.raises(TypeError, match="parameters: expected floating tensors"):
        prox_l1_([g, torch.zeros(1, dtype=torch.int8)], 0.05)
    torch.testing.assert_close(g.data, torch.tensor([0.02, 0.09, -0.05, 0.0, 0.0]))


def test_sora_training_zeroes_gates_that_do_not_help():
    torch.manual_seed(0)
    target = nn.Linear(16, 8, bias=False)
    base = nn.Linear(16, 8, bias=False)
    with torch.no_grad():
        target.weight.copy_(base.weight + torch.randn(8, 1) @ torch.randn(1, 16))  # one rank is enough
    fused = FusedLoRALinear.from_linear(base, r=6, alpha=6, gate=True)
    optimizer = torch.optim.Adam([p for p in fused.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(400):
        x = torch.randn(64, 16)
        optimizer.zero_grad()
        F.mse_loss(fused(x), target(x)).backward()
        optimizer.step()
        prox_l1_(fused.lora_gate["default"], 2e-2 * 0.5)
    assert 1 <= int((fused.lora_gate["default"] != 0).sum()) < 6
    assert F.mse_loss(fused(x), target(x)) < 0.2 * F.mse_loss(base(x), target(x))


def test_svfit_starts_as_the_linear_and_saves_r_numbers_a_row():
    linear = nn.Linear(48, 32)
    x = torch.randn(20, 48, requires_grad=True)
    expected = linear(x)
    fused = FusedLoRALinear.from_svd(linear, r=5)
    torch.testing.assert_close(fused(x), expected, rtol=1e-5, atol=1e-5)
    assert [n for n, p in fused.named_parameters() if p.requires_grad] == ["lora_gate.default"]
    assert saved_bytes(lambda: fused(x)) == 20 * 5 * 4
    u, v = fused.lora_B["default"], fused.lora_A["default"]
    upstream = torch.randn(20, 32)
    (gradient,) = torch.autograd.grad(fused(x), fused.lora_gate["default"], upstream)
    torch.testing.assert_close(gradient, ((upstream @ u) * (x @ v.T)).sum(0), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"r: expected an integer in \[1, 32\], got 33"):
        FusedLoRALinear.from_svd(nn.Linear(48, 32), r=33)


# ------------------------------------------------------------------------------------------------ LoRA-FA and LoRA+


def test_lora_fa_saves_s_alone():
    fused = layer(64, 32, dtype=torch.bfloat16, train=("B",))
    x = torch.randn(48, 64, dtype=torch.bfloat16, requires_grad=True)
    assert saved_bytes(lambda: fused(x)) == 48 * 4 * 2
    dropping = layer(64, 32, dtype=torch.bfloat16, train=("B",), dropout=0.1)
    assert saved_bytes(lambda: dropping(x)) == 48 * (4 * 2 + 64 // 8)  # and the bits, for dx
    assert not fused.lora_A["default"].requires_grad and fused.lora_B["default"].requires_grad
    with pytest.raises(ValueError, match="train: expected a collection of A, B, gate, magnitude"):
        layer(train=("C",))


def test_lora_plus_groups():
    model = nn.Sequential(layer(), nn.LayerNorm(24))
    groups = lora_plus_groups(model, 1e-3, ratio=8.0, weight_decay=0.1)
    assert [g["lr"] for g in groups] == [1e-3, 8e-3] and [g["weight_decay"] for g in groups] == [0.1, 0.1]
    assert groups[1]["params"][0] is model[0].lora_B["default"] and len(groups[0]["params"]) == 3
    grouped = [p for group in groups for p in group["params"]]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.nbytes for p in grouped) == sum(p.nbytes for p in trained) and len({*map(id, grouped)}) == len(trained)
    table = lowmem.nn.FusedLoRAEmbedding(nn.Embedding(9, 4), r=2, alpha=2)
    slow, fast = lora_plus_groups(nn.Sequential(table, layer(4, 4)), 1e-3)
    assert len(fast["params"]) == 1 and {id(table.lora_A["default"]), id(table.lora_B["default"])} <= {
        id(p) for p in slow["params"]
    }
    torch.optim.AdamW(groups)
    with pytest.raises(ValueError, match="lowmem.lora_plus_groups: model: expected a FusedLoRALinear whose B trains"):
        lora_plus_groups(nn.Linear(2, 2), 1e-3)


# ------------------------------------------------------------------------------------------------------------ all


VARIANTS = {"dora": {"use_dora": True}, "gate": {"gate": True}, "both": {"use_dora": True, "gate": True}}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("bias", [False, True])
def test_merge_unmerge_disabled_and_state(options, bias):
    fused = layer(bias=bias, **options).eval()
    x = torch.randn(6, 40, dtype=F64)
    active, base, weight = fused(x).detach(), F.linear(x, fused.weight, fused.bias), fused.weight.clone()
    fused.merge()
    torch.testing.assert_close(fused(x), active)
    with fused.disabled():
        torch.testing.assert_close(fused(x), base)
    twin = layer(bias=bias, **options).eval()
    twin.load_state_dict(copy.deepcopy(fused.state_dict()))
    for one in (fused, twin):
        one.unmerge()
        torch.testing.assert_close(one.weight.data, weight)
        torch.testing.assert_close(one(x), active)
        assert "merged_factor" not in one.state_dict()


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_compile_fullgraph(options):
    torch._dynamo.reset()
    fused = layer(dropout=0.0, **options)
    x = torch.randn(6, 40, dtype=F64)
    for eager, ours in zip(
        grads(fused, x), grads(torch.compile(fused, fullgraph=True, backend="aot_eager"), x), strict=True
    ):
        torch.testing.assert_close(ours, eager)
