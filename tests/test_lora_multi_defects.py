"""Known defects of other implementations that concern several adapters in one batch, each as a test that this package
passes; and batches of many adapters under compilation and recomputation.

LoRAFusion (CentML/lorafusion) and PEFT are the two; the names of the tests say what goes wrong there.
"""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowmem.nn import FusedLoRALinear, MultiLoRALinear, routed, train_adapters
from lowmem.ops import multi_lora_linear
from lowmem.ops.lora_multi import adapter_table
from lowmem.ops.philox import inv_keep, keep_mask
from lowmem.testing import saved_bytes

pytestmark = pytest.mark.usefixtures("poisoned")

K, N = 24, 20


def make(options, dtype=torch.float64, **base):
    """A MultiLoRALinear with one adapter an entry of ``options``, B not zero."""
    torch.manual_seed(0)
    layer = MultiLoRALinear(nn.Linear(K, N, dtype=dtype, **base), {f"j{i}": one for i, one in enumerate(options)})
    for b in layer.lora_B.values():
        nn.init.normal_(b)
    return layer


def grads_of(layer, x, upstream, **kwargs):
    """y, dx and every adapter's dA and dB."""
    x = x.detach().requires_grad_()
    y = layer(x, **kwargs)
    factors = [*layer.lora_A.values(), *layer.lora_B.values()]
    return [y.detach(), *torch.autograd.grad(y, [x, *factors], upstream)]


def composed(layer, x, ids, ps, seeds):
    """The layer in plain differentiable torch, every row by itself, with the masks that ``seeds`` draw."""
    base = F.linear(x, layer.weight, layer.bias)
    place = [0] * len(ps)
    rows = []
    for m, j in enumerate(ids.tolist()):
        y = base[m]
        if j >= 0:
            name = f"j{j}"
            keep = keep_mask(place[j] + 1, K, ps[j], seeds[j : j + 1], 0)[-1] * (inv_keep(ps[j]) if ps[j] else 1.0)
            y = y + layer.scaling(name) * ((x[m] * keep) @ layer.lora_A[name].T) @ layer.lora_B[name].T
            place[j] += 1
        rows.append(y)
    return torch.stack(rows)


# ---------------------------------------------------------------------------------------------------------- LoRAFusion


@pytest.mark.parametrize("save_mask", ["bits", "seed"])
def test_lorafusion_swaps_x_and_its_dropped_copy_and_refuses_mixed_dropout(save_mask, monkeypatch):
    ps = (0.5, 0.0, 0.2)
    layer = make([{"r": r, "alpha": 2, "dropout": p} for r, p in zip((3, 1, 17), ps, strict=True)])
    layer.mask = save_mask
    ids = torch.tensor([2, 0, -1, 1, 0, 0, 2, 1])
    seeds = torch.tensor([3, 4, 5])
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: seeds)
    x, upstream = torch.randn(8, K, dtype=torch.float64), torch.randn(8, N, dtype=torch.float64)
    ours = grads_of(layer, x, upstream, adapter_ids=ids)
    leaf = x.clone().requires_grad_()
    y = composed(layer, leaf, ids, ps, seeds)
    want = [y, *torch.autograd.grad(y, [leaf, *layer.lora_A.values(), *layer.lora_B.values()], upstream)]
    for got, expected in zip(ours, want, strict=True):
        torch.testing.assert_close(got, expected)


def test_lorafusion_takes_four_adapters_and_batch_size_one():
    layer = make([{"r": 1 + i % 3, "alpha": 1} for i in range(9)])
    x, upstream = torch.randn(9, 5, K, dtype=torch.float64), torch.randn(9, 5, N, dtype=torch.float64)
    ours = grads_of(layer, x, upstream, adapter_ids=torch.arange(9).flip(0))
    for i in range(9):
        one = FusedLoRALinear.from_linear(nn.Linear(K, N), r=1 + (8 - i) % 3, alpha=1, adapter_dtype=torch.float64)
        one.weight, one.bias = layer.weight, layer.bias
        name = f"j{8 - i}"
        one.lora_A["default"], one.lora_B["default"] = layer.lora_A[name], layer.lora_B[name]
        torch.testing.assert_close(ours[0][i], one(x[i]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lorafusion_wants_ranks_that_are_powers_of_two_and_one_dtype(dtype):
    ranks = (1, 3, 17, 40)
    layer = make([{"r": r, "alpha": r} for r in ranks], dtype)
    assert all(a.dtype is torch.float32 for a in layer.lora_A.values())
    ids = torch.arange(4).repeat(3)
    x, upstream = torch.randn(12, K).to(dtype), torch.randn(12, N).to(dtype)
    y, dx, *factors = grads_of(layer, x, upstream, adapter_ids=ids)
    assert y.dtype is dx.dtype is dtype and all(g.dtype is torch.float32 and g.any() for g in factors)
    for g, r in zip(factors[:4], ranks, strict=True):
        assert g.shape == (r, K)


def test_lorafusion_pads_every_adapter_to_a_block_of_rows():
    layer = make([{"r": 2, "alpha": 2, "dropout": 0.5} for _ in range(50)], torch.bfloat16)
    x = torch.randn(50, K, dtype=torch.bfloat16, requires_grad=True)
    kept = saved_bytes(lambda: layer(x, adapter_ids=torch.arange(50)))
    assert kept == x.nbytes + 50 * 2 * 2 + 50 * 4 + (50 + 51) * 8 + 50 * 48  # x, S, bits, order and offsets, table


def test_lorafusion_backward_crashes_without_dropout():
    layer = make([{"r": 2, "alpha": 2, "dropout": 0.0}, {"r": 2, "alpha": 2, "dropout": 0.3}])
    x, upstream = torch.randn(4, K, dtype=torch.float64), torch.randn(4, N, dtype=torch.float64)
    assert all(g.any() for g in grads_of(layer, x, upstream, adapter_ids=torch.tensor([0, 1, 1, 0])))
    layer.eval()
    assert all(g.any() for g in grads_of(layer, x, upstream, adapter_ids=torch.tensor([0, 1, 1, 0])))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mask", ["bits", "seed"])
def test_lorafusion_draws_another_mask_when_checkpointing_recomputes(reentrant, mask):
    layer = make([{"r": 2, "alpha": 2, "dropout": 0.5}, {"r": 3, "alpha": 2, "dropout": 0.2}])
    layer.mask = mask
    ids = torch.tensor([0, 1, 1, -1, 0])
    x = torch.randn(5, K, dtype=torch.float64)
    results = []
    for recompute in (False, True):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(7)
        random.seed(7)
        y = checkpoint(lambda t: layer(t, adapter_ids=ids), leaf, use_reentrant=reentrant) if recompute else layer(
            leaf, adapter_ids=ids
        )  # fmt: skip
        random.random()
        layer.zero_grad()
        y.square().sum().backward()
        results.append([y.detach(), leaf.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_lorafusion_ignores_disabled_adapters():
    layer = make([{"r": 2, "alpha": 2}, {"r": 3, "alpha": 2}])
    x = torch.randn(4, K, dtype=torch.float64)
    with layer.disabled():
        assert torch.equal(layer(x, adapter_ids=torch.tensor([0, 1, 0, 1])), F.linear(x, layer.weight, layer.bias))


# ---------------------------------------------------------------------------------------------------------------- PEFT


def test_peft_mixes_adapters_in_inference_only():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(K, N))
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["0"])
    model = peft.get_peft_model(base, config, adapter_name="a")
    model.add_adapter("b", config)
    x = torch.randn(2, K)
    with pytest.raises(ValueError, match="training mode"):
        model.train()(x, adapter_names=["a", "b"])
    ours = nn.Sequential(MultiLoRALinear(nn.Linear(K, N), {"a": {"r": 2, "alpha": 2}, "b": {"r": 2, "alpha": 2}}))
    train_adapters(ours)
    with routed(ours, ["a", "b"], adapter_ids=torch.tensor([0, 1]), rows=2):
        ours.train()(x).square().sum().backward()
    assert all(b.grad.any() for b in ours[0].lora_B.values())


# ------------------------------------------------------------------------------------------------- compile, bad input


@pytest.mark.parametrize("kind", ["none", "reentrant", "not reentrant"])
@pytest.mark.parametrize("mask", ["bits", "seed"])
def test_compiled_in_one_graph_with_dropout(kind, mask):
    torch._dynamo.reset()
    layer = make([{"r": 2, "alpha": 2, "dropout": 0.5}, {"r": 3, "alpha": 2, "dropout": 0.2}])
    layer.mask = mask

    def call(x, ids):
        if kind == "none":
            return layer(x, adapter_ids=ids)
        return checkpoint(lambda t: layer(t, adapter_ids=ids), x, use_reentrant=kind == "reentrant")

    compiled = torch.compile(call, fullgraph=kind != "reentrant", backend="aot_eager")
    factors = [*layer.lora_A.values(), *layer.lora_B.values()]
    for ids in ([0, 1, 1, -1, 0, 1], [1, 1, 1, 0, 0, 0]):
        ids, results = torch.tensor(ids), []
        for fn in (call, compiled):
            x = torch.ones(6, K, dtype=torch.float64).requires_grad_()
            torch.manual_seed(3)
            y = fn(x, ids)
            for one in factors:
                one.grad = None
            y.square().sum().backward()
            results.append([y.detach(), x.grad, *(one.grad for one in factors)])
        for one, two in zip(*results, strict=True):
            torch.testing.assert_close(one, two)


def test_compiled_follows_a_changed_scale_and_dropout():
    torch._dynamo.reset()
    layer = make([{"r": 2, "alpha": 2}, {"r": 3, "alpha": 2}])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, ids = torch.randn(4, K, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    for change in (lambda: None, lambda: layer.alpha.update(j0=5.0), lambda: layer.dropout.update(j1=1.0), layer.eval):
        change()
        torch.testing.assert_close(compiled(x, adapter_ids=ids), layer(x, adapter_ids=ids))


def test_the_table_is_made_once_and_never_of_a_mode():
    from torch._subclasses.fake_tensor import FakeTensorMode

    args = ((2, 3), (1.5, 0.25), (0.125, 0.0), torch.device("cpu"))
    with FakeTensorMode():
        fake = adapter_table(*args)
    with torch.inference_mode():
        one = adapter_table(*args)
    assert type(fake) is not torch.Tensor and type(one) is torch.Tensor and not one.is_inference()
    assert adapter_table(*args) is one
    assert one[:, :3].tolist() == [[0, 2, 8192], [2, 3, 0]]
    assert one[:, 3:].contiguous().view(torch.float64).tolist() == [[1.5, 8 / 7, 1.5 * 8 / 7], [0.25, 1.0, 0.25]]


def test_ids_on_another_device_and_layers_of_other_ranks():
    layer = make([{"r": 2, "alpha": 2}, {"r": 3, "alpha": 2}])
    x = torch.randn(4, K, dtype=torch.float64)
    for name, value in (("adapter_ids", torch.zeros(4)), ("cu_seqlens", torch.zeros(3))):
        with pytest.raises(ValueError, match=rf"lowmem.MultiLoRALinear: {name}: expected device cpu \(input's\), got"):
            layer(x, **{name: value.to("meta", torch.int64)})
    other = MultiLoRALinear(
        nn.Linear(N, K, dtype=torch.float64), {"j1": {"r": 7, "alpha": 7}, "j0": {"r": 1, "alpha": 1}}
    )
    for b in other.lora_B.values():
        nn.init.normal_(b)
    model, ids = nn.Sequential(layer, other), torch.tensor([0, 1, 1, 0])
    with routed(model, ["j0", "j1"], adapter_ids=ids, rows=4):
        y = model(x)
    for m, j in enumerate(ids.tolist()):  # by name, whatever rank and place the adapter has in each layer
        for one in (layer, other):
            one.set_adapter(f"j{j}")
        torch.testing.assert_close(y[m], model(x[m]))


def test_an_empty_adapter_and_an_empty_batch_have_zero_gradients():
    layer = make([{"r": 2, "alpha": 2, "dropout": 0.1}, {"r": 3, "alpha": 2}])
    x = torch.randn(2, K, dtype=torch.float64)
    y, _, a0, a1, b0, b1 = grads_of(layer, x, torch.ones(2, N, dtype=torch.float64), adapter_ids=torch.tensor([1, 1]))
    assert not a0.any() and not b0.any() and a1.any() and b1.any()
    nothing = grads_of(
        layer, x[:0], torch.ones(0, N, dtype=torch.float64), adapter_ids=torch.zeros(0, dtype=torch.long)
    )
    assert nothing[0].shape == (0, N) and not any(g.any() for g in nothing)
    alone = grads_of(layer, x, torch.ones(2, N, dtype=torch.float64), cu_seqlens=torch.tensor([0, 0, 2]))
    torch.testing.assert_close(alone[0], y)


def test_wrong_values_are_found_under_compile_too():
    layer = make([{"r": 2, "alpha": 2}, {"r": 3, "alpha": 2}])
    compiled = torch.compile(
        lambda x, offsets: multi_lora_linear(
            x, layer.weight, list(layer.lora_A.values()), list(layer.lora_B.values()), (1.0, 1.0), offsets
        ),
        fullgraph=True,
        backend="aot_eager",
    )
    x = torch.randn(4, K, dtype=torch.float64)
    assert compiled(x, torch.tensor([0, 1, 4])).shape == (4, N)
    with pytest.raises(RuntimeError, match="offsets: expected ascending numbers"):
        compiled(x, torch.tensor([0, 3, 2]))
