"""Rows of one batch through different adapters: equal to a loop over single calls, in every layout of the rows."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowmem
from lowmem.nn import FusedLoRALinear, MultiLoRALinear, lora_layers, route, routed, train_adapters
from lowmem.ops import lora_linear, multi_lora_linear
from lowmem.ops.lora_multi import adapter_table
from lowmem.testing import saved_bytes

F64 = torch.float64
RANKS, SCALES, DROPS = (3, 1, 5), (2.0, 0.5, 1.5), (0.0, 0.4, 0.2)


def factors(dtype=F64, k=20, n=12):
    g = torch.Generator().manual_seed(0)
    a = [torch.randn(r, k, dtype=dtype, generator=g, requires_grad=True) for r in RANKS]
    b = [torch.randn(n, r, dtype=dtype, generator=g, requires_grad=True) for r in RANKS]
    weight, bias = torch.randn(n, k, dtype=dtype, generator=g), torch.randn(n, dtype=dtype, generator=g)
    return a, b, weight, bias


def loop(x, ids, a, b, weight, bias, ps, seeds, save_mask=True):
    """The definition: every adapter's rows alone, then the rows of no adapter."""
    y = F.linear(x, weight, bias)
    for j in range(len(a)):
        rows = (ids == j).nonzero().flatten()
        seed = seeds[j : j + 1] if ps[j] else None
        part = lora_linear(x[rows], weight, a[j], b[j], SCALES[j], bias=bias, p=ps[j], seed=seed, save_mask=save_mask)
        y = y.index_copy(0, rows, part)
    return y


IDS = {
    "mixed": [2, 0, -1, 1, 1, 0, 2, -1, 0, 2],
    "sorted": [0, 0, 1, 1, 1, 2, 2],
    "one adapter": [1, 1, 1],
    "base only": [-1, -1],
    "empty adapter": [0, 2, 2, 0],
    "no rows": [],
}


@pytest.mark.parametrize("save_mask", [True, False])
@pytest.mark.parametrize("ps", [(0.0, 0.0, 0.0), DROPS])
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_equals_the_loop_over_single_calls(ids, ps, save_mask):
    a, b, weight, bias = factors()
    ids = torch.tensor(ids, dtype=torch.int64)
    x = torch.randn(len(ids), 20, dtype=F64, requires_grad=True)
    seeds = torch.tensor([5, 6, 7])
    routing = route("abc", adapter_ids=ids, rows=len(ids))
    leaves = [x, *a, *b]

    def multi():
        return multi_lora_linear(
            x,
            weight,
            a,
            b,
            SCALES,
            routing.offsets,
            order=routing.order,
            bias=bias,
            ps=ps,
            seeds=seeds,
            save_mask=save_mask,
        )

    outputs = [multi(), loop(x, ids, a, b, weight, bias, ps, seeds)]
    torch.testing.assert_close(*outputs)
    upstream = torch.randn(outputs[0].shape, dtype=F64)
    grads = [torch.autograd.grad(y, leaves, upstream) for y in outputs]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradcheck_and_base_none():
    a, b, weight, bias = factors()
    x = torch.randn(6, 20, dtype=F64, requires_grad=True)
    routing = route("abc", adapter_ids=torch.tensor([1, 0, 2, -1, 1, 0]), rows=6)
    seeds = torch.tensor([5, 6, 7])

    def call(base, *t):
        return multi_lora_linear(
            t[0], base, t[1:4], t[4:7], SCALES, routing.offsets, order=routing.order, ps=DROPS, seeds=seeds
        )

    assert torch.autograd.gradcheck(lambda *t: call(weight, *t), (x, *a, *b))
    assert torch.autograd.gradcheck(lambda *t: call(None, *t), (x, *a, *b))
    with_base = multi_lora_linear(
        x, weight.requires_grad_(), a, b, SCALES, routing.offsets, order=routing.order, bias=bias
    )
    dw, dx = torch.autograd.grad(with_base.sum(), (weight, x))
    torch.testing.assert_close(dw, x.sum(0).expand(12, 20))
    assert dx.isfinite().all()


def test_bf16_with_fp32_adapters_is_bit_equal_to_the_loop_on_s():
    a, b, weight, bias = factors(torch.float32)
    weight, bias = weight.bfloat16(), bias.bfloat16()
    x = torch.randn(9, 20, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.tensor([0, 1, 2, -1, 1, 0, 0, 2, 1])
    routing = route("abc", adapter_ids=ids, rows=9)
    s, mask = torch.ops.lowmem.lora_multi_shrink(
        x.detach(),
        [one.detach() for one in a],
        adapter_table(RANKS, SCALES, DROPS, "cpu"),
        torch.tensor([5, 6, 7]),
        routing.order,
        routing.offsets,
        True,
        True,
    )
    for j in range(3):
        rows = (ids == j).nonzero().flatten()
        seed = torch.tensor([5 + j]) if DROPS[j] else None
        one, bits = torch.ops.lowmem.lora_shrink(x.detach()[rows], a[j].detach(), SCALES[j], DROPS[j], seed, 0, True)
        assert torch.equal(s[rows, : RANKS[j]], one) and not s[rows, RANKS[j] :].any()
        assert torch.equal(mask[rows], bits if DROPS[j] else torch.full_like(mask[rows], 2**20 - 1))
    assert not s[3].any() and not mask[3].any()
    y = multi_lora_linear(x, weight, a, b, SCALES, routing.offsets, order=routing.order, bias=bias)
    y.float().sum().backward()
    assert y.dtype is torch.bfloat16 and a[0].grad.dtype is torch.float32


@pytest.mark.parametrize("op", ["lora_multi_shrink", "lora_multi_expand_", "lora_multi_dy", "lora_multi_da"])
@pytest.mark.parametrize("order", [False, True])
def test_opcheck(op, order):
    x, a, b = torch.randn(7, 20), [torch.randn(r, 20) for r in RANKS], [torch.randn(12, r) for r in RANKS]
    routing = route("abc", adapter_ids=torch.tensor([0, 0, 1, 1, 1, 2, 2]), rows=7)
    order = routing.order if order else None
    table, seeds, offsets = adapter_table(RANKS, SCALES, DROPS, "cpu"), torch.tensor([5, 6, 7]), routing.offsets
    s = torch.randn(7, 5)
    args = {
        "lora_multi_shrink": (x, a, table, seeds, order, offsets, True, True),
        "lora_multi_expand_": (x.clone(), s, a, table, None, seeds, order, offsets, True),
        "lora_multi_dy": (torch.randn(7, 12), b, s, table, order, offsets),
        "lora_multi_da": (s, x, list(RANKS), table, None, seeds, order, offsets, True),
    }[op]
    torch.library.opcheck(getattr(torch.ops.lowmem, op).default, args)


# ------------------------------------------------------------------------------------------------------------ routing


def segments(routing, rows):
    order = torch.arange(rows) if routing.order is None else routing.order
    ends = routing.offsets.tolist()
    return [order[low:high].tolist() for low, high in zip(ends, ends[1:], strict=False)]


def test_route_by_row_sample_and_segment():
    assert segments(route("ab", adapter_ids=torch.tensor([1, 0, -1, 1]), rows=4), 4) == [[1], [0, 3]]
    assert segments(route("ab", adapter_ids=torch.tensor([1, 0]), rows=6), 6) == [[3, 4, 5], [0, 1, 2]]
    assert segments(route("ab", cu_seqlens=torch.tensor([1, 3, 5]), rows=6), 6) == [[1, 2], [3, 4]]
    by_both = route("ab", adapter_ids=torch.tensor([1, 0, 1, -1]), cu_seqlens=torch.tensor([1, 2, 2, 5, 6]), rows=8)
    assert segments(by_both, 8) == [[], [1, 2, 3, 4]]
    assert segments(route("ab", adapter_ids=torch.tensor([[0, 1], [1, 1]], dtype=torch.int32), rows=4), 4) == [
        [0],
        [1, 2, 3],
    ]


BAD = [
    ({"adapter_ids": torch.tensor([0, 2])}, r"adapter_ids: expected numbers in \[-1, 2\), got \[0, 2\]"),
    ({"adapter_ids": torch.tensor([-2, 0])}, r"adapter_ids: expected numbers in \[-1, 2\), got \[-2, 0\]"),
    ({"adapter_ids": torch.tensor([0, 1, 1])}, "adapter_ids: expected 4 numbers, or a divisor of it"),
    ({"adapter_ids": torch.tensor([0.0])}, "adapter_ids: expected int32 or int64"),
    ({"adapter_ids": torch.zeros(4, dtype=torch.long, device="meta"), "cu_seqlens": torch.tensor([0, 4])}, "on meta"),
    ({"cu_seqlens": torch.tensor([0, 3, 2])}, r"cu_seqlens: expected ascending in \[0, 4\], got \[0, 3, 2\]"),
    ({"cu_seqlens": torch.tensor([0, 3, 5])}, "cu_seqlens: expected ascending"),
    ({"cu_seqlens": torch.tensor([0, 1, 2, 4])}, "cu_seqlens: expected 3 numbers"),
    ({"cu_seqlens": torch.tensor([0])}, "cu_seqlens: expected one dimension, at least two"),
    ({"cu_seqlens": torch.tensor([0, 4]), "adapter_ids": torch.tensor([0, 1])}, r"adapter_ids: expected \[1\]"),
    ({}, "adapter_ids: expected adapter_ids, cu_seqlens or both, got neither"),
]


@pytest.mark.parametrize(("kwargs", "message"), BAD, ids=range(len(BAD)))
def test_bad_routes(kwargs, message):
    with pytest.raises((ValueError, TypeError), match=f"lowmem.route: .*{message}"):
        route("ab", rows=4, **kwargs)


def test_bad_operator_arguments():
    a, b, weight, bias = factors()
    x, offsets = torch.randn(4, 20, dtype=F64), torch.tensor([0, 1, 2, 4])
    for change, message in [
        ({"offsets": torch.tensor([0, 2, 1, 4])}, r"offsets: expected ascending numbers in \[0, 4\]"),
        ({"offsets": torch.tensor([0, 1, 2, 5])}, "offsets: expected ascending"),
        ({"offsets": torch.tensor([0, 4])}, r"offsets: expected int64 \[4\]"),
        ({"order": torch.arange(3)}, r"order: expected int64 \[4\]"),
        ({"order": torch.tensor([0, 1, 2, 4])}, r"order: expected a permutation of 0..3, got \[0, 1, 2, 4\]"),
        ({"order": torch.tensor([0, 1, 1, 3])}, r"order: expected a permutation of 0..3, got \[0, 1, 1, 3\]"),
        ({"ps": (0.1, 0, 0)}, r"seeds: expected int64 \[3\] on cpu, got None"),
        ({"ps": (-0.1, 0, 0)}, r"ps\[0\]: expected a probability"),
        ({"scales": (1.0,)}, "scales: expected 3 of them"),
        ({"B": b[:2]}, "B: expected 3 of them"),
        ({"A": []}, "A: expected at least one adapter"),
        ({"A": [a[0], a[1][:, :3], a[2]]}, r"A\[1\]: expected a floating tensor \[r, 20\]"),
        ({"B": [b[0], b[0], b[2]]}, r"B\[1\]: expected a floating tensor \[12, 1\]"),
        ({"A": [a[0], a[1].float(), a[2]]}, ".*one dtype for all A"),
        ({"base": weight.float()}, "base: expected"),
        ({"bias": bias[:3]}, "bias: expected"),
        ({"x": torch.zeros(2, 20, dtype=torch.long)}, "x: expected a floating tensor"),
    ]:
        args = {"x": x, "base": weight, "A": a, "B": b, "scales": SCALES, "offsets": offsets, "bias": bias} | change
        with pytest.raises((ValueError, TypeError), match=f"lowmem.multi_lora_linear: {message}"):
            multi_lora_linear(**args)


# ------------------------------------------------------------------------------------------------------------ modules


def multi_layer(dropout=0.0, dtype=F64):
    torch.manual_seed(0)
    names = {f"job{j}": {"r": r, "alpha": 2 * r, "dropout": dropout} for j, r in enumerate(RANKS)}
    layer = MultiLoRALinear(nn.Linear(20, 12, dtype=dtype), names)
    for b in layer.lora_B.values():
        nn.init.normal_(b)
    return layer


def test_module_by_ids_by_segments_and_by_context():
    layer = multi_layer()
    assert all(p.requires_grad == ("lora_" in name) for name, p in layer.named_parameters())
    x = torch.randn(3, 2, 20, dtype=F64)
    ids = torch.tensor([2, -1, 0])
    expected = torch.stack([_alone(layer, x[i], int(j)) for i, j in enumerate(ids)])
    torch.testing.assert_close(layer(x, adapter_ids=ids), expected)
    torch.testing.assert_close(layer(x, adapter_ids=ids, cu_seqlens=torch.tensor([0, 2, 4, 6])), expected)
    model = nn.Sequential(layer)
    with routed(model, list(layer.lora_A), adapter_ids=ids, rows=6):
        torch.testing.assert_close(model(x), expected)
        with pytest.raises(ValueError, match="input: expected 6 rows, as routed, got 4"):
            model(x[:2])
    assert layer.routing is None
    torch.testing.assert_close(model(x), _alone(layer, x, 0))


def _alone(layer, x, j):
    if j < 0:
        return F.linear(x, layer.weight, layer.bias)
    name = f"job{j}"
    return lora_linear(x, layer.weight, layer.lora_A[name], layer.lora_B[name], layer.scaling(name), bias=layer.bias)


def test_many_adapters_and_an_adapter_without_rows_gets_a_zero_gradient():
    torch.manual_seed(0)
    layer = MultiLoRALinear(nn.Linear(16, 8, dtype=F64), {f"j{i}": {"r": 1 + i % 7, "alpha": 4} for i in range(200)})
    ids = torch.arange(300) % 199
    layer(torch.randn(300, 16, dtype=F64), adapter_ids=ids).sum().backward()
    assert not layer.lora_B["j199"].grad.any() and layer.lora_B["j5"].grad.any()


def test_compile_fullgraph():
    torch._dynamo.reset()
    layer = multi_layer()
    x = torch.randn(6, 20, dtype=F64, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for ids in ([0, 1, 2, -1, 1, 0], [2, 2, 2, 2, 1, 0]):
        ids = torch.tensor(ids)
        eager, ours = layer(x, adapter_ids=ids), compiled(x, adapter_ids=ids)
        torch.testing.assert_close(ours, eager)
        leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
        for one, other in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (eager, ours)), strict=True):
            torch.testing.assert_close(one, other)
    with pytest.raises(RuntimeError, match="lowmem.route: adapter_ids: expected numbers"):
        compiled(x, adapter_ids=torch.full((6,), 7))


def test_saved_bytes():
    layer = multi_layer(dropout=0.1, dtype=torch.bfloat16)
    x = torch.randn(40, 20, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.arange(40) % 3
    bits, routing = 40 * 4, (40 + 4) * 8 + 3 * 48  # order, offsets; the table of adapters
    assert saved_bytes(lambda: layer(x, adapter_ids=ids)) == x.nbytes + 40 * max(RANKS) * 2 + bits + routing


def test_whole_model_trains_each_adapter_as_alone():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    model = lowmem.convert(transformers.LlamaForCausalLM(config).double(), r=2, name="a")
    for _, layer in lora_layers(model):
        layer.add_adapter("b", r=3, alpha=3)
        nn.init.normal_(layer.lora_B["a"])
        nn.init.normal_(layer.lora_B["b"])
    train_adapters(model)
    ids = torch.randint(0, 32, (4, 6))
    grads = {}
    for name, rows in (("a", [0, 2]), ("b", [1, 3])):
        alone = copy.deepcopy(model)
        lowmem.nn.set_adapter(alone, name)
        alone(input_ids=ids[rows], labels=ids[rows]).loss.backward()
        grads |= {n: p.grad for n, p in alone.named_parameters() if p.grad is not None}
    with routed(model, ["a", "b"], adapter_ids=torch.tensor([0, 1, 0, 1]), rows=24):
        logits = model(input_ids=ids).logits
    losses = [F.cross_entropy(logits[rows, :-1].flatten(0, 1), ids[rows, 1:].flatten()) for rows in ([0, 2], [1, 3])]
    sum(losses).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, grads[name])


def test_refusals():
    layer = multi_layer()
    x, ids = torch.randn(2, 20, dtype=F64), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="lowmem.routed: names: expected adapters that every layer has, got 'nobody'"):
        with routed(nn.Sequential(layer), ["nobody"], adapter_ids=ids, rows=2):
            pass
    layer.merge()
    with pytest.raises(
        ValueError, match="routing: expected plain adapters on a layer that is not merged, got 'job0' merged"
    ):
        layer(x, adapter_ids=ids)
    layer.unmerge()
    layer.add_adapter("dora", r=2, alpha=2, use_dora=True)
    with pytest.raises(ValueError, match="got 'dora' with a gate or a magnitude"):
        layer(x, adapter_ids=ids)
    for base, adapters, message in [
        (nn.Linear(2, 2), {}, "adapters: expected at least one adapter"),
        (FusedLoRALinear(2, 2, r=1, alpha=1), {"a": {"r": 1, "alpha": 1}}, "base: expected an nn.Linear"),
    ]:
        with pytest.raises((ValueError, TypeError), match=f"lowmem.MultiLoRALinear: {message}"):
            MultiLoRALinear(base, adapters)
