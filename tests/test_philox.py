"""The random map: Philox against published vectors, dropout mask, bit packing, each backend against the reference."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem.ops.philox import inv_keep, keep_mask, pack_bits, philox4x32, threshold, unpack_bits

# Philox4x32-10's known answers as published with Random123: counter words, key words, output words
KNOWN = {
    "zeros": ([0x00000000] * 4, [0x00000000] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    "ones": ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    "pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
}


def signed(value, bits=64):
    """The two's-complement integer of ``bits`` with the same bits."""
    return value - (1 << bits) if value >> (bits - 1) else value


def seed_of(value, device="cpu"):
    return torch.tensor([signed(value & (2**64 - 1))], device=device)


def philox_by_hand(counter, key):
    """Philox4x32-10 over Python's own integers, from the paper's definition: independent of torch's int64."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def reference_words(counter, key):
    c = [torch.tensor([v]) for v in counter]
    return [int(w) for w in philox4x32(seed_of(key[0] | key[1] << 32), *c)]


@pytest.mark.parametrize("name", KNOWN)
def test_published_vectors(name):
    counter, key, expected = KNOWN[name]
    assert philox_by_hand(counter, key) == expected
    assert reference_words(counter, key) == expected


words = st.integers(0, 2**32 - 1)


@given(st.tuples(words, words, words, words), st.tuples(words, words))
def test_any_counter_and_key(counter, key):
    assert reference_words(counter, key) == philox_by_hand(counter, key)


@given(words, words, st.integers(0, 70), st.integers(0, 2**31 - 1), st.floats(0, 1))
def test_each_element_takes_its_documented_half_word(low, high, column, child, p):
    row = 3
    keep = keep_mask(row + 1, column + 1, p, seed_of(low | high << 32), child)
    word = philox_by_hand([column // 8, row, 0, child], [low, high])[(column % 8) // 2]
    half = (word >> 16) if column % 2 else word & 0xFFFF
    assert bool(keep[row, column]) == (half >= round(p * 65536))


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0.0, 0),
        (1e-9, 0),
        (0.5 / 65536, 0),  # a tie rounds to even, as Python's round does
        (1.5 / 65536, 2),
        (0.1, 6554),
        (0.5, 32768),
        (65535 / 65536, 65535),
        (1 - 1e-9, 65536),
        (1.0, 65536),
    ],
)
def test_threshold_and_inverse(p, expected):
    assert threshold(p) == expected
    assert inv_keep(p) == (0.0 if expected == 65536 else 65536 / (65536 - expected))
    assert math.isfinite(inv_keep(p))


def test_p_of_one_keeps_nothing_and_p_of_zero_keeps_all():
    # 1.0 in 1/65536ths is 65536, which a 16-bit threshold would wrap to 0: everything kept
    seed = seed_of(7)
    assert not keep_mask(33, 129, 1.0, seed).any()
    assert not keep_mask(33, 129, 1 - 1e-9, seed).any()
    assert keep_mask(33, 129, 0.0, seed).all()
    assert keep_mask(33, 129, 1e-9, seed).all()


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9, 0.999])
def test_keep_rate(p):
    rows, cols = 256, 1024
    keep = keep_mask(rows, cols, p, seed_of(99)).double()
    exact, n = 1 - threshold(p) / 65536, rows * cols
    sigma = math.sqrt(exact * (1 - exact))
    assert abs(keep.mean() - exact) < 5 * sigma / math.sqrt(n)
    # and along each axis: no row, column or half-word is favoured
    for axis, count in ((0, rows), (1, cols)):
        assert (keep.mean(axis) - exact).abs().max() < 6 * sigma / math.sqrt(count)
    halves = keep.view(rows, cols // 8, 8).mean((0, 1))
    assert (halves - exact).abs().max() < 5 * sigma / math.sqrt(n / 8)


@pytest.mark.parametrize("other", [{"child": 1}, {"seed": 6}, {"seed": 5 + 2**32}, {"seed": 5 - 2**63}])
def test_masks_of_other_children_and_seeds_are_independent(other):
    one = keep_mask(256, 512, 0.5, seed_of(5)).double() - 0.5
    two = keep_mask(256, 512, 0.5, seed_of(other.get("seed", 5)), other.get("child", 0)).double() - 0.5
    assert abs((one * two).mean()) < 5 * 0.25 / math.sqrt(one.numel())


def test_neighbours_are_independent():
    bits = keep_mask(256, 1024, 0.5, seed_of(11)).double() - 0.5
    bound = 5 * 0.25 / math.sqrt(bits.numel())
    for shift in (1, 2, 7, 8, 16, 32):
        assert abs((bits[:, shift:] * bits[:, :-shift]).mean()) < bound, f"columns {shift} apart"
        assert abs((bits[shift:] * bits[:-shift]).mean()) < bound, f"rows {shift} apart"


def test_a_row_does_not_depend_on_the_shape_around_it():
    seed = seed_of(1234567890123456789)
    large = keep_mask(64, 512, 0.3, seed, 2)
    assert torch.equal(large[:5, :77], keep_mask(5, 77, 0.3, seed, 2))


@given(st.integers(0, 5), st.integers(1, 130), st.integers(0, 2**31))
def test_pack_and_unpack(rows, cols, draw):
    keep = torch.rand(rows, cols, generator=torch.Generator().manual_seed(draw)) < 0.5
    packed = pack_bits(keep)
    assert packed.dtype == torch.int32 and packed.shape == (rows, (cols + 31) // 32)
    assert torch.equal(unpack_bits(packed, cols), keep)
    for row in range(rows):
        value = sum(int(bit) << k for k, bit in enumerate(keep[row].tolist()))  # spare bits 0
        assert [v & 0xFFFFFFFF for v in packed[row].tolist()] == [
            (value >> 32 * w) & 0xFFFFFFFF for w in range(packed.shape[1])
        ]


def served_mask(device, rows, cols, p, seed, child=0):
    """The packed mask as the backend that serves lora_shrink on ``device`` draws it."""
    x, a = torch.ones(rows, cols, device=device), torch.ones(3, cols, device=device)
    return torch.ops.lowmem.lora_shrink(x, a, 1.0, p, seed.to(device), child, True)[1].cpu()


@pytest.mark.parametrize("cols", [1, 7, 8, 9, 31, 32, 33, 63, 65, 100, 256, 515, 1031])
def test_backend_draws_the_reference_mask(device, cols):
    seed = seed_of(0x123456789ABCDEF)
    for rows, p, child in ((1, 0.5, 0), (5, 0.1, 1), (33, 0.9, 2**31 - 1), (4, 1.0, 0), (4, 1 - 1e-9, 3), (4, 1e-9, 0)):
        expected = pack_bits(keep_mask(rows, cols, p, seed, child))
        assert torch.equal(served_mask(device, rows, cols, p, seed, child), expected), (rows, p, child)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**32, 2**62 - 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_backend_uses_all_64_bits_of_the_seed(device, seed):
    expected = pack_bits(keep_mask(9, 70, 0.37, seed_of(seed), 4))
    assert torch.equal(served_mask(device, 9, 70, 0.37, seed_of(seed), 4), expected)


@given(
    st.integers(0, 40),
    st.integers(1, 300),
    st.one_of(
        st.floats(0, 1),
        st.integers(0, 65536).map(lambda t: t / 65536),
        st.integers(0, 65535).map(lambda t: (t + 0.5) / 65536),
    ),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**31 - 1),
)
def test_backend_mask_for_any_shape_and_threshold(rows, cols, p, seed, child):
    mask = served_mask("cpu", rows, cols, p, seed_of(seed), child)
    if p == 0:
        assert mask.numel() == 0
    else:
        assert torch.equal(mask, pack_bits(keep_mask(rows, cols, p, seed_of(seed), child)))


@pytest.mark.parametrize("shift", [0, 1])
def test_backend_regenerates_the_saved_mask_from_the_seed(device, shift):
    # masked_expand_ over ds = 1, a = 1 writes inv_keep where kept: the mask as the backward pass draws it
    rows, cols, p, seed = 19, 203, 0.25, seed_of(2**40 + 3, device)
    ds, a = torch.ones(rows, 1, device=device), torch.ones(1, cols, device=device)
    out = torch.empty(rows, cols + shift, device=device)[:, shift:]
    torch.ops.lowmem.lora_masked_expand_(out, ds, a, None, p, seed, 6, False)
    assert torch.equal((out != 0).cpu(), keep_mask(rows, cols, p, seed.cpu(), 6))
