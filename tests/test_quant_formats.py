"""The formats of the quant family: tables, bytes, specs, quantizers, storage; and the layout written out by hand."""

import hashlib
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quant_cases import INTS, SPECS, TABLES, fits, packed, value_by_hand, weight

from lowmem.quant import QTensor, QuantSpec, dequantize, quantize
from lowmem.quant.formats import BITS, FORMATS, code_table, dynamic_map, pack_codes, row_bytes, unpack_codes

pytestmark = pytest.mark.usefixtures("poisoned")

every_spec = pytest.mark.parametrize("name", SPECS)


def quantile_table(bits):
    """NF-k from its construction: quantiles of N(0, 1) between 1 - offset and offset, with an exact 0."""
    from scipy.stats import norm

    offset = 0.9677083
    half = 2 ** (bits - 1)
    positive = [norm.ppf(offset + (0.5 - offset) * i / half) for i in range(half)]
    negative = [-norm.ppf(offset + (0.5 - offset) * i / (half - 1)) for i in range(half - 1)]
    values = sorted([*positive, 0.0, *negative])
    return torch.tensor([v / max(values) for v in values])


def test_tables():
    for name in TABLES:
        table = code_table(name)
        assert table.dtype == torch.float32 and table.shape == (2 ** BITS[name],)
        assert table.abs().max() == 1 and (table == 0).any()
    for name, bits in (("nf4", 4), ("nf3", 3), ("nf2", 2)):
        assert torch.allclose(code_table(name), quantile_table(bits).float(), atol=1e-6, rtol=0), name
    half = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
    assert torch.equal(code_table("fp4"), torch.cat([half, -half]))
    table = dynamic_map()
    assert table.shape == (256,) and torch.equal(table, table.sort().values) and len(table.unique()) == 256
    assert table[-1] == 1 and table[127] == 0 and table[0] == torch.tensor(-0.99296875)
    with pytest.raises(ValueError, match=r"lowmem\.code_table: format: expected nf4, nf3, nf2 or fp4, got 'int4'"):
        code_table("int4")


@given(st.sampled_from([2, 3, 4, 8]), st.integers(0, 3), st.integers(0, 100), st.integers(0, 1000))
def test_packing_round_trip(bits, rows, count, draw):
    g = torch.Generator().manual_seed(draw)
    codes = torch.randint(0, 2**bits, (rows, count), generator=g, dtype=torch.uint8)
    data = pack_codes(codes, bits)
    assert data.dtype == torch.uint8 and data.shape == (rows, row_bytes(bits, count))
    assert torch.equal(unpack_codes(data, bits, count), codes)


@every_spec
def test_each_element_by_hand(name):
    spec = SPECS[name]
    for shape in ((3, 64), (5, 37), (2, 3, 96)):
        if not fits(spec, shape[-1]):
            continue
        for float_zero in (False, True):
            q = packed(spec, *shape, float_zero=float_zero).check("test")
            dense = dequantize(q, torch.float64).view(q.rows, q.cols)
            for row in range(q.rows):
                for col in range(0, q.cols, 5):
                    by_hand = value_by_hand(q, row, col)
                    assert math.isclose(float(dense[row, col]), by_hand, rel_tol=1e-6, abs_tol=1e-9), (row, col)


@every_spec
def test_bytes_are_the_formula(name):
    spec = SPECS[name]
    for shape in ((8, 256), (3, 5, 128), (7, 33), (1, 1)):
        if fits(spec, shape[-1]):
            q = packed(spec, *shape)
            assert q.nbytes == spec.storage_bytes(math.prod(shape[:-1]), shape[-1])
            assert q.bits_per_weight == 8 * q.nbytes / math.prod(shape)


def test_bits_per_weight():
    n = k = 4096
    assert round(QuantSpec("nf4", 64, double_quant=True).bits_per_weight(n, k), 3) == 4.127
    assert QuantSpec("nf4").bits_per_weight(n, k) == 4.5
    assert QuantSpec("int3", -1).bits_per_weight(n, k) == 3 + 16 / k
    assert QuantSpec("int2", -1).bits_per_weight(n, k) == 2 + 16 / k
    assert QuantSpec("int3", 128).bits_per_weight(n, k) == 3.125
    assert QuantSpec("nf2", 64, double_quant=True).bits_per_weight(n, k) < 2.13


def error(w, q):
    return float((dequantize(q, torch.float32) - w).norm() / w.norm())


@pytest.mark.parametrize("method", ["absmax", "mse", "hqq"])
@every_spec
def test_round_trip_error(name, method):
    spec = SPECS[name]
    w = weight(64, 256)
    e = error(w, quantize(w, spec, method=method))
    # half a step over the range that a group of this size has; a wrong scale, zero or code is far beyond it
    limit = {8: 0.02, 4: 0.15, 3: 0.36, 2: 0.95}[spec.bits]
    assert e < limit, e
    if method == "mse":
        assert e <= error(w, quantize(w, spec)) * 1.001


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if not spec.double_quant])
def test_quantizing_again_changes_nothing(name):
    spec = SPECS[name]
    w = dequantize(packed(replace(spec, scale_dtype=torch.float32), 16, 96))
    again = quantize(w, replace(spec, scale_dtype=torch.float32))
    assert error(w, again) < 1e-6


def test_searching_beats_absmax_at_two_bits():
    w = weight(64, 512)
    for name in ("nf2", "int2"):
        plain = error(w, quantize(w, name))
        assert error(w, quantize(w, name, method="mse")) < 0.8 * plain
        assert error(w, quantize(w, name, method="hqq")) < 0.95 * plain


@pytest.mark.parametrize("method", ["absmax", "mse", "hqq"])
@every_spec
def test_zero_and_constant_groups(name, method):
    spec = SPECS[name]
    zeros = quantize(torch.zeros(4, 64), spec, method=method)
    assert torch.equal(dequantize(zeros), torch.zeros(4, 64))
    for constant in (0.5, -0.5, 1e-30, -3e36, 2e-38):
        w = torch.full((4, 64), constant)
        dense = dequantize(quantize(w, replace(spec, scale_dtype=torch.float32), method=method))
        assert dense.isfinite().all(), constant
        if not spec.double_quant and method == "absmax" and (spec.zero_point or constant > 0 or spec.is_table):
            assert torch.allclose(dense, w, rtol=0.02, atol=0), constant


@every_spec
def test_not_finite_is_refused(name):
    for value in (math.nan, math.inf, -math.inf):
        w = weight(4, 64)
        w[2, 17] = value
        for method in ("absmax", "mse", "hqq"):
            with pytest.raises(ValueError, match=r"lowmem\.quantize: w: expected finite values, got NaN or infinity"):
                quantize(w, SPECS[name], method=method)


def test_scales_beyond_their_dtype_are_refused():
    with pytest.raises(ValueError, match=r"w: expected finite values, got scales beyond torch\.float16"):
        quantize(torch.full((2, 64), 1e6), QuantSpec("int4", scale_dtype=torch.float16))


def test_experts_and_odd_shapes():
    for name in ("nf4", "nf3", "nf2", "fp4"):
        w = weight(3, 5, 7)
        q = quantize(w, name)
        assert q.shape == (3, 5, 7) and dequantize(q).shape == w.shape and q.rows == 15
        assert torch.equal(dequantize(q).view(15, 7), dequantize(quantize(w.view(15, 7), name)))
    for name in INTS:
        q = quantize(weight(3, 5, 33), QuantSpec(name, -1))
        assert q.packed.shape == (3, 5, row_bytes(BITS[name], 33)) and q.scale.shape == (3, 5, 1)
    empty = quantize(torch.zeros(0, 64), "nf4")
    assert dequantize(empty).shape == (0, 64)


def test_dtype_and_layout_of_the_weight():
    w = weight(16, 64)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        q = quantize(w.to(dtype), "int8")
        assert q.dtype == dtype and dequantize(q).dtype == dtype and dequantize(q, torch.float16).dtype == torch.float16
    a, b = quantize(w.t().contiguous().t(), "nf4"), quantize(w, "nf4")
    assert torch.equal(a.packed, b.packed) and torch.equal(a.scale, b.scale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "nf5"}, "format: expected one of nf4"),
        ({"group_size": 48}, "group_size: expected a power of two"),
        ({"group_size": True}, "group_size: expected"),
        ({"group_size": -1}, "group_size: expected a power of two from 16 to 4096 for nf4, got -1"),
        ({"zero_point": True}, "zero_point: expected False for nf4"),
        ({"scale_dtype": torch.float64}, "scale_dtype: expected"),
        ({"scale_bits": 5}, "scale_bits: expected 2, 3, 4 or 8"),
        ({"scale_group": 100}, "scale_group: expected"),
    ],
)
def test_bad_spec(change, message):
    with pytest.raises(ValueError, match=rf"lowmem\.QuantSpec: {message}"):
        QuantSpec(**{"format": "nf4", **change})


def test_bad_quantize():
    w = weight(4, 65)
    with pytest.raises(ValueError, match=r"lowmem\.quantize: group_size: expected a divisor of K = 65, got 64"):
        quantize(w, "int4")
    with pytest.raises(ValueError, match=r"lowmem\.quantize: method: expected one of absmax, mse, hqq, got 'gptq'"):
        quantize(w, "nf4", method="gptq")
    with pytest.raises(TypeError, match=r"lowmem\.quantize: w: expected a tensor of a floating dtype"):
        quantize(w.long(), "nf4")
    with pytest.raises(ValueError, match=r"lowmem\.quantize: w: expected two dimensions or more"):
        quantize(w[0], "nf4")
    with pytest.raises(TypeError, match=r"lowmem\.quantize: spec: expected a format's name or a QuantSpec, got int"):
        quantize(w, 4)


@every_spec
def test_spec_code_round_trip(name):
    spec = SPECS[name]
    back = QuantSpec.from_code(spec.code)
    assert back == replace(
        spec,
        zero_point=False,
        scale_dtype=None,
        scale_bits=spec.scale_bits if spec.double_quant else 8,
        scale_group=spec.scale_group if spec.double_quant else 256,
    )
    assert FORMATS[spec.code & 15] == spec.format


@every_spec
def test_check_refuses_tensors_that_do_not_fit(name):
    q = packed(SPECS[name], 6, 64)
    cut = {f: t for f in ("packed", "scale", "zero", "scale_code", "scale_absmax") if (t := getattr(q, f)) is not None}
    for field, tensor in cut.items():
        with pytest.raises(ValueError, match=rf"lowmem\.test: {field}: expected"):
            replace(q, **{field: tensor.reshape(-1)[:-1]}).check("test")
        with pytest.raises(TypeError, match=rf"lowmem\.test: {field}: expected"):
            replace(q, **{field: tensor.double()}).check("test")
    with pytest.raises(ValueError, match=r"lowmem\.test: packed: expected"):
        replace(q, shape=(7, 64)).check("test")
    assert isinstance(q, QTensor) and q.check("test") is q


# ------------------------------------------------------------------------------------------------------- bitsandbytes

# sha256 (16 digits) of what bitsandbytes 0.50.2 makes of `exact(shape)` on the CPU, blocks of 64: codes and absmax;
# doubly quantized: uint8 absmax, nested absmax, offset
BITSANDBYTES = {
    ((64, 320), "float32", "nf4"): (
        "ab5ad652a0545987",
        "eaf059b5229c612d",
        "8a88cae40092a26a",
        "12b72104d43cb94e",
        "0x1.ef55540000000p-2",
    ),
    ((64, 320), "float32", "fp4"): (
        "0e7641dde642c9ee",
        "eaf059b5229c612d",
        "8a88cae40092a26a",
        "12b72104d43cb94e",
        "0x1.ef55540000000p-2",
    ),
    ((64, 320), "bfloat16", "nf4"): (
        "fbda025dc5f4ae04",
        "954c60dec51a23e6",
        "14ddf373882110a4",
        "ac0bc39488de46b3",
        "0x1.ef519a0000000p-2",
    ),
    ((64, 320), "bfloat16", "fp4"): (
        "18285d7ca89968e0",
        "954c60dec51a23e6",
        "14ddf373882110a4",
        "ac0bc39488de46b3",
        "0x1.ef519a0000000p-2",
    ),
    ((33, 77), "float32", "nf4"): (
        "bfb495b9d6db7300",
        "ea447751f9d8290d",
        "f884ce130be9bd21",
        "74cd5ae533e0c0a1",
        "0x1.e3d9ac0000000p-2",
    ),
    ((33, 77), "float32", "fp4"): (
        "66088a3fd3c2ce38",
        "ea447751f9d8290d",
        "f884ce130be9bd21",
        "74cd5ae533e0c0a1",
        "0x1.e3d9ac0000000p-2",
    ),
    ((33, 77), "bfloat16", "nf4"): (
        "0bc82bcdb02902d8",
        "7909eebdd9b82c92",
        "a92b6f485d0474d5",
        "d1840fd676596f6e",
        "0x1.e3b3340000000p-2",
    ),
    ((33, 77), "bfloat16", "fp4"): (
        "53819437e04d16bf",
        "7909eebdd9b82c92",
        "a92b6f485d0474d5",
        "d1840fd676596f6e",
        "0x1.e3b3340000000p-2",
    ),
}


def exact(n, k):
    """Heavy-tailed weights by integers alone, the same on every machine."""
    state, values = 12345, []
    for _ in range(n * k):
        state = (1103515245 * state + 12345) % 2**31
        u = (state >> 8) % 65536 - 32768
        values.append(u * abs(u) / 2**31)
    w = torch.tensor(values, dtype=torch.float64).view(n, k)
    w.view(-1)[:64] = 0
    return w


def digest(t):
    return hashlib.sha256(t.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("case", BITSANDBYTES, ids=str)
def test_the_bytes_of_bitsandbytes(case):
    shape, dtype, name = case
    packed_bytes, absmax, nested, nested_absmax, offset = BITSANDBYTES[case]
    w = exact(*shape).to(getattr(torch, dtype))
    q = quantize(w, name)
    assert digest(q.packed) == packed_bytes and digest(q.scale) == absmax
    n = quantize(w, name, double_quant=True)
    assert digest(n.packed) == packed_bytes
    assert float(n.scale_offset) == pytest.approx(float.fromhex(offset), rel=1e-6)
    if float(n.scale_offset) == float.fromhex(offset):  # the mean is torch's sum, whose order is the processor's
        assert digest(n.scale) == nested and digest(n.scale_absmax) == nested_absmax


def test_against_bitsandbytes_itself():
    peer = pytest.importorskip("bitsandbytes.functional")
    for shape in ((512, 512), (33, 77), (64, 1000)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            w = weight(*shape, dtype=dtype)
            for name in ("nf4", "fp4"):
                for size in (64, 256):
                    for nested in (False, True):
                        data, state = peer.quantize_4bit(w, blocksize=size, quant_type=name, compress_statistics=nested)
                        q = quantize(w, QuantSpec(name, size, double_quant=nested))
                        assert torch.equal(q.packed.view(-1), data.view(-1))
                        assert torch.equal(q.scale.view(-1), state.absmax.view(-1))
                        assert torch.equal(dequantize(q), peer.dequantize_4bit(data, state))
                        if nested:
                            assert torch.equal(q.scale_absmax, state.state2.absmax)
                            assert torch.equal(q.scale_code, state.state2.code)
                            assert float(q.scale_offset) == float(state.offset)
