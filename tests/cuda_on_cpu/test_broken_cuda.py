"""Kernels with one mistake each (broken.cuh): the rig catches every one, and says nothing about their sound twins."""

import pytest
import torch
from rig import _packed

pytestmark = pytest.mark.emulate

# name: (in's columns, out's columns, what the error says)
MISTAKES = {
    "early_return": (
        64,
        50,
        r"never meet: .*barrier of broken.cuh:\d+; threads 50-63 have returned",
    ),
    "divergent_barrier": (64, 64, r"met at different barriers: threads 0-31 .*broken.cuh:\d+; threads 32-63 .*broken"),
    "off_by_one_write": (64, 50, r"thread \(50, 0, 0\): wrote 0 bytes past the end of out"),
    "off_by_one_read": (50, 50, r"thread \(0, 0, 0\): read 0 bytes past the end of in"),
    "misaligned": (260, 64, r"misaligned \w+ at broken.cuh:\d+: .* not a multiple of 16"),
    "absent_lanes": (64, 64, r"never meet: threads 0-15 wait in __shfl_xor_sync at broken.cuh:\d+"),
    "shared_overrun": (64, 64, r"thread \(63, 0, 0\): wrote past the end of the dynamic shared memory"),
    "static_overrun": (64, 64, r"wrote up to \d bytes past the end of a static shared array of 256 bytes"),
}


def args(name, columns, width, *, start=torch.nan, place="end"):
    # a kernel that takes 16 bytes at a time needs an aligned start; the others lie flush against the guard
    place = "start" if name in ("missing_wait", "overwritten_stage") else place
    values = torch.arange(1, columns + 1, dtype=torch.float32).view(1, columns)
    out = torch.full((1, width), start, dtype=torch.float32)
    return _packed(values, place=place), _packed(out, place=place)


@pytest.mark.parametrize("order", [0, 1, 5])
@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_an_error(rig, name, order):
    columns, width, message = MISTAKES[name]
    given = args(name, columns, width)
    if name == "shared_overrun" or name == "off_by_one_write":
        order = 0  # the first thread to do wrong is named
    with pytest.raises(rig.Error, match=message):
        rig.once(rig.module.broken, name, False, *given, order=order)


# name: (in's columns, out's columns)
UNSOUND_VALUES = {
    "missing_barrier": (64, 64),
    "missing_wait": (256, 256),
    "overwritten_stage": (5 * 256, 64),
    "stale_shared": (192, 192),
}


@pytest.mark.parametrize("name", UNSOUND_VALUES)
def test_mistake_reads_what_is_not_there_yet(rig, name):
    given = args(name, *UNSOUND_VALUES[name])
    for order in (0, 1, 5):
        array = rig.once(rig.module.broken, name, False, *given, order=order)
        assert torch.from_numpy(array).view(torch.float32).isnan().any(), f"order {order} hides the mistake"


def test_order_of_arrival_shows_when_it_is_reversed(rig):
    values = (torch.rand(1, 640) * 10.0 ** torch.randint(-6, 6, (1, 640))).float()
    given = _packed(values), _packed(torch.zeros(1, 1))
    with pytest.raises(AssertionError, match="depend on the order"):
        rig.run(rig.module.broken, "racing_sum", False, *given)
    rig.run(rig.module.broken, "racing_sum", True, *given)


def test_missing_barrier_shows_when_the_order_is_reversed(rig):
    with pytest.raises(AssertionError, match="depend on the order"):
        rig.run(rig.module.broken, "missing_barrier", False, *args("missing_barrier", 64, 64))


def narrow(rows=5, stride=2**29 + 8):
    out = torch.full((rows, 64), torch.nan)
    return _packed(torch.zeros(1, 1)), _packed(out, strides=(stride, 1))


def test_offset_in_32_bits_is_an_error(rig):
    with pytest.raises(rig.Error, match=r"wrote \d+ bytes before the start of out"):
        rig.once(rig.module.broken, "narrow_offset", False, *narrow())


def test_offset_in_64_bits_reaches_every_row(rig):
    got = torch.from_numpy(rig.once(rig.module.broken, "narrow_offset", True, *narrow())).view(torch.float32)
    assert torch.equal(got, torch.arange(5.0).view(5, 1).expand(5, 64))


def test_spinning_is_stopped(rig):
    rig.module.configure(0, 2, 0.2)
    with pytest.raises(rig.Error, match="still at work after 0 s: does it spin"):
        rig.module.broken("spinning", False, *args("spinning", 64, 64))


def test_inputs_cannot_be_written(rig):
    # in and out exchanged: the write goes to memory that the rig gave away for reading only
    values, out = args("missing_barrier", 64, 64)
    with pytest.raises(rig.Error, match="wrote at byte 0 of in"):
        rig.once(rig.module.writes_input, values, out)


SOUND = {name: sizes[:2] for name, sizes in MISTAKES.items()} | UNSOUND_VALUES | {"spinning": (64, 64)}


@pytest.mark.parametrize("name", SOUND)
def test_sound_twin_passes(rig, name):
    columns, width = SOUND[name]
    if name == "misaligned":
        given = args(name, columns, width, place="start")
    else:
        given = args(name, columns, width)
    [array] = rig.run(rig.module.broken, name, True, *given)
    got = torch.from_numpy(array).view(torch.float32)
    assert got.isfinite().all()
    if name in ("missing_barrier", "early_return", "divergent_barrier", "static_overrun"):
        assert torch.equal(got[0], torch.arange(1, width + 1).flip(0).float())
