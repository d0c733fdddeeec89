"""FusedLoRALinear: against PEFT's layer, its adapters, state, merging, saved bytes, compile and checkpointing."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowmem
from lowmem.nn import FusedLoRALinear, disabled, lora_layers, set_adapter
from lowmem.ops.philox import inv_keep, keep_mask
from lowmem.testing import saved_bytes

peft = pytest.importorskip("peft", reason="the peer whose layer we replace (extra: hf)")


def layer(k=40, n=24, dtype=torch.float32, **kwargs):
    options = {"r": 4, "alpha": 8, "bias": True, "dtype": dtype} | kwargs
    made = FusedLoRALinear(k, n, **options)
    for b in made.lora_B.values():
        nn.init.normal_(b)
    return made


def peft_twin(fused, dropout=0.0):
    """PEFT's LoRA layer with the same weights, behind its own tuner."""
    linear = nn.Linear(fused.in_features, fused.out_features, bias=fused.bias is not None, dtype=fused.weight.dtype)
    name = fused.active_adapter
    config = peft.LoraConfig(
        r=fused.r[name],
        lora_alpha=fused.alpha[name],
        lora_dropout=dropout,
        target_modules=["0"],
        use_rslora=fused.use_rslora[name],
    )
    model = peft.get_peft_model(nn.Sequential(linear), config)
    twin = model.base_model.model[0]
    with torch.no_grad():
        twin.base_layer.weight.copy_(fused.weight)
        if fused.bias is not None:
            twin.base_layer.bias.copy_(fused.bias)
        twin.lora_A["default"].weight.copy_(fused.lora_A[name])
        twin.lora_B["default"].weight.copy_(fused.lora_B[name])
    return twin


def run(module, x, seed=0):
    """Output and the gradients of x and of every trainable parameter (A first) under a fixed upstream gradient."""
    torch.manual_seed(seed)
    x = x.detach().requires_grad_()
    y = module(x)
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    for leaf in leaves:
        leaf.grad = None
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("shape", [(7, 40), (40,), (2, 3, 40), (0, 40), (2, 0, 40)])
def test_equals_peft_layer(shape, rslora):
    fused = layer(dtype=torch.float64, use_rslora=rslora, adapter_dtype=torch.float64)
    x = torch.randn(*shape, dtype=torch.float64)
    for ours, theirs in zip(run(fused, x), run(peft_twin(fused), x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_dropout_is_the_seeds_mask_and_only_while_training():
    fused = layer(dtype=torch.float64, dropout=0.4)
    x = torch.randn(9, 40, dtype=torch.float64)
    torch.manual_seed(3)
    seed = torch.randint(0, 2**62, (1,))
    dropped = x * keep_mask(9, 40, 0.4, seed) * inv_keep(0.4)
    a, b = fused.lora_A["default"], fused.lora_B["default"]
    expected = F.linear(x, fused.weight, fused.bias) + 2.0 * dropped @ a.T @ b.T
    torch.manual_seed(3)
    torch.testing.assert_close(fused(x), expected)
    fused.eval()
    torch.testing.assert_close(fused(x), F.linear(x, fused.weight, fused.bias) + 2.0 * x @ a.T @ b.T)


@pytest.mark.parametrize("mask", ["bits", "seed"])
def test_bits_and_seed_give_the_same_gradients(mask):
    reference, fused = layer(dropout=0.3), None
    fused = copy.deepcopy(reference)
    fused.mask = mask
    x = torch.randn(11, 40)
    for ours, theirs in zip(run(fused, x), run(reference, x), strict=True):
        assert torch.equal(ours, theirs)


def test_two_layers_draw_two_masks_and_two_steps_draw_two_masks():
    fused = layer(dropout=0.5, bias=False)
    x = torch.ones(16, 40)
    assert not torch.equal(fused(x), fused(x))


def test_fp32_adapters_over_bf16_base_are_the_default_and_keep_no_fp32_copy_of_x():
    fused = layer(64, 32, dtype=torch.bfloat16, dropout=0.1)
    assert fused.lora_A["default"].dtype is torch.float32
    x = torch.randn(48, 64, dtype=torch.bfloat16, requires_grad=True)
    expected = x.nbytes + 48 * 4 * 2 + 48 * 64 // 8
    assert saved_bytes(lambda: fused(x)) == expected
    fused.mask = "seed"
    assert saved_bytes(lambda: fused(x)) == x.nbytes + 48 * 4 * 2 + 8
    assert fused(x).dtype is torch.bfloat16


def test_saved_bytes_of_qkv_and_of_a_llama_block_against_peft():
    """The issue's figures: q/k/v at most 0.30 of PEFT's bytes and a block's seven linears at most 0.55, r=16, p=0.1,
    bf16.

    PEFT's bytes are counted on this device, whose dropout may keep a 2-byte noise tensor where CUDA's keeps a 1-byte
    mask; the bound is held against the smaller of the two."""
    rows, hidden, wide = 96, 256, 896
    inputs = {"attn": hidden, "o": hidden, "mlp": hidden, "down": wide}
    linears = [("attn", hidden)] * 3 + [("o", hidden)] + [("mlp", wide)] * 2 + [("down", hidden)]

    def count(layers):
        xs = {name: torch.randn(rows, k, dtype=torch.bfloat16, requires_grad=True) for name, k in inputs.items()}
        return saved_bytes(lambda: [m(xs[name]) for m, name in layers])

    def pair(subset):
        ours = [
            (layer(inputs[x], n, dtype=torch.bfloat16, r=16, alpha=16, dropout=0.1, adapter_dtype=torch.bfloat16), x)
            for x, n in subset
        ]
        theirs = [(peft_twin(m, dropout=0.1).to(torch.bfloat16), x) for m, x in ours]
        cuda_formula = sum(rows * (inputs[x] * (2 + 1) + 16 * 2) for x, _ in subset)
        return count(ours), min(count(theirs), cuda_formula)

    ours, theirs = pair(linears[:3])
    assert ours <= 0.30 * theirs, (ours, theirs)
    ours, theirs = pair(linears)
    assert ours <= 0.55 * theirs, (ours, theirs)


def test_nothing_is_saved_without_grad():
    fused = layer(dropout=0.1)
    assert saved_bytes(lambda: torch.no_grad()(fused)(torch.randn(3, 40))) == 0


def test_frozen_adapters_still_pass_gradients_on_and_save_no_x():
    fused = layer()
    fused.requires_grad_(False)
    x = torch.randn(5, 40, requires_grad=True)
    assert saved_bytes(lambda: fused(x)) == 0
    delta = 2.0 * fused.lora_B["default"] @ fused.lora_A["default"]
    (grad,) = torch.autograd.grad(fused(x).sum(), x)
    torch.testing.assert_close(grad, torch.ones(5, 24) @ (fused.weight + delta))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_merge_unmerge_disabled(dtype):
    fused = layer(dtype=dtype).eval()
    x = torch.randn(6, 40, dtype=dtype)
    weight, active = fused.weight.clone(), fused(x)
    tolerance = {"rtol": 0, "atol": 8 * torch.finfo(dtype).eps * float(active.detach().abs().max())}
    with fused.disabled():
        base = fused(x)
    assert torch.equal(base, F.linear(x, fused.weight, fused.bias))
    fused.merge()
    torch.testing.assert_close(fused(x), active.detach(), **tolerance)
    with fused.disabled():
        torch.testing.assert_close(fused(x), base, **tolerance)
    fused.unmerge()
    delta = (fused.lora_B["default"] @ fused.lora_A["default"]).detach()
    merged_size = float(weight.detach().abs().max() + 2 * delta.abs().max())
    assert float((fused.weight - weight).abs().max()) <= 2 * torch.finfo(dtype).eps * merged_size


def test_merged_rows_beyond_one_block():
    fused = layer(8, 2500, bias=False)
    expected = fused.weight + 2.0 * fused.lora_B["default"] @ fused.lora_A["default"]
    fused.merge()
    torch.testing.assert_close(fused.weight.data, expected.detach())


def test_merge_refuses_nan_and_leaves_the_weight():
    fused = layer()
    weight = fused.weight.clone()
    with torch.no_grad():
        fused.lora_A["default"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="lowmem.FusedLoRALinear: default: expected finite"):
        fused.merge()
    assert torch.equal(fused.weight, weight) and fused.merged is None


def test_merge_state_errors():
    fused = layer()
    with pytest.raises(ValueError, match="unmerge: expected a merged layer"):
        fused.unmerge()
    fused.merge()
    with pytest.raises(ValueError, match="merge: expected a layer that is not merged"):
        fused.merge()
    fused.add_adapter("other", r=2, alpha=2)
    with pytest.raises(ValueError, match="unmerge"):
        fused.set_adapter("other")


def test_disabled_nests_and_is_undone_by_an_exception():
    model = lowmem.convert(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), r=2)
    with pytest.raises(RuntimeError, match="stop"), disabled(model), model[0].disabled():
        raise RuntimeError("stop")
    assert [fused._disabled for _, fused in lora_layers(model)] == [0, 0]


def test_named_adapters():
    fused = layer(adapter_dtype=torch.float32)
    x = torch.randn(5, 40)
    first = fused(x)
    fused.add_adapter("task_b", r=7, alpha=7, use_rslora=True)
    assert torch.equal(fused(x), first)
    assert not fused.lora_A["task_b"].requires_grad
    fused.set_adapter("task_b")
    assert [p.requires_grad for p in (*_ab(fused, "task_b"), *_ab(fused, "default"))] == [True, True, False, False]
    assert torch.equal(
        fused(x), lowmem.ops.lora_linear(x, fused.weight, *_ab(fused, "task_b"), 7**0.5, bias=fused.bias)
    )
    assert fused.scaling() == pytest.approx(7**0.5)
    model = nn.Sequential(fused, FusedLoRALinear(24, 8, r=2, alpha=2))
    with pytest.raises(
        ValueError, match=r"lowmem.set_adapter: name: expected an adapter that every layer has \(default\)"
    ):
        set_adapter(model, "task_b")
    set_adapter(model, "default")
    assert fused.active_adapter == "default"


def _ab(fused, name):
    return fused.lora_A[name], fused.lora_B[name]


def test_deepcopy_and_pickle():
    fused = layer(dropout=0.2)
    fused.add_adapter("other", r=3, alpha=3)
    x = torch.randn(4, 40)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        for ours, theirs in zip(run(fused, x), run(twin, x), strict=True):
            assert torch.equal(ours, theirs)
        assert repr(twin) == repr(fused)


def test_state_dict_round_trip_and_keys():
    fused, twin = layer(), layer()
    state = fused.state_dict()
    assert list(state) == ["weight", "bias", "lora_A.default", "lora_B.default"]
    twin.load_state_dict(state)
    x = torch.randn(3, 40)
    assert torch.equal(fused(x), twin(x))
    assert state._metadata[""]["version"] == 1


def test_state_dict_of_a_merged_layer_stays_merged():
    fused, twin = layer().eval(), layer().eval()
    x = torch.randn(3, 40)
    fused.merge()
    stored = io.BytesIO()
    torch.save(fused.state_dict(), stored)
    stored.seek(0)
    twin.load_state_dict(torch.load(stored, weights_only=False))
    assert twin.merged == "default" and torch.equal(fused(x), twin(x))


def test_state_dict_errors_name_the_keys():
    fused = layer()
    state = fused.state_dict()
    del state["lora_A.default"]
    state["lora_A.extra"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="(?s)Missing key.*lora_A.default.*Unexpected key.*lora_A.extra"):
        layer().load_state_dict(state)
    newer = fused.state_dict()
    newer._metadata[""]["version"] = 99
    with pytest.raises(RuntimeError, match="expected version <= 1, got 99"):
        layer().load_state_dict(newer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_matches_a_linear_under_autocast(dtype):
    fused = layer(dropout=0.0)
    x = torch.randn(6, 40, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = fused(x)
        expected = F.linear(x, fused.weight, fused.bias) + 2.0 * F.linear(
            F.linear(x, _ab(fused, "default")[0]), _ab(fused, "default")[1]
        )
    assert y.dtype is dtype
    torch.testing.assert_close(
        y, expected, rtol=0, atol=16 * torch.finfo(dtype).eps * float(expected.detach().abs().max())
    )
    y.float().sum().backward()
    assert x.grad.dtype is torch.float32 and fused.lora_A["default"].grad.dtype is torch.float32


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mask", ["bits", "seed"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend, mask, autocast):
    torch._dynamo.reset()
    fused = layer(dropout=0.3, mask=mask)
    seed = torch.tensor([1234567890123])

    def step(module, x):  # inductor draws other seeds than eager, so both get the same one
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return lowmem.ops.lora_linear(
                x,
                module.weight,
                *_ab(module, "default"),
                2.0,
                bias=module.bias,
                p=0.3,
                seed=seed,
                save_mask=mask == "bits",
            )

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    x = torch.randn(6, 40, requires_grad=True)
    leaves = [x, *_ab(fused, "default")]
    outputs = [f(fused, x) for f in (step, compiled)]
    torch.testing.assert_close(*outputs)
    grads = [torch.autograd.grad(y.float().square().sum(), leaves) for y in outputs]
    for eager, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, eager, rtol=2e-2 if autocast else 1e-5, atol=2e-2 if autocast else 1e-5)
    whole = torch.compile(fused, fullgraph=True, backend=backend)
    whole(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in _ab(fused, "default"))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mask", ["bits", "seed"])
def test_checkpointing_draws_the_same_masks(mask, reentrant):
    # the activations between are recomputed from inside the layers' own backward
    model = nn.Sequential(*(m for _ in range(3) for m in (nn.GELU(), layer(40, 40, dropout=0.3, mask=mask))))
    x = torch.randn(8, 40)
    twin = copy.deepcopy(model)
    for a, b in zip(run(model, x, 5), run(Checkpointed(twin, reentrant), x, 5), strict=True):
        assert torch.equal(a, b)


class Checkpointed(nn.Module):
    """Runs a module under activation checkpointing."""

    def __init__(self, inner, reentrant):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def test_compile_with_checkpointing():
    torch._dynamo.reset()
    model = Checkpointed(nn.Sequential(*(layer(40, 40, dropout=0.3) for _ in range(2))), False)
    x = torch.randn(8, 40)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for eager, ours in zip(run(model, x, 5), run(compiled, x, 5), strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("r", [1, 3, 512])
def test_any_rank_and_odd_sizes(r):
    fused = layer(33, 7, dtype=torch.float64, r=r, alpha=r, dropout=0.0)
    x = torch.randn(3, 33, dtype=torch.float64)
    for ours, theirs in zip(run(fused, x), run(peft_twin(fused), x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


BAD = [
    ({"r": 0}, "r: expected an integer >= 1, got 0"),
    ({"r": 2.5}, "r: expected an integer >= 1, got 2.5"),
    ({"alpha": float("nan")}, "alpha: expected a finite number, got nan"),
    ({"dropout": -0.1}, r"dropout: expected a probability in \[0, 1\], got -0.1"),
    ({"dropout": 1.5}, r"dropout: expected a probability in \[0, 1\], got 1.5"),
    ({"mask": "byte"}, "mask: expected 'bits' or 'seed', got 'byte'"),
    ({"name": "a.b"}, "name: expected a non-empty string without dots"),
    (
        {"base": torch.zeros(3, 3)},
        r"base: expected a floating tensor of shape \[24, 40\], or a QTensor, got \(3",
    ),
    ({"adapter_dtype": torch.int8}, "adapter_dtype: expected a floating dtype, got torch.int8"),
]


@pytest.mark.parametrize(("kwargs", "message"), BAD, ids=[next(iter(kwargs)) for kwargs, _ in BAD])
def test_bad_arguments(kwargs, message):
    with pytest.raises((ValueError, TypeError), match=f"lowmem.FusedLoRALinear: {message}"):
        FusedLoRALinear(40, 24, **({"r": 4, "alpha": 8} | kwargs))


def test_bad_inputs_to_forward():
    fused = layer()
    with pytest.raises(ValueError, match=r"lowmem.lora_linear: A: expected shape \[r, 41\]"):
        fused(torch.randn(2, 41))
    with pytest.raises(
        TypeError, match="lowmem.lora_linear: base: expected x's dtype torch.float64, got torch.float32"
    ):
        fused(torch.randn(2, 40, dtype=torch.float64))
    with pytest.raises(TypeError, match="lowmem.lora_linear: x: expected a floating dtype, got torch.int64"):
        fused(torch.zeros(2, 40, dtype=torch.int64))


def test_nan_input_reaches_its_row_and_no_parameter():
    fused = layer(dropout=0.5)
    before = copy.deepcopy(fused.state_dict())
    x = torch.randn(4, 40)
    x[1, 3] = float("nan")
    y = fused(x)
    assert y[1].isnan().all() and y[[0, 2, 3]].isfinite().all()
    y.sum().backward()
    assert all(torch.equal(before[key], value) for key, value in fused.state_dict().items())


def test_duplicate_adapter_and_from_linear_errors():
    fused = layer()
    with pytest.raises(ValueError, match="name: expected a name other than default"):
        fused.add_adapter("default", r=2, alpha=2)
    with pytest.raises(ValueError, match="linear: expected a plain nn.Linear"):
        FusedLoRALinear.from_linear(fused, r=2, alpha=2)
    with pytest.raises(ValueError, match="name: expected one of default"):
        fused.set_adapter("nobody")
