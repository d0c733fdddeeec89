"""Tile sizes of the ``quant`` kernels, as data: one entry per kernel and architecture.

Nothing is tuned at run time. Registers, spills and shared memory of every entry are kept in bounds by
``tests/test_compile_targets.py``; which of the entries that fit is fastest has to be measured on each GPU.
"""

from __future__ import annotations

# (rows of W, columns of W, depth of the reduction or 0, warps, stages)
Tile = tuple[int, int, int, int, int]

DEQUANTIZE: Tile = (4, 512, 0, 4, 1)

SCALE_GRAD: dict[str, Tile] = {
    "sm_80": (128, 128, 32, 8, 3),
    "sm_86": (128, 64, 32, 4, 3),
    "sm_90": (128, 128, 64, 8, 3),
    "sm_100": (128, 128, 64, 8, 3),
    "gfx942": (64, 64, 64, 4, 2),
}

SMALL_SCALE_GRAD: Tile = (64, 64, 32, 4, 2)
"""For fp32, whose full-precision dots run without tensor cores, and for loads that cannot be 16 bytes wide."""

INTERPRETER_TILE: Tile = (16, 64, 16, 4, 1)

GROUP_TILES = 8
"""Tiles of rows of W that run next to each other, so that they meet their columns of x in L2."""


def scale_grad(arch: str, small: bool) -> Tile:
    """``(BN, BK, BM, warps, stages)`` of the scale gradient; ``small``: fp32, or loads that cannot be wide."""
    if arch == "interpreter":
        return INTERPRETER_TILE
    return SMALL_SCALE_GRAD if small else SCALE_GRAD[arch]


def dequantize(arch: str) -> Tile:
    """``(BM, BK, 0, warps, stages)`` of the dequantization."""
    return INTERPRETER_TILE if arch == "interpreter" else DEQUANTIZE
