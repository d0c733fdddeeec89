"""FusedLoRAGroup: the numbers of separate layers, under everything that can come between siblings' calls."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowmem
from lowmem.nn import FusedLoRAGroup, FusedLoRALinear, lora_layers
from lowmem.nn.lora_group import groups_by_call, groups_by_name
from lowmem.testing import saved_bytes


class Attention(nn.Module):
    """Three projections of one tensor, called one by one."""

    def __init__(self, dtype=torch.float64, dropout=0.3, mask="bits", between=None):
        super().__init__()
        options = {"alpha": 8, "dropout": dropout, "bias": True, "dtype": dtype, "mask": mask}
        self.q_proj = FusedLoRALinear(24, 24, r=4, **options)
        self.k_proj = FusedLoRALinear(24, 8, r=3, **options)
        self.v_proj = FusedLoRALinear(24, 8, r=5, **options)
        self.between = between
        for _, layer in lora_layers(self):
            nn.init.normal_(layer.lora_B["default"])

    def forward(self, x):
        q = self.q_proj(x)
        if self.between:
            x = self.between(x)
        return torch.cat([q, self.k_proj(x), self.v_proj(x)], -1)


def pair(**options):
    """The same module ungrouped and grouped."""
    torch.manual_seed(0)
    apart = Attention(**options)
    together = copy.deepcopy(apart)
    for parent, layers in groups_by_name(together):
        FusedLoRAGroup(layers).attach(parent)
    return apart, together


def run(module, x, seed=3):
    torch.manual_seed(seed)
    x = x.detach().clone().requires_grad_()
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    y = module(x * 1.0)  # a tensor that may be changed in place
    for leaf in leaves:
        leaf.grad = None
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def same(apart, together, x):
    one, other = run(apart, x), run(together, x)
    assert torch.equal(one[0], other[0])
    for a, b in zip(one[1:], other[1:], strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture
def calls(monkeypatch):
    """How many layers each call of the operator computed."""
    counts = []
    original = lowmem.nn.lora_group.lora_group

    def counted(x, layers, **kwargs):
        counts.append(len(layers))
        return original(x, layers, **kwargs)

    monkeypatch.setattr(lowmem.nn.lora_group, "lora_group", counted)
    return counts


X = torch.randn(2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mask", ["bits", "seed"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_same_numbers_and_masks_as_apart(calls, dropout, mask):
    same(*pair(dropout=dropout, mask=mask), X)
    assert calls == [3]


def test_called_by_itself_and_with_zero_rows():
    apart, together = pair()
    group = together.q_proj.group
    torch.manual_seed(5)
    expected = apart(X)
    torch.manual_seed(5)
    assert torch.equal(torch.cat(group(X), -1), expected)
    assert [y.shape for y in group(torch.zeros(0, 24, dtype=torch.float64))] == [(0, 24), (0, 8), (0, 8)]


def test_half_precision_bits_are_the_same_and_dx_is_as_good():
    apart, together = pair(dtype=torch.bfloat16)
    x = X.to(torch.bfloat16)
    one, other = run(apart, x), run(together, x)
    assert torch.equal(one[0], other[0])
    exact = run(copy.deepcopy(apart).double(), x.double())
    assert (other[1] - exact[1]).abs().max() <= 2 * (one[1] - exact[1]).abs().max()


@torch.no_grad()
def test_an_in_place_change_between_siblings_is_seen():
    apart, together = pair(between=lambda x: x.mul_(2.0), dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(apart(X.clone()), together(X.clone()))


def test_another_tensor_between_siblings_is_seen_and_warned_of():
    apart, together = pair(between=lambda x: x + 1.0, dropout=0.0)
    with pytest.warns(UserWarning, match="lowmem.FusedLoRAGroup: .* not asked"):
        same(apart, together, X)


def test_a_caller_without_grad_does_not_take_its_siblings_gradient():
    class First(Attention):
        def forward(self, x):
            with torch.no_grad():
                q = self.q_proj(x)
            return torch.cat([q, self.k_proj(x), self.v_proj(x)], -1)

    module = First(dropout=0.0)
    FusedLoRAGroup([module.q_proj, module.k_proj, module.v_proj]).attach(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module(X).sum().backward()
    assert module.k_proj.lora_B["default"].grad is not None and module.q_proj.lora_B["default"].grad is None


def test_nothing_is_kept_after_the_call_nor_after_an_exception():
    def stop(x):
        raise RuntimeError("stop")

    _, together = pair(between=stop)
    group = together.q_proj.group
    with pytest.raises(RuntimeError, match="stop"):
        together(X)
    assert (group._x, group._outputs, group._open) == (None, {}, 0)
    together.between = None
    together(X)
    assert (group._x, group._outputs, group._open) == (None, {}, 0)


def test_outside_the_parent_a_layer_is_alone(calls):
    _, together = pair()
    together.k_proj(X)
    assert calls == []


@pytest.mark.parametrize("case", ["disabled", "merged", "eval", "hook", "forward", "dora"])
def test_a_sibling_that_differs_is_left_out(calls, case):
    apart, together = pair(dropout=0.0)
    for module in (apart, together):
        k = module.k_proj
        if case == "disabled":
            k._disabled = 1
        elif case == "merged":
            k.merge()
        elif case == "eval":
            k.eval()
        elif case == "hook":
            k.register_forward_pre_hook(lambda layer, args: (args[0] * 2,))
        elif case == "forward":
            k.forward = lambda x, k=k: FusedLoRALinear.forward(k, x * 2)  # as offloading libraries do
        else:
            k.add_adapter("dora", r=2, alpha=2, use_dora=True)
            k.set_adapter("dora")
            torch.manual_seed(9)
            nn.init.normal_(k.lora_A["dora"])
            nn.init.normal_(k.lora_B["dora"])
    same(apart, together, X)
    assert calls == [2]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    apart, together = pair()
    same(apart, Checkpointed(together), X)


def test_compile_takes_each_layers_own_path():
    torch._dynamo.reset()
    apart, together = pair()
    same(apart, torch.compile(together, fullgraph=True, backend="aot_eager"), X)


def test_autocast_casts_and_saves_x_once():
    apart, together = pair(dtype=torch.float32, dropout=0.0)
    x = X.float().requires_grad_()

    def call(module):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(x)

    assert torch.equal(call(apart), call(together))
    casts = sum(layer.weight.numel() + layer.bias.numel() for _, layer in lora_layers(apart)) * 2
    one, other = saved_bytes(lambda: call(apart)), saved_bytes(lambda: call(together))
    assert one - other == 2 * x.numel() * 2, (one, other, casts)


def test_deepcopy_and_pickle_keep_the_group():
    apart, together = pair()
    for twin in (copy.deepcopy(together), pickle.loads(pickle.dumps(together))):
        assert twin.q_proj.group.layers[1] is twin.k_proj and twin.q_proj.group is not together.q_proj.group
        same(apart, twin, X)


def test_bad_layers():
    a, b = FusedLoRALinear(8, 8, r=2, alpha=2), FusedLoRALinear(9, 8, r=2, alpha=2)
    for layers, message in [
        ([a], "expected at least two FusedLoRALinear, got 1"),
        ([a, b], "expected one in_features, since they read one tensor, got 8 and 9"),
        ([a, a], "expected different layers"),
        ([a, nn.Linear(8, 8)], "expected FusedLoRALinear, got Linear"),
    ]:
        with pytest.raises((ValueError, TypeError), match=f"lowmem.FusedLoRAGroup: layers: {message}"):
            FusedLoRAGroup(layers)
    other = FusedLoRALinear(8, 8, r=2, alpha=2)
    FusedLoRAGroup([a, other]).attach(nn.Identity())
    with pytest.raises(ValueError, match="layers that are in no group"):
        FusedLoRAGroup([a, FusedLoRALinear(8, 8, r=2, alpha=2)])
    with pytest.raises(ValueError, match="lowmem.lora_group: layers: expected at least one layer"):
        lowmem.ops.lora_group(X, [])


# ------------------------------------------------------------------------------------------------- found by convert


class Odd(nn.Module):
    """Siblings that no name gives away, and one that reads another tensor."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.late = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, *, scale=1.0):
        return self.late(self.left(x) * self.right(x) * scale)


@pytest.mark.parametrize("inputs", [torch.ones(2, 8), (torch.ones(2, 8),), {"x": torch.ones(2, 8), "scale": 2.0}])
def test_convert_finds_siblings_by_one_call(inputs):
    model = nn.ModuleDict({"odd": Odd()})
    model.forward = model["odd"].forward
    model.train()
    model["odd"].late.eval()
    lowmem.convert(model, r=2, example_inputs=inputs)
    odd = model["odd"]
    assert odd.left.group.layers == [odd.left, odd.right] and odd.late.group is None
    assert odd.left.training and not odd.late.training


def test_convert_groups_a_llama_and_leaves_cross_attention_alone():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = lowmem.convert(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)), r=2)
    block = model.model.layers[0]
    assert len(block.self_attn.q_proj.group.layers) == 3 and block.self_attn.o_proj.group is None
    assert block.mlp.gate_proj.group.layers == [block.mlp.gate_proj, block.mlp.up_proj]
    by_call = {frozenset(map(id, layers)) for _, layers in groups_by_call(model, torch.zeros(1, 4, dtype=torch.long))}
    assert by_call == {frozenset(map(id, layers)) for _, layers in groups_by_name(model)}

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder_attn, self.self_attn = Attention(), Attention()

    decoder = Decoder()
    assert [parent for parent, _ in groups_by_name(decoder)] == [decoder.self_attn]


def test_a_layer_used_in_two_places_is_in_no_group():
    shared = FusedLoRALinear(8, 8, r=2, alpha=2)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj = shared, FusedLoRALinear(8, 8, r=2, alpha=2)

    assert groups_by_name(nn.ModuleList([Block(), Block()])) == []
