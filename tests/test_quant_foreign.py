"""Other packages' quantized weights: read as they dequantize them, bitsandbytes' bit for bit both ways; damaged files.

The fixture holds what the packages themselves wrote and dequantized (``fixtures/make_foreign.py``)."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quant_cases import weight

from lowmem import integrations
from lowmem.quant import QuantSpec, dequantize, quantize

safetensors_torch = pytest.importorskip("safetensors.torch")
FILE = Path(__file__).with_name("fixtures") / "foreign.safetensors"
CASES = {}
for _key, _value in safetensors_torch.load_file(FILE).items():
    _case, _, _part = _key.partition("/")
    CASES.setdefault(_case, {})[_part] = _value
BNB = [c for c in CASES if c.startswith("bitsandbytes")]


def parts_of(case):
    return {k: v for k, v in CASES[case].items() if k not in ("dense", "w")}


def read(case, parts=None):
    """``(q, perm)`` of a case by the reader it belongs to."""
    parts = parts_of(case) if parts is None else parts
    kind = case.split("-")[0]
    if kind == "bitsandbytes":
        return integrations.from_bitsandbytes(parts), None
    if kind == "gptq":
        _, bits, version, *_ = case.split("-")
        form = "gptq" if version == "v1" else "gptq_v2"
        return integrations.from_gptq(parts, name="l", bits=int(bits), checkpoint_format=form)
    if kind == "awq":
        return integrations.from_awq(parts, name="l"), None
    if kind == "hqq":
        return integrations.from_hqq(parts, name="l"), None
    extra = {"target_dtype": case.split("-")[1], "block_size": [1, 32]} if "nf4" not in case else {}
    return integrations.from_torchao(parts, extra), None


def dense_of(case, q, perm):
    dense = dequantize(q)
    return dense if perm is None else dense[:, torch.argsort(perm)]


@pytest.mark.parametrize("case", BNB)
def test_bitsandbytes_bit_for_bit(case):
    parts = CASES[case]
    q, _ = read(case)
    assert torch.equal(dequantize(q), parts["dense"]) and q.dtype == parts["w"].dtype
    made = quantize(parts["w"], q.spec)  # what this package makes of the same weight
    for mine in (q, made):
        written = integrations.to_bitsandbytes(mine)
        assert written.keys() == parts_of(case).keys()
        for key, value in parts_of(case).items():
            assert written[key].dtype == value.dtype and written[key].shape == value.shape, key
            assert torch.equal(written[key], value), key
    again = integrations.from_bitsandbytes(integrations.to_bitsandbytes(q, name="a.b"), name="a.b")
    assert torch.equal(dequantize(again), parts["dense"]) and again.spec == q.spec


@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith("bitsandbytes")])
def test_values_are_the_packages_own(case):
    expected = CASES[case]["dense"]
    q, perm = read(case)
    assert (perm is not None) == ("order" in case)
    dense = dense_of(case, q, perm).double()
    assert dense.shape == expected.shape
    # they round s (q - z) in their own way, in 16 bits; torchao's nf4 table has four digits
    scale = float(expected.abs().max())
    eps = torch.finfo(expected.dtype).eps
    tolerance = 2 * eps * scale + (6e-5 * scale if "nf4" in case else 0)
    assert float((dense - expected.double()).abs().max()) <= tolerance
    # ... and codes are the same: quantization steps are far larger than that
    assert len(torch.unique(dense)) > 1


def test_bits_on_disk_and_in_memory():
    q, _ = read("bitsandbytes-nf4-nested-68x128")
    assert q.nbytes == q.spec.storage_bytes(68, 128)
    written = integrations.to_bitsandbytes(q)
    table = written["weight.quant_map"].nbytes + written["weight.quant_state.bitsandbytes__nf4"].nbytes
    assert sum(t.nbytes for t in written.values()) == q.nbytes - q.scale_offset.nbytes + table
    assert read("gptq-3-v2")[0].packed.nbytes * 8 == 3 * 32 * 64


def test_writing_other_formats_is_refused():
    w = weight(8, 64)
    for spec, message in (
        (QuantSpec("nf3"), "q: expected nf4 or fp4, got nf3"),
        (QuantSpec("nf4", 16), "q: expected a group size of 32 to 4096, got 16"),
        (QuantSpec("nf4", double_quant=True, scale_bits=4), "doubly quantized scales of 8 bits in blocks of 256"),
    ):
        with pytest.raises(ValueError, match=rf"lowmem\.to_bitsandbytes: .*{message}"):
            integrations.to_bitsandbytes(quantize(w, spec))
    q = quantize(weight(512, 64), QuantSpec("nf4", double_quant=True))
    with pytest.raises(ValueError, match="one offset for all scales"):
        integrations.to_bitsandbytes(replace(q, scale_offset=torch.zeros(2)))
    half = quantize(w, QuantSpec("nf4", scale_dtype=torch.bfloat16))
    assert integrations.to_bitsandbytes(half)["weight.absmax"].dtype == torch.float32


def test_a_torchao_tensor_by_its_attributes():
    class Int4Tensor:
        """W = q s + z, two's complement nibbles, the even element low."""

    g = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (3, 8, 64), generator=g)
    t = Int4Tensor()
    t.qdata = ((codes[..., 1::2] << 4) | (codes[..., ::2] & 15)).to(torch.int8)
    t.scale = torch.rand(3, 2, 8, generator=g).bfloat16() + 0.1
    t.zero_point = torch.randn(3, 2, 8, generator=g).bfloat16()
    t.block_size, t.act_pre_scale = [1, 1, 32], None
    q = integrations.from_torchao(t)
    wide = [p.float().mT.repeat_interleave(32, -1) for p in (t.scale, t.zero_point)]
    assert torch.allclose(dequantize(q, torch.float32), codes * wide[0] + wide[1], atol=1e-5)
    assert q.dtype == torch.bfloat16
    t.act_pre_scale = torch.ones(64)
    with pytest.raises(ValueError, match=r"lowmem\.from_torchao: weight: expected no scale on the activations"):
        integrations.from_torchao(t)
    with pytest.raises(TypeError, match=r"lowmem\.from_torchao: weight: expected an NF4Tensor"):
        integrations.from_torchao(torch.ones(2, 2))


def test_act_order_multiplies_permuted_columns():
    from lowmem.ops import qmatmul

    q, perm = read("gptq-4-v1-order")
    x = torch.randn(5, 64)
    expected = x.double() @ CASES["gptq-4-v1-order"]["dense"].double().T
    assert torch.allclose(qmatmul(x[:, perm], q).double(), expected, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------- damaged


IGNORED = (
    "compute_dtype",
    "unpack_view_dtype",
    "view_as_float",
    "group_size",
    "channel_wise",
    "optimize",
    "round_zero",
)


def damage(parts, key, how, g):
    """``parts`` with one tensor damaged, and whether that can be seen."""
    value = parts[key]
    flat = value.reshape(-1)
    needed = key.split(".")[-1] not in IGNORED
    if how == "missing":
        return {k: v for k, v in parts.items() if k != key}, needed and key != "l.g_idx"
    seen = needed and (value.numel() > 3 or how != "dtype")  # numbers may be written in several ways
    if how == "truncated":
        changed = flat[: int(torch.randint(0, max(len(flat), 1), (1,), generator=g))]
    elif how == "longer":
        changed = torch.cat([flat, flat, flat[:1]])
    elif how == "dtype":
        changed = value.to(torch.float64)
    elif how == "shape":
        changed = value.unsqueeze(0).unsqueeze(-1)
    elif how == "nan" and value.is_floating_point():
        changed, seen = torch.full_like(value, math.nan), needed and not key.endswith("W_q")
    else:  # bytes replaced at random
        seen = False
        data = flat.contiguous().view(torch.uint8).clone()
        at = torch.randint(0, len(data), (max(1, len(data) // 4),), generator=g)
        data[at] = torch.randint(0, 256, at.shape, generator=g, dtype=torch.uint8)
        changed = data.view(value.dtype).view(value.shape)
    return {**parts, key: changed}, seen and how != "shape"  # readers may take the same bytes in another shape


HOW = ("missing", "truncated", "longer", "dtype", "shape", "nan", "bytes")


@pytest.mark.parametrize("case", [c for c in CASES if "33x37" in c or "68x128" in c or "bitsandbytes" not in c])
@given(st.integers(0, 10**6), st.sampled_from(HOW))
def test_damaged_tensors(case, draw, how):
    """A clear error of this package, or a QTensor whose every byte is within its tensors: never anything else."""
    g = torch.Generator().manual_seed(draw)
    parts = parts_of(case)
    key = sorted(parts)[int(torch.randint(0, len(parts), (1,), generator=g))]
    parts, seen = damage(parts, key, how, g)
    try:
        q, _ = read(case, parts)
    except (ValueError, TypeError) as error:
        assert str(error).startswith("lowmem."), error
        return
    q.check("test")
    assert dequantize(q).shape == q.shape
    assert not seen, (key, how)


STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    "state",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 50000,
        {"shape": [33, 38]},
        {"shape": [2**40, 2**40]},
        {"shape": [-33, -37]},
        {"shape": "33x37"},
        {"shape": None},
        {"shape": [33, True]},
        {"blocksize": 48},
        {"blocksize": 0},
        {"blocksize": 2**70},
        {"blocksize": "64"},
        {"blocksize": 128},
        {"dtype": "int8"},
        {"dtype": ["float32"]},
        {"quant_type": "fp4"},
        {"nested_blocksize": 64},
        {"nested_blocksize": None},
        {"nested_offset": "1"},
        {"nested_offset": math.nan},
        {"nested_offset": math.inf},
        {"nested_offset": 1e300},
    ],
)
def test_bad_json(state):
    parts = parts_of("bitsandbytes-nf4-nested-33x37")
    if isinstance(state, dict):
        state = json.dumps(json.loads(bytes(parts[STATE].tolist())) | state).encode()
    parts[STATE] = torch.tensor(list(state), dtype=torch.uint8)
    if b'"nested_blocksize": 64' in state:  # 19 scales are one block of either size
        assert integrations.from_bitsandbytes(parts).spec.scale_group == 64
        return
    with pytest.raises(ValueError, match=r"lowmem\.from_bitsandbytes: "):
        integrations.from_bitsandbytes(parts)


def test_bad_gptq_order_and_arguments():
    parts = parts_of("gptq-4-v1-order")
    for index in (torch.full((64,), 7), torch.full((64,), -1), torch.zeros(64), torch.arange(64) // 16 * 0):
        with pytest.raises((ValueError, TypeError), match=r"lowmem\.from_gptq: l\.g_idx: expected"):
            integrations.from_gptq({**parts, "l.g_idx": index}, name="l")
    with pytest.raises(ValueError, match=r"lowmem\.from_gptq: bits: expected 2, 3, 4 or 8, got 5"):
        integrations.from_gptq(parts, name="l", bits=5)
    with pytest.raises(ValueError, match=r"lowmem\.from_gptq: checkpoint_format: expected 'gptq' or 'gptq_v2'"):
        integrations.from_gptq(parts, name="l", checkpoint_format="marlin")
    with pytest.raises(ValueError, match=r"lowmem\.from_gptq: tensors: expected 'x\.qweight', got keys l\.g_idx"):
        integrations.from_gptq(parts, name="x")


def test_hqq_along_the_other_axis_is_refused():
    parts = parts_of("hqq-4") | {"l.axis": torch.tensor(0, dtype=torch.int32)}
    with pytest.raises(ValueError, match=r"lowmem\.from_hqq: l\.axis: expected 1 \(groups along K\), got 0"):
        integrations.from_hqq(parts, name="l")


def test_against_bitsandbytes_itself():
    F = pytest.importorskip("bitsandbytes.functional", reason="the fixture stands for it where it is not installed")
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            w = weight(96, 320).bfloat16()
            packed, state = F.quantize_4bit(w, compress_statistics=nested, quant_type=kind)
            mine = integrations.to_bitsandbytes(quantize(w, QuantSpec(kind, double_quant=nested)))
            theirs = {"weight": packed} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
            assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], v) for k, v in theirs.items())
            loaded = F.QuantState.from_dict({k: v for k, v in mine.items() if k != "weight"}, torch.device("cpu"))
            assert torch.equal(
                F.dequantize_4bit(mine["weight"], loaded), dequantize(integrations.from_bitsandbytes(theirs))
            )
