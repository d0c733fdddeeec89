"""The emulator serves what README.md says: each part against results that plain torch gives."""

import pytest
import torch

pytestmark = pytest.mark.emulate


@pytest.mark.parametrize("threads", [32, 256, 1024])
def test_shuffles_and_shared_memory_sum_a_block(rig, threads):
    x = torch.randint(-99, 99, (1, 3 * threads - 5)).float()
    got = rig.features("block_sums", x, out=torch.full((1, 3), torch.nan), extra=(threads,))
    padded = torch.cat((x[0], torch.zeros(5))).view(3, threads)
    assert torch.equal(got[0], padded.sum(1))


def test_warp_operations(rig):
    v = torch.randint(-50, 50, (32,), dtype=torch.int32)
    got = rig.features("warp_row", v.view(1, 32), out=torch.zeros(32, 10, dtype=torch.int32))
    lane = torch.arange(32)
    positive = sum(1 << i for i in range(32) if v[i] > 0)
    positive -= (positive >> 31) << 32  # as the int32 that holds these bits
    want = torch.stack(
        (
            v[(lane + 5) % 32],
            torch.where(lane >= 3, v[(lane - 3).clamp(min=0)], v),
            torch.where(lane % 16 < 13, v[(lane + 3).clamp(max=31)], v),
            v[lane ^ 9],
            torch.full((32,), positive),
            torch.ones(32, dtype=torch.int64),
            torch.ones(32, dtype=torch.int64),
            torch.where(lane % 2 == 1, v[lane ^ 2], -1),
            torch.tensor([bin(int(x) & 0xFFFFFFFF).count("1") for x in v]),
            torch.full((32,), int((v > 0).sum())),
        ),
        dim=1,
    )
    assert torch.equal(got, want.int())


def test_atomics_and_dynamic_shared_memory(rig):
    x = torch.randint(0, 1000, (1, 777), dtype=torch.int32)
    got = rig.features("histogram", x, out=torch.zeros(1, 16, dtype=torch.int32), extra=(3, 64))
    assert torch.equal(got[0].long(), torch.bincount(x[0] & 15, minlength=16))


def test_cp_async_ldmatrix_and_mma_are_exact(rig):
    a = torch.randint(-8, 9, (16, 16)).bfloat16()
    b = torch.randint(-8, 9, (16, 8)).bfloat16()
    got = rig.features("one_mma", a, b, out=torch.full((16, 8), torch.nan))
    assert torch.equal(got, a.float() @ b.float())


def test_integer_intrinsics(rig):
    assert rig.module.byte_perm(0x33221100, 0x77665544, 0x7250) == 0x77225500
    assert rig.module.byte_perm(0x00008000, 0, 0xA9D1) == 0x00FF0080 & 0x00FF0000 | 0x00000080
    assert rig.module.umulhi(0xD2511F53, 0xCD9E8D57) == (0xD2511F53 * 0xCD9E8D57) >> 32


def test_launch_limits_are_checked(rig):
    with pytest.raises(rig.Error, match="1 to 1024 threads a block, got 2048"):
        rig.features("block_sums", torch.zeros(1, 8), out=torch.zeros(1, 1), extra=(2048,))
