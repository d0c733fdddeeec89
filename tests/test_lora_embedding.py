"""LoRA on embeddings: against PEFT's layer and plain torch, exact dense gradients, bytes, merging, bad input."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowmem
from lowmem.nn import FusedLoRAEmbedding, disabled, routed
from lowmem.ops import lora_embedding
from lowmem.testing import assert_close_to_reference, saved_bytes, saved_for_backward, terms_of

F64 = torch.float64
pytestmark = pytest.mark.usefixtures("poisoned")


def layer(count=30, n=8, dtype=F64, padding_idx=3, device="cpu", **options):
    base = nn.Embedding(count, n, padding_idx=padding_idx, dtype=dtype, device=device)
    made = FusedLoRAEmbedding(base, **({"r": 3, "alpha": 6} | options))
    for a in made.lora_A.values():
        nn.init.normal_(a)
    return made


def run(module, ids, leaves):
    y = module(ids)
    upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


@pytest.mark.parametrize("shape", [(4, 5), (7,), (), (0, 3)])
@pytest.mark.parametrize("rslora", [False, True])
def test_equals_peft_layer(shape, rslora):
    peft = pytest.importorskip("peft")
    fused = layer(use_rslora=rslora)
    base = nn.Embedding(30, 8, padding_idx=3, dtype=F64)
    config = peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=0.5, target_modules=["0"], use_rslora=rslora)
    twin = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False).base_model.model[0]
    with torch.no_grad():
        twin.base_layer.weight.copy_(fused.weight)
        twin.lora_embedding_A["default"].data = fused.lora_A["default"].detach().clone()
        twin.lora_embedding_B["default"].data = fused.lora_B["default"].detach().clone()
    ids = torch.randint(0, 30, shape)
    theirs = run(twin, ids, [twin.lora_embedding_A["default"], twin.lora_embedding_B["default"]])
    for ours, other in zip(run(fused, ids, [fused.lora_A["default"], fused.lora_B["default"]]), theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-12)


def test_starts_as_the_embedding_and_as_peft_does():
    base = nn.Embedding(30, 8, padding_idx=3)
    fused = FusedLoRAEmbedding(base, r=3, alpha=6)
    ids = torch.randint(0, 30, (5, 4))
    assert torch.equal(fused(ids), base(ids)) and fused.weight is base.weight
    assert not fused.lora_A["default"].any() and fused.lora_B["default"].std() > 0.5
    assert isinstance(fused, nn.Embedding) and fused.padding_idx == 3
    assert [name for name, p in fused.named_parameters() if p.requires_grad] == ["lora_A.default", "lora_B.default"]


@pytest.mark.parametrize("by_freq", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 2, -1])
def test_every_gradient_against_plain_torch(by_freq, padding_idx):
    ids = torch.tensor([[0, 2, 2, 6], [6, 6, 1, 5]])
    leaves = [torch.randn(*s, dtype=F64, requires_grad=True) for s in [(7, 5), (3, 7), (5, 3)]]
    options = {"padding_idx": padding_idx, "scale_grad_by_freq": by_freq}

    def plain(ids):
        w, a, b = leaves
        return F.embedding(ids, w, **options) + 1.5 * F.embedding(ids, a.t(), **options) @ b.t()

    ours = run(lambda ids: lora_embedding(ids, *leaves, 1.5, **options), ids, leaves)
    for one, two in zip(ours, run(plain, ids, leaves), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    assert torch.equal(run(lambda i: lora_embedding(i, *leaves, 1.5, **options), ids.int(), leaves)[1], ours[1])


def test_gradcheck():
    ids = torch.tensor([0, 2, 2, 6])
    leaves = [torch.randn(*s, dtype=F64, requires_grad=True) for s in [(7, 5), (3, 7), (5, 3)]]
    assert torch.autograd.gradcheck(lambda *t: lora_embedding(ids, *t, 0.7), leaves)


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_bf16_by_the_error_rule(adapter, device):
    fused = layer(50, 24, dtype=torch.bfloat16, adapter_dtype=adapter, device=device, r=5, alpha=10)
    ids = torch.randint(0, 50, (64,), device=device)
    parts = [fused.weight.detach(), fused.lora_A["default"].detach(), fused.lora_B["default"].detach()]
    dy = torch.randn(64, 24, device=device).bfloat16()

    def reference(w, a, b, dy):
        s = (2.0 * F.embedding(ids, a.t())).to(w.dtype)
        y = F.embedding(ids, w) + s @ b.to(w.dtype).t()
        ds = dy @ b.to(dy.dtype) * 2.0
        da = torch.zeros_like(a).index_add(1, ids[ids != 3], ds.to(a.dtype).t()[:, ids != 3])
        return y, da, (dy.t() @ s).to(b.dtype)

    ours = run_with(fused, ids, dy)
    exact = reference(*(t.double() for t in (*parts, dy)))
    terms = terms_of(reference, *parts, dy)
    rounded = [
        [],
        [2.0 * dy.double() @ parts[2].double()],
        [(2.0 * dy.double().abs().t() @ parts[1].t()[ids].double())],
    ]
    for got, wide, low, sums, middle in zip(ours, exact, reference(*parts, dy), terms, rounded, strict=True):
        assert_close_to_reference(got, wide, low, terms=sums, rounded=middle, rounded_to=torch.bfloat16)


def run_with(fused, ids, dy):
    y = fused(ids)
    return [y.detach(), *torch.autograd.grad(y, [fused.lora_A["default"], fused.lora_B["default"]], dy)]


def test_a_token_that_repeats_is_summed_in_fp32_and_the_gradient_is_dense():
    fused = layer(4, 2, dtype=torch.bfloat16, padding_idx=None, r=1, alpha=1)
    with torch.no_grad():
        fused.lora_B["default"].fill_(0.5)
    fused(torch.ones(5000, dtype=torch.int64)).sum().backward()
    grad = fused.lora_A["default"].grad
    assert grad.layout == torch.strided and grad.dtype == torch.float32
    assert grad.tolist() == [[0.0, 5000.0, 0.0, 0.0]]  # a sum in bf16 stands still at 256


def test_saves_the_ids_and_nothing_else():
    fused = layer(64, 32, dtype=torch.bfloat16)
    ids = torch.randint(0, 64, (6, 8))
    assert saved_bytes(lambda: fused(ids)) == 6 * 8 * 8
    assert saved_for_backward(lambda: fused(ids), exclude=ids) == []


def test_merge_unmerge_disabled_and_state():
    fused = layer()
    ids = torch.randint(0, 30, (4, 5))
    active, plain, weight = fused(ids).detach(), F.embedding(ids, fused.weight), fused.weight.detach().clone()
    with fused.disabled():
        assert torch.equal(fused(ids), plain)
    fused.merge()
    torch.testing.assert_close(fused(ids), active)
    with disabled(nn.ModuleList([fused])):
        torch.testing.assert_close(fused(ids), plain)
    twin = layer()
    twin.load_state_dict(copy.deepcopy(fused.state_dict()))
    assert list(twin.state_dict()) == ["weight", "lora_A.default", "lora_B.default"]
    for one in (fused, twin):
        assert one.merged == "default"
        one.unmerge()
        torch.testing.assert_close(one.weight.data, weight)
        torch.testing.assert_close(one(ids), active)


def test_named_adapters():
    fused = layer()
    ids = torch.randint(0, 30, (4, 5))
    first = fused(ids)
    fused.add_adapter("other", r=2, alpha=1)
    assert torch.equal(fused(ids), first)
    fused.set_adapter("other")
    assert torch.equal(fused(ids), F.embedding(ids, fused.weight))
    assert fused.lora_A["other"].requires_grad and not fused.lora_A["default"].requires_grad


def test_compile_fullgraph():
    torch._dynamo.reset()
    fused = layer()
    ids = torch.randint(0, 30, (4, 5))
    leaves = [fused.lora_A["default"], fused.lora_B["default"]]
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(run(compiled, ids, leaves), run(fused, ids, leaves), strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(2)}, "ids: expected int32 or int64, got torch.float32"),
        ({"base": torch.zeros(7)}, r"base: expected a floating tensor \[V, N\], got shape \(7,\)"),
        ({"A": torch.zeros(3, 8)}, r"A: expected a floating tensor \[r, 7\] with r >= 1, got shape \(3, 8\)"),
        ({"A": torch.zeros(0, 7)}, r"A: expected .* with r >= 1, got shape \(0, 7\)"),
        ({"B": torch.zeros(5, 2)}, r"B: expected a floating tensor \[5, 3\], got shape \(5, 2\)"),
        ({"B": torch.zeros(5, 3, device="meta")}, r"B: expected device cpu \(base's\), got device meta"),
        ({"padding_idx": 7}, r"padding_idx: expected a number in \[-7, 7\), got 7"),
    ],
)
def test_bad_arguments(change, message):
    given = {"ids": torch.zeros(2, dtype=torch.int64), "base": torch.zeros(7, 5), "A": torch.zeros(3, 7)}
    given |= {"B": torch.zeros(5, 3), "scale": 1.0} | change
    with pytest.raises((ValueError, TypeError), match="^lowmem.lora_embedding: " + message):
        lora_embedding(**given)


def test_refusals():
    for base, message in [
        (nn.Linear(2, 2), "expected an nn.Embedding .*, got Linear"),
        (type("Scaled", (nn.Embedding,), {})(4, 2), "expected an nn.Embedding .*, got Scaled"),
        (nn.Embedding(4, 2, max_norm=1.0), "expected an embedding without max_norm, .*, got max_norm=1.0"),
    ]:
        with pytest.raises((ValueError, TypeError), match="^lowmem.FusedLoRAEmbedding: base: " + message):
            FusedLoRAEmbedding(base, r=2, alpha=2)
    for option in ("use_dora", "gate"):
        with pytest.raises(ValueError, match=f"{option}: expected False .an embedding has plain adapters., got True"):
            layer(**{option: True})
    with pytest.raises(IndexError):
        layer()(torch.tensor([30]))
    model = nn.Sequential(layer())
    ids = torch.zeros(2, dtype=torch.int64)
    with (
        pytest.raises(ValueError, match="lowmem.routed: module: expected adapters on linear layers alone, got Fused"),
        routed(model, ["default"], adapter_ids=ids, rows=2),
    ):
        pass


def test_convert_of_a_tied_embedding_warns_and_merging_is_refused():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    )
    with pytest.warns(UserWarning, match="'model.embed_tokens' shares its weight with 'lm_head'"):
        lowmem.convert(model, r=2, target_modules=["q_proj", "embed_tokens"])
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, FusedLoRAEmbedding)
    ids = torch.arange(8).view(1, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    assert embedding.lora_A["default"].grad.any() and model.lm_head.weight.grad is None
    with pytest.raises(ValueError, match="expected a weight that no other module reads, got one tied to lm_head"):
        embedding.merge()
    text = str(lowmem.report(model))
    assert "embed_tokens" in text and "2 of 9 layers converted" in text
