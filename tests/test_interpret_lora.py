"""The Triton kernels of the lora family against the plain-torch references, in the interpreter or on a GPU.

`TRITON_INTERPRET=1 pytest -m interpret` executes them on the CPU, in fp32 and fp16 (the interpreter gets bf16 products
wrong), with tiles so small that small shapes have several of everything. `pytest -m gpu` runs the same checks compiled,
bf16 included, with the tiles users get.
"""

from __future__ import annotations

import pytest
import torch
from interpreted import DTYPES, WHERE, everywhere

from lowmem.ops import lora as family
from lowmem.ops.philox import inv_keep, keep_mask, pack_bits, philox4x32, threshold, unpack_bits
from lowmem.testing import LAYOUTS, assert_close_to_reference, huge_view, reference_pair, terms_of

pytestmark = pytest.mark.usefixtures("poisoned", "kernels")


def launch():
    from lowmem.triton_kernels import lora

    return lora


class Problem:
    """Operands of one layer: x [M, K], W [N, K], A [r, K], B [N, r], dy [M, N], s and ds [M, r], bias [N]."""

    def __init__(self, where, dtype, m, k, n, r, adapters=None, salt=0):
        g = torch.Generator().manual_seed(1000 + salt)

        def randn(*shape, scale=1.0, dtype=dtype):
            return (torch.randn(shape, generator=g) * scale).to(dtype).to(where)

        adapters = adapters or dtype
        self.x, self.dy, self.bias = randn(m, k), randn(m, n), randn(n)
        self.w = randn(n, k, scale=k**-0.5)
        self.a, self.b = randn(r, k, scale=k**-0.5, dtype=adapters), randn(n, r, dtype=adapters)
        self.s, self.ds = randn(m, r), randn(m, r)
        self.seed = torch.tensor([0x1234_5678_9ABC_DEF0 + salt], device=where)
        self.where = where

    def mask(self, p, child=1):
        return pack_bits(keep_mask(*self.x.shape, p, self.seed, child)) if p else None


def close(actual, fn, *args, rounded=()):
    """The accuracy rule on a result (or each of several) of ``fn`` over ``args``."""
    exact, lowprec = reference_pair(fn, *args)
    terms = terms_of(fn, *args)
    single = isinstance(actual, torch.Tensor)
    for i, one in enumerate([actual] if single else actual):
        pick = (lambda v, i=i: v) if single else (lambda v, i=i: v[i])
        if one.dtype.is_floating_point:
            assert_close_to_reference(
                one, pick(exact), pick(lowprec), terms=pick(terms), rounded=rounded, what=f"{fn.__name__}[{i}]"
            )


def check_shrink(q, p, child=1, scale=2.0, x=None, a=None):
    x, a = q.x if x is None else x, q.a if a is None else a
    s, bits = launch().shrink(x, a, scale, p, q.seed, child, True)
    keep = keep_mask(*x.shape, p, q.seed, child) if p else None
    want = pack_bits(keep) if p else torch.empty(0, dtype=torch.int32, device=x.device)
    assert bits.dtype is torch.int32 and torch.equal(bits, want), "the packed mask differs from the reference's"
    close(s, lambda x, a: family.shrink_reference(x, a, scale, p, q.seed, child, False)[0], x, a)
    again, none = launch().shrink(x, a, scale, p, q.seed, child, False)
    assert none.numel() == 0 and torch.equal(again, s), "seed-only mode gives another S"
    return s


def check_dy(q, scale=0.5, dy=None):
    dy = q.dy if dy is None else dy
    close(launch().dy_fused(dy, q.b, q.s, scale), lambda *t: family.dy_reference(*t, scale), dy, q.b, q.s)


def check_da(q, p, child=1, x=None):
    x = q.x if x is None else x
    mask = q.mask(p, child)
    got = launch().da(q.ds, x, mask, p, None, child)
    close(got, lambda ds, x: family.da_reference(ds, x, mask, p, None, child), q.ds, x)
    assert torch.equal(got, launch().da(q.ds, x, None, p, q.seed, child)), "bits and seed give different dA"


def _masked_expand(q, p, accumulate, child):
    def fn(out, ds, a):
        out = out.clone()
        family.masked_expand_reference(out, ds, a, q.mask(p, child), p, None, child, accumulate)
        return out

    return fn


def check_masked_expand(q, p, accumulate, child=1, lay=lambda t: t):
    out = lay(q.x.clone())
    want = _masked_expand(q, p, accumulate, child)
    before = out.clone() if accumulate else torch.zeros_like(out)
    if not accumulate:
        out.fill_(float("nan"))  # what is there must not matter
    seeded = lay(out.clone())
    launch().masked_expand_fused(out, q.ds, q.a, q.mask(p, child), p, None, child, accumulate)
    launch().masked_expand_fused(seeded, q.ds, q.a, None, p, q.seed, child, accumulate)
    delta = _masked_expand(q, p, False, child)(out, q.ds, q.a)  # rounded on the reference's way
    close(out, want, before, q.ds, q.a, rounded=(delta,))
    assert torch.equal(out, seeded), "bits and seed give different results"


def check_dx(q, p, descriptors, child=1):
    mask = q.mask(p, child)

    def fn(dy, w, ds, a):
        return family.dx_reference(dy, w, ds, a, mask, p, None, child)

    close(
        launch().dx_fused(q.dy, q.w, q.ds, q.a, mask, p, None, child, descriptors=descriptors), fn, q.dy, q.w, q.ds, q.a
    )


def check_expand(q, bias, descriptors):
    bias = q.bias if bias else None
    got = launch().expand_fused(q.x, q.w, q.s, q.b, bias, descriptors=descriptors)
    args = (q.x, q.w, q.s, q.b) + ((bias,) if bias is not None else ())
    close(got, lambda x, w, s, b, bias=None: family.expand_reference(x, w, s, b, bias), *args)


# ------------------------------------------------------------------------------------------------------- random map


@everywhere
def test_words_follow_the_reference(where):
    from broken_triton import words_kernel

    rows = torch.tensor([0, 1, 2, 12345, 2**16, 2**31 - 1, 2**31, 2**32 - 1], device=where)
    blocks = torch.tensor([0, 1, 511, 2**32 - 1], device=where)
    for seed in (0, 1, 2**32 - 1, 2**32, 2**62 - 1, -1):
        key = torch.tensor([seed], device=where)
        for child in (0, 1, 2**31 - 1):
            out = torch.empty(4, 8, 4, dtype=torch.int64, device=where)
            words_kernel[(1,)](out, key, rows, blocks, torch.tensor([child]).item(), ROWS=8, BLOCKS=4)
            want = torch.stack(philox4x32(key, blocks.view(1, 4), rows.view(8, 1), 0, child))
            assert torch.equal(out, want), (seed, child)


@everywhere
@pytest.mark.parametrize(
    "p", [1e-7, 1 / 65536, 0.1, 0.25, 0.49999, 0.5, 0.50002, 0.9, 65534 / 65536, 65535 / 65536, 1 - 1e-7, 1.0]
)
def test_masks_at_every_kind_of_threshold(where, p):
    q = Problem(where, torch.float32, 9, 77, 3, 2)
    s = check_shrink(q, p)
    t = threshold(p)
    drawn = launch()._bits(9, 77, None, p, q.seed, 1, q.x)[1].view(torch.int32).view(9, 3)
    assert torch.equal(drawn, q.mask(p)), "the drawing kernel differs from the reference"
    if t == 65536:
        assert not s.any() and not drawn.any() and inv_keep(p) == 0.0
    if t == 0:
        assert unpack_bits(drawn, 77).all()


def at_a_drawn_half(q, row=2, column=5):
    """A drop probability whose threshold is exactly the 16 bits that one element draws."""
    index = torch.tensor([column // 8], device=q.where)
    drawn = philox4x32(q.seed, index, torch.tensor([row], device=q.where), 0, 1)[column % 8 // 2]
    return (int(drawn) >> 16 * (column % 2) & 0xFFFF) / 65536


@everywhere
def test_an_element_at_its_threshold_is_kept(where):
    q = Problem(where, torch.float32, 4, 40, 3, 2)
    for column in range(5, 13):
        p = at_a_drawn_half(q, column=column)
        assert keep_mask(4, 40, p, q.seed, 1)[2, column] and not keep_mask(4, 40, p + 1 / 65536, q.seed, 1)[2, column]
        check_shrink(q, p)


# ------------------------------------------------------------------------------------------- shapes, ranks and dtypes

SHAPES = [(1, 1, 1, 1), (33, 100, 67, 3), (20, 64, 48, 16), (7, 257, 33, 40), (17, 31, 70, 130)]


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES)
def test_memory_bound_kernels(where, dtype, shape, p):
    q = Problem(where, dtype, *shape)
    check_shrink(q, p)
    check_da(q, p)
    check_masked_expand(q, p, accumulate=False)
    check_masked_expand(q, p, accumulate=True)
    if not p:
        check_dy(q)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (40, 96, 64, 16), (40, 64, 96, 130)])
@pytest.mark.parametrize("descriptors", [False, True])
def test_fused_gemms(where, dtype, shape, descriptors):
    q = Problem(where, dtype, *shape)
    check_expand(q, True, descriptors)
    check_expand(q, False, descriptors)
    check_dx(q, 0.3, descriptors)
    check_dx(q, 0.0, descriptors)


@everywhere
def test_descriptor_kernels_serve_aligned_tensors_only(where):
    lora = launch()
    aligned = torch.zeros(4, 16, dtype=torch.float16, device=where)
    arch = lora.gpu.architecture(aligned.device)
    if arch not in ("interpreter", "sm_90", "sm_100"):
        pytest.skip(f"{arch} has no tensor descriptors")
    assert lora._descriptors(arch, aligned)
    assert not lora._descriptors(arch, aligned.new_zeros(4, 15)), "rows of 30 bytes"
    assert not lora._descriptors(arch, aligned.new_zeros(65)[1:].view(4, 16)), "a base at 2 bytes"
    assert not lora._descriptors(arch, aligned.T), "columns that are not contiguous"
    assert not lora._descriptors(arch, aligned[:1].expand(4, 16)), "rows that repeat"
    assert not lora._descriptors("sm_80", aligned)


@everywhere
@pytest.mark.parametrize("adapters", [torch.float32, torch.float16, torch.bfloat16])
def test_adapters_of_another_dtype(where, adapters):
    for dtype in (torch.float32, torch.float16):
        q = Problem(where, dtype, 18, 72, 34, 5, adapters=adapters)
        check_shrink(q, 0.2)
        check_dy(q)
        check_masked_expand(q, 0.2, accumulate=True)
        check_expand(q, True, True)
        check_dx(q, 0.2, True)


@everywhere
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_any_layout(where, layout):
    lay = LAYOUTS[layout]
    for dtype in (torch.float32, torch.float16):
        q = Problem(where, dtype, 19, 66, 35, 3)
        for name in ("x", "w", "a", "b", "dy", "s", "ds"):
            setattr(q, name, lay(getattr(q, name)))
        check_shrink(q, 0.3)
        check_dy(q)
        check_da(q, 0.3)
        check_expand(q, True, True)
        check_dx(q, 0.3, True)
        if layout != "expanded":  # rows that share memory cannot be written
            check_masked_expand(q, 0.3, accumulate=True, lay=lay)
            check_masked_expand(q, 0.3, accumulate=False, lay=lay)


@everywhere
def test_empty_and_unserved_inputs_go_to_the_reference(where):
    lora = launch()
    for m, k, n in ((0, 8, 5), (3, 0, 5), (0, 0, 0)):
        q = Problem(where, torch.float32, m, max(k, 1), max(n, 1), 2)
        q.x, q.a = q.x[:, :k], q.a[:, :k]
        q.w, q.b, q.dy = q.w[:n, :k], q.b[:n], q.dy[:, :n]
        s, bits = lora.shrink(q.x, q.a, 1.0, 0.5, q.seed, 0, True)
        assert s.shape == (m, 2) and bits.shape == (m, (k + 31) // 32) and not s.any()
        ds, db = lora.dy(q.dy, q.b, s, 1.0)
        assert ds.shape == (m, 2) and db.shape == (n, 2) and not db.any()
        assert lora.expand(q.x, q.w, s, q.b, None).shape == (m, n)
        assert lora.dx(q.dy, q.w, ds, q.a, bits, 0.5, None, 0).shape == (m, k)
        assert lora.da(ds, q.x, bits, 0.5, None, 0).shape == (2, k)
    q = Problem(where, torch.float64, 5, 9, 4, 2)
    s, bits = lora.shrink(q.x, q.a, 2.0, 0.5, q.seed, 0, True)
    want, want_bits = family.shrink_reference(q.x, q.a, 2.0, 0.5, q.seed, 0, True)
    assert s.dtype is torch.float64 and torch.equal(s, want) and torch.equal(bits, want_bits)
    assert torch.equal(lora.dy(q.dy, q.b, q.s, 1.0)[1], family.dy_reference(q.dy, q.b, q.s, 1.0)[1])


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_dropped_contributes_zero_even_if_not_finite(where, dtype):
    q = Problem(where, dtype, 6, 40, 5, 2)
    keep = keep_mask(6, 40, 0.5, q.seed, 1)
    q.x = torch.where(keep, q.x, torch.nan)
    q.x[0, (~keep[0]).nonzero()[0]] = torch.inf
    s, _ = launch().shrink(q.x, q.a, 2.0, 0.5, q.seed, 1, True)
    assert s.isfinite().all()
    assert launch().da(q.ds, q.x, q.mask(0.5), 0.5, None, 1).isfinite().all()
    q.x[2, keep[2].nonzero()[0]] = torch.nan  # kept: it propagates, to its row of S and its column of dA only
    s, _ = launch().shrink(q.x, q.a, 2.0, 0.5, q.seed, 1, True)
    assert s[2].isnan().all() and s[[0, 1, 3, 4, 5]].isfinite().all()
    column = int(keep[2].nonzero()[0])
    da = launch().da(q.ds, q.x, q.mask(0.5), 0.5, None, 1)
    assert da[:, column].isnan().all() and da[:, torch.arange(40, device=where) != column].isfinite().all()


@everywhere
def test_the_operators_own_launchers(where):
    """What ``torch.ops.lowmem`` calls on a GPU: the rule's defaults, through the real signatures."""
    lora = launch()
    q = Problem(where, torch.float16, 24, 80, 48, 7)
    mask = q.mask(0.3)
    close(lora.dy(q.dy, q.b, q.s, 0.5), lambda *t: family.dy_reference(*t, 0.5), q.dy, q.b, q.s)
    delta = q.s @ q.b.T  # the composed way writes it before the base product joins
    close(lora.expand(q.x, q.w, q.s, q.b, None), lambda *t: family.expand_reference(*t, None), q.x, q.w, q.s, q.b,
          rounded=(delta,))  # fmt: skip
    close(
        lora.expand(q.x, q.w, q.s, q.b, q.bias), family.expand_reference, q.x, q.w, q.s, q.b, q.bias, rounded=(delta,)
    )
    close(lora.expand(q.x, None, q.s, q.b, q.bias), lambda x, *t: family.expand_reference(x, None, *t), q.x, q.s, q.b,
          q.bias)  # fmt: skip
    delta = _masked_expand(q, 0.3, False, 1)(q.x, q.ds, q.a)
    for w in (q.w, None):

        def fn(dy, ds, a, w=w):
            return family.dx_reference(dy, None if w is None else w.to(dy.dtype), ds, a, mask, 0.3, None, 1)

        close(lora.dx(q.dy, w, q.ds, q.a, mask, 0.3, None, 1), fn, q.dy, q.ds, q.a, rounded=(delta,))


# ----------------------------------------------------------------------------------------------- order and offsets


@everywhere
def test_split_sums_repeat_their_bits(where, monkeypatch):
    lora = launch()
    q = Problem(where, torch.float16, 70, 170, 60, 9)
    monkeypatch.setattr(lora.gpu, "programs", lambda device: 16)  # enough programs that every reduction is split
    for kernel, length, step, tiles in (("shrink", 170, 32, 5), ("dy", 70, 16, 2), ("da", 70, 16, 6)):
        assert lora._parts(kernel, length, step, tiles, q.x.device, 2)[0] > 1

    def run():
        s, bits = lora.shrink(q.x, q.a, 2.0, 0.3, q.seed, 1, True)
        return (s, bits, *lora.dy_fused(q.dy, q.b, q.s, 0.5), lora.da(q.ds, q.x, bits, 0.3, None, 1))

    first = run()
    for again, one in zip(run(), first, strict=True):
        assert torch.equal(again, one)
    check_shrink(q, 0.3)
    check_dy(q)
    check_da(q, 0.3)
    if where == "cpu":  # the programs of each grid from the last to the first
        _reverse_programs(monkeypatch)
        for again, one in zip(run(), first, strict=True):
            assert torch.equal(again, one), "the result depends on the order in which programs run"


def _reverse_programs(monkeypatch):
    from triton.runtime.interpreter import interpreter_builder as builder

    forward = builder.set_grid_idx

    def backward(x, y, z):
        forward(*(size - 1 - index for size, index in zip(builder.grid_dim, (x, y, z), strict=True)))

    monkeypatch.setattr(builder, "set_grid_idx", backward)


def behind_4_gib(values):
    """``values`` in a view whose last row starts 2**31 elements behind its first, with as much zeroed memory before it
    as a wrapped 32-bit offset could reach."""
    rows, cols = values.shape
    stride = -(-(2**31) // (rows - 1))
    spare = huge_view(2, cols, values.dtype, values.device, span=2**31 + (rows - 1) * stride)
    view = spare.as_strided((rows, cols), (stride, 1), 2**31)
    view.copy_(values)
    return view


@everywhere
def test_offsets_beyond_32_bits(where):
    q = Problem(where, torch.float16, 3, 40, 5, 2)
    check_shrink(q, 0.3, x=behind_4_gib(q.x))
    check_da(q, 0.3, x=behind_4_gib(q.x))
    q.dy = behind_4_gib(q.dy)
    check_dy(q)
    check_dx(q, 0.3, False)
    q = Problem(where, torch.float16, 3, 40, 5, 2)
    q.x = behind_4_gib(q.x)
    check_expand(q, True, False)
    check_masked_expand(Problem(where, torch.float16, 3, 40, 5, 2), 0.3, accumulate=True, lay=behind_4_gib)


# ------------------------------------------------------------------------------- deliberately broken kernels are caught


def _broken(name):
    import broken_triton

    return getattr(broken_triton, name)


BROKEN = {
    "threshold off by one": ("lora_kernels", "threshold_parts", "threshold_parts_off_by_one",
                             lambda q: check_shrink(q, at_a_drawn_half(q))),
    "threshold in 16 bits": ("lora_kernels", "threshold_parts", "threshold_parts_16_bits",
                             lambda q: check_shrink(q, 1.0)),
    "spare mask bits": ("lora_kernels", "inside_byte", "inside_byte_everything", lambda q: check_shrink(q, 0.3)),
    "offset in 32 bits": ("lora_kernels", "load_tile", "load_tile_32_bits",
                          lambda q: check_shrink(q, 0.0, x=behind_4_gib(q.x[:3]))),
    "no mask on the tail": ("lora_kernels", "load_tile", "load_tile_no_tail",
                            lambda q: check_shrink(q, 0.0, x=LAYOUTS["padded"](q.x), a=LAYOUTS["padded"](q.a))),
    "inverted mask in dA": ("lora_kernels", "load_mask_byte", "load_mask_byte_inverted", lambda q: check_da(q, 0.3)),
    "inverted mask in dx": ("lora_gemm", "load_mask_byte", "load_mask_byte_inverted",
                            lambda q: check_dx(q, 0.3, False)),
    "a part left out": ("lora_kernels", "reduce_kernel", "reduce_kernel_short", check_dy),
    "an element not written": ("lora_kernels", "reduce_kernel", "reduce_kernel_hole", check_dy),
    "one rank block of two": ("lora_gemm", "add_rank_term", "add_rank_term_first_block",
                              lambda q: check_expand(q, False, False)),
}  # fmt: skip


@pytest.mark.parametrize("where", WHERE[:1], indirect=True)
@pytest.mark.parametrize("mistake", sorted(BROKEN))
def test_broken_kernels_are_caught(where, mistake, monkeypatch):
    module, name, replacement, check = BROKEN[mistake]
    q = Problem(where, torch.float16, 21, 107, 75, 70)
    check(q)
    monkeypatch.setattr(
        getattr(launch(), {"lora_kernels": "kernels", "lora_gemm": "gemm"}[module]), name, _broken(replacement)
    )
    with pytest.raises(AssertionError):
        check(q)


@pytest.mark.parametrize("where", WHERE[:1], indirect=True)
def test_a_sum_in_program_order_is_caught(where, monkeypatch):
    parts = torch.randn(7, 64)

    def run():
        out = torch.zeros(64)
        _broken("reduce_in_program_order")[(7,)](parts, out, 64, BLOCK=64)
        return out

    first = run()
    _reverse_programs(monkeypatch)
    assert not torch.equal(run(), first), "reversing the programs should have changed this sum's last bits"
