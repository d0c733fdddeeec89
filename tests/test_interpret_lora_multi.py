# ruff: noqa: F811 (the fixture `where` comes from test_interpret_lora.py)
"""The Triton kernels over many adapters, in the interpreter or on a GPU: against the loop over the kernels of one
adapter (the same bits where the sums are cut alike), and by the accuracy rule against plain torch."""

import pytest
import torch
from test_interpret_lora import DTYPES, close, everywhere, launch

from lowmem.nn import route
from lowmem.ops import lora_multi as family
from lowmem.ops.lora_multi import adapter_table
from lowmem.ops.philox import keep_mask, pack_bits, unpack_bits
from lowmem.testing import LAYOUTS

pytestmark = pytest.mark.usefixtures("poisoned", "kernels")

RANKS, SCALES, DROPS = (3, 17, 1, 70), (2.0, 0.5, 1.5, 0.25), (0.0, 0.4, 1.0, 0.2)
IDS = {
    "mixed": [3, 0, -1, 1, 1, 0, 3, -1, 0, 3, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0],
    "sorted": [0] * 20 + [1] * 3 + [3] * 33,  # adapter 2 has no rows
    "one": [1] * 18,
    "base only": [-1, -1],
}


def multi():
    from lowmem.triton_kernels import lora_multi

    return lora_multi


class Problem:
    """Operands of every operator over ``ids``."""

    def __init__(self, where, dtype, ids, k=70, n=52, *, by_order=True, ranks=RANKS, adapters=None):
        g = torch.Generator().manual_seed(11)
        m, adapters = len(ids), adapters or dtype

        def rand(rows, cols, scale=1.0, dtype=dtype):
            return (torch.randn(rows, cols, generator=g) * scale).to(dtype).to(where)

        self.x, self.dy, self.out = rand(m, k), rand(m, n), rand(m, k)
        self.a = [rand(r, k, k**-0.5, adapters) for r in ranks]
        self.b = [rand(n, r, 1.0, adapters) for r in ranks]
        self.s = rand(m, max(ranks))
        ids = torch.tensor(ids, dtype=torch.int64, device=where)
        routing = route([str(j) for j in ranks], adapter_ids=ids, rows=m)
        assert by_order or torch.equal(routing.order, torch.arange(m, device=where))
        self.order, self.offsets, self.ids = routing.order if by_order else None, routing.offsets, ids
        self.ranks = list(ranks)
        self.table = adapter_table(tuple(ranks), SCALES[: len(ranks)], DROPS[: len(ranks)], where)
        self.seeds = torch.arange(len(ranks), device=where) + 2**40
        self.at = (self.order, self.offsets)

    def rows(self, j):
        return (self.ids == j).nonzero().flatten()

    def mask(self):
        """The keep bits of every row, by the definition."""
        m, k = self.x.shape
        keep = torch.zeros(m, k, dtype=torch.bool, device=self.x.device)
        for j, p in enumerate(DROPS[: len(self.ranks)]):
            rows = self.rows(j)
            keep[rows] = keep_mask(len(rows), k, p, self.seeds[j : j + 1], 0)
        return pack_bits(keep)


def loop_shrink(q, drop, bits):
    """S and the bits, one adapter at a time."""
    s = q.x.new_zeros(len(q.ids), max(q.ranks))
    for j, r in enumerate(q.ranks):
        rows, p = q.rows(j), DROPS[j] if drop else 0.0
        if len(rows):
            s[rows, :r] = launch().shrink(q.x[rows], q.a[j], SCALES[j], p, q.seeds[j : j + 1], 0, bits)[0]
    return s


def run_all(q, drop=True, bits=True):
    """Every launcher's results."""
    lora = multi()
    seeds = q.seeds if drop else None
    s, mask = lora.shrink(q.x, q.a, q.table, seeds, *q.at, drop, bits)
    kept = mask if drop and bits else None
    ds, db = lora.dy(q.dy, q.b, q.s, q.table, *q.at)
    da = lora.da(q.s, q.x, q.ranks, q.table, kept, None if kept is not None else seeds, *q.at, drop)
    out = q.out.clone()
    lora.expand_(out, q.s, q.a, q.table, kept, None if kept is not None else seeds, *q.at, drop)
    return {"s": s, "mask": mask, "ds": ds, "db": db, "da": da, "out": out}


def check_all(q, drop=True, bits=True):
    """Every launcher against the loop over the launchers of one adapter, bit for bit (sums are not cut at these
    sizes), and those were held against the references in test_interpret_lora.py."""
    got = run_all(q, drop, bits)
    n = q.dy.shape[1]
    s, ds, out = loop_shrink(q, drop, bits), torch.zeros_like(got["ds"]), q.out.clone()
    dbs = family.split_like(got["db"], [torch.empty(n, r) for r in q.ranks])
    das = got["da"].split(q.ranks)
    mask = q.mask()
    for j, r in enumerate(q.ranks):
        rows, p = q.rows(j), DROPS[j] if drop else 0.0
        if not len(rows):
            assert not dbs[j].any() and not das[j].any(), "an adapter without rows has a gradient"
            continue
        thin = q.s[rows, :r].contiguous()
        ds[rows, :r], db = launch().dy_fused(q.dy[rows], q.b[j], thin, SCALES[j])
        da = launch().da(thin, q.x[rows], mask[rows] if p else None, p, None, 0)
        part = out[rows]
        launch().masked_expand_fused(part, thin, q.a[j], mask[rows] if p else None, p, None, 0, True)
        out[rows] = part
        assert torch.equal(dbs[j], db) and torch.equal(das[j], da), (j, "sums over the rows")
    assert torch.equal(got["s"], s) and torch.equal(got["ds"], ds) and torch.equal(got["out"], out)
    if drop and bits:
        assert torch.equal(got["mask"], mask)
    return got


# -------------------------------------------------------------------------------------------------------- block table


@everywhere
@pytest.mark.parametrize("empty", [False, True])
def test_block_table(where, empty):
    g = torch.Generator().manual_seed(5)
    sizes = [[0], [1], [16], [17, 0, 0, 40, 16], [0, 0, 5], torch.randint(0, 40, (150,), generator=g).tolist()]
    for counts in sizes:
        for before, after in ((0, 0), (3, 21)):
            offsets = torch.tensor([before, *counts]).cumsum(0).to(where)
            m = before + sum(counts) + after
            got = multi().block_table(offsets, m, 16, empty=empty).tolist()
            want = []
            for j, count in enumerate(counts):
                blocks = max(-(-count // 16), 1 if empty else 0)
                want += [[j, int(offsets[j]) + 16 * i] for i in range(blocks)]
            assert got[: len(want)] == want and all(j == -1 for j, _ in got[len(want) :])
            assert len(got) == (m // 16 if empty else -(-m // 16)) + len(counts)


# ------------------------------------------------------------------------------------------------------------ numbers


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ids", IDS)
def test_equals_the_loop_over_one_adapter(where, dtype, ids):
    q = Problem(where, dtype, IDS[ids])
    check_all(q, True, True)
    check_all(q, False, False)
    if ids != "mixed":
        check_all(Problem(where, dtype, IDS[ids], by_order=False), True, False)


@everywhere
def test_adapters_of_another_dtype_and_odd_sizes(where):
    for dtype, adapters in ((torch.float16, torch.float32), (torch.float32, torch.float16)):
        check_all(Problem(where, dtype, IDS["mixed"], k=65, n=33, adapters=adapters))
    check_all(Problem(where, torch.float32, [0, 1, 0], k=1, n=1, ranks=(1, 2)))


@everywhere
@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"expanded"}))
def test_any_layout(where, layout):
    lay = LAYOUTS[layout]
    q = Problem(where, torch.float32, IDS["mixed"])
    want = run_all(q)
    for name in ("x", "dy", "s"):
        setattr(q, name, lay(getattr(q, name)))
    q.a, q.b = [lay(one) for one in q.a], [lay(one) for one in q.b]
    got = run_all(q)
    out = lay(q.out.clone())
    multi().expand_(out, q.s, q.a, q.table, got["mask"], None, *q.at, True)
    for name, value in got.items():
        assert torch.equal(value, want[name]), name
    assert torch.equal(out, want["out"])


@everywhere
def test_accuracy(where):
    q = Problem(where, torch.float16, IDS["mixed"])
    got = run_all(q)
    keep = unpack_bits(q.mask(), q.x.shape[1])
    parts = family.split_like(got["db"], q.b)
    for j, r in enumerate(q.ranks):
        rows = q.rows(j)
        if DROPS[j] == 1.0:
            continue
        factor, own, thin = 1 / (1 - round(DROPS[j] * 65536) / 65536), keep[rows], q.s[rows, :r]

        def dropped(x, own=own):
            return torch.where(own, x, 0)

        def shrink(x, a, j=j, factor=factor):
            return (dropped(x) @ a.T).mul_(SCALES[j] * factor)

        close(got["s"][rows, :r], shrink, q.x[rows], q.a[j])
        close(got["ds"][rows, :r], lambda dy, b, j=j: (dy @ b).mul_(SCALES[j]), q.dy[rows], q.b[j])
        close(parts[j], lambda dy, s: (dy.T @ s).to(torch.promote_types(dy.dtype, torch.float32)), q.dy[rows], thin)
        close(
            got["da"].split(q.ranks)[j],
            lambda s, x, factor=factor: (s.T @ dropped(x)).to(torch.promote_types(x.dtype, torch.float32)).mul_(factor),
            thin,
            q.x[rows],
        )


@everywhere
def test_split_sums_repeat_their_bits_and_stay_right(where, monkeypatch):
    from lowmem.triton_kernels import device as gpu

    g = torch.Generator().manual_seed(2)
    ids = torch.randint(-1, 2, (150,), generator=g).tolist()
    q = Problem(where, torch.float32, ids, k=170, n=60, ranks=(3, 17, 1, 9))
    monkeypatch.setattr(gpu, "programs", lambda device: 0)
    whole = run_all(q)
    monkeypatch.setattr(gpu, "programs", lambda device: 60)  # enough programs that every reduction is split
    assert launch()._parts("dy", 150, 16, 2, q.x.device, 2)[0] > 2
    first = run_all(q)
    for name, again in run_all(q).items():
        assert torch.equal(again, first[name])
    for name in ("s", "da", "db", "ds"):
        assert name == "ds" or not torch.equal(first[name], whole[name]), f"{name}: nothing was split"
        torch.testing.assert_close(first[name], whole[name], rtol=1e-5, atol=1e-5)
    alone = Problem(where, torch.float32, [0] * 150, k=170, n=60, ranks=(17,))  # cut as the single launcher cuts it
    got = run_all(alone, drop=False)
    ds, db = launch().dy_fused(alone.dy, alone.b[0], alone.s, SCALES[0])
    assert torch.equal(got["ds"], ds) and torch.equal(got["db"].view(60, 17), db)
    assert torch.equal(got["da"], launch().da(alone.s, alone.x, None, 0.0, None, 0))


@everywhere
def test_many_adapters(where):
    ranks = tuple(1 + j % 5 for j in range(90))
    ids = [j for j in range(0, 90, 2)] + [7] * 20
    g = torch.Generator().manual_seed(1)
    x, a = torch.randn(len(ids), 20, generator=g).to(where), [torch.randn(r, 20, generator=g).to(where) for r in ranks]
    table = adapter_table(ranks, (1.0,) * 90, (0.0,) * 90, where)
    at = route([str(j) for j in range(90)], adapter_ids=torch.tensor(ids, device=where), rows=len(ids))
    s, _ = multi().shrink(x, a, table, None, at.order, at.offsets, False, False)
    for m, j in enumerate(ids):
        torch.testing.assert_close(s[m, : ranks[j]], a[j] @ x[m], rtol=1e-5, atol=1e-5)
        assert not s[m, ranks[j] :].any()


@everywhere
def test_wrong_rows_touch_no_memory_outside(where):
    """On a GPU nobody has looked at the values by then: whatever they are, reads and writes stay inside."""
    q = Problem(where, torch.float32, IDS["mixed"])
    wild = torch.tensor([5, -3, 10**9, 7, 40], device=where)
    q.at = (torch.full_like(q.order, 10**12), wild)
    guard = torch.full((3, *q.out.shape), 7.0, device=where)
    guard[1] = q.out
    multi().expand_(guard[1], q.s, q.a, q.table, None, q.seeds, *q.at, True)
    assert torch.equal(guard[1], q.out) and (guard[[0, 2]] == 7.0).all()
    s, _ = multi().shrink(q.x, q.a, q.table, q.seeds, *q.at, True, True)
    assert not s.any()


@everywhere
def test_what_is_not_served_goes_to_the_reference(where):
    q = Problem(where, torch.float64, IDS["mixed"])
    s, mask = multi().shrink(q.x, q.a, q.table, q.seeds, *q.at, True, True)
    want = family.shrink_reference(q.x, q.a, q.table, q.seeds, *q.at, True, True)
    assert s.dtype is torch.float64 and torch.equal(s, want[0]) and torch.equal(mask, want[1])
    for ids in ([], [0]):
        empty = Problem(where, torch.float32, ids, k=4, n=4, ranks=(2, 3))
        assert {name: value.shape[0] for name, value in run_all(empty).items()}["s"] == len(ids)


# ------------------------------------------------------------------------------- deliberately broken kernels are caught

BROKEN = {
    "rows drawn by their place in the batch": ("shrink_rows", "shrink_rows_by_place"),
    "the next adapter's scale": ("number", "number_of_another"),
    "rows in the batch's order": ("rows_at", "rows_at_without_order"),
    "the segment's end": ("segment", "segment_without_end"),
}


@pytest.mark.parametrize("where", ["cpu"], indirect=True)
@pytest.mark.interpret
@pytest.mark.parametrize("mistake", BROKEN)
def test_broken_kernels_are_caught(where, mistake, monkeypatch):
    import broken_triton_multi

    name, replacement = BROKEN[mistake]
    q = Problem(where, torch.float32, IDS["mixed"])
    monkeypatch.setattr(multi().kernels, name, getattr(broken_triton_multi, replacement))
    with pytest.raises(AssertionError):
        check_all(q)


@pytest.mark.parametrize("where", ["cpu"], indirect=True)
@pytest.mark.interpret
def test_a_forgotten_spare_slot_is_caught(where, monkeypatch):
    from lowmem.triton_kernels import device as gpu

    monkeypatch.setattr(gpu, "programs", lambda device: 60)
    q = Problem(where, torch.float32, [0] * 150, k=40, n=60, ranks=(3,))
    db = q.dy.T @ q.s[:, :3]
    torch.testing.assert_close(run_all(q)["db"].view(60, 3), db, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(multi(), "_sum", lambda *args: None)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(run_all(q)["db"].view(60, 3), db, rtol=1e-4, atol=1e-4)
