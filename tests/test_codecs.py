"""The number formats: the reference against formats written out a second way, exact cases, and C++ against it bit for
bit."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem import _dispatch
from lowmem.ops import group_decode, group_encode
from lowmem.ops.codecs import CODECS, GROUP_SIZES, WITH_SPAN, decode_reference, encode_reference, exp2, fma, log2
from lowmem.testing import huge_view

PAIRS = list(itertools.product(CODECS, (True, False)))
pytestmark = pytest.mark.usefixtures("poisoned")


def round_trip(x, codec, signed, group=128):
    kept = encode_reference(x, codec, group, signed)
    return decode_reference(*kept, x.numel(), codec, group, signed)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


def awkward(signed):
    """Inputs that a codec might mistake, each a flat fp32 tensor."""
    g = torch.Generator().manual_seed(3)
    wild = torch.randint(-(2**31), 2**31 - 1, (3000,), generator=g).int().view(torch.float32)
    spiky = torch.randn(3001, generator=g) * torch.randn(3001, generator=g).mul(3).exp()
    holes = torch.randn(2048, generator=g)
    holes[::7], holes[128:256], holes[300], holes[500], holes[700] = 0.0, 0.0, 1e-40, math.nan, -math.inf
    ties = (torch.rand(3000, generator=g) * 255).round() / 2
    cases = [wild, wild[wild.isfinite()], spiky, holes, ties, torch.randn(300, generator=g) * 1e-39, torch.empty(0)]
    cases += [torch.randn(n, generator=g) for n in (1, 2, 15, 17, 1023, 1025)] + [torch.full((129,), 2.5)]
    return [x if signed else x.abs() for x in cases]


# ---------------------------------------------------------------------------------------------------------- arithmetic


def test_fma_rounds_once():
    a, b, c = (torch.randn(20000) * 10.0 ** torch.randint(-4, 4, (20000,)) for _ in range(3))
    # products that nearly cancel, and sums that a first rounding to double would put on a tie
    c[:9000] = -(a * b)[:9000]
    a[9000:12000], b[9000:12000], c[9000:12000] = 1 + 2.0**-12, 1 + 2.0**-12, 2.0**-60
    from fractions import Fraction

    got = fma(a, b, c)
    for i in range(0, 20000, 37):
        exact = Fraction(a[i].item()) * Fraction(b[i].item()) + Fraction(c[i].item())
        down, up = got[i].nextafter(torch.tensor(-math.inf)), got[i].nextafter(torch.tensor(math.inf))
        err = abs(Fraction(got[i].item()) - exact)
        assert err <= abs(Fraction(down.item()) - exact) and err <= abs(Fraction(up.item()) - exact)


def test_logarithm_and_power():
    x = torch.logspace(-37, 38, 20001, base=10.0).clamp(max=3e38)
    assert (log2(x).double() - x.double().log2()).abs().max() < 2.5e-5
    powers = 2.0 ** torch.arange(-126.0, 128.0)
    assert torch.equal(log2(powers), torch.arange(-126.0, 128.0))
    t = -torch.rand(20000) * 120
    assert (exp2(t).double() / t.double().exp2() - 1).abs().max() < 5e-6
    assert torch.equal(exp2(torch.arange(-120.0, 1.0)), 2.0 ** torch.arange(-120.0, 1.0))


# ------------------------------------------------------------------------------------------------------------- formats


def by_hand(codec, signed):
    """Every magnitude of a format without expansion, as a share of the largest, by its definition."""
    if codec in ("e4m3", "e5m2"):
        bits, bias, last = (3, 7, 0x7E) if codec == "e4m3" else (2, 15, 0x7B)
        codes = range(last + 1)
        values = [
            (c % 2**bits) * 2.0 ** (1 - bias - bits)
            if c < 2**bits
            else (1 + (c % 2**bits) / 2**bits) * 2.0 ** ((c >> bits) - bias)
            for c in codes
        ]
    elif codec == "de8":
        places = 7 if signed else 8
        values = [0.0]
        for i in range(places):
            n = 2**i
            values += [10.0 ** (i - places + 1) * (0.1 + 0.9 * (k + 0.5) / n) for k in range(n)]
    else:
        values = list(range({("int8", 1): 128, ("int8", 0): 256, ("int4", 1): 8, ("int4", 0): 16}[codec, int(signed)]))
    return torch.tensor(values, dtype=torch.float64) / values[-1]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("codec", ["e4m3", "e5m2", "de8", "int8", "int4"])
def test_every_value_and_the_nearest_of_them(codec, signed):
    values = by_hand(codec, signed)
    m = 3.7
    x = (values * m).float()
    x = torch.cat([torch.tensor([m]), x, torch.tensor([m])])
    got = round_trip(x, codec, signed, 512).double()
    assert (got / m - torch.cat([torch.ones(1), values, torch.ones(1)])).abs().max() < 4e-7
    # no other value is nearer than the one that was taken
    y = torch.cat([torch.tensor([1.0]), torch.rand(511) ** 6])
    taken = round_trip(y, codec, signed, 512).double()
    nearest = (y.double()[:, None] - values[None]).abs().amin(1)
    assert ((taken - y).abs() - nearest).max() < 1e-6


def test_torch_has_the_same_fp8():
    y = torch.cat([torch.tensor([448.0]), torch.rand(511) ** 4 * 448])
    codes, _, _ = encode_reference(y, "e4m3", 512, True)
    assert torch.equal(codes.view(torch.float8_e4m3fn).float(), y.to(torch.float8_e4m3fn).float())
    y = torch.cat([torch.tensor([57344.0]), torch.rand(511) ** 9 * 57344])
    codes, _, _ = encode_reference(y, "e5m2", 512, True)
    assert torch.equal(codes.view(torch.float8_e5m2).float(), y.to(torch.float8_e5m2).float())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("codec", ["e4m3+exp", "de8+exp"])
def test_expansion_by_its_formula(codec, signed):
    x = torch.randn(128, dtype=torch.float32).abs() + 0.01
    codes, scale, span = encode_reference(x, codec, 128, signed)
    m, low = x.max().double(), x.min().double()
    d = 16.6147098541 if codec == "e4m3+exp" else (20.7838853169 if signed else 24.1109123212)
    assert scale.item() == m and span.item() == math.floor(16 * d / math.log2(m / low))
    values, k = by_hand(codec.removesuffix("+exp"), signed), span.item() / 16
    index = codes.long() & (127 if signed or codec == "e4m3+exp" else 255)
    want = m * values[index] ** (1 / k)
    got = decode_reference(codes, scale, span, 128, codec, 128, signed).double()
    assert (got / want - 1).abs().max() < 1e-4
    if codec == "e4m3+exp":  # de8 has its finest steps at the top anyway
        assert ((got - x).abs() / x).mean() < ((round_trip(x, "e4m3", signed) - x).abs() / x).mean()


@pytest.mark.parametrize("signed, levels", [(True, 127), (False, 255)])
def test_log8_by_its_formula(signed, levels):
    x = torch.rand(128) * 5 + 0.001
    codes, scale, span = encode_reference(x, "log8", 128, signed)
    octaves = math.log2(x.max() / x.min())
    assert scale == x.max() and span.item() == math.ceil(2 * octaves)
    step = span.item() / 2 / (levels - 1)
    got = decode_reference(codes, scale, span, 128, "log8", 128, signed)
    assert (got.double().log2() - x.double().log2()).abs().max() <= step / 2 + 1e-4
    assert codes.min() >= 1


def test_log8_of_ranges_beyond_its_widest():
    x = torch.tensor([1.0, 2.0**-23.9, 2.0**-24.8, 2.0**-27, -(2.0**-30), 0.0, *[0.5] * 10])
    got = round_trip(x, "log8", True, 16)
    assert got[0] == 1 and abs(got[1].log2() + 23.9) <= 24 / 126 / 2 + 1e-4
    assert abs(got[2] * 2**24 - 1) < 1e-4  # the last level
    assert torch.equal(got[3:6], torch.zeros(3)) and not got[4].signbit()
    v = torch.tensor([1.0, 1e-37, 0.0, *[0.5] * 13])  # a second moment may become larger, never 0
    got = round_trip(v, "log8", False, 16)
    assert got[0] == 1 and 2.0**-121 < got[1] < 2.0**-119 and got[2] == 0


# ---------------------------------------------------------------------------------------------------------- exact cases


@pytest.mark.parametrize("codec, signed", PAIRS)
def test_exact_cases(codec, signed):
    constant = torch.full((300,), 0.7391)
    constant[::5] = 0.0
    if signed:
        constant[::3] *= -1
        constant[constant == 0] = 0.0
    got = round_trip(constant, codec, signed)
    assert torch.equal(got, constant) and not got[got == 0].signbit().any()
    for value in (2.0**-100, 1.5e-30, 3.0e38):
        assert torch.equal(round_trip(torch.full((20,), value), codec, signed), torch.full((20,), value))
    for value in (0.0, 1e-45, 2.0**-127, 2.0**-101):
        codes, scale, _ = encode_reference(torch.full((20,), value), codec, 128, signed)
        assert codes.max() == 0 and scale.item() == 0
    broken = torch.rand(512) + 0.1
    for value in (math.nan, math.inf):
        broken[200] = value
        got = round_trip(broken, codec, signed)
        assert got[128:256].isnan().all() and got[:128].isfinite().all() and got[256:].isfinite().all()


@pytest.mark.parametrize("lane", [0, 1, 63, 127])
@pytest.mark.parametrize("codec, signed", PAIRS)
def test_a_zero_in_any_lane_changes_nothing_else(codec, signed, lane):
    x = torch.rand(128, generator=torch.Generator().manual_seed(lane)) + 0.05
    want = round_trip(x, codec, signed)
    largest = int(x.argmax())
    if lane == largest or lane == int(x.argmin()):
        lane = (lane + 1) % 128
    holed = x.clone()
    holed[lane] = 0.0
    got = round_trip(holed, codec, signed)
    assert got[lane] == 0
    others = torch.arange(128) != lane
    assert torch.equal(got[others], want[others])


@pytest.mark.parametrize("codec, signed", PAIRS)
def test_a_short_last_group_is_a_group(codec, signed):
    x = torch.rand(128 + 37) + 0.1
    whole, tail = round_trip(x[:128].clone(), codec, signed), round_trip(x[128:].clone(), codec, signed)
    assert torch.equal(round_trip(x, codec, signed), torch.cat([whole, tail]))
    assert torch.equal(round_trip(x[:1].clone(), codec, signed), x[:1])  # alone, an element is the group's largest


@pytest.mark.parametrize("codec, signed", PAIRS)
@given(scale=st.integers(-90, 120), draw=st.integers(0, 2**31))
def test_powers_of_two_only_move_the_scale(codec, signed, scale, draw):
    x = torch.rand(40, generator=torch.Generator().manual_seed(draw)) + 2.0**-8
    x = x if not signed else x * torch.where(torch.rand(40) < 0.5, -1.0, 1.0)
    factor = 2.0**scale
    codes, at, span = encode_reference(x, codec, 64, signed)
    moved = encode_reference(x * factor, codec, 64, signed)
    assert torch.equal(moved[1], at * factor)
    if codec not in WITH_SPAN:  # there the logarithms round otherwise, now and then
        assert torch.equal(moved[0], codes)
    got = decode_reference(codes, at, span, 40, codec, 64, signed)
    assert ((got - x).abs() <= x.abs().max() * (0.08 if codec != "int4" else 0.15)).all()


# ------------------------------------------------------------------------------------------------------------ operators


@pytest.mark.parametrize("group", [16, 128, 512])
@pytest.mark.parametrize("codec, signed", PAIRS)
def test_backend_has_the_bits_of_the_reference(device, codec, signed, group):
    for x in awkward(signed):
        want = encode_reference(x, codec, group, signed)
        got = torch.ops.lowmem.group_encode(x.to(device), codec, group, signed)
        assert all(same(a, b.cpu()) for a, b in zip(want, got, strict=True))
        values = torch.ops.lowmem.group_decode(*(t.to(device) for t in want), x.numel(), codec, group, signed)
        assert same(decode_reference(*want, x.numel(), codec, group, signed), values.cpu())


SCRIPT = """
import torch
from test_codecs import PAIRS, awkward, same
from lowmem.ops.codecs import decode_reference, encode_reference
for codec, signed in PAIRS:
    for group in (32, 256):
        for x in awkward(signed):
            want = encode_reference(x, codec, group, signed)
            got = torch.ops.lowmem.group_encode(x, codec, group, signed)
            assert all(same(a, b) for a, b in zip(want, got)), (codec, signed, group)
            values = torch.ops.lowmem.group_decode(*want, x.numel(), codec, group, signed)
            assert same(decode_reference(*want, x.numel(), codec, group, signed), values), (codec, signed, group)
from test_lowbit_optim_ops import check_pairs
check_pairs([("de8", "log8"), ("e4m3+exp", "e4m3+exp"), ("int4", "int8"), ("log8", "de8+exp"), ("e5m2", "e4m3")])
print("all checked")
"""


@pytest.mark.skipif(not _dispatch.CPU.loaded, reason=_dispatch.CPU.why_not or "loaded")
@pytest.mark.parametrize("level", ["plain", "avx2", "avx512"])
def test_every_instruction_set(level):
    import os
    from pathlib import Path

    root = Path(__file__).resolve().parent.parent
    env = {**os.environ, "LOWMEM_CPU_ISA": level, "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "tests"), env.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=600)
    if "that this processor has" in done.stderr:
        pytest.skip(f"this processor has no {level}")
    assert done.returncode == 0 and "all checked" in done.stdout, done.stderr[-3000:]


def test_registration(device):
    x = torch.randn(3, 50, device=device)
    for codec in ("log8", "int4"):
        torch.library.opcheck(torch.ops.lowmem.group_encode.default, (x, codec, 64, True))
        kept = torch.ops.lowmem.group_encode(x, codec, 64, True)
        torch.library.opcheck(torch.ops.lowmem.group_decode.default, (*kept, 150, codec, 64, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_public_functions(device, dtype):
    x = torch.randn(6, 256, device=device).to(dtype)
    for codec in CODECS:
        kept = group_encode(x.t(), codec, group_size=64)
        assert kept[0].shape == ((768,) if codec == "int4" else (256, 6))
        back = group_decode(*kept, codec, group_size=64).view(256, 6)
        assert (back - x.t()).abs().max() < 0.08 * x.abs().max()  # the widest gaps: e5m2's and int4's, a seventh
    groups = 6 * 256 // 64
    assert sum(t.nbytes for t in group_encode(x, "de8", group_size=64)) == 6 * 256 + 4 * groups
    assert sum(t.nbytes for t in group_encode(x, "log8", group_size=64)) == 6 * 256 + 5 * groups
    assert group_decode(*group_encode(x.view(-1)[:7], "int4"), "int4", numel=7).shape == (7,)
    compiled = torch.compile(lambda t: group_decode(*group_encode(t, "log8"), "log8"), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), group_decode(*group_encode(x, "log8"), "log8"))


def test_rows_beyond_32_bits():
    far = huge_view(2, 300, torch.float32)
    far.copy_(torch.randn(2, 300))
    assert all(
        torch.equal(a, b) for a, b in zip(group_encode(far, "log8"), group_encode(far.clone(), "log8"), strict=True)
    )


def test_bad_input():
    x = torch.randn(200)
    with pytest.raises(ValueError, match=r"lowmem\.group_encode: codec: expected one of e4m3, .* got 'fp9'"):
        group_encode(x, "fp9")
    with pytest.raises(ValueError, match=r"lowmem\.group_encode: group_size: expected one of 16, 32, .* got 100"):
        group_encode(x, "log8", group_size=100)
    with pytest.raises(TypeError, match=r"lowmem\.group_encode: x: expected float32, .* got torch.int64"):
        group_encode(torch.arange(3), "log8")
    codes, scale, span = group_encode(x, "log8")
    with pytest.raises(ValueError, match=r"lowmem\.group_decode: span: expected 2 elements, got 1"):
        group_decode(codes, scale, span[:1], "log8")
    with pytest.raises(TypeError, match=r"lowmem\.group_decode: scale: expected torch.float32"):
        group_decode(codes, scale.double(), span, "log8")
    with pytest.raises(ValueError, match=r"lowmem\.group_decode: numel: expected a number that 200 bytes"):
        group_decode(codes, scale, span, "log8", numel=100)
    assert GROUP_SIZES == (16, 32, 64, 128, 256, 512)
