"""lowmem.act.compress: what autograd saves inside a module, compressed once for all that share it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowmem
from lowmem.act.compress import FORMATS

pytestmark = pytest.mark.usefixtures("poisoned")
D, T = 256, 24


class Block(nn.Module):
    """Attention and a gated MLP over one width; q, k and v share their input."""

    def __init__(self, norm=nn.LayerNorm, glu=None):
        super().__init__()
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            setattr(self, name, nn.Linear(D, D, bias=False))
        self.norm1, self.norm2, self.glu = norm(D), norm(D), glu
        self.fail = False

    def forward(self, x):
        n = self.norm1(x)
        q, k, v = (layer(n).view(2, T, 4, D // 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(a.transpose(1, 2).reshape(2, T, D))
        if self.fail:
            raise RuntimeError("in the middle")
        n = self.norm2(x)
        gate, up = self.gate(n), self.up(n)
        return x + self.down(F.silu(gate) * up if self.glu is None else self.glu(gate, up))


def gradients(module, x, run=None):
    x = x.detach().requires_grad_()
    y = (run or module)(x)
    loss = (y.float() * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum()
    return y.detach(), torch.autograd.grad(loss, [x, *module.parameters()])


def relative(a, b):
    return float((a - b).float().norm() / b.float().norm())


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_are_the_same_and_gradients_close(device, kind, dtype):
    block = Block().to(device, dtype)
    x = torch.randn(2, T, D, device=device, dtype=dtype)
    want, exact = gradients(block, x)
    clean = copy.deepcopy(block)
    assert lowmem.act.compress(block, kind) is block
    got, grads = gradients(block, x)
    assert torch.equal(got, want)
    bound = {"fp8": 1 / 16, "int8": 1 / 64, "int4": 1 / 4}[kind]
    wide = [t.double() for t in gradients(copy.deepcopy(clean).double(), x.double())[1]]
    for a, b, e in zip(grads, exact, wide, strict=True):  # torch's own error in this dtype counts too
        assert relative(a, e) < bound + 2 * relative(b, e)
    assert any(not torch.equal(a, b) for a, b in zip(grads, exact, strict=True)), "nothing was compressed"


def packs(module, x, kind="fp8"):
    """Regions compressed in one forward of ``module``."""
    made = []
    real = lowmem.act.compress(module, kind)._lowmem_compressor._compress
    module._lowmem_compressor._compress = lambda *a: made.append(a[0]) or real(*a)
    y = module(x)
    return y, made


def test_a_shared_input_is_compressed_once_and_weights_never(device):
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(D, D, bias=False) for _ in range(3))

        def forward(self, x):
            x = x * 1.0
            flat = x.view(-1, D)  # another view of the same memory
            return (
                sum(layer(x).view(-1, D) for layer in self.layers)
                + self.layers[0](flat)
                + x.transpose(0, 1).exp().sum()
            )

    module = Three().to(device)
    x = torch.randn(2, T, D, device=device, requires_grad=True)
    _, made = packs(module, x)
    assert sum(t.numel() == x.numel() for t in made) == 2  # x * 1.0, and exp's result
    assert not any(tuple(t.shape) == (D, D) for t in made)


def test_a_write_makes_it_another_tensor(device):
    class Writes(nn.Module):
        def forward(self, x):
            x = x * 1.0
            y = x.clone()
            a = (y * x).sum()
            with torch.no_grad():
                x.data.mul_(1.0)  # no version
            y = y.mul_(2.0)
            return a + y.exp().sum()

    module = Writes()
    x = torch.randn(2, T, D, device=device, requires_grad=True)
    _, made = packs(module, x)
    assert len({(t.data_ptr(), t._version) for t in made}) == len(made)


def test_memory_that_is_given_again_is_not_mistaken(device):
    class Chain(nn.Module):
        def forward(self, x):
            for _ in range(30):  # each exp frees what came before it under no_grad, and allocates alike
                with torch.no_grad():
                    scratch = torch.randn_like(x)
                    del scratch
                x = torch.tanh(x * 1.01)
            return x

    module = Chain()
    x = torch.randn(8, D, device=device)
    _, exact = gradients(module, x)
    lowmem.act.compress(module, "int8")
    assert relative(gradients(module, x)[1][0], exact[0]) < 0.1


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_checkpoints(device, reentrant, inside):
    block = Block().to(device)
    x = torch.randn(2, T, D, device=device)
    want, exact = gradients(block, x)
    if inside:  # the checkpoint keeps its input compressed

        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.block = block

            def forward(self, x):
                return torch.utils.checkpoint.checkpoint(self.block, x * 1.0, use_reentrant=reentrant)

        module = lowmem.act.compress(Outer())
        run = module
    else:
        module = lowmem.act.compress(block)

        def run(x):
            return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)

    x = x.requires_grad_()
    y = run(x)
    assert torch.equal(y, want) or inside
    (y * torch.linspace(-1, 1, y.numel(), device=device).view_as(y)).sum().backward()
    grads = [x.grad, *(p.grad for p in block.parameters())]
    for a, b in zip(grads, exact, strict=True):
        assert relative(a, b) < 0.06
    if not inside and not reentrant:
        assert all(torch.equal(a, b) for a, b in zip(grads, exact, strict=True)), (
            "nothing is kept, so nothing is rounded"
        )


def test_recipes_are_kept_in_place_of_outputs(device):
    plain = Block(norm=lambda d: lowmem.nn.LayerNorm(d), glu=lowmem.nn.SwiGLU())
    block = Block(norm=lambda d: lowmem.nn.LayerNorm(d, save="fp8"), glu=lowmem.nn.SwiGLU(save="fp8"))
    block.load_state_dict(plain.state_dict())
    x = torch.randn(2, T, D, device=device)
    _, exact = gradients(plain.to(device), x)
    made = []
    lowmem.act.compress(block.to(device))
    real = block._lowmem_compressor._compress
    block._lowmem_compressor._compress = lambda t, recipe, dense: made.append(recipe) or real(t, recipe, dense)
    _, grads = gradients(block, x)
    hows = [recipe[0].how for recipe in made if recipe is not None]
    assert sorted(hows) == ["norm_fp8", "norm_fp8", "swiglu_fp8"]
    assert all(relative(a, b) < 0.08 for a, b in zip(grads, exact, strict=True))


def test_autocast_does_not_compress_casts_of_weights(device):
    block = Block().to(device)
    made = []
    lowmem.act.compress(block)
    real = block._lowmem_compressor._compress
    block._lowmem_compressor._compress = lambda t, *rest: made.append(tuple(t.shape)) or real(t, *rest)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        block(torch.randn(2, T, D, device=device))
    assert made and (D, D) not in made


def test_an_exception_leaves_nothing_behind(device):
    block = lowmem.act.compress(Block().to(device))
    block.fail = True
    x = torch.randn(2, T, D, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="in the middle"):
        block(x)
    assert not block._lowmem_compressor.open and not block._lowmem_compressor.memo
    w = torch.randn(T, D, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad((x * w).sum(), w)
    assert torch.equal(grad, x.detach().sum(0)) or torch.allclose(grad, x.detach().sum(0))
    block.fail = False
    assert gradients(block, x)[1]
    with torch.no_grad():
        assert not block(x).requires_grad


def test_not_finite_values_stay_visible(device):
    for kind in FORMATS:
        layer = lowmem.act.compress(nn.Linear(D, D, bias=False).to(device), kind)
        x = torch.randn(T, D, device=device)
        x[3, 5] = torch.nan
        x = x.requires_grad_()
        (dw,) = torch.autograd.grad(layer(x * 1.0).nan_to_num().sum(), layer.weight, allow_unused=True)
        assert bool(dw[:, 5].isnan().all())


def test_refused_under_compile_by_name(device):
    block = lowmem.act.compress(nn.Linear(D, D).to(device))
    with pytest.raises(Exception, match=r"lowmem\.act\.compress: module: expected eager execution"):
        torch.compile(block, fullgraph=True, backend="eager")(torch.randn(T, D, device=device))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((3,), "module: expected an nn.Module"),
        ((nn.Linear(2, 2), "fp4"), "format: expected 'fp8'"),
        ((nn.Linear(2, 2), "fp8", 64), "group_size: expected 128 for 'fp8'"),
        ((nn.Linear(2, 2), "int8", 48), "group_size: expected a power of two"),
        ((lowmem.act.compress(nn.Linear(2, 2)),), "module: expected a module that is not compressed"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises((ValueError, TypeError), match=rf"lowmem\.act\.compress: {message}"):
        lowmem.act.compress(*arguments)
