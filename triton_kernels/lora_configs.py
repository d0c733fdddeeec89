"""Tile sizes of the ``lora`` kernels, as data: one entry per kernel, architecture and rank block.

Nothing is tuned at run time. Registers, spills and shared memory of every entry are kept in bounds by
``tests/test_compile_targets.py``; which of the entries that fit is fastest has to be measured on each GPU.
"""

from __future__ import annotations

from .device import ARCHITECTURES

# name: (BM, BN or BK of the tile's columns, depth of the reduction or 0, warps, stages)
Tile = tuple[int, int, int, int, int]

_DROP = "shrink"  # x goes through registers (dropout): loads are not staged
_PLAIN = "shrink_plain"

# kernel -> architecture -> largest rank block -> tile
TILES: dict[str, dict[str, dict[int, Tile]]] = {
    _DROP: {
        "sm_80": {16: (64, 64, 0, 4, 1), 64: (128, 64, 0, 8, 1), 128: (128, 64, 0, 8, 1)},
        "sm_86": {16: (64, 64, 0, 4, 1), 64: (128, 64, 0, 8, 1), 128: (128, 64, 0, 8, 1)},
        "sm_90": {16: (64, 64, 0, 4, 1), 64: (128, 64, 0, 8, 1), 128: (128, 64, 0, 8, 1)},
        "sm_100": {16: (64, 64, 0, 4, 1), 64: (128, 64, 0, 8, 1), 128: (128, 64, 0, 8, 1)},
        "gfx942": {16: (64, 64, 0, 4, 1), 64: (128, 64, 0, 8, 1), 128: (128, 64, 0, 8, 1)},
    },
    _PLAIN: {
        "sm_80": {16: (64, 128, 0, 4, 3), 64: (64, 128, 0, 4, 3), 128: (128, 64, 0, 8, 3)},
        "sm_86": {16: (64, 128, 0, 4, 3), 64: (64, 64, 0, 4, 3), 128: (64, 64, 0, 4, 3)},
        "sm_90": {16: (64, 128, 0, 4, 4), 64: (64, 128, 0, 4, 3), 128: (128, 64, 0, 8, 4)},
        "sm_100": {16: (64, 128, 0, 4, 4), 64: (64, 128, 0, 4, 3), 128: (128, 64, 0, 8, 4)},
        "gfx942": {16: (64, 64, 0, 4, 2), 64: (64, 64, 0, 4, 2), 128: (128, 64, 0, 8, 2)},
    },
    "dy": {
        "sm_80": {16: (64, 256, 0, 8, 3), 32: (64, 256, 0, 8, 3), 64: (64, 128, 0, 8, 3)},
        "sm_86": {16: (32, 256, 0, 8, 3), 32: (32, 256, 0, 8, 3), 64: (32, 128, 0, 4, 3)},
        "sm_90": {16: (64, 512, 0, 8, 2), 32: (64, 256, 0, 8, 3), 64: (64, 256, 0, 8, 3)},
        "sm_100": {16: (128, 256, 0, 8, 2), 32: (128, 256, 0, 8, 2), 64: (128, 128, 0, 8, 2)},
        "gfx942": {16: (32, 256, 0, 8, 1), 32: (32, 256, 0, 8, 1), 64: (32, 128, 0, 8, 1)},
    },
    "da": {
        "sm_80": {16: (64, 64, 0, 4, 1), 64: (64, 64, 0, 4, 1)},
        "sm_86": {16: (64, 64, 0, 4, 1), 64: (64, 64, 0, 4, 1)},
        "sm_90": {16: (64, 128, 0, 4, 1), 64: (64, 128, 0, 4, 1)},
        "sm_100": {16: (64, 128, 0, 4, 1), 64: (64, 128, 0, 4, 1)},
        "gfx942": {16: (64, 64, 0, 4, 1), 64: (64, 64, 0, 4, 1)},
    },
    "masked_expand": {arch: {16: (64, 128, 0, 4, 1), 64: (64, 128, 0, 8, 1)} for arch in ARCHITECTURES},
    "expand": {
        "sm_80": {64: (128, 128, 64, 8, 3)},
        "sm_86": {64: (128, 128, 32, 8, 3)},
        "sm_90": {64: (128, 256, 64, 8, 3)},
        "sm_100": {64: (128, 256, 64, 8, 3)},
        "gfx942": {64: (128, 128, 64, 8, 2)},
    },
    "dx": {
        "sm_80": {64: (128, 128, 64, 8, 3)},
        "sm_86": {64: (128, 128, 32, 8, 3)},
        "sm_90": {16: (128, 256, 64, 8, 3)},  # 3 stages and the output's tile leave room for 16 rows of a
        "sm_100": {16: (128, 256, 64, 8, 3)},
        "gfx942": {64: (128, 128, 64, 8, 2)},
    },
}

# Tiles where loads cannot be 16 bytes wide (sizes, strides or addresses that 16 does not divide: every element then has
# its own address and predicate) and for fp32, whose full-precision dots run without tensor cores.
SMALL_TILES: dict[str, Tile] = {
    "shrink": (32, 64, 0, 4, 1),
    "shrink_plain": (32, 32, 0, 4, 1),
    "dy": (32, 64, 0, 4, 1),
    "da": (32, 64, 0, 4, 1),
    "masked_expand": (32, 64, 0, 4, 1),
    "expand": (64, 64, 32, 4, 2),
    "dx": (64, 64, 32, 4, 2),
}
SMALL_RANK_BLOCK = 32

# Kernels over many adapters hold a row's number and an adapter's rank in registers besides; where that spilled, these.
MANY_TILES: dict[tuple[str, str, int], Tile] = {
    ("dy", "sm_86", 64): (32, 64, 0, 4, 3),
    ("dy", "sm_90", 64): (64, 128, 0, 8, 3),
    ("dy", "sm_100", 32): (128, 128, 0, 8, 2),
}
MANY_SMALL_TILES: dict[str, Tile] = {"shrink": (32, 32, 0, 4, 1), "dy": (32, 64, 0, 8, 1)}
DRAW_TILE = (32, 32, 4)
"""Rows, bytes and warps of the kernel that draws packed bits."""

RESIDENT = {"shrink": 5, "shrink_plain": 2, "dy": 1, "da": 5}
"""Programs of a split reduction that one multiprocessor holds at once, by registers and shared memory on sm_90."""

# the interpreter takes milliseconds a program and has no limits: tiles small enough that small shapes need several
INTERPRETER_TILE: Tile = (16, 32, 32, 4, 1)
INTERPRETER_RANK_BLOCK = 64

GROUP_ROWS = 8
"""Row tiles of a GEMM that run next to each other, so that they meet their columns in L2."""


def rank_block(kernel: str, arch: str, rank: int, small: bool) -> int:
    """Ranks that one tile takes: the power of two from 16 that holds ``rank``, up to the largest entry."""
    need = max(16, 1 << (rank - 1).bit_length())
    if arch == "interpreter":
        return min(need, INTERPRETER_RANK_BLOCK)
    return min(need, SMALL_RANK_BLOCK if small else max(TILES[kernel][arch]))


def tile(kernel: str, arch: str, block: int, small: bool) -> Tile:
    """``(BM, BN, BK, warps, stages)`` of ``kernel`` for a rank block; ``small``: fp32, or loads that cannot be wide."""
    if arch == "interpreter":
        return INTERPRETER_TILE
    if small:
        return SMALL_TILES[kernel]
    entries = TILES[kernel][arch]
    return entries[min(size for size in entries if size >= block)]


def tile_of_many(kernel: str, arch: str, block: int, small: bool) -> Tile:
    """:func:`tile` for the kernels over many adapters."""
    if arch == "interpreter":
        return INTERPRETER_TILE
    if small and kernel in MANY_SMALL_TILES:
        return MANY_SMALL_TILES[kernel]
    if not small:
        fits = min(size for size in TILES[kernel][arch] if size >= block)
        if (kernel, arch, fits) in MANY_TILES:
            return MANY_TILES[kernel, arch, fits]
    return tile(kernel, arch, block, small)


def flatten(arch: str, block: int, rank_tiles: int) -> bool:
    """Whether a persistent GEMM's loops over tiles and depth become one, so that a tile's first loads overlap the
    former's end. Loads of the rank-r term are then staged as well, which fits beside the rest for 16 ranks only; on
    sm_100 Triton does not compile it."""
    return arch == "sm_90" and block == 16 and rank_tiles == 1
