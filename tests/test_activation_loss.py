"""linear_cross_entropy: the linear layer and its loss without the logits, against plain torch in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lowmem.nn import FusedLinearCrossEntropy
from lowmem.ops import activation_loss as family
from lowmem.ops import linear_cross_entropy
from lowmem.testing import DTYPES, LAYOUTS, assert_close_to_reference, huge_view, poison_empties, saved_bytes

pytestmark = pytest.mark.usefixtures("poisoned")
HALF = (torch.bfloat16, torch.float16)
# label smoothing, z-loss, softcap
OPTIONS = [(0.0, 0.0, None), (0.1, 0.0, None), (0.0, 1e-2, 3.0), (0.2, 1e-3, 10.0)]


def plain(x, weight, target, bias=None, *, smoothing=0.0, z_loss=0.0, softcap=None, reduction="mean", ignore=-100):
    """What a user would write; the logits in full, the loss in fp32 (fp64)."""
    logits = F.linear(x, weight).to(torch.promote_types(x.dtype, torch.float32))
    logits = logits if bias is None else logits + bias.to(logits.dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    kept = target != ignore
    loss = F.cross_entropy(logits, target, ignore_index=ignore, label_smoothing=smoothing, reduction="none")
    loss = loss + torch.where(kept, z_loss * torch.logsumexp(logits, -1).square(), 0)
    if reduction == "none":
        return loss
    return loss.sum() / (kept.sum().clamp(min=1) if reduction == "mean" else 1)


def problem(dtype, device="cpu", m=11, k=16, v=37, bias=True):
    x = torch.randn(m, k, device=device).to(dtype).requires_grad_()
    weight = torch.randn(v, k, device=device).mul_(k**-0.5).to(dtype).requires_grad_()
    b = torch.randn(v, device=device, dtype=torch.promote_types(dtype, torch.float32)) if bias else None
    target = torch.randint(0, v, (m,), device=device)
    target[1::4] = -100
    return x, weight, target, b.requires_grad_() if bias else None


def run(fn, x, weight, target, bias, *, upstream=None, **options):
    """``(loss, dx, dW, db)`` in one call."""
    inputs = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
    loss = fn(x, weight, target, bias=bias, **options)
    upstream = torch.full_like(loss, 0.7) if upstream is None else upstream.to(loss.dtype)
    return loss.detach(), *torch.autograd.grad(loss, inputs, upstream)


def check(got, x, weight, target, bias, *, roundings=0, **options):
    names = {"smoothing": "label_smoothing"}
    exact_in = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in (x, weight, bias)]
    exact = run(plain, exact_in[0], exact_in[1], target, exact_in[2], **options)
    lowprec = run(plain, x, weight, target, bias, **options)
    ours = run(linear_cross_entropy, x, weight, target, bias, **{names.get(n, n): v for n, v in options.items()}, **got)
    logits = F.linear(x.detach().double(), weight.detach().double()).requires_grad_()
    eye = torch.eye(logits.shape[1], dtype=torch.float64, device=x.device)
    most = 0 if bias is None else bias.detach().double().abs().max()
    slopes = run(plain, logits, eye, target, exact_in[2], **options)[1].abs()
    acc = family.accumulate_dtype(x.dtype)
    for name, a, e, low in zip(("loss", "dx", "dW", "db"), ours, exact, lowprec, strict=False):
        # documented: the scratch holds logits, and then their gradients, rounded to x's dtype; dW once a chunk
        rounded = [logits] if name == "loss" and x.dtype in HALF else [e] * roundings if name == "dW" else []
        if name == "db" and x.dtype in HALF:
            rounded = [slopes.sum(0)]
        terms = {"loss": logits.abs().sum() + most, "db": slopes.sum(0)}.get(name)
        assert_close_to_reference(a, e, low, rounded=rounded, rounded_to=x.dtype, terms=terms, what=f"{name} {acc}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing, z_loss, softcap", OPTIONS)
@pytest.mark.parametrize("reduction", family.REDUCTIONS)
@pytest.mark.parametrize("save", family.SAVES)
def test_loss_and_gradients(device, dtype, smoothing, z_loss, softcap, reduction, save):
    options = {"smoothing": smoothing, "z_loss": z_loss, "softcap": softcap, "reduction": reduction}
    for rows in (None, 4):
        x, weight, target, bias = problem(dtype, device)
        upstream = torch.rand(11, device=device) if reduction == "none" else None
        check({"save": save, "rows": rows}, x, weight, target, bias, upstream=upstream, **options)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
def test_layouts(device, layout):
    x, weight, target, bias = problem(torch.float32, device)
    x, weight = (LAYOUTS[layout](t.detach()).requires_grad_() for t in (x, weight))
    check({}, x, weight, torch.stack([target, target], 1)[:, 0], bias)


@given(st.integers(0, 9), st.integers(1, 9), st.integers(1, 70), st.integers(1, 12))
def test_every_shape(m, k, v, rows):
    x, weight, target, bias = problem(torch.float32, m=m, k=k, v=v)
    with poison_empties():
        check({"rows": rows}, x, weight, target, bias, reduction="sum")


def test_the_rows_operator_against_its_reference(device):
    for dtype in DTYPES:
        for v in (1, 15, 16, 17, 600):
            logits, target = torch.randn(6, v, device=device).to(dtype), torch.randint(0, v, (6,), device=device)
            target[2] = -1
            acc = family.accumulate_dtype(dtype)
            bias, factor = torch.randn(v, device=device), torch.rand(6, device=device).to(acc)
            acc_terms = torch.tensor(8.0)

            def reference(logits, bias, factor, target=target):
                grad, loss = logits.clone(), logits.new_empty(6, dtype=family.accumulate_dtype(logits.dtype))
                family.rows_reference(grad, loss, target, bias, factor, -1, 0.1, 1e-3, 4.0)
                return grad, loss

            exact = reference(logits.double(), bias.double(), factor.double())
            lowprec = reference(logits, bias, factor)
            loss = logits.new_empty(6, dtype=acc)
            torch.ops.lowmem.cross_entropy_rows_(logits, loss, target, bias, factor, -1, 0.1, 1e-3, 4.0)
            # what is subtracted: probabilities of at most 1, and logits capped at 4
            for a, e, low, terms in zip((logits, loss), exact, lowprec, (factor, acc_terms), strict=True):
                assert_close_to_reference(a, e, low, terms=terms)


def test_frozen_parts_have_no_gradients(device):
    x, weight, target, _ = problem(torch.float32, device, bias=False)
    weight.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(tuple(t.shape)), t)[1], lambda t: t):
        seen = []
        linear_cross_entropy(x, weight, target)
    assert tuple(weight.shape) not in seen, "a frozen head's dW was computed"
    check({}, x, weight, target, None)
    check({}, x, weight, target, None, reduction="none", upstream=torch.rand(11, device=device))
    x = x.detach()
    weight.requires_grad_()
    check({}, x, weight, target, None)
    with torch.no_grad():
        assert not linear_cross_entropy(x, weight, target).requires_grad


def test_saved_bytes_by_formula(device):
    m, k, v = 32, 24, 50
    x, weight, target, _ = problem(torch.float32, device, m, k, v, bias=False)
    weight.requires_grad_(False)
    assert saved_bytes(lambda: linear_cross_entropy(x, weight, target), exclude=[x, weight, target]) == 4 * m * k
    weight.requires_grad_()
    both = saved_bytes(lambda: linear_cross_entropy(x, weight, target), exclude=[x, weight, target])
    assert both == 4 * m * k + 4 * v * k
    again = saved_bytes(lambda: linear_cross_entropy(x, weight, target, save="recompute"), exclude=[x, weight, target])
    assert again == 4  # one divided by the number of rows that count


def test_the_scratch_stays_within_its_bound():
    for m, v, size in ((4096, 150_000, 2), (512, 150_000, 4), (100_000, 32_000, 2), (3, 10, 4)):
        rows = family.chunk_rows(m, v, size)
        assert 1 <= rows <= m
        assert rows * v * size <= max(family.SCRATCH_BYTES, family.SCRATCH_SHARE * m * v * size)


def test_an_all_ignored_batch_changes_nothing(device):
    x, weight, target, bias = problem(torch.float32, device)
    x.data[0, 0] = float("nan")  # a padded row may hold anything
    target.fill_(-100)
    for reduction in ("mean", "sum"):
        got = run(linear_cross_entropy, x, weight, target, bias, reduction=reduction)
        assert float(got[0]) == 0.0
        assert all(bool((t == 0).all()) for t in (got[1], got[3]))
    x.data[0, 0] = 0.0
    assert bool((run(linear_cross_entropy, x, weight, target, bias)[2] == 0).all())


def test_not_finite_logits_of_a_row_that_counts_show(device):
    x, weight, target, bias = problem(torch.float32, device)
    for value in (float("nan"), float("inf")):
        x.data[0, 0] = value
        assert not bool(linear_cross_entropy(x, weight, target, bias=bias).isfinite())
        each = linear_cross_entropy(x, weight, target, bias=bias, reduction="none")
        assert not bool(each[0].isfinite()) and bool(each[1:].isfinite().all())


def test_labels_out_of_range_are_refused_before_anything_is_computed():
    x, weight, target, bias = problem(torch.float32)
    for label in (37, -1, 2**40):
        bad = target.clone()
        bad[3] = label
        with pytest.raises(ValueError, match=rf"linear_cross_entropy: target: expected labels in \[0, 37\).*{label}"):
            linear_cross_entropy(x, weight, bad, bias=bias)
        logits, loss = torch.zeros(11, 37), torch.zeros(11)
        with pytest.raises(RuntimeError, match="cross_entropy_rows_: target"):
            torch.ops.lowmem.cross_entropy_rows_(logits, loss, bad, None, torch.ones(11), -100, 0.0, 0.0, 0.0)
        assert not logits.any()
    linear_cross_entropy(x, weight, torch.where(target == -100, 5000, target), ignore_index=5000)


def test_one_backward_pass(device):
    x, weight, target, _ = problem(torch.float64, device, bias=False)
    loss = linear_cross_entropy(x, weight, target)
    torch.autograd.grad(loss * 2, x, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, x)
    loss = linear_cross_entropy(x, weight, target, save="recompute")
    first = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(loss, x)[0])
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(linear_cross_entropy(x, weight, target), x, create_graph=True)


def test_wide_sums_of_dw(device):
    x, weight, target, _ = problem(torch.bfloat16, device, m=64, bias=False)
    exact = run(plain, x.detach().double().requires_grad_(), weight.detach().double().requires_grad_(), target, None)[2]
    errors = []
    for dtype in (None, torch.float32):
        got = run(linear_cross_entropy, x, weight, target, None, rows=1, dw_dtype=dtype)[2]
        assert got.dtype == torch.bfloat16
        errors.append(float((got.double() - exact).abs().mean()))
    assert errors[1] < errors[0]


def test_gradcheck(device):
    x, weight, target, bias = problem(torch.float64, device, 5, 3, 7)
    for reduction in family.REDUCTIONS:
        for save in family.SAVES:
            module = FusedLinearCrossEntropy(
                label_smoothing=0.1, z_loss=1e-2, softcap=4.0, reduction=reduction, save=save, rows=2
            )
            # the factor of "grad" is applied in place: gradcheck calls backward again over one graph
            if save == "recompute" or (reduction == "none"):
                assert torch.autograd.gradcheck(lambda *a, f=module: f(a[0], a[1], target, a[2]), (x, weight, bias))


@pytest.mark.parametrize("reduction", family.REDUCTIONS)
def test_compile(device, reduction):
    x, weight, target, bias = problem(torch.float32, device)
    module = FusedLinearCrossEntropy(reduction=reduction, rows=4)

    def step(x, weight, bias):
        loss = module(x, weight, target, bias)
        return loss, *torch.autograd.grad(loss, (x, weight, bias), torch.full_like(loss, 0.5))

    want = step(x, weight, bias)
    loss = torch.compile(module, fullgraph=True, backend="aot_eager")(x, weight, target, bias)
    got = loss, *torch.autograd.grad(loss, (x, weight, bias), torch.full_like(loss, 0.5))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_checkpoint_and_autocast(device):
    x, weight, target, _ = problem(torch.float32, device, bias=False)
    want = torch.autograd.grad(linear_cross_entropy(x, weight, target), (x, weight))
    for reentrant in (True, False):
        loss = torch.utils.checkpoint.checkpoint(linear_cross_entropy, x, weight, target, use_reentrant=reentrant)
        got = torch.autograd.grad(loss, (x, weight)) if not reentrant else None
        if reentrant:
            loss.backward()
            got = x.grad, weight.grad
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        loss = linear_cross_entropy(x, weight, target)
        want = F.cross_entropy(F.linear(x, weight).float(), target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, want, rtol=1e-2, atol=1e-2)
    assert torch.autograd.grad(loss, x)[0].dtype == torch.float32


def test_offsets_beyond_32_bits():
    logits = huge_view(3, 40, torch.bfloat16)
    logits[2] = torch.arange(40)
    target, loss = torch.tensor([0, 1, 2]), torch.empty(3)
    torch.ops.lowmem.cross_entropy_rows_(logits, loss, target, None, torch.ones(3), -100, 0.0, 0.0, 0.0)
    torch.testing.assert_close(loss, F.cross_entropy(torch.stack([torch.zeros(40)] * 2 + [torch.arange(40.0)]), target,
                                                     reduction="none"))  # fmt: skip
    assert float(logits[2, 2]) == -1.0


def test_registration(device):
    x, weight, target, bias = (t.detach() for t in problem(torch.float32, device))
    args = (x, weight, target, bias, torch.ones(11, device=device), -100, 0.1, 1e-3, 3.0, 4, True, True, True)
    torch.library.opcheck(torch.ops.lowmem.linear_cross_entropy.default, (*args, torch.float32))
    logits, loss = torch.randn(11, 37, device=device), torch.zeros(11, device=device)
    rows = (logits, loss, target, bias, torch.ones(11, device=device), -100, 0.1, 1e-3, 3.0)
    torch.library.opcheck(torch.ops.lowmem.cross_entropy_rows_.default, rows)


def test_two_threads_give_the_same_bits(two_threads):
    x, weight, target, bias = problem(torch.float32, m=40, v=3000)
    two = linear_cross_entropy(x, weight, target, bias=bias, reduction="none")
    torch.set_num_threads(1)
    torch.testing.assert_close(two, linear_cross_entropy(x, weight, target, bias=bias, reduction="none"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, "x: expected a floating dtype"),
        ({"x": torch.zeros(2, 0), "weight": torch.zeros(5, 0)}, r"x: expected shape \[..., K\] with K >= 1"),
        ({"weight": torch.zeros(5, 4)}, r"weight: expected shape \[V, 3\]"),
        ({"weight": torch.zeros(5, 3, dtype=torch.float64)}, "weight: expected x's dtype"),
        ({"target": torch.zeros(2)}, "target: expected int64 labels"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, r"target: expected shape \(2,\)"),
        ({"bias": torch.zeros(4)}, r"bias: expected shape \[5\]"),
        ({"label_smoothing": 1.5}, r"label_smoothing: expected a number in \[0, 1\]"),
        ({"z_loss": -1.0}, "z_loss: expected a finite number"),
        ({"softcap": 0.0}, "softcap: expected a finite number > 0"),
        ({"reduction": "max"}, "reduction: expected 'mean'"),
        ({"save": "all"}, "save: expected 'grad'"),
        ({"rows": 0}, "rows: expected an integer >= 1"),
        ({"dw_dtype": torch.int32}, "dw_dtype: expected a floating dtype"),
    ],
)
def test_bad_input(change, message):
    arguments = {"x": torch.zeros(2, 3), "weight": torch.zeros(5, 3), "target": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises((ValueError, TypeError), match=rf"lowmem\.linear_cross_entropy: {message}"):
        linear_cross_entropy(**{**arguments, **change})
