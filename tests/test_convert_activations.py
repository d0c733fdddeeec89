"""convert(activations=...), FusedLoRALinear(save=...), and the bytes of a Llama-2-7B layer."""

import copy

import pytest
import torch
from torch import nn

import lowmem
from lowmem.nn import FusedLoRAGroup, FusedLoRALinear, GatedMLP, RMSNorm, lora_layers
from lowmem.ops import lora_group, lora_linear, rms_norm, swiglu
from lowmem.ops.activation_saved import packed_bytes
from lowmem.ops.lora import Adapted
from lowmem.testing import saved_bytes

transformers = pytest.importorskip("transformers", reason="whole models come from it (extra: hf)")
ops = torch.ops.lowmem


def llama(dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    options = {
        "vocab_size": 64,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
    } | kwargs
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**options)).to(dtype)


# ---------------------------------------------------------------------------------------------- FusedLoRALinear(save=)


def adapted(n, k, r, device, dtype=torch.float32, p=0.0):
    a, b = torch.randn(r, k, device=device) * k**-0.5, torch.randn(n, r, device=device)
    w = (torch.randn(n, k, device=device) * k**-0.5).to(dtype)
    seed = torch.tensor([7], device=device) if p else None
    return Adapted(w, a.requires_grad_(), b.requires_grad_(), 2.0, p=p, seed=seed)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_fp8_input_of_a_lora_layer(device, dtype, p):
    layer = adapted(24, 200, 4, device, dtype, p)
    x = torch.randn(2, 5, 200, device=device, dtype=dtype).requires_grad_()
    results = {}
    for save in ("bf16", "fp8", "recompute"):
        (y,) = lora_group(x, [layer], save=save)
        results[save] = y, *torch.autograd.grad(y, (x, layer.A, layer.B), torch.ones_like(y))
    assert all(map(torch.equal, results["bf16"], results["recompute"]))
    y, dx, da, db = results["fp8"]
    assert torch.equal(y, results["bf16"][0]) and torch.equal(dx, results["bf16"][1])
    assert torch.equal(db, results["bf16"][3])
    # dA alone sees the groups: exactly the dA of the decoded x
    x8 = ops.fp8_unpack(ops.fp8_pack(x.detach().view(10, 200)), 10, 200, dtype)
    want = torch.autograd.grad(lora_linear(x8, *layer[:4], p=p, seed=layer.seed), layer.A,
                               torch.ones(10, 24, device=device, dtype=dtype))[0]  # fmt: skip
    torch.testing.assert_close(da, want)
    exact = results["bf16"][2]
    ds = (torch.ones(10, 24, device=device, dtype=torch.float64) @ layer.B.double()).abs() * 2 / (1 - p)
    bound = ds.T @ (x.detach().view(10, 200).double().abs() / 16 + 2.0**-10)
    assert bool(((da.double() - exact.double()).abs() <= bound + exact.abs().max() * torch.finfo(dtype).eps).all())


def test_bytes_of_a_lora_layer(device):
    layer = adapted(24, 256, 4, device, torch.bfloat16)
    x = torch.randn(6, 256, device=device, dtype=torch.bfloat16).requires_grad_()
    inputs = [layer.base, layer.A, layer.B]
    assert (
        saved_bytes(lambda: lora_linear(x, *layer[:4], save="fp8"), exclude=inputs) == packed_bytes(6, 256) + 6 * 4 * 2
    )
    assert saved_bytes(lambda: lora_linear(x, *layer[:4]), exclude=inputs) == 6 * 256 * 2 + 6 * 4 * 2
    frozen = layer._replace(A=layer.A.detach())  # LoRA-FA keeps no x in any form
    assert saved_bytes(lambda: lora_group(x, [frozen], save="fp8"), exclude=inputs) == 6 * 4 * 2


@pytest.mark.parametrize("save", ["fp8", "recompute"])
def test_an_offered_input_is_kept_once(device, save):
    """norm -> q, k, v and SwiGLU -> down keep what the producers keep and nothing of their own but S."""
    layers = [adapted(24, 256, 4, device, torch.bfloat16) for _ in range(3)]
    x, u = (torch.randn(6, 256, device=device, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    weight = torch.rand(256, device=device).requires_grad_()
    inputs = [weight] + [t for layer in layers for t in layer[:3]]

    def norm_then(save):
        return sum(lora_group(rms_norm(x, weight, save=save), layers, save=save))

    def glu_then(save):
        return lora_linear(swiglu(x, u, save=save), *layers[0][:4], save=save)

    each = packed_bytes(6, 256) if save == "fp8" else 6 * 256 * 2
    assert saved_bytes(lambda: norm_then(save), exclude=inputs) == each + 6 * 4 + 3 * 6 * 4 * 2
    assert saved_bytes(lambda: glu_then(save), exclude=inputs) == 2 * each + 6 * 4 * 2
    for fn in (norm_then, glu_then):
        grads = [
            torch.autograd.grad(fn(how).float().square().sum(), [x, layers[0].A, layers[0].B]) for how in (save, "bf16")
        ]
        for a, b in zip(*grads, strict=True):
            if save == "recompute":
                assert torch.equal(a, b)
            else:
                assert float((a - b).float().norm() / b.float().norm()) < 2 / 16


def test_layers_and_groups_keep_their_form(device):
    linears = [nn.Linear(128, 32, bias=False) for _ in range(2)]
    layers = [FusedLoRALinear.from_linear(one.to(device), r=4, alpha=4, save="fp8") for one in linears]
    x = torch.randn(6, 128, device=device).requires_grad_()
    group = FusedLoRAGroup(layers)
    frozen = [layer.weight for layer in layers]
    assert saved_bytes(lambda: sum(group(x)), exclude=frozen) == packed_bytes(6, 128) + 2 * 6 * 4 * 4
    apart = saved_bytes(lambda: layers[0](x) + layers[1](x), exclude=frozen)
    assert apart == 2 * packed_bytes(6, 128) + 2 * 6 * 4 * 4
    for layer in layers:
        nn.init.normal_(layer.lora_B["default"])
    want = torch.autograd.grad(sum(layer(x) for layer in layers).sum(), x)
    compiled = torch.compile(lambda x: layers[0](x) + layers[1](x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x), want)
    with pytest.raises(ValueError, match=r"lowmem\.FusedLoRALinear: save: expected 'bf16'"):
        FusedLoRALinear(4, 4, r=1, alpha=1, save="int8")
    with pytest.raises(ValueError, match=r"lowmem\.lora_linear: save: expected 'bf16'"):
        lora_linear(x, None, torch.ones(1, 128, device=device), torch.ones(2, 1, device=device), 1.0, save="int8")


# -------------------------------------------------------------------------------------------------------------- convert


@pytest.mark.parametrize("activations", ["fp8", "recompute"])
def test_convert_a_llama(device, activations):
    plain = lowmem.convert(llama().to(device), r=4, alpha=8)
    model = lowmem.convert(llama().to(device), r=4, alpha=8, activations=activations)
    for m in (plain, model):
        torch.manual_seed(3)
        for _, layer in lora_layers(m):
            nn.init.normal_(layer.lora_B["default"], std=0.1)
    model.load_state_dict(plain.state_dict())
    assert set(model.state_dict()) == set(plain.state_dict())
    kinds = [type(m) for m in model.modules()]
    assert kinds.count(RMSNorm) == 5 and kinds.count(GatedMLP) == 2
    saves = {name: layer.save for name, layer in lora_layers(model)}
    assert {name.rpartition(".")[2] for name, save in saves.items() if save == "bf16"} == {"o_proj"}
    ids = torch.randint(0, 64, (2, 20), device=device)
    results = []
    for m in (plain, model):
        loss = m(input_ids=ids, labels=ids).loss
        results.append((loss, torch.autograd.grad(loss, [p for p in m.parameters() if p.requires_grad])))
    torch.testing.assert_close(results[0][0], results[1][0])
    for a, b in zip(results[1][1], results[0][1], strict=True):
        assert float((a - b).norm() / b.norm()) < (0.1 if activations == "fp8" else 1e-4)
    frozen = [p for p in model.parameters()]
    bytes_ = [saved_bytes(lambda m=m: m.model(ids).last_hidden_state, exclude=frozen) for m in (plain, model)]
    assert bytes_[1] < (0.5 if activations == "fp8" else 0.67) * bytes_[0]
    report = lowmem.report(model)
    assert f"save={activations}" in str(report) and "7 of 7 norms and gated MLPs replaced" in str(report)


def test_convert_without_adapters(device):
    model = llama().to(device)
    ids = torch.randint(0, 64, (2, 20), device=device)
    want = model(ids).logits
    assert lowmem.convert(model, activations="fp8") is model
    torch.testing.assert_close(model(ids).logits, want)
    assert all(p.requires_grad for p in model.parameters())
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_convert_compiles_and_checkpoints(device):
    model = lowmem.convert(llama().to(device), r=4, alpha=8, activations="fp8")
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B["default"], std=0.1)
    ids = torch.randint(0, 64, (2, 12), device=device)
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, trained)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    again = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, trained)
    assert all(map(torch.equal, grads, again))
    layer = copy.deepcopy(model.model.layers[0].mlp)
    x = torch.randn(2, 6, 128, device=device).requires_grad_()
    want = torch.autograd.grad(layer(x).sum(), x)
    got = torch.autograd.grad(torch.compile(layer, fullgraph=True, backend="aot_eager")(x).sum(), x)
    torch.testing.assert_close(got, want)


def test_what_only_looks_alike_is_left(device):
    class OneMoreRMSNorm(nn.Module):  # Gemma's weight is a difference from one
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.zeros(128)), 1e-6

        def forward(self, x):
            return nn.functional.rms_norm(x, (128 if x.shape[-1] == 128 else x.shape[-1],), None, self.eps) * (
                1 + self.weight
            )

    model = llama()
    model.model.norm = OneMoreRMSNorm()
    model.model.layers[0].mlp.act_fn = nn.GELU()
    lowmem.convert(model, r=2, activations="fp8")
    assert isinstance(model.model.norm, OneMoreRMSNorm) and not isinstance(model.model.layers[0].mlp, GatedMLP)
    text = str(lowmem.report(model))
    assert "OneMoreRMSNorm computes something else" in text and "is not down(silu(gate(x)) * up(x))" in text
    layer = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64))
    want = layer(torch.ones(2, 64))
    assert type(lowmem.convert(layer, activations="fp8")[0]) is lowmem.nn.LayerNorm
    torch.testing.assert_close(layer(torch.ones(2, 64)), want)


def test_bad_input():
    for kwargs, message in (
        ({"activations": "int8"}, "activations: expected 'fp8'"),
        ({}, "r: expected a rank, or quant=..., or activations=..."),
        ({"activations": "fp8"}, "activations: expected a model with norms"),
    ):
        with pytest.raises(ValueError, match=rf"lowmem\.convert: {message}"):
            lowmem.convert(nn.Sequential(nn.Linear(3, 3)), **kwargs)


# ---------------------------------------------------------------------------------------- bytes of a Llama-2-7B layer

TOKENS = 32


def layer_7b(adapters):
    """One decoder layer at Llama-2-7B's width, its weights of 16 bits, in training mode."""
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=1, vocab_size=8,
        attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaModel(config).to(torch.bfloat16)
    if adapters is not None:
        lowmem.convert(model, r=16, alpha=16, target_modules="all-linear", **adapters)
    model.layers.to_empty(device="cpu")
    for p in model.layers.parameters():
        nn.init.zeros_(p) if p.dim() == 1 else p.data.fill_(1e-3)
    return model.layers[0].train()


def run_7b(layer):
    x = torch.randn(1, TOKENS, 4096, dtype=torch.bfloat16).requires_grad_()
    angles = torch.randn(1, TOKENS, 128, dtype=torch.bfloat16)  # cos and sin are the model's, not a layer's
    exclude = [x, angles, *layer.parameters()]

    def call():
        y = layer(x, position_embeddings=(angles, angles))
        return y[0] if isinstance(y, tuple) else y

    return call, exclude


@pytest.mark.slow
def test_bytes_of_a_llama_2_7b_layer():
    """Per token: at most 66.8 KB with FP8 groups and recomputation, 48 KB with FP8 q, k, v and o."""
    layer = layer_7b({"activations": "fp8"})
    call, exclude = run_7b(layer)
    got = saved_bytes(call, exclude=exclude) / TOKENS
    groups = 4096 + 32
    s = 7 * 16 * 2
    assert got == 2 * (groups + 4) + 4 * 8192 + 32 * 4 + 2 * (11008 + 86) + s
    assert got <= 66_800
    attention = layer.self_attn
    compressor = lowmem.act.compress(attention)._lowmem_compressor
    held = {}
    real = compressor.pack

    def pack(t):
        kept = real(t)
        one = kept[0].what if isinstance(kept, tuple) else kept
        left_out = isinstance(one, nn.Parameter) or any(
            one.untyped_storage()._cdata == other.untyped_storage()._cdata for other in exclude
        )
        if not left_out:
            held[one.untyped_storage()._cdata] = one.untyped_storage().nbytes(), one
        return kept

    compressor.pack = pack
    norm_and_mlp = saved_bytes(call, exclude=exclude)
    shared = packed_bytes(TOKENS, 4096)  # the first norm's, which q, k and v keep too
    total = (norm_and_mlp + sum(size for size, _ in held.values()) - shared) / TOKENS
    assert total == 2 * (groups + 4) + 4 * groups + 32 * 4 + 2 * (11008 + 86) + s
    assert total <= 48_000
