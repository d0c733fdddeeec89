"""LQ-LoRA, LoftQ and the integer program over formats: against dense linear algebra, brute force and plain formats."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quant_cases import weight

from lowmem.quant import QuantSpec, assign_bits, dequantize, loftq_init, lq_decompose, lq_specs, quantize
from lowmem.quant.budget import quantization_costs, solve_budget
from lowmem.quant.lq import low_rank

NESTED = QuantSpec("nf2", 64, double_quant=True)


def heavy(*shape, draw=0):
    """Student's t with four degrees of freedom."""
    g = torch.Generator().manual_seed(draw)
    normal, chi = torch.randn(*shape, generator=g), torch.randn(4, *shape, generator=g).square().mean(0)
    return normal / chi.sqrt()


def relative(w, q, a, b, scale=1.0, by=None):
    rest, by = w - dequantize(q, w.dtype) - scale * (b @ a), torch.ones_like(w) if by is None else by
    return float((rest * by).norm() / (w * by).norm())


# ------------------------------------------------------------------------------------------------------- decompositions


@pytest.mark.parametrize("exact", [True, False])
def test_low_rank_is_the_best_rank_r(exact):
    m = heavy(96, 160).double()
    left, right = low_rank(m, 6, exact=exact)
    s = torch.linalg.svdvals(m)
    best = float(s[6:].square().sum().sqrt())
    assert left.shape == (96, 6) and right.shape == (6, 160)
    assert best <= float((m - left @ right).norm()) * (1 + 1e-12)
    assert float((m - left @ right).norm()) <= best * (1 + 1e-9 if exact else 1.003)
    assert torch.allclose(left.norm(dim=0), right.norm(dim=1))  # the singular values are split evenly
    again, _ = low_rank(m, 6, exact=exact)
    assert torch.equal(left, again)


@pytest.mark.parametrize("draw", [weight, heavy])
@pytest.mark.parametrize("format", ["nf2", "nf3", "nf4", "int2"])
def test_lq_decompose(format, draw):
    w = draw(96, 192)
    errors = []
    q, a, b = lq_decompose(w, 8, format, errors=errors)
    assert a.shape == (8, 192) and b.shape == (96, 8) and q.shape == (96, 192)
    found = relative(w, q, a, b)
    assert found == pytest.approx(min(errors), rel=1e-5)  # the best iterate, as it was measured
    plain = quantize(w, format)
    assert found < 0.97 * relative(w, plain, torch.zeros(1, 192), torch.zeros(96, 1))
    assert found <= errors[0]  # quantize, then the SVD of the residual
    assert q.nbytes == plain.nbytes


def test_the_best_iterate_is_not_the_last():
    errors = []
    w = weight(96, 192)
    q, a, b = lq_decompose(w, 8, "nf2", errors=errors)
    assert errors[-1] > min(errors) and relative(w, q, a, b) < errors[-1]


def test_fisher_weights():
    w = weight(64, 96)
    g = torch.Generator().manual_seed(0)
    fisher = torch.rand(64, 96, generator=g).pow(6)
    by = fisher.sqrt()
    errors = []
    weighted = lq_decompose(w, 6, NESTED, fisher=fisher, errors=errors)
    assert relative(w, *weighted, by=by) == pytest.approx(min(errors), rel=1e-5)
    steep = fisher.mean(1, keepdim=True).pow(3) * fisher.mean(0).pow(3)  # rank 1: rows and columns that matter
    by = steep.sqrt()
    assert relative(w, *lq_decompose(w, 6, NESTED, fisher=steep), by=by) < relative(
        w, *lq_decompose(w, 6, NESTED), by=by
    )


def test_fisher_of_rank_one_gives_the_dense_weighted_optimum():
    # with r and c positive, min ||sqrt(r c^T) * (M - L)|| over rank-k L is the SVD of diag(sqrt r) M diag(sqrt c)
    w = weight(48, 80).double()
    g = torch.Generator().manual_seed(1)
    rows, cols = torch.rand(48, 1, generator=g).double() + 0.01, torch.rand(80, generator=g).double() + 0.01
    q, a, b = lq_decompose(w, 5, "nf3", fisher=rows * cols, iterations=1)
    by = (rows * cols).sqrt()
    rest = (w - dequantize(q, torch.float64)) * by
    best = torch.linalg.svdvals(rest)[5:].square().sum().sqrt()
    assert float(((w - dequantize(q, torch.float64) - b @ a) * by).norm()) == pytest.approx(float(best), rel=1e-9)


def test_fisher_with_rows_that_never_had_a_gradient():
    w, fisher = weight(32, 64), torch.rand(32, 64)
    fisher[3] = 0
    fisher[:, 7] = 0
    q, a, b = lq_decompose(w, 4, "nf4", fisher=fisher)
    assert all(t.isfinite().all() for t in (a, b, dequantize(q)))


def test_loftq():
    w = heavy(96, 192)
    one, five = [], []
    q, a, b = loftq_init(w, 8, "nf2", errors=one)
    assert torch.equal(q.packed, quantize(w, "nf2").packed)  # quantized first
    rest = w - dequantize(q)
    assert float((rest - b @ a).norm()) <= float(torch.linalg.svdvals(rest)[8:].square().sum().sqrt()) * 1.003
    q, a, b = loftq_init(w, 8, "nf2", iterations=5, errors=five)
    assert len(one) == 1 and len(five) == 5 and five[0] == one[0]
    assert relative(w, q, a, b) == pytest.approx(min(five), rel=1e-5) and min(five) < 0.98 * five[0]
    assert 8 * q.packed.nbytes == 2 * w.numel()  # two bits are two bits


@pytest.mark.parametrize("make", [lq_decompose, loftq_init])
def test_scale_dtype_experts_and_repeatability(make):
    w = weight(3, 32, 64).bfloat16()
    q, a, b = make(w, 4, "nf4", scale=2.0, iterations=2)
    assert q.shape == (3, 32, 64) and a.shape == (3, 4, 64) and b.shape == (3, 32, 4)
    assert a.dtype == torch.float32 and q.dtype == torch.bfloat16
    assert dequantize(q).dtype == torch.bfloat16
    assert relative(w.float(), q, a, b, scale=2.0) < relative(w.float(), q, a, b, scale=0.0)
    again = make(w, 4, "nf4", scale=2.0, iterations=2)
    assert torch.equal(again[1], a) and torch.equal(again[0].packed, q.packed)
    assert make(weight(32, 64).double(), 4, "nf4")[1].dtype == torch.float64


@pytest.mark.parametrize("make", [lq_decompose, loftq_init])
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"w": torch.ones(4, 4, dtype=torch.int32)}, TypeError, "w: expected a floating tensor"),
        ({"w": torch.ones(4)}, ValueError, "w: expected .out, in. or .experts, out, in."),
        ({"w": torch.full((32, 64), math.inf)}, ValueError, "w: expected finite values"),
        ({"r": 0}, ValueError, r"r: expected an integer in \[1, 32\]"),
        ({"r": 33}, ValueError, r"r: expected an integer in \[1, 32\]"),
        ({"scale": 0.0}, ValueError, "scale: expected a finite number > 0"),
        ({"iterations": 0}, ValueError, "iterations: expected an integer >= 1"),
        ({"spec": "nf5"}, ValueError, "format: expected one of nf4"),
    ],
)
def test_bad_arguments(make, change, kind, message):
    arguments = {"w": weight(32, 64), "r": 4, "spec": "nf4", **change}
    with pytest.raises(kind, match=message):
        make(**arguments)


@pytest.mark.parametrize(
    ("fisher", "message"),
    [
        (torch.rand(64, 32), "fisher: expected shape"),
        (torch.ones(32, 64).neg(), "fisher: expected finite values >= 0"),
        (torch.full((32, 64), math.nan), "fisher: expected finite values >= 0"),
        (torch.zeros(32, 64), "fisher: expected a value above 0"),
    ],
)
def test_bad_fisher(fisher, message):
    with pytest.raises(ValueError, match=rf"lowmem\.lq_decompose: {message}"):
        lq_decompose(weight(32, 64), 4, "nf4", fisher=fisher)


# ---------------------------------------------------------------------------------------------------------- the budget


def test_the_432_configurations():
    specs = lq_specs()
    assert len(specs) == 432 == len(set(specs))
    n, k = 4096, 4096
    for spec in specs:
        size = {torch.float32: 32, torch.float16: 16, torch.bfloat16: 16}[spec.scale_dtype]
        formula = spec.bits + spec.scale_bits / spec.group_size + size / (spec.group_size * spec.scale_group)
        # beyond the formula: one offset and the table of the scales' codes, once a weight
        assert 0 < spec.bits_per_weight(n, k) - formula <= 8 * (4 * 256 + 4) / (n * k)


@given(st.integers(0, 10**6))
def test_program_equals_brute_force(draw):
    g = torch.Generator().manual_seed(draw)
    layers, options = 4, 6
    costs = torch.rand(layers, options, generator=g).double().tolist()
    bits = torch.randint(1, 1000, (layers, options), generator=g).tolist()
    least = sum(min(row) for row in bits)
    budget = least + int(torch.randint(0, 1200, (1,), generator=g))
    chosen = solve_budget(costs, bits, budget)
    assert sum(row[c] for row, c in zip(bits, chosen, strict=True)) <= budget
    best = min(
        sum(row[c] for row, c in zip(costs, choice, strict=True))
        for choice in itertools.product(range(options), repeat=layers)
        if sum(row[c] for row, c in zip(bits, choice, strict=True)) <= budget
    )
    assert sum(row[c] for row, c in zip(costs, chosen, strict=True)) == pytest.approx(best, rel=1e-9)


def test_program_leaves_out_what_does_not_fit():
    nan = math.nan
    assert solve_budget([[nan, 1.0], [0.5, nan]], [[1, 5], [5, 1]], 10) == [1, 0]
    with pytest.raises(ValueError, match=r"lowmem\.assign_bits: budget_bits: expected at least 10 bits"):
        solve_budget([[nan, 1.0], [0.5, nan]], [[1, 5], [5, 1]], 9)


@pytest.mark.parametrize("method", ["absmax", "mse"])
@pytest.mark.parametrize("weighted", [False, True])
def test_costs_are_the_errors_of_quantize(weighted, method):
    w = heavy(24, 96)
    fisher = torch.rand(24, 96) if weighted else None
    specs = [s for s in lq_specs() if s.group_size != 64][:: 7 if method == "absmax" else 29]
    specs += [QuantSpec("nf4", 64), QuantSpec("int4", 32)]
    specs += [QuantSpec("int3", 32, zero_point=True), QuantSpec("int8", 64)]
    costs = quantization_costs(w, specs, fisher=fisher, method=method)
    assert math.isnan(costs[-1])  # 96 columns have no groups of 64
    for spec, cost in list(zip(specs, costs, strict=True))[:-1]:
        rest = w - dequantize(quantize(w, spec, method=method))
        exact = float((rest.square() * (1 if fisher is None else fisher)).sum())
        assert cost == pytest.approx(exact, rel=1e-3), spec


def test_costs_of_a_sample():
    w = weight(512, 128)
    specs = [QuantSpec("nf2"), QuantSpec("nf4")]
    assert quantization_costs(w, specs, sample=1 << 15) == pytest.approx(quantization_costs(w, specs), rel=0.05)
    less = quantization_costs(w, specs, r=16)
    assert all(x < y for x, y in zip(less, quantization_costs(w, specs), strict=True))


def spread_model():
    """Weights that a model has: of several shapes, magnitudes and tails."""
    shapes = [(64, 128), (128, 64), (64, 64), (96, 128), (64, 192)]
    return {
        f"l{i}": (heavy if i % 2 else weight)(*shape, draw=i) * (0.5 + i) * shape[1] ** (0 if i % 2 == 0 else -0.5)
        for i, shape in enumerate(shapes)
    }


@pytest.mark.parametrize("budget", [2.5, 2.75])
def test_lq_lora_beats_plain_formats_at_equal_storage(budget):
    model = spread_model()
    total = sum(w.numel() for w in model.values())
    specs = [s for s in lq_specs() if s.scale_dtype != torch.float16]

    def mean_bits(assigned):
        return sum(8 * s.storage_bytes(*model[n].shape) for n, s in assigned.items()) / total

    def plain_error(assigned, method="absmax"):
        made = {n: dequantize(quantize(w, assigned[n], method=method)) for n, w in model.items()}
        return sum(float((w - made[n]).square().sum()) for n, w in model.items())

    # the best single normal-float format that fits the budget, its scales doubly quantized or not
    single = [*specs, *(QuantSpec(f, g, scale_dtype=t) for f in ("nf2", "nf3") for g in (16, 32, 64, 128)
                        for t in (torch.float32, torch.bfloat16))]  # fmt: skip
    fitting = [dict.fromkeys(model, s) for s in single if s.is_table and mean_bits(dict.fromkeys(model, s)) <= budget]
    for method in ("absmax", "mse"):
        # with clipping the best formats differ little: those of the most bits are enough
        some = fitting if method == "absmax" else sorted(fitting, key=mean_bits)[-12:]
        plain = min(plain_error(a, method) for a in some)
        assigned = assign_bits(model, budget, specs=specs, r=8, method=method)
        assert mean_bits(assigned) <= budget
        lq = 0.0
        for name, w in model.items():
            q, a, b = lq_decompose(w, 8, assigned[name], method=method, iterations=10)
            assert q.nbytes == assigned[name].storage_bytes(*w.shape)
            lq += float((w - dequantize(q) - b @ a).square().sum())
        assert plain_error(assign_bits(model, budget, specs=specs, method=method), method) < plain  # the program alone
        assert lq < 0.8 * plain, method


def test_assign_bits_of_a_module():
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 64, bias=False))
    fisher = {"0": torch.ones(96, 64), "2": torch.full((64, 96), 50.0)}
    specs = [QuantSpec(f, 32) for f in ("nf2", "nf3", "nf4")]
    found = assign_bits(model, 4.0, specs=specs)
    assert list(found) == ["0", "2"] and {s.format for s in found.values()} <= {"nf2", "nf3", "nf4"}
    found = assign_bits(model, 4.0, specs=specs, fisher=fisher)
    assert (found["0"].format, found["2"].format) == ("nf2", "nf4")  # what matters more gets the bits
    assert list(assign_bits(model, 4.0, specs=specs, target_modules=["2"])) == ["2"]
    experts = {"experts": weight(4, 16, 64)}
    assert assign_bits(experts, 2.9, specs=specs[:1] + [QuantSpec("nf2", 64)])["experts"].group_size == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget_bits": 1.0}, "budget_bits: expected at least"),
        ({"budget_bits": math.nan}, "budget_bits: expected a finite number"),
        ({"specs": []}, "specs: expected one QuantSpec or more"),
        ({"specs": [QuantSpec("int4", 128)]}, "specs: expected one that fits 'a' with K = 64"),
        ({"model": {}}, "model: expected linear layers"),
        ({"model": {"a": torch.full((4, 64), math.nan)}}, "model: expected finite weights"),
        ({"fisher": {}}, "fisher: expected a tensor for each layer"),
        ({"fisher": {"a": torch.ones(3)}}, "fisher: expected shape"),
    ],
)
def test_bad_budget(change, message):
    arguments = {"model": {"a": weight(4, 64)}, "budget_bits": 4.6, "specs": [QuantSpec("nf4")], **change}
    with pytest.raises(ValueError, match=rf"lowmem\.assign_bits: {message}"):
        assign_bits(**arguments)
