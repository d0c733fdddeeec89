"""The operators over many adapters against their definition, the loop over single adapters: the same bits on the CPU,
for every layout of the rows."""

import pytest
import torch

from lowmem.nn import route
from lowmem.ops import lora_multi as family
from lowmem.ops.lora_multi import adapter_table
from lowmem.ops.philox import unpack_bits
from lowmem.testing import LAYOUTS, poison_empties

OPS = ("lora_multi_shrink", "lora_multi_expand_", "lora_multi_dy", "lora_multi_da")
REFERENCES = {name: getattr(family, name.removeprefix("lora_multi_").removesuffix("_") + "_reference") for name in OPS}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

ROWS = {
    "runs": torch.arange(5).repeat_interleave(torch.tensor([40, 3, 0, 17, 300])),
    "mixed": torch.randint(-1, 5, (90,), generator=torch.Generator().manual_seed(3)),
    "base only": torch.full((9,), -1),
    "no rows": torch.zeros(0, dtype=torch.int64),
    "one row": torch.tensor([3]),
}
RANKS, SCALES, DROPS = (3, 1, 16, 5, 20), (2.0, 0.5, 1.5, 0.25, 1.0), (0.0, 0.4, 0.2, 1.0, 0.1)


class Problem:
    """Operands of every operator over ``ids``; with ``by_order`` rows by an index, else ``ids`` must be sorted."""

    def __init__(self, dtype, ids, k=100, n=70, ranks=RANKS, adapters=None, by_order=True, layout="contiguous"):
        g = torch.Generator().manual_seed(len(ids))
        m, lay = len(ids), LAYOUTS[layout]

        def rand(rows, cols, to=dtype):
            return torch.randn(rows, cols, generator=g, dtype=torch.float64).to(to)

        adapters = adapters or dtype
        self.x, self.dy, self.out = lay(rand(m, k)), lay(rand(m, n)), lay(rand(m, k))
        self.a, self.b = [rand(r, k, adapters) for r in ranks], [rand(n, r, adapters) for r in ranks]
        self.s = lay(rand(m, max(ranks)))
        routing = route([str(j) for j in range(len(ranks))], adapter_ids=ids, rows=m)
        self.order, self.offsets = routing.order if by_order else None, routing.offsets
        self.ranks = list(ranks)
        self.table = adapter_table(tuple(ranks), SCALES[: len(ranks)], DROPS[: len(ranks)], "cpu")
        self.seeds = torch.arange(len(ranks)) + 2**40

    def args(self, op, *, drop=True, bits=True):
        """The operator's arguments, and the reference's: mutable ones apart."""
        at = (self.order, self.offsets)
        seeds = self.seeds if drop else None
        mask = family.shrink_reference(self.x, self.a, self.table, seeds, *at, drop, True)[1] if drop and bits else None
        seeds = None if mask is not None else seeds
        return {
            "lora_multi_shrink": (self.x, self.a, self.table, self.seeds if drop else None, *at, drop, bits),
            "lora_multi_expand_": (self.out, self.s, self.a, self.table, mask, seeds, *at, drop),
            "lora_multi_dy": (self.dy, self.b, self.s, self.table, *at),
            "lora_multi_da": (self.s, self.x, self.ranks, self.table, mask, seeds, *at, drop),
        }[op]


def run(op, implementation, args):
    if op == "lora_multi_expand_":
        out = torch.empty_strided(args[0].shape, args[0].stride(), dtype=args[0].dtype).copy_(args[0])
        implementation(out, *args[1:])
        return (out,)
    result = implementation(*args)
    return result if isinstance(result, tuple) else (result,)


def same(op, args):
    with poison_empties():
        ours = run(op, getattr(torch.ops.lowmem, op), args)
    for got, want in zip(ours, run(op, REFERENCES[op], args), strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want), f"{op}: {(got != want).sum()} differ"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_the_same_bits_as_the_loop(op, dtype, rows):
    for drop, bits in ((False, False), (True, True), (True, False)):
        same(op, Problem(dtype, ROWS[rows]).args(op, drop=drop, bits=bits))
    if rows != "mixed":  # ids ascend: adapter j's rows are neighbours
        same(op, Problem(dtype, ROWS[rows], by_order=False).args(op))


@pytest.mark.parametrize("op", OPS)
def test_other_ranks_sizes_and_dtypes(op):
    ids = ROWS["mixed"] % 3
    for dtype, adapters in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
    ):
        same(op, Problem(dtype, ids, k=33, n=65, ranks=(7, 70, 2), adapters=adapters).args(op))
    same(op, Problem(torch.float32, ids, k=40, n=40, ranks=(600, 1, 65)).args(op))
    same(op, Problem(torch.float32, ids, k=2100, n=2100, ranks=(4, 1, 5)).args(op))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"expanded"}))
def test_any_layout(op, layout):
    for by_order in (True, False):
        same(op, Problem(torch.float32, ROWS["runs"], layout=layout, by_order=by_order).args(op))


@pytest.mark.parametrize("op", OPS)
def test_threads_do_not_change_bits(op):
    args = Problem(torch.bfloat16, ROWS["mixed"].repeat(8), k=1500, n=1500).args(op)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            results.append(run(op, getattr(torch.ops.lowmem, op), args))
        finally:
            torch.set_num_threads(1)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_rows_beside_the_adapters_are_not_touched():
    q = Problem(torch.float32, ROWS["mixed"])
    free = ROWS["mixed"] < 0
    (out,) = run("lora_multi_expand_", torch.ops.lowmem.lora_multi_expand_, q.args("lora_multi_expand_"))
    assert torch.equal(out[free], q.out[free]) and not torch.equal(out[~free], q.out[~free])
    s, mask = torch.ops.lowmem.lora_multi_shrink(*q.args("lora_multi_shrink"))
    assert not s[free].any() and not mask[free].any()


def test_what_is_dropped_contributes_zero_even_if_not_finite():
    q = Problem(torch.float32, torch.tensor([1, 3, 1]), k=64)  # p = 0.4 and p = 1
    _, mask = torch.ops.lowmem.lora_multi_shrink(*q.args("lora_multi_shrink"))
    q.x[~unpack_bits(mask, 64)] = float("nan")
    assert torch.ops.lowmem.lora_multi_shrink(*q.args("lora_multi_shrink"))[0].isfinite().all()
    assert torch.ops.lowmem.lora_multi_da(*q.args("lora_multi_da")).isfinite().all()


def test_the_operators_check_what_they_are_given():
    q = Problem(torch.float32, ROWS["runs"])
    x, a, table, seeds, order, offsets, drop, save = q.args("lora_multi_shrink")
    outside = order.clone()
    outside[2] = len(order)
    for change, message in (
        ((x, a, table, seeds, outside, offsets), r"order: expected numbers in \[0, 360\), got 360"),
        ((x, a, table, seeds, -order - 1, offsets), r"order: expected numbers in \[0, 360\), got -"),
        ((x, a, table, seeds, order[:-1], offsets), "order: expected a contiguous vector of 360"),
        ((x, a, table, seeds, order, offsets - 1), "offsets: expected no negative number, got -1"),
        ((x, a, table, seeds, order, offsets.flip(0)), "offsets: expected ascending numbers up to 360"),
        ((x, a, table, seeds, order, offsets + 1), "offsets: expected ascending numbers up to 360, got 361"),
        ((x, a, table, seeds, order, offsets[:-1]), "offsets: expected a contiguous vector of 6"),
        ((x, a[:2], table, seeds, order, offsets), r"table: expected shape \[2, 6\]"),
        (
            (x, a, table, None, order, offsets),
            "seeds: expected int64, one an adapter, since there is dropout, got None",
        ),
        ((x, a, table, seeds[:2], order, offsets), "seeds: expected a contiguous vector of 5"),
        ((x[:, :9], a, table, seeds, order, offsets), r"a: expected shape \[\*, 9\]"),
    ):
        with pytest.raises(RuntimeError, match=f"lowmem.lora_multi_shrink: {message}"):
            torch.ops.lowmem.lora_multi_shrink(*change, drop, save)
    ds = torch.zeros(360, 3)
    with pytest.raises(RuntimeError, match="lowmem.lora_multi_da: ds: expected at least 20 columns"):
        torch.ops.lowmem.lora_multi_da(ds, x, q.ranks, table, None, seeds, order, offsets, True)


def test_differentiating_through_an_operator_is_refused():
    q = Problem(torch.float32, ROWS["one row"])
    args = q.args("lora_multi_shrink")
    q.a[2].requires_grad_()
    with pytest.raises(RuntimeError, match="lowmem.lora_multi_shrink: the operator has no derivative of its own"):
        torch.ops.lowmem.lora_multi_shrink(*args)
