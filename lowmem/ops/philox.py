"""The random map of the package, in plain torch: what every backend must reproduce bit for bit.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) keyed by the 64-bit seed. Element
``(row, k)`` of a dropout mask takes the 16-bit half ``k % 2`` of word ``(k % 8) // 2`` of the block at counter
``(k // 8, row, 0, child)``, so one block of four words serves eight neighbours of a row. An element is kept where its
16 bits, as an unsigned number, are at least ``threshold(p) = round(p * 65536)``.

``csrc/common/philox.h`` and ``triton_kernels/philox.py`` hold the same map; ``tests/test_philox.py`` ties the three to
published test vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def threshold(p: float) -> int:
    """The 16-bit keep threshold of drop probability ``p``: 0 keeps all, 65536 keeps none."""
    return min(max(int(round(p * 65536.0)), 0), 65536)


def inv_keep(p: float) -> float:
    """``1 / (1 - p)`` for the probability that 16 bits can express; 0 where nothing is kept."""
    t = threshold(p)
    return 65536.0 / (65536 - t) if t < 65536 else 0.0


def _mulhilo(m: int, c: Tensor) -> tuple[Tensor, Tensor]:
    # 32 x 32 -> 64 bits in int64 without overflow: split the constant in 16-bit halves
    lo16, hi16 = (m & 0xFFFF) * c, (m >> 16) * c
    mid = (lo16 >> 16) + (hi16 & 0xFFFF)
    return ((hi16 >> 16) + (mid >> 16)) & _LOW, ((mid << 16) | (lo16 & 0xFFFF)) & _LOW


def philox4x32(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor | int, c3: Tensor | int) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32. ``seed`` int64[1] (low word: key 0, high word: key 1); counters int64 in [0, 2**32),
    broadcast together. Returns four int64 tensors holding 32-bit words."""
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    c0, c1 = torch.broadcast_tensors(c0, c1)
    c2 = torch.as_tensor(c2, device=c0.device).expand_as(c0)
    c3 = torch.as_tensor(c3, device=c0.device).expand_as(c0)
    for _ in range(10):
        hi0, lo0 = _mulhilo(_M0, c0)
        hi1, lo1 = _mulhilo(_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def keep_mask(rows: int, cols: int, p: float, seed: Tensor, child: int = 0) -> Tensor:
    """Dropout's keep mask, bool ``[rows, cols]``, of drop probability ``p`` under ``seed`` (int64[1]) and ``child``."""
    dev = seed.device
    blocks = (cols + 7) // 8
    c0 = torch.arange(blocks, device=dev).view(1, blocks)
    c1 = torch.arange(rows, device=dev).view(rows, 1)
    words = torch.stack(philox4x32(seed, c0, c1, 0, child), dim=-1)  # [rows, blocks, 4]
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1).view(rows, blocks * 8)
    return halves[:, :cols] >= threshold(p)


def pack_bits(keep: Tensor) -> Tensor:
    """Bool ``[rows, cols]`` to int32 ``[rows, ceil(cols / 32)]``: bit ``k % 32`` of word ``k // 32``; spare bits 0."""
    rows, cols = keep.shape
    words = (cols + 31) // 32
    padded = torch.zeros(rows, words * 32, dtype=torch.int64, device=keep.device)
    padded[:, :cols] = keep
    value = (padded.view(rows, words, 32) << torch.arange(32, device=keep.device)).sum(-1)
    return (value - ((value >> 31) << 32)).to(torch.int32)


def unpack_bits(mask: Tensor, cols: int) -> Tensor:
    """The inverse of :func:`pack_bits`: int32 ``[rows, words]`` to bool ``[rows, cols]``."""
    bits = (mask.to(torch.int64).unsqueeze(-1) >> torch.arange(32, device=mask.device)) & 1
    return bits.reshape(mask.shape[0], mask.shape[1] * 32)[:, :cols].bool()
