"""Deliberately broken pieces of the Triton kernels, each with the mistake it stands for; and a probe of the random map.

`test_interpret_lora.py` puts each broken piece in place of the real one and shows that its checks fail.
`test_compile_targets.py` compiles :func:`spilling_kernel` and shows that its limits catch it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowmem.triton_kernels.philox import load_key, words


@triton.jit
def words_kernel(out_ptr, seed_ptr, row_ptr, block_ptr, child, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """A probe, not broken: the four words ``[4, ROWS, BLOCKS]`` at given rows and blocks (int64, below 2**32)."""
    row = tl.load(row_ptr + tl.arange(0, ROWS)).to(tl.uint32)
    block = tl.load(block_ptr + tl.arange(0, BLOCKS)).to(tl.uint32)
    key0, key1 = load_key(seed_ptr)
    w0, w1, w2, w3 = words(key0, key1, row[:, None], block[None, :], child.to(tl.uint32))
    at = tl.arange(0, ROWS)[:, None] * BLOCKS + tl.arange(0, BLOCKS)[None, :]
    tl.store(out_ptr + at, w0.to(tl.int64))
    tl.store(out_ptr + ROWS * BLOCKS + at, w1.to(tl.int64))
    tl.store(out_ptr + 2 * ROWS * BLOCKS + at, w2.to(tl.int64))
    tl.store(out_ptr + 3 * ROWS * BLOCKS + at, w3.to(tl.int64))


@triton.jit
def threshold_parts_off_by_one(threshold):
    """Keeps where the half is greater than the threshold, not at least it."""
    c = 65535 - threshold
    low = ((c & 0x7FFF) | ((c >> 1) & 0x8000)) * 0x00010001
    top = tl.where((c & 0x18000) != 0, 0xFFFFFFFF, 0).to(tl.uint32)
    return low, top


@triton.jit
def threshold_parts_16_bits(threshold):
    """The threshold kept in 16 bits: 65536, drop all, becomes 0, keep all."""
    c = 65536 - (threshold & 0xFFFF)
    low = ((c & 0x7FFF) | ((c >> 1) & 0x8000)) * 0x00010001
    top = tl.where((c & 0x18000) != 0, 0xFFFFFFFF, 0).to(tl.uint32)
    return low, top


@triton.jit
def inside_byte_everything(block, columns):
    """Spare bits of the last mask word are left as drawn."""
    return (block * 0 + 255).to(tl.uint32)


@triton.jit
def load_tile_32_bits(ptr, rows, stride, ROWS, columns, COLS, EVEN: tl.constexpr):
    """The offset is computed in 32 bits."""
    ptrs = ptr + rows.to(tl.int32)[:, None] * stride + columns[None, :]
    return tl.load(ptrs, mask=(rows[:, None] < ROWS) & (columns[None, :] < COLS), other=0.0)


@triton.jit
def load_tile_no_tail(ptr, rows, stride, ROWS, columns, COLS, EVEN: tl.constexpr):
    """Columns beyond the view are read."""
    ptrs = ptr + rows[:, None] * stride + columns[None, :]
    return tl.load(ptrs, mask=rows[:, None] < ROWS, other=0.0)


@triton.jit
def load_mask_byte_inverted(mask_ptr, rows, stride_mask, ROWS, blocks, COLS, EVEN: tl.constexpr):
    """A wrong gradient: the dropped elements are the ones kept."""
    inside = (rows[:, None] < ROWS) & (blocks[None, :] * 8 < COLS)
    byte = tl.load(mask_ptr + rows[:, None] * stride_mask + blocks[None, :], mask=inside, other=0)
    return byte.to(tl.uint32) ^ 0xFF


@triton.jit
def reduce_kernel_short(parts_ptr, out_ptr, size, parts, scale, BLOCK: tl.constexpr):
    """The last part of a split sum is left out."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, parts - 1):
        acc += tl.load(parts_ptr + index, mask=index < size, other=0.0)
        parts_ptr += size
    tl.store(out_ptr + index, (acc * scale).to(out_ptr.dtype.element_ty), mask=index < size)


@triton.jit
def reduce_kernel_hole(parts_ptr, out_ptr, size, parts, scale, BLOCK: tl.constexpr):
    """The last element is never written."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, parts):
        acc += tl.load(parts_ptr + index, mask=index < size, other=0.0)
        parts_ptr += size
    tl.store(out_ptr + index, (acc * scale).to(out_ptr.dtype.element_ty), mask=index < size - 1)


@triton.jit
def add_rank_term_first_block(
    acc, s_ptr, b_ptr, M, N, R, stride_s, stride_b, m0, n0, dtype: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, RANK_TILES: tl.constexpr,
):  # fmt: skip
    """Only the first rank block is added."""
    row = m0.to(tl.int64) + tl.arange(0, BM)
    column = n0.to(tl.int64) + tl.arange(0, BN)
    rank = tl.arange(0, BR)
    in_s = (row[:, None] < M) & (rank[None, :] < R)
    in_b = (column[:, None] < N) & (rank[None, :] < R)
    s = tl.load(s_ptr + row[:, None] * stride_s + rank[None, :], mask=in_s, other=0.0)
    b = tl.load(b_ptr + column[:, None] * stride_b + rank[None, :], mask=in_b, other=0.0).to(dtype)
    return tl.dot(s, tl.trans(b), acc, input_precision=PRECISION)


@triton.jit
def reduce_in_program_order(part_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """A sum whose order is the programs' own: each adds its part to what is there (as an atomic add would)."""
    index = tl.arange(0, BLOCK)
    part = tl.load(part_ptr + tl.program_id(0) * size + index, mask=index < size, other=0.0)
    tl.store(out_ptr + index, tl.load(out_ptr + index, mask=index < size, other=0.0) + part, mask=index < size)


@triton.jit
def spilling_kernel(x_ptr, out_ptr, stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Holds far more values at once than a thread has registers."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLS)[None, :]
    x = tl.load(x_ptr + row * stride + column).to(tl.float32)
    total = tl.sum(tl.exp(x), 1)
    x = x / total[:, None]
    total = tl.sum(tl.exp(x), 0)
    tl.store(out_ptr + row * stride + column, x / total[None, :])
